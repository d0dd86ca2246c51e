"""Where Ceph's bindings are missing, and how their errors become ours: without a cluster."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nova_imagecache import BackendError, CacheConfig, ImageCache, NoSpaceError
from nova_imagecache.backends import BackendPaths, _rados
from nova_imagecache.backends._rados_errors import (
    LOSSES,
    BusyError,
    ExistsError,
    ForbiddenError,
    NotThereError,
    RadosError,
    RefusedError,
    SnapshotsError,
    UnfinishedError,
    error_of,
)
from nova_imagecache.backends.rbd import RbdBackend
from nova_imagecache.exceptions import BackendUnavailableError
from nova_imagecache.testing import FakeSource


@pytest.fixture
def backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RbdBackend]:
    """On a host where ``import rados`` fails."""
    _rados.bindings.cache_clear()
    monkeypatch.setitem(sys.modules, "rados", None)
    yield RbdBackend({}, BackendPaths(root=tmp_path / "root", disks_dir=tmp_path / "disks"))
    _rados.bindings.cache_clear()


def test_missing_bindings_name_their_packages(backend: RbdBackend, tmp_path: Path) -> None:
    """The first use says what to install; check says it as well, and fails with nothing else."""
    with pytest.raises(BackendError, match=r"cannot be imported.*python3-rados and python3-rbd") as caught:
        backend.find_base("img")
    assert caught.value.stage == "loading"
    assert not caught.value.retryable
    [problem] = [fact for fact in backend.check() if fact.problem]
    assert problem.name == "bindings"
    assert "python3-rados" in str(problem.problem)
    config = CacheConfig(root=tmp_path / "root", disks_dir=tmp_path / "disks", backend="rbd")
    with ImageCache(config, source=FakeSource({"img": b"x" * 512}), backend=backend) as cache:
        with pytest.raises(BackendError, match="python3-rbd"):
            cache.create_root_disk("img", "vm")
        assert not cache.check().ok


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.ENOENT, NotThereError),
        (errno.EEXIST, ExistsError),
        (errno.EBUSY, BusyError),
        (errno.EUCLEAN, UnfinishedError),
        (errno.ENOTEMPTY, SnapshotsError),
        (errno.EPERM, ForbiddenError),
        (errno.EACCES, ForbiddenError),
        (errno.EINVAL, RefusedError),
        (errno.ENOSPC, NoSpaceError),
        (errno.EDQUOT, NoSpaceError),
        (errno.ETIMEDOUT, BackendUnavailableError),
        (errno.ENOTCONN, BackendUnavailableError),
        (errno.EIO, RadosError),
        (None, RadosError),
    ],
)
def test_refusals_are_told_apart(code: int | None, kind: type[BackendError]) -> None:
    """Each of Ceph's errnos is an error of its own type, which says what was tried; only some may be tried again."""
    losses = LOSSES.count
    error = error_of(code, "open an image")
    assert type(error) is kind
    assert "open an image" in str(error)
    assert error.retryable == (kind is BackendUnavailableError)
    assert LOSSES.count == losses


def test_a_client_that_was_thrown_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may try again, and the process knows that a connection is lost."""
    monkeypatch.setattr(LOSSES, "count", 7)
    error = error_of(errno.ESHUTDOWN, "open an image")
    assert error.retryable
    assert "blocklisted" in str(error)
    assert LOSSES.count == 8

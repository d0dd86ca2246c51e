"""Images that Glance keeps in the same cluster, used where they lie: which, and what is told of the others."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import rbd as pool
from harness.images import raw
from nova_imagecache import (
    BackendError,
    BaseNotFoundError,
    CacheConfig,
    ImageCache,
    ImageRejectedError,
    InvalidRequestError,
)
from nova_imagecache.backends import _rbd_store
from nova_imagecache.backends._rbd_connection import Connection
from nova_imagecache.testing import FakeImage, FakeSource
from services.ceph import CephCluster
from services.ceph_bindings import bindings

pytestmark = pytest.mark.services

MIB = 2**20


@pytest.fixture(autouse=True)
def _empty(ceph: CephCluster) -> Iterator[None]:
    with pool.emptied(ceph, "vms", "images"):
        yield


def make_cache(ceph: CephCluster, directory: Path, images: dict[str, FakeImage], **changes: Any) -> ImageCache:
    config = CacheConfig(root=directory / "root", disks_dir=directory / "disks", backend="rbd")
    return ImageCache(config, source=FakeSource(images), backend=pool.make_backend(ceph, directory, **changes))


def in_glances_pool(ceph: CephCluster) -> tuple[str, str]:
    """Name and location of a raw image with the snapshot "snap", as Glance makes it."""
    _, rbd = bindings()
    name = f"glance-{os.urandom(4).hex()}"
    with ceph.pool("images", "glance") as ioctx:
        rbd.RBD().create(ioctx, name, 2 * MIB)
        with rbd.Image(ioctx, name) as image:
            image.write(b"glance", 0)
            image.create_snap("snap")
    return name, f"rbd://{ceph.fsid}/images/{name}/snap"


SECRETS = (
    "s3+https://ACCESS:SECRET@s3.example/bucket/img",
    "swift+http://tenant%3Auser:SECRET@auth.example/v2/container/img",
    "SECRET-without-a-scheme",
    "ACCESS:SECRET@nowhere",
)


def test_no_secret_of_another_store_is_told(
    ceph: CephCluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither a log nor an error has more of a foreign location than its kind; those of Ceph are told whole."""
    gone = f"rbd://{ceph.fsid}/images/gone/snap"
    images = {"img": FakeImage(data=raw("one").served, locations=(*SECRETS, gone))}
    with caplog.at_level(logging.DEBUG):
        with make_cache(ceph, tmp_path, images) as cache:
            assert cache.ensure_base("img").managed
            cache.remove_base("img")
        with (
            make_cache(ceph, tmp_path, images, when_not_clonable="refuse") as cache,
            pytest.raises(ImageRejectedError) as caught,
        ):
            cache.ensure_base("img")
    for text in (caplog.text, str(caught.value), repr(caught.value), repr(pickle.dumps(caught.value))):
        assert "SECRET" not in text
        assert "ACCESS" not in text
    for text in (caplog.text, str(caught.value)):
        assert "s3+https://..." in text
        assert f"{gone}: images/gone@snap is not there" in text


def test_a_place_that_cannot_be_opened_is_passed_by(ceph: CephCluster, tmp_path: Path) -> None:
    """Whatever is wrong with one image, the next place is tried; one that was adopted before is of no use then."""
    damaged, first = in_glances_pool(ceph)
    _, second = in_glances_pool(ceph)
    images = {
        "late": FakeImage(data=b"x", locations=(first, second)),
        "early": FakeImage(data=raw("one").served, locations=(first,)),
    }
    with make_cache(ceph, tmp_path, images) as cache:
        assert not cache.ensure_base("early").managed
        with pool.damaged(ceph, damaged, "images"):
            base = cache.ensure_base("late")
            assert (base.managed, base.location.name in second) == (False, True)  # type: ignore[union-attr]  # in RBD
            assert cache.ensure_base("early").managed


def test_an_adopted_base_is_not_removed(ceph: CephCluster, tmp_path: Path) -> None:
    """It is Glance's: the error says so, and the image is untouched."""
    name, location = in_glances_pool(ceph)
    with make_cache(ceph, tmp_path, {"img": FakeImage(data=b"x", locations=(location,))}) as cache:
        base = cache.ensure_base("img")
        words = r"the base is adopted, .*Delete the image in the image service"
        with pytest.raises(InvalidRequestError, match=words):
            cache.remove_base("img")
        backend = pool.make_backend(ceph, tmp_path)
        with pytest.raises(BackendError, match=words):
            backend.retire_base(base)
        backend.close()
        assert not cache.get_base("img").managed
        assert cache.cleanup(cache.plan_cleanup(max_idle=0)).removed == ()
    assert pool.names(ceph, "images") == [name]


def test_a_hit_asks_no_monitor(ceph: CephCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the monitors say of clones is asked once in a while, not for each disk."""
    _, location = in_glances_pool(ceph)
    with make_cache(ceph, tmp_path, {"img": FakeImage(data=b"x", locations=(location,))}) as cache:
        cache.create_root_disk("img", "vm")
        asked: list[str] = []
        true_command = Connection.command

        def command(self: Connection, prefix: str, **arguments: str) -> Any:
            asked.append(prefix)
            return true_command(self, prefix, **arguments)

        monkeypatch.setattr(Connection, "command", command)
        for number in range(3):
            cache.create_root_disk("img", f"vm-{number}")
        assert asked == []
        monkeypatch.setattr(_rbd_store, "_ASK_AGAIN", 0.0)
        cache.create_root_disk("img", "vm-late")
        assert set(asked) == {"osd get-require-min-compat-client"}


def test_a_disk_of_an_image_that_was_replaced(ceph: CephCluster, tmp_path: Path) -> None:
    """Another image under the adopted one's name is not what was adopted: no disk is made of it as such."""
    _, rbd = bindings()
    name, location = in_glances_pool(ceph)
    with make_cache(ceph, tmp_path, {"img": FakeImage(data=raw("one").served, locations=(location,))}) as cache:
        base = cache.ensure_base("img")
        with ceph.pool("images", "glance") as ioctx:
            with rbd.Image(ioctx, name) as image:
                image.remove_snap("snap")
            rbd.RBD().remove(ioctx, name)
            rbd.RBD().create(ioctx, name, 2 * MIB)
            with rbd.Image(ioctx, name) as image:
                image.create_snap("snap")
        backend = pool.make_backend(ceph, tmp_path)
        with pytest.raises(BaseNotFoundError, match="went away"):
            backend.create_root_disk(base, "vm", "disk", 2 * MIB)
        backend.close()
    assert pool.names(ceph) == []

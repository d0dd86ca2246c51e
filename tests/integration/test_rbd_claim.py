"""One import for a whole cluster: who has the claim brings the image in, the others wait."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from harness import rbd as pool
from harness.hosts import Host
from harness.images import qcow2, raw
from harness.waiting import until
from nova_imagecache import CacheConfig, ImageCache, ImageCorruptError
from nova_imagecache.backends import Claim, _rados_claims, _rbd_claim, _rbd_connection
from nova_imagecache.exceptions import BackendError, BackendUnavailableError
from nova_imagecache.testing import FakeImage, FakeSource
from services.ceph import CephCluster

pytestmark = pytest.mark.services

MIB = 2**20
SIZE = 8 * MIB

_HOST = """
import json, sys, threading
from pathlib import Path
from harness import rbd as pool
from harness.hosts import Host
from harness.images import qcow2
from nova_imagecache import CacheConfig, ImageCache
from nova_imagecache.backends import _rbd_claim
from nova_imagecache.testing import FakeImage, FakeSource
values, (seconds, stalled) = json.loads(sys.argv[1]), json.loads(sys.argv[2])
_rbd_claim.SECONDS, _rbd_claim.RENEWAL = seconds, seconds / 4
directory = Path(values["directory"])
config = CacheConfig(root=directory / "root", disks_dir=directory / "disks", backend="rbd")
image = qcow2("claimed", 8 * 2**20)
stall = threading.Event() if stalled else None
fake = FakeImage(data=image.served, disk_format="qcow2", stall=stall, stall_after=len(image.served) // 2)
class Source(FakeSource):
    def open(self, image, offset=0):
        print("fetching", flush=True)
        return super().open(image, offset)
source = Source({"img": fake})
with ImageCache(config, source=source, backend=pool.from_spec(sys.argv[1])) as cache:
    cache.recover()
    print("ready", flush=True)
    sys.stdin.readline()
    base = cache.ensure_base("img")
    print(json.dumps([base.image_id, base.record.fetched_at]), flush=True)
"""


@pytest.fixture(autouse=True)
def _empty(ceph: CephCluster) -> Iterator[None]:
    with pool.emptied(ceph):
        yield


def start(ceph: CephCluster, directory: Path, user: str, *, seconds: int, stalled: bool = False) -> Host:
    """Another host, which brings "img" in when it is told to; ``stalled``: half of it, and then waits for ever."""
    return Host(_HOST, pool.spec(ceph, directory, user=user), json.dumps([seconds, stalled]))


def _lines(host: Host) -> list[str]:
    """What the host says up to its answer."""
    said = [host.hear()]
    return [*said, host.hear()] if said == ["fetching"] else said


@pytest.fixture
def two_users(ceph: CephCluster) -> tuple[str, str]:
    """The client ids of two hosts."""
    ceph.create_user("nova2", mon="profile rbd", osd="profile rbd pool=vms, profile rbd-read-only pool=images")
    return "nova", "nova2"


def make_cache(ceph: CephCluster, directory: Path, source: FakeSource) -> ImageCache:
    config = CacheConfig(root=directory / "root", disks_dir=directory / "disks", backend="rbd")
    return ImageCache(config, source=source, backend=pool.make_backend(ceph, directory))


def test_two_hosts_download_once(ceph: CephCluster, two_users: tuple[str, str], tmp_path: Path) -> None:
    """Both ask at once, both get the base, and the image was fetched by one of them; nothing of a claim is left."""
    with contextlib.ExitStack() as life:
        hosts = [life.enter_context(start(ceph, tmp_path / user, user, seconds=20)) for user in two_users]
        assert [host.hear() for host in hosts] == ["ready", "ready"]
        for host in hosts:
            host.say("go")
        answers = [_lines(host) for host in hosts]
        assert [host.end() for host in hosts] == [0, 0]
    assert sorted(len(answer) for answer in answers) == [1, 2], "one fetched it"
    assert answers[0][-1] == answers[1][-1]
    assert pool.names(ceph) == ["base.img"]
    assert pool.claims(ceph) == []
    with pool.opened(ceph, "base.img") as image:
        assert image.read(0, SIZE) == qcow2("claimed", SIZE).guest


def test_the_holder_is_killed(ceph: CephCluster, two_users: tuple[str, str], tmp_path: Path) -> None:
    """The other waits while the holder lives, longer than a claim lasts, and goes on soon after its death."""
    seconds = 4
    with (
        start(ceph, tmp_path / "one", two_users[0], seconds=seconds, stalled=True) as holder,
        start(ceph, tmp_path / "two", two_users[1], seconds=seconds) as other,
    ):
        assert (holder.hear(), other.hear()) == ("ready", "ready")
        holder.say("go")
        assert holder.hear() == "fetching"
        other.say("go")
        time.sleep(seconds + 4)
        assert pool.claims(ceph) == ["claim.img"]
        assert "base.img" not in pool.names(ceph)
        assert other.process.poll() is None
        holder.kill()
        died = time.monotonic()
        assert other.hear() == "fetching"
        assert 0.5 < time.monotonic() - died < seconds + 6
        assert json.loads(other.hear())[0] == "img"
        assert other.end() == 0
    assert "base.img" in pool.names(ceph)
    assert pool.claims(ceph) == []


def test_the_claim_ends_with_the_import(ceph: CephCluster, tmp_path: Path) -> None:
    """After success and after failure it is free at once, its object is gone, and no thread is left."""
    sample = raw("ends", SIZE)
    wrong = FakeImage(data=sample.served, digest=FakeImage(data=b"other").info("other").digest)
    with make_cache(ceph, tmp_path, FakeSource({"good": sample.fake, "bad": wrong})) as cache:
        cache.ensure_base("good")
        with pytest.raises(ImageCorruptError):
            cache.ensure_base("bad")
    with closing(pool.make_backend(ceph, tmp_path)) as backend:
        for image_id in ("good", "bad"):
            claim = backend.claim_import(image_id)
            assert claim is not None
            claim.release()
            claim.release()
    assert pool.claims(ceph) == []
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("claim of")] == []


def test_a_claim_is_one_holders(ceph: CephCluster, tmp_path: Path) -> None:
    """None for whoever else asks, in this process too; other images are free."""
    with closing(pool.make_backend(ceph, tmp_path)) as backend:
        claim = backend.claim_import("img")
        assert claim is not None
        assert backend.claim_import("img") is None
        other = backend.claim_import("other")
        assert other is not None
        assert list(backend.iter_bases()) == []
        assert backend.recover().removed == ()
        for held in (claim, other):
            held.release()
        again = backend.claim_import("img")
        assert again is not None
        again.release()


def test_a_claim_ends_with_its_backend(ceph: CephCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Closing the backend gives back a claim that nobody released: no thread renews it over a new connection."""
    monkeypatch.setattr(_rbd_claim, "RENEWAL", 0.05)
    backend = pool.make_backend(ceph, tmp_path)
    claim = backend.claim_import("img")
    assert claim is not None
    backend.close()
    assert pool.claims(ceph) == []
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("claim of")] == []
    claim.release()
    with pytest.raises(BackendError, match="has been closed"):
        backend.find_base("img")
    assert not _rbd_connection._PROCESS.connections


def test_renewals_that_fail_are_logged(
    ceph: CephCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The claim ends, somebody else may take it, and its release by the one who lost it takes nothing from them."""
    monkeypatch.setattr(_rbd_claim, "SECONDS", 1)
    monkeypatch.setattr(_rbd_claim, "RENEWAL", 0.2)
    caplog.set_level(logging.INFO)
    true_claim = _rados_claims.claim

    def claim(*arguments: object, renewing: bool = False) -> None:
        if renewing:
            raise BackendUnavailableError("no answer")
        true_claim(*arguments)  # type: ignore[arg-type]  # handed on as they came

    monkeypatch.setattr(_rados_claims, "claim", claim)
    taken: list[Claim] = []
    with closing(pool.make_backend(ceph, tmp_path)) as backend:
        first = backend.claim_import("img")
        assert first is not None

        def take() -> bool:
            taken.extend(filter(None, [backend.claim_import("img")]))
            return bool(taken)

        until(take, "the claim to end")
        assert "the claim was not renewed" in caplog.text
        first.release()
        assert "the claim was not given back" in caplog.text
        assert pool.claims(ceph) == ["claim.img"]
        taken[0].release()
    assert pool.claims(ceph) == []


def test_a_full_pool_keeps_no_claim(ceph: CephCluster, tmp_path: Path) -> None:
    """A claim is given back where nothing can be written; one that cannot be taken stops no import."""
    ceph.create_pool("small")
    with closing(pool.make_backend(ceph, tmp_path, pool="small", user="admin", connect_timeout=2)) as backend:
        claim = backend.claim_import("img")
        assert claim is not None
        ceph.set_quota("small", 4096)
        with ceph.pool("small") as ioctx:
            ioctx.write_full("filler", b"x" * 8192)
        until(lambda: pool.is_full(ceph, "small"), "the pool to be full")
        claim.release()
        assert pool.claims(ceph, "small") == []
        assert type(backend.claim_import("img")) is Claim
    ceph.delete_pool("small")

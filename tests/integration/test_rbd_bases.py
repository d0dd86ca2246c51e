"""Bases and disks in a real pool: marks, users, features, writes, and what goes when."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from harness import rbd as pool
from harness.images import raw
from nova_imagecache import BaseNotFoundError, CacheConfig, ImageCache
from nova_imagecache.backends import _rados, _rados_claims, _rbd_adopted, _rbd_bases
from nova_imagecache.backends._rados_errors import NotThereError
from nova_imagecache.exceptions import BackendUnavailableError, BaseInUseError, DiskInUseError
from nova_imagecache.testing import FakeSource, FaultPlan
from services.ceph import CephCluster
from services.ceph_bindings import bindings

pytestmark = pytest.mark.services

MIB = 2**20


@pytest.fixture(autouse=True)
def _empty(ceph: CephCluster) -> Iterator[None]:
    with pool.emptied(ceph):
        yield


def make_cache(ceph: CephCluster, directory: Path, **changes: Any) -> ImageCache:
    images = {name: raw(name).fake for name in ("img", "other")}
    config = CacheConfig(root=directory / "root", disks_dir=directory / "disks", backend="rbd")
    return ImageCache(config, source=FakeSource(images), backend=pool.make_backend(ceph, directory, **changes))


def test_cleanup_removes_what_is_idle(ceph: CephCluster, tmp_path: Path) -> None:
    """A base without users goes after its idle time, with its snapshot and checksums; one with a disk stays."""
    with make_cache(ceph, tmp_path) as cache:
        cache.create_root_disk("img", "vm")
        cache.ensure_base("other")
        assert cache.cleanup().removed == ()
        assert cache.get_base("img").unused_since is None
        assert cache.get_base("other").unused_since is not None
        assert cache.cleanup(cache.plan_cleanup(max_idle=0)).removed == ("other",)
        assert pool.names(ceph) == ["base.img", "vm_disk"]
        cache.remove_root_disk("vm")
        assert cache.cleanup(cache.plan_cleanup(max_idle=0)).removed == ("img",)
    assert pool.names(ceph) == []


def test_a_base_is_told_by_its_header(ceph: CephCluster, tmp_path: Path) -> None:
    """However much metadata others have put before its own; without its snapshot it is none."""
    _, rbd = bindings()
    with make_cache(ceph, tmp_path) as cache:
        base = cache.ensure_base("img")
        with ceph.pool("vms") as ioctx, rbd.Image(ioctx, "base.img") as image:
            for number in range(150):
                image.metadata_set(f"another.{number:03d}", "\N{SNOWMAN}" * 100)
            assert cache.get_base("img").record == base.record
            assert [one.record for one in cache.bases()] == [base.record]
            image.remove_snap("base")
            assert list(cache.bases()) == []
            with pytest.raises(BaseNotFoundError):
                cache.get_base("img")


def test_what_is_found_is_listed(ceph: CephCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ceph lets a name lead to an image before it lists the image: in between, and after a death there, what is found
    is listed once and counted once, and recover finishes it."""
    restore = _rados.trash_restore

    def die(ioctx: Any, rbd_id: str, name: str) -> None:
        ioctx.write_full(f"rbd_id.{name}", struct.pack("<I", len(rbd_id)) + rbd_id.encode())
        raise BackendUnavailableError("died", backend="rbd")

    with make_cache(ceph, tmp_path) as cache:
        for make in (cache.ensure_base, lambda image_id: cache.create_root_disk(image_id, "vm")):
            monkeypatch.setattr(_rados, "trash_restore", die)
            with suppress(BackendUnavailableError):
                make("img")
            monkeypatch.setattr(_rados, "trash_restore", restore)
            assert [base.image_id for base in cache.bases()] == ["img"]
            assert [disk.disk_id for disk in cache.root_disks()] == ["vm"] * (make != cache.ensure_base)
            usage = cache.usage()
            assert (usage.trash, usage.staging) == (0, 0)
            assert cache.recover().failed == {}
            assert pool.leftovers(ceph) == []
        assert pool.names(ceph) == ["base.img", "vm_disk"]


def test_a_claim_of_the_dead_ends_by_itself(ceph: CephCluster, tmp_path: Path) -> None:
    """Who dies between claiming a base and taking its name away holds the next one up until the claim is over."""
    with make_cache(ceph, tmp_path) as cache:
        cache.ensure_base("img")
        with ceph.pool("vms") as ioctx:
            _rados_claims.claim_image(ioctx, _id(ioctx, "base.img"), "of the dead", 1, "taking the name away")
        start = time.monotonic()
        cache.remove_base("img")
        assert time.monotonic() - start > 1
    assert pool.names(ceph) == []


def test_a_clone_in_the_trash_is_a_user(ceph: CephCluster, tmp_path: Path) -> None:
    """A disk that somebody moved to the trash may come back: its base stays, and the user is told as such."""
    _, rbd = bindings()
    with make_cache(ceph, tmp_path) as cache:
        cache.create_root_disk("img", "vm")
        with ceph.pool("vms") as ioctx:
            [rbd_id] = [_id(ioctx, "vm_disk")]
            rbd.RBD().trash_move(ioctx, "vm_disk", 0)
            [user] = cache.users("img")
            assert (user.disk_id, user.name, user.detail) == (None, None, "vms/vm_disk (in the trash)")
            with pytest.raises(BaseInUseError):
                cache.remove_base("img")
            assert cache.cleanup(cache.plan_cleanup(max_idle=0)).removed == ()
            assert cache.recover().removed == ()
            rbd.RBD().trash_restore(ioctx, rbd_id, "vm_disk")
        assert [user.disk_id for user in cache.users("img")] == ["vm"]


def _id(ioctx: Any, name: str) -> str:
    with pool.reading(ioctx, name) as image:
        return str(image.id())


def test_a_disk_with_a_snapshot_of_others_stays(ceph: CephCluster, tmp_path: Path) -> None:
    """A backup's snapshot keeps the disk under its name, and the error says what is in the way."""
    with make_cache(ceph, tmp_path) as cache:
        cache.create_root_disk("img", "vm")
        with pool.opened(ceph, "vm_disk", read_only=False) as image:
            image.create_snap("backup")
        start = time.monotonic()
        with pytest.raises(DiskInUseError, match=r"snapshots: backup.* Remove its snapshots first"):
            cache.remove_root_disk("vm")
        assert time.monotonic() - start < 5, "a snapshot does not go away by waiting"
        assert pool.names(ceph) == ["base.img", "vm_disk"]
        with pool.opened(ceph, "vm_disk", read_only=False) as image:
            image.remove_snap("backup")
        cache.remove_root_disk("vm")
        assert pool.names(ceph) == ["base.img"]


def test_use_is_written_down_once_a_minute(ceph: CephCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Disks made meanwhile write nothing to their base; a mark of being unused is taken away at once."""
    assert _rbd_adopted.TOUCH_INTERVAL == 60
    with make_cache(ceph, tmp_path) as cache, FaultPlan([_rados]) as plan:
        base = cache.ensure_base("img")
        backend = pool.make_backend(ceph, tmp_path)
        rbd_id = backend.store.id_of("base.img")

        def marks() -> int:
            """Writes to the base's marks since the last call."""
            steps = plan.trace[marks_seen[0] :]
            marks_seen[0] = len(plan.trace)
            return sum(step.name == "rados.set_metadata" and rbd_id in step.targets for step in steps)

        marks_seen = [0]
        assert marks() == 1  # when it was published
        for number in range(3):
            cache.create_root_disk("img", f"vm-{number}")
        assert marks() == 0
        backend.mark_unused(base, time.time())
        assert marks() == 1
        cache.create_root_disk("img", "vm-3")
        assert marks() == 1
        assert cache.get_base("img").unused_since is None
        monkeypatch.setattr(_rbd_bases, "TOUCH_INTERVAL", 0.0)
        before = cache.get_base("img").last_used
        cache.create_root_disk("img", "vm-4")
        after = cache.get_base("img").last_used
        assert before is not None
        assert after is not None
        assert after > before
        backend.close()


def test_a_mark_asks_nobody_for_the_lock(ceph: CephCluster, tmp_path: Path) -> None:
    """A client that has the image's lock and stands still holds up no mark, and is not thrown out for one."""

    def lockers() -> object:
        with pool.opened(ceph, "base.img") as image:
            return image.list_lockers()

    with make_cache(ceph, tmp_path) as cache, closing(pool.make_backend(ceph, tmp_path)) as backend:
        base = cache.ensure_base("img")
        with pool.lock_taken(ceph, "base.img"):
            before = lockers()
            backend.mark_unused(base, 1_700_000_000.5)
            assert lockers() == before != []
            assert cache.get_base("img").unused_since == 1_700_000_000.5
            backend.mark_unused(base, None)
        assert cache.get_base("img").unused_since is None


def test_a_mark_makes_no_image(ceph: CephCluster, tmp_path: Path) -> None:
    """One on an image that is gone says so, and leaves no header that nobody would ever remove."""
    with closing(pool.make_backend(ceph, tmp_path)) as backend, ceph.pool("vms") as ioctx:
        for value in ("1", None):
            with pytest.raises(NotThereError):
                _rados.set_metadata(backend.store.io, "0123456789ab", {"key": value})
        assert [one.key for one in ioctx.list_objects() if one.key.startswith("rbd_header.")] == []


FEATURES = {
    ("layering",): 1,
    ("layering", "exclusive-lock"): 5,
    ("layering", "exclusive-lock", "object-map", "fast-diff"): 29,
}


@pytest.mark.parametrize("features", FEATURES)
def test_features_are_the_options(ceph: CephCluster, tmp_path: Path, features: tuple[str, ...]) -> None:
    """Bases and clones have the features that the option names; figures and bytes are right without an object map."""
    with make_cache(ceph, tmp_path, features=list(features)) as cache:
        cache.create_root_disk("img", "vm")
        for name in ("base.img", "vm_disk"):
            with pool.opened(ceph, name) as image:
                assert image.features() & 61 == FEATURES[features]
        assert 0 < cache.base_usage("img").allocated <= cache.get_base("img").record.size
        cache.verify_base("img")
        facts = {fact.name: fact.value for fact in cache.check().facts}
        assert facts["features"] == ", ".join(features)
    with make_cache(ceph, tmp_path / "default") as cache:
        cache.create_root_disk("img", "vm-2")
        with pool.opened(ceph, "vm-2_disk") as image:
            assert image.features() & 61 == 61


def test_one_base_of_two_that_are_named_alike(ceph: CephCluster, tmp_path: Path) -> None:
    """A disk is made of the base that was found, not of what has its name by now."""
    with make_cache(ceph, tmp_path) as cache:
        old = cache.ensure_base("img")
        cache.remove_base("img")
        new = cache.ensure_base("img")
        backend = pool.make_backend(ceph, tmp_path)
        with pytest.raises(BaseNotFoundError, match="went away"):
            backend.create_root_disk(old, "vm", "disk", 2 * MIB)
        assert pool.names(ceph) == ["base.img"]
        backend.create_root_disk(new, "vm", "disk", 2 * MIB)
        backend.close()


def test_no_step_too_many(ceph: CephCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk is cloned, resized, written down and published; the clone is opened once, and its base not to be found."""
    _, rbd = bindings()
    opened: list[str] = []

    class Counted(rbd.Image):  # type: ignore[misc, name-defined]  # the bindings have no types
        def __init__(self, ioctx: Any, name: str | None = None, *args: Any, **kwargs: Any) -> None:
            opened.append(str(name))
            super().__init__(ioctx, name, *args, **kwargs)

    with make_cache(ceph, tmp_path) as cache:
        cache.create_root_disk("img", "first")
        monkeypatch.setattr(rbd, "Image", Counted)
        with FaultPlan([_rados]) as plan:
            cache.create_root_disk("img", "vm", size=4 * MIB)
        assert [name.rpartition(".")[0] for name in opened] == ["staging.vm_disk"]
        monkeypatch.undo()
    steps = [step.name.removeprefix("rados.") for step in plan.trace]
    assert steps == ["clone", "resize", "set_metadata", "trash_move", "trash_restore"]

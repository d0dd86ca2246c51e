"""Attaching a disk of RBD to another base: whatever ends it half-way, what the guest wrote is kept."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import rbd as pool
from harness.images import raw
from harness.waiting import until
from nova_imagecache import (
    BackendUnavailableError,
    CacheConfig,
    CancelledError,
    DiskExistsError,
    DiskInUseError,
    ImageCache,
)
from nova_imagecache.backends import _rados, _rbd_attach, _rbd_look
from nova_imagecache.backends._rados_errors import StuckError
from nova_imagecache.backends._rbd_disks import RbdDisks
from nova_imagecache.backends._rbd_names import GOING
from nova_imagecache.backends.rbd import RbdBackend
from nova_imagecache.testing import FakeSource
from services.ceph import CephCluster
from services.ceph_bindings import bindings

pytestmark = pytest.mark.services

MIB = 2**20
WRITTEN = b"written by the guest"
LATER = b"written by it later!"
AT = 3 * MIB


@pytest.fixture(autouse=True)
def _empty(ceph: CephCluster) -> Iterator[None]:
    with pool.emptied(ceph):
        yield


@pytest.fixture
def backend(ceph: CephCluster, tmp_path: Path) -> RbdBackend:
    return pool.make_backend(ceph, tmp_path)


@pytest.fixture
def cache(ceph: CephCluster, backend: RbdBackend, tmp_path: Path) -> Iterator[ImageCache]:
    """A cache with a disk "vm" in which a guest wrote, and whose base was brought in anew."""
    with made_anew(ceph, tmp_path, backend) as made:
        yield made


@contextlib.contextmanager
def made_anew(ceph: CephCluster, directory: Path, backend: RbdBackend) -> Iterator[ImageCache]:
    with make_cache(directory, backend) as made:
        made.create_root_disk("img", "vm", size=4 * MIB)
        with pool.opened(ceph, "vm_disk", read_only=False) as image:
            image.write(WRITTEN, AT)
        backend.quarantine_base(made.get_base("img"))
        made.ensure_base("img")
        yield made


def make_cache(directory: Path, backend: RbdBackend) -> ImageCache:
    config = CacheConfig(root=directory / "root", disks_dir=directory / "disks", backend="rbd")
    return ImageCache(config, source=FakeSource({"img": raw("one").fake}), backend=backend)


def guests(ceph: CephCluster) -> bytes:
    """What is where the guest wrote."""
    with pool.opened(ceph, "vm_disk") as image:
        return bytes(image.read(AT, len(WRITTEN)))


def stop_before(monkeypatch: pytest.MonkeyPatch, step: str, number: int = 1) -> None:
    """The cluster is away from the ``number``-th of these steps on."""
    true, calls = getattr(_rados, step), []

    def away(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) >= number:
            raise BackendUnavailableError("Ceph does not answer in time")
        true(*arguments)

    monkeypatch.setattr(_rados, step, away)


def test_a_disk_without_its_name_is_there(
    ceph: CephCluster, cache: ImageCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An outage between the old disk's going and the new one's coming: no blank disk is made in its place."""
    with monkeypatch.context() as outage:
        stop_before(outage, "trash_restore")
        with pytest.raises(BackendUnavailableError):
            cache.attach_root_disk("img", "vm")
    assert "vm_disk" not in pool.names(ceph)
    with pytest.raises(DiskExistsError, match=r"has not ended.*Call recover"):
        cache.create_root_disk("img", "vm", size=4 * MIB)
    assert cache.create_root_disk("img", "vm-2", size=4 * MIB).disk_id == "vm-2"
    report = cache.recover()
    assert ("trash/vm_disk" in report.restored, report.failed) == (True, {})
    cache.create_root_disk("img", "vm", size=4 * MIB)
    assert guests(ceph) == WRITTEN
    cache.attach_root_disk("img", "vm")
    assert guests(ceph) == WRITTEN
    cache.recover()
    assert pool.names(ceph) == ["base.img", "vm-2_disk", "vm_disk"]


def test_writes_that_hang(
    ceph: CephCluster, cache: ImageCache, backend: RbdBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is as before at once, and what was made of the new one goes with recover, when that no longer hangs."""
    monkeypatch.setattr(type(backend.store), "longest", 1.0)
    with contextlib.ExitStack() as peer:
        true_write, taken = _rados.write, []

        def write(image: Any, *arguments: Any) -> None:
            [name] = [name for name in pool.names(ceph) if name.startswith("staging.vm_disk")]
            peer.enter_context(pool.lock_taken(ceph, name))
            taken.append(time.monotonic())
            true_write(image, *arguments)

        with monkeypatch.context() as hanging:
            hanging.setattr(_rados, "write", write)
            with pytest.raises(StuckError):
                cache.attach_root_disk("img", "vm")
        assert time.monotonic() - taken[0] < 4, "Ceph takes a client for dead after five seconds"
        assert guests(ceph) == WRITTEN
        assert cache.recover().failed == {}
        assert "vm_disk" in pool.names(ceph)
    until(lambda: not cache.recover().alive, "the new disk to be closed")
    cache.attach_root_disk("img", "vm")
    assert guests(ceph) == WRITTEN
    cache.recover()
    assert pool.names(ceph) == ["base.img", "vm_disk"]


def test_another_host_makes_the_disk_meanwhile(
    ceph: CephCluster, cache: ImageCache, backend: RbdBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the moment in which the disk has no name it is refused, and attaching comes to its end."""
    true_move, told = _rados.trash_move, []
    with make_cache(tmp_path / "other", pool.make_backend(ceph, tmp_path / "other")) as other:
        other.ensure_base("img")

        def move(ioctx: Any, name: str, delay: int) -> None:
            true_move(ioctx, name, delay)
            if name == "vm_disk":
                with pytest.raises(DiskExistsError) as refused:
                    other.create_root_disk("img", "vm", size=4 * MIB)
                told.append(refused.value.disk_id)

        monkeypatch.setattr(_rados, "trash_move", move)
        assert cache.attach_root_disk("img", "vm").reference == "clone"
    assert told == ["vm"]
    assert guests(ceph) == WRITTEN


@pytest.mark.parametrize("older", [False, True])
def test_a_disk_that_took_the_name_is_no_successor(
    ceph: CephCluster, cache: ImageCache, monkeypatch: pytest.MonkeyPatch, *, older: bool
) -> None:
    """Where another disk has the name all the same, recover keeps both and says what to do."""
    with monkeypatch.context() as outage:
        stop_before(outage, "trash_restore")
        with pytest.raises(BackendUnavailableError):
            cache.attach_root_disk("img", "vm")
    with monkeypatch.context() as unaware:
        unaware.setattr(RbdDisks, "_refuse_replaced", lambda *_: None)
        cache.create_root_disk("img", "vm", size=4 * MIB)
    if older:
        _forget_successor(ceph)
    for _ in range(2):
        report = cache.recover()
        assert report.failed.keys() == {"trash/vm_disk"}
        assert "rbd trash restore" in report.failed["trash/vm_disk"]
        assert "trash/vm_disk" in pool.names(ceph)
    cache.remove_root_disk("vm")
    assert cache.recover().restored == ("trash/vm_disk",)
    assert guests(ceph) == WRITTEN


@pytest.mark.parametrize("older", [False, True])
def test_a_disk_that_was_replaced_goes(
    ceph: CephCluster, cache: ImageCache, monkeypatch: pytest.MonkeyPatch, *, older: bool
) -> None:
    """Its successor has the name, and that alone lets recover remove it; an older version did not note which it is."""
    with monkeypatch.context() as outage:
        stop_before(outage, "trash_remove")
        with pytest.raises(BackendUnavailableError):
            cache.attach_root_disk("img", "vm")
    assert guests(ceph) == WRITTEN
    if older:
        _forget_successor(ceph)
    report = cache.recover()
    assert report.failed.keys() == ({"trash/vm_disk"} if older else set())
    assert ("trash/vm_disk" in report.removed) is not older
    assert ("trash/vm_disk" in pool.names(ceph)) is older
    assert guests(ceph) == WRITTEN


@pytest.mark.parametrize("step", ["trash_restore", "trash_remove"])
def test_a_disk_that_is_removed_does_not_come_back(
    ceph: CephCluster, cache: ImageCache, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """The old disk goes as well, whether attaching ended before the new one had the name or just before the end."""
    with monkeypatch.context() as outage:
        stop_before(outage, step)
        with pytest.raises(BackendUnavailableError):
            cache.attach_root_disk("img", "vm")
    cache.remove_root_disk("vm")
    assert [name for name in pool.names(ceph) if "vm" in name] == []
    assert cache.recover().restored == ()
    assert list(cache.root_disks()) == []
    cache.create_root_disk("img", "vm", size=4 * MIB)
    assert guests(ceph) == bytes(len(WRITTEN))


@pytest.mark.parametrize("step", ["trash_move", "trash_remove"])
@pytest.mark.parametrize("number", [1, 2])
def test_a_removal_of_both_that_ends_half_way(
    ceph: CephCluster, cache: ImageCache, monkeypatch: pytest.MonkeyPatch, step: str, number: int
) -> None:
    """Whatever is left then, recover gives no name to the disk of before."""
    with monkeypatch.context() as outage:
        stop_before(outage, "trash_remove")
        with pytest.raises(BackendUnavailableError):
            cache.attach_root_disk("img", "vm")
    with pool.opened(ceph, "vm_disk") as image:
        new = image.id()
    with monkeypatch.context() as outage:
        stop_before(outage, step, number)
        with contextlib.suppress(BackendUnavailableError):
            cache.remove_root_disk("vm")
    assert cache.recover().restored == ()
    if "vm_disk" in pool.names(ceph):
        with pool.opened(ceph, "vm_disk") as image:
            assert image.id() == new
    cache.remove_root_disk("vm")
    assert [name for name in pool.names(ceph) if "vm" in name] == []


@pytest.mark.parametrize("end", ["recover", "remove"])
def test_a_disk_that_was_replaced_twice(
    ceph: CephCluster, cache: ImageCache, backend: RbdBackend, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """Of the two that wait in the trash the later one is the disk; removing it takes both."""
    for step in ("trash_remove", "trash_restore"):
        with monkeypatch.context() as outage:
            stop_before(outage, step)
            with pytest.raises(BackendUnavailableError):
                cache.attach_root_disk("img", "vm")
        if step == "trash_remove":
            with pool.opened(ceph, "vm_disk", read_only=False) as image:
                image.write(LATER, AT)
            backend.quarantine_base(cache.get_base("img"))
            cache.ensure_base("img")
    assert pool.names(ceph).count("trash/vm_disk") == 2
    if end == "recover":
        report = cache.recover()
        assert (report.restored.count("trash/vm_disk"), report.failed) == (1, {})
        assert guests(ceph) == LATER
    cache.remove_root_disk("vm")
    cache.recover()
    assert pool.names(ceph) == ["base.img"]


def _forget_successor(ceph: CephCluster) -> None:
    _mark(ceph, lambda mark: json.dumps({key: value for key, value in json.loads(mark).items() if key != "by"}))


def _mark(ceph: CephCluster, change: Callable[[str], str]) -> None:
    """Change the mark of the disk that waits in the trash."""
    _, rbd = bindings()
    with ceph.pool("vms") as ioctx:
        [rbd_id] = [one["id"] for one in rbd.RBD().trash_list(ioctx) if one["name"] == "vm_disk"]
        with rbd.Image(ioctx, image_id=rbd_id) as image:
            image.metadata_set(GOING, change(image.metadata_get(GOING)))


def test_a_call_that_ends_while_it_copies(
    ceph: CephCluster, cache: ImageCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cancel or a deadline ends it between two pieces: nothing is left, and the disk is as it was."""
    cancel = threading.Event()
    true_read, reads = _rbd_look.read, []

    def read(image: Any, offset: int, length: int) -> bytes:
        reads.append(offset)
        cancel.set()
        return true_read(image, offset, length)

    with pool.opened(ceph, "vm_disk") as image:
        before = image.id()
    monkeypatch.setattr(_rbd_attach, "_PIECE", MIB)
    with monkeypatch.context() as watched:
        watched.setattr(_rbd_look, "read", read)
        with pytest.raises(CancelledError):
            cache.attach_root_disk("img", "vm", cancel=cancel)
    assert len(reads) == 2, "one piece of each"
    with pool.opened(ceph, "vm_disk") as image:
        assert image.id() == before
    assert guests(ceph) == WRITTEN
    assert [name for name in pool.names(ceph) if "staging." in name] == []


def test_a_mark_that_cannot_be_read(
    ceph: CephCluster, cache: ImageCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What is marked like that keeps no disk of its name from being made or removed; it stays, and recover says so."""
    with monkeypatch.context() as outage:
        stop_before(outage, "trash_restore")
        with pytest.raises(BackendUnavailableError):
            cache.attach_root_disk("img", "vm")
    _mark(ceph, lambda _: "{")
    cache.create_root_disk("img", "vm", size=4 * MIB)
    assert "cannot be read" in caplog.text
    cache.remove_root_disk("vm")
    assert [name for name in pool.names(ceph) if "vm" in name] == ["trash/vm_disk"]
    assert cache.recover().failed.keys() == {"trash/vm_disk"}


def test_no_guest_starts_while_it_copies(ceph: CephCluster, cache: ImageCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk has no name then: what a guest wrote to it after it was read would be lost."""
    true_copy, tries = _rbd_attach._copy_differences, []

    def copy(*arguments: Any) -> None:
        true_copy(*arguments)
        try:
            with pool.opened(ceph, "vm_disk", read_only=False) as image:
                image.write(LATER, AT)
            tries.append("started")
        except bindings()[1].ImageNotFound:
            tries.append("refused")

    monkeypatch.setattr(_rbd_attach, "_copy_differences", copy)
    cache.attach_root_disk("img", "vm")
    assert guests(ceph) == (LATER if tries == ["started"] else WRITTEN)
    assert tries == ["refused"]


@pytest.mark.parametrize("features", [["layering"], ["layering", "exclusive-lock"]])
@pytest.mark.parametrize("moment", ["trash_move", "copy"])
def test_a_guest_that_starts_just_before_it_copies(
    ceph: CephCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, features: list[str], moment: str
) -> None:
    """It found the name, and has the disk open when that is gone: the disk is the old one again, with its writes."""
    _, rbd = bindings()
    backend = pool.make_backend(ceph, tmp_path, features=features)
    with contextlib.ExitStack() as guest, made_anew(ceph, tmp_path, backend) as cache:
        io = guest.enter_context(ceph.pool("vms"))
        before = backend.store.id_of("vm_disk")
        true_move, true_copy, images = _rados.trash_move, _rbd_attach._copy_differences, []

        def move(ioctx: Any, name: str, delay: int) -> None:
            if name == "vm_disk" and moment == "trash_move":
                images.append(guest.enter_context(rbd.Image(io, "vm_disk")))
            true_move(ioctx, name, delay)

        def copy(*arguments: Any) -> None:
            true_copy(*arguments)
            if moment == "copy":  # whoever knew the id already
                images.append(guest.enter_context(rbd.Image(io, image_id=before)))
                images[0].write(LATER, AT)

        monkeypatch.setattr(_rados, "trash_move", move)
        monkeypatch.setattr(_rbd_attach, "_copy_differences", copy)
        with pytest.raises(DiskInUseError):
            cache.attach_root_disk("img", "vm")
        monkeypatch.undo()
        [image] = images
        image.write(LATER, AT)
        image.close()
        assert backend.store.id_of("vm_disk") == before
        assert guests(ceph) == LATER
        assert [name for name in pool.names(ceph) if "vm" in name] == ["vm_disk"]
        cache.attach_root_disk("img", "vm")
        assert guests(ceph) == LATER


def test_a_disk_that_another_host_grows_just_before(
    ceph: CephCluster, cache: ImageCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps its size."""
    true_move = _rados.trash_move

    def move(ioctx: Any, name: str, delay: int) -> None:
        if name == "vm_disk":
            with pool.opened(ceph, name, read_only=False) as image:
                image.resize(8 * MIB)
        true_move(ioctx, name, delay)

    monkeypatch.setattr(_rados, "trash_move", move)
    assert cache.attach_root_disk("img", "vm").virtual_size == 8 * MIB
    assert guests(ceph) == WRITTEN


def test_another_host_leaves_alone_what_is_being_attached(
    ceph: CephCluster, cache: ImageCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it copies recover gives no name back, and the disk is in use for whoever removes it."""
    true_copy, told = _rbd_attach._copy_differences, []
    monkeypatch.setattr(RbdBackend, "busy_patience", 0.2)
    with make_cache(tmp_path / "other", pool.make_backend(ceph, tmp_path / "other")) as other:

        def copy(*arguments: Any) -> None:
            told.append(other.recover())
            with pytest.raises(DiskInUseError, match="being attached"):
                other.remove_root_disk("vm")
            true_copy(*arguments)

        monkeypatch.setattr(_rbd_attach, "_copy_differences", copy)
        cache.attach_root_disk("img", "vm")
    assert "trash/vm_disk" in told[0].alive
    assert (told[0].restored, told[0].failed) == ((), {})
    assert guests(ceph) == WRITTEN


def test_an_old_disk_that_is_still_open_at_the_end(
    ceph: CephCluster, cache: ImageCache, backend: RbdBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is attached by then; recover removes what it was."""
    monkeypatch.setattr(backend.store, "patience", 0.2)
    true_remove = _rados.trash_remove

    def remove(ioctx: Any, rbd_id: str) -> None:
        with _rados.changing(ioctx, image_id=rbd_id):
            true_remove(ioctx, rbd_id)

    with monkeypatch.context() as patched:
        patched.setattr(_rados, "trash_remove", remove)
        with pytest.raises(DiskInUseError, match=r"is attached.*recover"):
            cache.attach_root_disk("img", "vm")
    assert guests(ceph) == WRITTEN
    assert "trash/vm_disk" in cache.recover().removed
    assert cache.attach_root_disk("img", "vm").reference == "clone"


def test_a_disk_with_a_snapshot_of_others_is_left_alone(ceph: CephCluster, cache: ImageCache) -> None:
    """The new clone would not have it: a backup would be lost."""
    with pool.opened(ceph, "vm_disk", read_only=False) as image:
        image.create_snap("backup")
    with pytest.raises(DiskInUseError, match=r"snapshots: backup.* Remove its snapshots first"):
        cache.attach_root_disk("img", "vm")
    with pool.opened(ceph, "vm_disk", read_only=False) as image:
        assert [snapshot["name"] for snapshot in image.list_snaps()] == ["backup"]
        image.remove_snap("backup")
    assert [name for name in pool.names(ceph) if name.startswith("staging.")] == []
    cache.attach_root_disk("img", "vm")
    assert guests(ceph) == WRITTEN

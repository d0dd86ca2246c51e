"""Copies of disks that name their base by its path: none loses the base by what becomes of another, and each ends."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness import images, places
from harness.children import run_to_death
from harness.images import MIB, qemu_img
from harness.rig import Rig
from harness.upkeep import names
from nova_imagecache import DiskExistsError, ImageCache
from nova_imagecache.backends import _seen
from nova_imagecache.backends._references import made_at
from nova_imagecache.backends._seen import seen
from nova_imagecache.testing import FaultPlan

SIZE = 4 * MIB


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with places.quick(tmp_path) as directory:
        sample = images.raw("referred to")
        yield Rig(directory, "path", {"img": sample, "twin": sample})


def _users(cache: ImageCache) -> list[tuple[str, bool]]:
    return sorted((str(user.disk_id), user.certain) for user in cache.users("img"))


def _references(rig: Rig) -> list[str]:
    return sorted(path.name for path in rig.root.glob("users/*/*"))


def _reads(disk: Path) -> None:
    found = json.loads(qemu_img("info", "--output=json", "--backing-chain", "-f", "qcow2", str(disk)).stdout)
    assert len(found) > 1


def _stays(rig: Rig, disk: Path) -> None:
    """Neither a sweep nor a pass takes the base that this disk reads."""
    with rig.cache() as cache:
        assert not cache.recover().failed
        cache.cleanup(cache.plan_cleanup(max_idle=0))
        assert names(cache) == {"img"}
    _reads(disk)


def _nothing_is_left(rig: Rig) -> None:
    with rig.cache() as cache:
        assert cache.users("img") == []
        cache.cleanup(cache.plan_cleanup(max_idle=0))
        assert names(cache) == set()
    assert _references(rig) == []


def _resize(rig: Rig) -> None:
    """As Nova does on one host: the directory has another name, and the disk is copied back."""
    (rig.disks / "vm").rename(rig.disks / "vm_resize")
    shutil.copytree(rig.disks / "vm_resize", rig.disks / "vm")


def _other(rig: Rig) -> Rig:
    """Another directory of disks over the same root."""
    other = Rig(rig.dir, rig.kind, rig.samples)
    other.disks = rig.dir / "other-disks"
    return other


# --- one host


def test_a_resize_that_is_reverted(rig: Rig) -> None:
    """The copy is attached and goes; the original comes back under its name, is attached, and goes at last."""
    with rig.cache() as cache:
        cache.create_root_disk("img", "vm", size=SIZE)
        _resize(rig)
        cache.attach_root_disk("img", "vm")
        assert _users(cache) == [("vm", True), ("vm_resize", True)]
        cache.remove_root_disk("vm")
        (rig.disks / "vm_resize").rename(rig.disks / "vm")
    _stays(rig, rig.disks / "vm" / "disk")
    with rig.cache() as cache:
        cache.attach_root_disk("img", "vm")
        assert _users(cache) == [("vm", True)]
        cache.remove_root_disk("vm")
    _nothing_is_left(rig)


def test_a_resize_that_is_confirmed(rig: Rig) -> None:
    """The original goes, by its record or with its directory; the attached copy stays, and goes with its own."""
    for deleted in (False, True):
        with rig.cache() as cache:
            cache.create_root_disk("img", "vm", size=SIZE)
            _resize(rig)
            cache.attach_root_disk("img", "vm")
            if deleted:
                shutil.rmtree(rig.disks / "vm_resize")
            cache.remove_root_disk("vm_resize")
            assert _users(cache) == [("vm", True)]
        _stays(rig, rig.disks / "vm" / "disk")
        with rig.cache() as cache:
            cache.remove_root_disk("vm")
        _nothing_is_left(rig)


def _remove(cache: ImageCache) -> None:
    cache.remove_root_disk("vm")


def _flatten(cache: ImageCache) -> None:
    cache.flatten_root_disk("vm")


def _flatten_alone(cache: ImageCache) -> None:
    """As a blockPull of libvirt does, which a sweep finds."""
    (disk,) = [disk for disk in cache.root_disks() if disk.disk_id == "vm"]
    path = disk.location.path  # type: ignore[union-attr]  # a file
    qemu_img("convert", "-O", "qcow2", str(path), f"{path}.whole")
    Path(f"{path}.whole").replace(path)
    cache.recover()


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("end", [_remove, _flatten, _flatten_alone])
def test_what_ends_a_copy_in_its_originals_place(
    rig: Rig, end: Callable[[ImageCache], None], *, attached: bool
) -> None:
    """The original, under another name now, keeps a reference, which it ends."""
    with rig.cache() as cache:
        cache.create_root_disk("img", "vm", size=SIZE)
        _resize(rig)
        if attached:
            cache.attach_root_disk("img", "vm")
        end(cache)
        assert _users(cache) == [("vm_resize", True)]
    _stays(rig, rig.disks / "vm_resize" / "disk")
    with rig.cache() as cache:
        cache.remove_root_disk("vm_resize")
        cache.remove_root_disk("vm")
    _nothing_is_left(rig)


def test_an_original_that_moves_after_its_copy_was_attached(rig: Rig) -> None:
    """No sweep takes its reference for a second one of the copy."""
    with rig.cache() as cache:
        cache.create_root_disk("img", "vm", size=SIZE)
        shutil.copytree(rig.disks / "vm", rig.disks / "copy")
        cache.attach_root_disk("img", "copy")
        (rig.disks / "vm").rename(rig.disks / "vm_resize")
        cache.recover()
        assert _users(cache) == [("copy", True), ("vm", False)]
        cache.remove_root_disk("copy")
        (rig.disks / "vm_resize").rename(rig.disks / "vm")
    _stays(rig, rig.disks / "vm" / "disk")
    with rig.cache() as cache:
        cache.remove_root_disk("vm")
    _nothing_is_left(rig)


def test_an_original_that_moved_before_its_copy_is_attached(rig: Rig) -> None:
    """The copy does not take its reference over."""
    with rig.cache() as cache:
        cache.create_root_disk("img", "vm", size=SIZE)
        shutil.copytree(rig.disks / "vm", rig.disks / "copy")
        (rig.disks / "vm").rename(rig.disks / "vm_resize")
        cache.attach_root_disk("img", "copy")
        cache.remove_root_disk("copy")
        assert len(cache.users("img")) == 1
    _stays(rig, rig.disks / "vm_resize" / "disk")
    with rig.cache() as cache:
        cache.remove_root_disk("vm_resize")
    _nothing_is_left(rig)


def test_a_copy_that_nobody_attached_outlives_its_original(rig: Rig) -> None:
    """Its original's reference is its own from then on, also under another name in the same directory."""
    with rig.cache() as cache:
        cache.create_root_disk("img", "vm", size=SIZE)
        for end in ("", ".json"):
            shutil.copy(rig.disks / "vm" / f"disk{end}", rig.disks / "vm" / f"disk2{end}")
        shutil.copytree(rig.disks / "vm", rig.disks / "copy")
        cache.remove_root_disk("vm")
        cache.remove_root_disk("vm", name="disk2")
        cache.remove_root_disk("copy", name="disk2")
        assert _users(cache) == [("copy", True)]
    _stays(rig, rig.disks / "copy" / "disk")
    with rig.cache() as cache:
        cache.remove_root_disk("copy")
    _nothing_is_left(rig)


def test_copies_with_references_of_one_moment(rig: Rig) -> None:
    """As earlier releases left them: each is one disk's, and a sweep of a moved original takes none that is needed."""
    with rig.cache() as cache:
        cache.create_root_disk("img", "vm", size=SIZE)
        shutil.copytree(rig.disks / "vm", rig.disks / "copy")
        users = rig.root / "users" / "img"
        values = json.loads((users / "vm.disk.json").read_bytes())
        values |= {"disk_id": "copy", "path": str(rig.disks / "copy" / "disk")}
        (users / "copy.disk.json").write_text(json.dumps(values))
        (rig.disks / "vm").rename(rig.disks / "vm_resize")
        assert cache.recover().removed == ()
        cache.remove_root_disk("copy")
    _stays(rig, rig.disks / "vm_resize" / "disk")
    with rig.cache() as cache:
        cache.remove_root_disk("vm_resize")
        cache.recover()
    _nothing_is_left(rig)


def test_a_death_while_a_copy_is_told_apart(rig: Rig) -> None:
    """Wherever it comes: both disks keep the base, the same call works, and nothing is left of either in the end."""
    with rig.cache() as cache:
        cache.create_root_disk("img", "vm", size=SIZE)
        _resize(rig)
    start = rig.dir / "start"
    shutil.copytree(rig.root, start / "root")
    shutil.copytree(rig.disks, start / "disks")

    def again() -> None:
        for name in ("root", "disks"):
            shutil.rmtree(rig.dir / name)
            shutil.copytree(start / name, rig.dir / name)

    def attach(plan: FaultPlan) -> None:
        with plan:
            rig.cache().attach_root_disk("img", "vm")

    watched = FaultPlan()
    attach(watched)
    steps = [step.index for step in watched.trace]
    assert len(steps) > 5
    for step in steps:
        for recovered in (False, True):
            again()
            plan = FaultPlan().kill(step)
            assert run_to_death(functools.partial(attach, plan), f"step {step}")
            if recovered:
                _stays(rig, rig.disks / "vm" / "disk")
                _stays(rig, rig.disks / "vm_resize" / "disk")
            with rig.cache() as cache:
                cache.attach_root_disk("img", "vm")
                cache.remove_root_disk("vm_resize")
                assert ("vm", True) in _users(cache), step
                cache.recover()
                cache.remove_root_disk("vm")
                cache.recover()
            _nothing_is_left(rig)


# --- a snapshot beside the disk


def _snapshot(rig: Rig, disk_id: str) -> Path:
    path = rig.disks / disk_id / "snap1"
    base = str(rig.root / "bases" / "img" / "disk")
    qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", str(path))
    return path


@pytest.mark.parametrize("moved", [False, True])
def test_attaching_by_link_keeps_what_a_snapshot_reads_through(rig: Rig, *, moved: bool) -> None:
    """The disk stays tied by the path, and goes when the snapshot has gone."""
    with rig.cache() as cache:
        cache.create_root_disk("img", "vm", size=SIZE)
    snapshot = _snapshot(rig, "vm")
    if moved:
        (rig.disks / "vm").rename(rig.disks / "vm2")
        snapshot = rig.disks / "vm2" / "snap1"
    disk_id = snapshot.parent.name
    linking = Rig(rig.dir, "link", rig.samples)
    with linking.cache() as cache:
        assert cache.attach_root_disk("img", disk_id).reference == "path"
        with pytest.raises(DiskExistsError, match="snap1"):
            cache.remove_root_disk(disk_id)
        with pytest.raises(DiskExistsError, match="snap1"):
            cache.attach_root_disk("twin", disk_id)
    _stays(linking, snapshot)
    snapshot.unlink()
    with linking.cache() as cache:
        cache.remove_root_disk(disk_id)
    _nothing_is_left(linking)


# --- records that cannot be read


@pytest.mark.parametrize("damage", ["{", '{"version": 99}'])
def test_a_moved_disk_whose_record_cannot_be_read(rig: Rig, damage: str) -> None:
    """Damaged, or of a newer release: it may be the disk that is said to be gone, and keeps its reference."""
    with rig.cache() as cache:
        cache.create_root_disk("img", "vm", size=SIZE)
        (rig.disks / "vm").rename(rig.disks / "vm_resize")
        record = rig.disks / "vm_resize" / "disk.json"
        whole = record.read_bytes()
        record.write_text(damage)
        for _again in range(2):
            cache.remove_root_disk("vm")
        assert len(_references(rig)) == 1
    _stays(rig, rig.disks / "vm_resize" / "disk")
    record.write_bytes(whole)
    with rig.cache() as cache:
        cache.remove_root_disk("vm_resize")
    _nothing_is_left(rig)


def test_a_disk_that_is_removed_beside_a_record_that_cannot_be_read(rig: Rig) -> None:
    """It may be its copy: the reference stays until the record is whole again or the disk gone, and a sweep ends it."""
    for gone in (False, True):
        with rig.cache() as cache:
            for disk_id in ("vm", "other"):
                cache.create_root_disk("img", disk_id, size=SIZE)
            record = rig.disks / "other" / "disk.json"
            whole = record.read_bytes()
            record.write_bytes(b"{")
            cache.remove_root_disk("vm")
            cache.recover()
            assert not (rig.disks / "vm").exists()
            assert _users(cache) == [("other", True), ("vm", False)]
            # a disk of that name meanwhile is another one, and takes nothing along
            cache.create_root_disk("img", "vm", size=SIZE)
            cache.remove_root_disk("vm")
            if gone:
                shutil.rmtree(rig.disks / "other")
            else:
                record.write_bytes(whole)
            cache.recover()
            cache.remove_root_disk("vm")
            assert [disk_id for disk_id, _certain in _users(cache)] == ["other"]
            cache.remove_root_disk("other")
        _nothing_is_left(rig)


def test_records_of_others_are_no_doubt(rig: Rig) -> None:
    """What is no record of ours beside a file that names no base stands in nobody's way."""
    with rig.cache() as cache:
        cache.create_root_disk("img", "vm", size=SIZE)
        (rig.disks / "tool").mkdir()
        for name in ("settings", "settings.json", "alone.json"):
            (rig.disks / "tool" / name).write_text("{}")
        (rig.disks / "tool" / "directory.json").mkdir()
        (rig.disks / "dangling").symlink_to("nowhere")
        cache.remove_root_disk("vm")
    _nothing_is_left(rig)


def test_directories_that_are_renamed_while_they_are_read(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is between two names is looked for again."""
    with rig.cache() as cache:
        cache.create_root_disk("img", "vm", size=SIZE)
    own = made_at(rig.root / "users" / "img" / "vm.disk.json")
    assert own is not None
    named = _seen._named

    def listing(path: Path) -> list[tuple[str, int]]:
        found = named(path)
        if path == rig.disks and (rig.disks / "vm").exists():
            (rig.disks / "vm").rename(rig.disks / "vm_resize")
        return found

    monkeypatch.setattr(_seen, "_named", listing)
    assert [path for path, _record in seen([rig.disks], own, None)] == [rig.disks / "vm_resize" / "disk"]


# --- two directories of disks over one root


@pytest.mark.parametrize("renamed", [False, True])
@pytest.mark.parametrize("attached", [False, True])
def test_a_disk_that_is_copied_to_another_directory_of_disks(rig: Rig, *, renamed: bool, attached: bool) -> None:
    """Whatever is removed first, the other keeps the base."""
    other = _other(rig)
    at_first = "vm_resize" if renamed else "vm"
    for removed, kept in ((rig, other), (other, rig)):
        with rig.cache() as here, other.cache() as there:
            here.create_root_disk("img", "vm", size=SIZE)
            if renamed:
                (rig.disks / "vm").rename(rig.disks / "vm_resize")
            shutil.copytree(rig.disks / at_first, other.disks / "vm")
            if attached:
                there.attach_root_disk("img", "vm")
                assert len(there.users("img")) == 2
            if removed is rig:
                here.remove_root_disk(at_first)
            else:
                there.remove_root_disk("vm")
            disk = kept.disks / (at_first if kept is rig else "vm") / "disk"
            if not (removed is rig and not attached):  # else nothing tells that there is another directory
                _stays(kept, disk)
            (here if kept is rig else there).remove_root_disk(disk.parent.name)
        _nothing_is_left(rig)


def test_a_disk_of_that_name_in_another_directory_of_disks(rig: Rig) -> None:
    """Its reference is not of the disk whose directory the driver deleted."""
    other = _other(rig)
    with rig.cache() as here, other.cache() as there:
        here.create_root_disk("img", "vm", size=SIZE)
        shutil.copytree(rig.disks / "vm", other.disks / "vm")
        there.attach_root_disk("img", "vm")
        shutil.rmtree(rig.disks / "vm")
        here.remove_root_disk("vm")
        assert [(user.detail, user.certain) for user in here.users("img")] == [(str(other.disks / "vm" / "disk"), True)]
        _stays(other, other.disks / "vm" / "disk")
        there.remove_root_disk("vm")
    _nothing_is_left(rig)

"""Where a path reference ends: with its disk, wherever the disk's directory went, and with nothing else's."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import InChild
from harness import images, places
from harness.children import run_to_death
from harness.images import MIB, qemu_img
from harness.rig import Rig
from harness.upkeep import DAY, Clock, names, open_cache
from nova_imagecache import BaseInUseError, DiskExistsError
from nova_imagecache.backends._references import host_record
from nova_imagecache.testing import FaultPlan

SIZE = 4 * MIB


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with places.quick(tmp_path) as directory:
        yield Rig(directory, "path", {"img": images.raw("referred to"), "other": images.raw("another")})


def _references(rig: Rig) -> list[str]:
    return sorted(path.name for path in rig.root.glob("users/*/*"))


def _passes_for_400_days(rig: Rig) -> set[str]:
    """What is left after a pass a day for more than a year."""
    clock = Clock()
    with open_cache(rig, clock) as cache:
        for _day in range(0, 400, 20):
            assert not cache.cleanup().failed
            clock.move(20 * DAY)
        return names(cache)


# --- it ends


def test_a_confirmed_resize_leaves_nothing(rig: Rig) -> None:
    """The directory is renamed, the disk removed under its new id: the reference goes, and the base in its time."""
    with rig.cache() as cache:
        cache.create_root_disk("img", "vm", size=SIZE)
        (rig.disks / "vm").rename(rig.disks / "vm_resize")
        with pytest.raises(BaseInUseError):
            cache.remove_base("img")
        cache.remove_root_disk("vm_resize")
        assert cache.users("img") == []
        cache.remove_root_disk("vm")
    assert _references(rig) == []
    assert _passes_for_400_days(rig) == set()


def test_a_removal_by_hand_after_a_confirmed_resize(rig: Rig) -> None:
    """Nobody stands in its way."""
    with rig.cache() as cache:
        cache.create_root_disk("img", "vm", size=SIZE)
        (rig.disks / "vm").rename(rig.disks / "vm_resize")
        cache.remove_root_disk("vm_resize")
        cache.remove_base("img")
        assert names(cache) == set()


def test_a_directory_that_the_driver_deleted_itself(rig: Rig) -> None:
    """The disk is said to be removed after its directory went: its reference goes all the same."""
    with rig.cache() as cache:
        for name in ("disk", "disk.rescue"):
            cache.create_root_disk("img", "vm", name=name, size=SIZE)
        cache.create_root_disk("img", "vm-2", size=SIZE)
        shutil.rmtree(rig.disks / "vm")
        cache.remove_root_disk("vm")
        assert {(user.disk_id, user.name) for user in cache.users("img")} == {
            ("vm", "disk.rescue"),
            ("vm-2", "disk"),
        }
        cache.remove_root_disk("vm", name="disk.rescue")
        assert [user.disk_id for user in cache.users("img")] == ["vm-2"]
        cache.remove_root_disk("vm-2")
        assert not (rig.disks / "vm").exists(), "nothing is left of looking"
    assert _references(rig) == []
    assert _passes_for_400_days(rig) == set()


def test_a_directory_of_others_among_the_disks(open_path: Path, in_child: InChild) -> None:
    """As lost+found is, on a filesystem of its own: disks are listed, a base says who uses it, references end."""
    open_path.chmod(0o777)
    rig = Rig(open_path, "path", {"img": images.raw("referred to")})

    def make() -> None:
        rig.cache().create_root_disk("img", "vm", size=SIZE)

    in_child(make, unprivileged=True)
    (rig.disks / "lost+found").mkdir()
    (rig.disks / "lost+found").chmod(0o700)

    def use() -> None:
        cache = rig.cache()
        assert [disk.disk_id for disk in cache.root_disks()] == ["vm"]
        assert [user.disk_id for user in cache.users("img")] == ["vm"]
        with pytest.raises(BaseInUseError, match="vm/disk"):
            cache.remove_base("img")
        shutil.rmtree(rig.disks / "vm")
        cache.remove_root_disk("vm")
        assert cache.users("img") == []

    in_child(use, unprivileged=True)
    assert _references(rig) == []


def test_a_directory_of_ours_that_cannot_be_listed_hides_no_other(open_path: Path, in_child: InChild) -> None:
    """The other disks are listed; what lies in it is in doubt, and a reference that may be of it stays."""
    open_path.chmod(0o777)
    rig = Rig(open_path, "path", {"img": images.raw("referred to")})

    def use() -> None:
        cache = rig.cache()
        for disk_id in ("a", "vm", "z"):
            cache.create_root_disk("img", disk_id, size=SIZE)
        (rig.disks / "a").chmod(0)
        assert [disk.disk_id for disk in cache.root_disks()] == ["vm", "z"]
        shutil.rmtree(rig.disks / "vm")
        cache.remove_root_disk("vm")
        (rig.disks / "a").chmod(0o755)

    in_child(use, unprivileged=True)
    assert len(_references(rig)) == 3


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_record_of_others_that_cannot_be_read_keeps_a_reference(open_path: Path, in_child: InChild) -> None:
    """In a directory that can be entered it may be the very disk's, moved by another user."""
    open_path.chmod(0o777)
    rig = Rig(open_path, "path", {"img": images.raw("referred to")})

    def make() -> None:
        rig.cache().create_root_disk("img", "vm", size=SIZE)

    in_child(make, unprivileged=True)
    (rig.disks / "vm").rename(rig.disks / "moved")
    for path in (rig.disks / "moved", rig.disks / "moved" / "disk.json"):
        os.chown(path, 0, 0)
    (rig.disks / "moved" / "disk.json").chmod(0o600)
    in_child(lambda: rig.cache().remove_root_disk("vm"), unprivileged=True)
    assert _references(rig) == ["vm.disk.json"]


def test_a_disk_that_the_driver_deleted_itself(rig: Rig) -> None:
    """The directory stays, with other files in it; disk and record are gone."""
    with rig.cache() as cache:
        cache.create_root_disk("img", "vm", size=SIZE)
        for name in ("disk", "disk.json"):
            (rig.disks / "vm" / name).unlink()
        (rig.disks / "vm" / "console.log").write_text("login: ")
        cache.remove_root_disk("vm")
        assert cache.users("img") == []
    assert (rig.disks / "vm" / "console.log").exists()
    assert _references(rig) == []


def test_a_resize_on_the_same_host(rig: Rig) -> None:
    """Confirmed: the old disk goes with its own reference, the new disk keeps its own, and goes with it."""
    with rig.cache() as cache:
        cache.create_root_disk("img", "vm", size=SIZE)
        (rig.disks / "vm").rename(rig.disks / "vm_resize")
        cache.create_root_disk("img", "vm", size=2 * SIZE)
        cache.remove_root_disk("vm_resize")
        assert [(user.disk_id, user.certain) for user in cache.users("img")] == [("vm", True)]
        cache.remove_root_disk("vm")
        assert cache.users("img") == []
    assert _references(rig) == []


def test_an_old_directory_that_the_driver_deleted_itself(rig: Rig) -> None:
    """A resize on the same host whose old directory went without a word: with the instance its reference goes too."""
    with rig.cache() as cache:
        cache.create_root_disk("img", "vm", size=SIZE)
        (rig.disks / "vm").rename(rig.disks / "vm_resize")
        cache.create_root_disk("img", "vm", size=2 * SIZE)
        shutil.rmtree(rig.disks / "vm_resize")
        cache.remove_root_disk("vm")
        assert [user.certain for user in cache.users("img")] == [False], "it may lie anywhere"
        cache.remove_root_disk("vm")
        assert cache.users("img") == []
    assert _references(rig) == []


def test_a_moved_disk_that_was_attached_is_written_down_once(rig: Rig) -> None:
    """Under its new id; the old id's reference goes at once, and the new one with the disk."""
    with rig.cache() as cache:
        cache.create_root_disk("img", "vm", size=SIZE)
        (rig.disks / "vm").rename(rig.disks / "vm_resize")
        cache.attach_root_disk("img", "vm_resize")
        assert [(user.disk_id, user.certain) for user in cache.users("img")] == [("vm_resize", True)]
        cache.remove_root_disk("vm_resize")
        assert cache.users("img") == []


def test_a_second_reference_of_one_disk_is_swept(rig: Rig) -> None:
    """An attach of a moved disk that died between writing the new one and taking the old one: recover does."""
    with rig.cache() as cache:
        cache.create_root_disk("img", "vm", size=SIZE)
        (rig.disks / "vm").rename(rig.disks / "vm_resize")
        with FaultPlan().fail("fs.unlink", match="users/img/vm.disk.json"), pytest.raises(Exception, match="vm_resize"):
            cache.attach_root_disk("img", "vm_resize")
        assert len(cache.users("img")) == 2
        assert cache.recover().removed == ("users/img/vm.disk.json",)
        assert [(user.disk_id, user.certain) for user in cache.users("img")] == [("vm_resize", True)]


def test_a_flattened_disk_that_moved_ends_its_reference(rig: Rig) -> None:
    """It stands alone: whatever it was called when it was made, it is no user any more."""
    with rig.cache() as cache:
        cache.create_root_disk("img", "vm", size=SIZE)
        (rig.disks / "vm").rename(rig.disks / "vm_resize")
        cache.flatten_root_disk("vm_resize")
        assert cache.users("img") == []


# --- it does not end


def test_a_moved_disk_outlives_the_removal_of_its_old_name(rig: Rig) -> None:
    """While it is seen under another directory, nobody's word about the old one takes its reference."""
    with rig.cache() as cache:
        cache.create_root_disk("img", "vm", size=SIZE)
        (rig.disks / "vm").rename(rig.disks / "vm_resize")
        for _again in range(3):
            cache.remove_root_disk("vm")
        assert [(user.disk_id, user.certain) for user in cache.users("img")] == [("vm", False)]
        cache.cleanup(cache.plan_cleanup(max_idle=0))
        assert names(cache) == {"img"}
        assert not (rig.disks / "vm").exists()


def test_a_removal_takes_no_reference_of_another_disk(rig: Rig) -> None:
    """Neither one with a longer name nor one of another image."""
    with rig.cache() as cache:
        for image_id, disk_id, name in (
            ("img", "vm", "disk"),
            ("img", "vm", "disk.rescue"),
            ("img", "vm.disk", "disk"),
            ("other", "vm", "disk.eph0"),
        ):
            cache.create_root_disk(image_id, disk_id, name=name, size=SIZE)
        shutil.rmtree(rig.disks / "vm")
        cache.remove_root_disk("vm")
        assert {(user.disk_id, user.name) for user in cache.users("img")} == {
            ("vm", "disk.rescue"),
            ("vm.disk", "disk"),
        }
        assert [(user.disk_id, user.name) for user in cache.users("other")] == [("vm", "disk.eph0")]


def test_a_copy_of_a_disk_is_a_user_of_its_own(rig: Rig) -> None:
    """A directory that was copied under another id: attached and removed, it takes nothing of the first one along."""
    with rig.cache() as cache:
        cache.create_root_disk("img", "vm", size=SIZE)
        shutil.copytree(rig.disks / "vm", rig.disks / "copy")
        cache.attach_root_disk("img", "copy")
        assert [(user.disk_id, user.certain) for user in cache.users("img")] == [("copy", True), ("vm", True)]
        assert cache.recover().removed == ()
        cache.remove_root_disk("copy")
        assert [(user.disk_id, user.certain) for user in cache.users("img")] == [("vm", True)]
        shutil.copytree(rig.disks / "vm", rig.disks / "copy")
        cache.remove_root_disk("copy")
        assert [(user.disk_id, user.certain) for user in cache.users("img")] == [("vm", True)]


def test_a_disk_that_is_made_again_keeps_its_reference(rig: Rig) -> None:
    """The directory was deleted and the disk made anew: its removal and the sweep leave nothing and lose nothing."""
    with rig.cache() as cache:
        cache.create_root_disk("img", "vm", size=SIZE)
        shutil.rmtree(rig.disks / "vm")
        cache.create_root_disk("img", "vm", size=SIZE)
        cache.recover()
        assert [user.certain for user in cache.users("img")].count(True) == 1
        assert any(json.loads(path.read_bytes())["disk_id"] == "vm" for path in rig.root.glob("users/img/vm.disk.json"))


def test_a_reference_that_cannot_be_read_stays(rig: Rig) -> None:
    """It is somebody's: a removal of another disk does not take it."""
    with rig.cache() as cache:
        cache.create_root_disk("img", "vm", size=SIZE)
        (rig.root / "users" / "img" / "strange.json").write_bytes(b"{")
        cache.remove_root_disk("vm")
        assert [(user.detail, user.certain) for user in cache.users("img")] == [("strange.json", False)]


def test_making_and_removing_disks_reads_no_other_references(rig: Rig) -> None:
    """With thousands of disks of one image each costs what it costs alone."""
    with rig.cache() as cache:
        cache.create_root_disk("img", "vm-0", size=SIZE)
        users = rig.root / "users" / "img"
        for number in range(1, 50):
            path = rig.disks / f"vm-{number}" / "disk"
            (users / f"vm-{number}.disk.json").write_bytes(host_record(f"vm-{number}", "disk", path, float(number)))
        for path in users.iterdir():
            path.chmod(0o644)
        before = {path.name: path.stat().st_atime_ns for path in users.iterdir()}
        cache.create_root_disk("img", "fresh", size=SIZE)
        cache.remove_root_disk("fresh")
        assert {path.name: path.stat().st_atime_ns for path in users.iterdir()} == before


def test_removing_a_linked_disk_reads_no_references(rig: Rig) -> None:
    """Where some disks of an image are tied by its path, those that are linked to it do not pay for them."""
    with rig.cache() as cache:
        cache.create_root_disk("img", "vm", size=SIZE)
    written = rig.root / "users" / "img" / "vm.disk.json"
    with Rig(rig.dir, "link", rig.samples).cache() as cache:
        cache.create_root_disk("img", "linked", size=SIZE)
        written.chmod(0o644)
        before = written.stat().st_atime_ns
        cache.remove_root_disk("linked")
    assert written.stat().st_atime_ns == before
    assert _references(rig) == ["vm.disk.json"]


# --- it outlives what did not end it


def _opens(disk: Path) -> None:
    assert json.loads(qemu_img("info", "--output=json", "--backing-chain", "-f", "qcow2", str(disk)).stdout)[1:]


def _nothing_goes(rig: Rig, disk: Path) -> None:
    """Neither a sweep nor a pass takes the base that this file reads."""
    with rig.cache() as cache:
        cache.recover()
        assert cache.cleanup(cache.plan_cleanup(max_idle=0)).removed == ()
        assert names(cache) == {"img"}
    _opens(disk)


def test_a_disk_that_was_renamed(rig: Rig) -> None:
    """It reads the base as before, and no other takes its place while it does."""
    with rig.cache() as cache:
        cache.create_root_disk("img", "vm", size=SIZE)
        (rig.disks / "vm" / "disk").rename(rig.disks / "vm" / "disk.orig")
        _nothing_goes(rig, rig.disks / "vm" / "disk.orig")
        with pytest.raises(DiskExistsError, match=r"disk\.orig"):
            cache.create_root_disk("img", "vm", size=SIZE)


def test_a_disk_that_was_moved_without_its_record(rig: Rig) -> None:
    """A pass comes before the record follows, or it never does: the base stays for it."""
    with rig.cache() as cache:
        cache.create_root_disk("img", "vm", size=SIZE)
    moved = rig.disks / "vm_resize" / "disk"
    moved.parent.mkdir()
    (rig.disks / "vm" / "disk").rename(moved)
    _nothing_goes(rig, moved)
    # a new disk in its place
    with rig.cache() as cache:
        cache.create_root_disk("img", "vm", size=SIZE)
        assert len(cache.users("img")) == 2
        cache.remove_root_disk("vm")
    _nothing_goes(rig, moved)
    with rig.cache() as cache:
        cache.remove_root_disk("vm")  # and whose disk that was says that it is gone
    assert _references(rig) == []


def test_a_snapshot_that_reads_the_base(rig: Rig) -> None:
    """Pulled onto the base by libvirt, or made beside the disk: what ties the disk serves both."""
    with rig.cache() as cache:
        cache.create_root_disk("img", "vm", size=SIZE)
        snapshot = rig.disks / "vm" / "snap1"
        base = str(rig.root / "bases" / "img" / "disk")
        qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", str(snapshot))
        with pytest.raises(DiskExistsError, match="snap1"):
            cache.remove_root_disk("vm")
        cache.flatten_root_disk("vm")
        _nothing_goes(rig, snapshot)
        with pytest.raises(DiskExistsError, match="snap1"):
            cache.remove_root_disk("vm")
        (rig.disks / "vm" / "disk").unlink()
        _nothing_goes(rig, snapshot)
        snapshot.unlink()
        cache.remove_root_disk("vm")
        assert _references(rig) == []


def test_another_disk_in_the_same_directory_is_no_snapshot(rig: Rig) -> None:
    """It has a reference of its own."""
    with rig.cache() as cache:
        cache.create_root_disk("img", "vm", size=SIZE)
        cache.create_root_disk("img", "vm", name="disk.rescue", size=SIZE)
        cache.remove_root_disk("vm", name="disk.rescue")
        assert len(cache.users("img")) == 1
        cache.remove_root_disk("vm")
    assert _references(rig) == []


def test_a_death_after_the_disk_has_its_name(rig: Rig) -> None:
    """The next sweep finishes its reference: from then on it is that of any disk, and outlives a move."""

    def make() -> None:
        with FaultPlan().kill("fs.rename", match="~unfinished", nth=2):
            rig.cache().create_root_disk("img", "vm", size=SIZE)

    rig.cache().ensure_base("img")
    assert run_to_death(make, "making")
    assert (rig.disks / "vm" / "disk").exists()
    assert [name.count("~unfinished") for name in _references(rig)] == [1]
    with rig.cache() as cache:
        cache.recover()
        assert _references(rig) == ["vm.disk.json"]
    (rig.disks / "vm" / "disk").rename(rig.disks / "vm" / "moved")
    _nothing_goes(rig, rig.disks / "vm" / "moved")


def test_one_directory_that_cannot_be_entered_stops_no_others_reference(open_path: Path, in_child: InChild) -> None:
    """What is unfinished of the others is finished; of that one it is told."""
    open_path.chmod(0o777)
    rig = Rig(open_path, "path", {"img": images.raw("referred to")})

    def make() -> None:
        with rig.cache() as cache:
            for disk_id in ("a", "b"):
                cache.create_root_disk("img", disk_id, size=SIZE)
        for path in rig.root.glob("users/*/*"):
            path.rename(path.with_name(f"{path.stem}~unfinished.json"))

    in_child(make, unprivileged=True)
    (rig.disks / "a").chmod(0)
    if os.geteuid() == 0:
        os.chown(rig.disks / "a", 0, 0)

    def recover() -> tuple[str, ...]:
        return tuple(rig.cache().recover().failed)

    try:
        failed = in_child(recover, unprivileged=True)
        assert "users/img/a.disk~unfinished.json" in failed
        assert _references(rig) == ["a.disk~unfinished.json", "b.disk.json"]
    finally:
        (rig.disks / "a").chmod(0o755)

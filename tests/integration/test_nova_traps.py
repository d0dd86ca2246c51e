"""How Nova's image cache went wrong, each way tried here on real files. Numbers are those of the list of traps."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from harness import images, places
from harness.children import child
from harness.images import MIB, qemu_img
from harness.rig import Rig, compare, truth_file
from harness.upkeep import (
    DAY,
    HOUR,
    Clock,
    assert_counts_as_du,
    clean_twice,
    counted,
    dense,
    inodes,
    last_used,
    names,
    open_cache,
)
from nova_imagecache import FileLocation, ImageCache, NoSpaceError, RootDisk, UserFinder
from nova_imagecache.finders import DiskDirectories, ImagesInUse
from nova_imagecache.testing import FaultPlan

SIZE = 4 * MIB
SAMPLES = {
    "img": images.raw("trapped"),
    "rescue": images.raw("rescue"),
    "ephemeral": images.raw("ephemeral"),
    "idle": images.raw("idle"),
}
KINDS = ("link", "path")
UUID = "0f8fad5b-d9cb-469f-a165-70867728950e"


@pytest.fixture(params=KINDS)
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    with places.quick(tmp_path) as directory:
        yield Rig(directory, request.param, SAMPLES)


def _reads(disk: RootDisk, rig: Rig, image_id: str) -> None:
    assert isinstance(disk.location, FileLocation)
    compare(disk.location.path, "qcow2", truth_file(SAMPLES[image_id].guest, rig.scratch), disk.name)


def _foreign(rig: Rig, image_id: str, path: Path) -> Path:
    """An overlay of somebody else, over the cache's base."""
    path.parent.mkdir(parents=True, exist_ok=True)
    base = rig.root / "bases" / image_id / "disk"
    qemu_img("create", "-q", "-f", "qcow2", "-b", str(base), "-F", "raw", str(path), str(SIZE))
    return path


def test_t2_a_cleaner_beside_a_warm_boot(rig: Rig) -> None:
    """The base goes between finding it and using it, at the worst moment: the boot goes on with another one."""
    cache = open_cache(rig)
    cache.ensure_base("img")
    plan = FaultPlan()
    found = plan.pause("fs.mkdir", match="vm")
    with plan, ThreadPoolExecutor(1) as pool:
        booting = pool.submit(cache.create_root_disk, "img", "vm", size=SIZE)
        found.wait()
        with open_cache(rig) as other:
            assert other.cleanup(other.plan_cleanup(max_idle=0)).removed == ("img",)
        found.release()
        _reads(booting.result(60), rig, "img")
    rig.check("T2")
    rig.check_tidy("T2")


def test_t3_lock_files_stay(rig: Rig) -> None:
    """Their inodes are the same after every kind of removal, so that two who lock a base lock the same file."""
    clock = Clock()
    cache = open_cache(rig, clock)
    cache.create_root_disk("img", "vm", size=SIZE)
    cache.ensure_base("idle")
    locks = {path: path.stat().st_ino for path in (rig.root / "locks").iterdir()}
    assert any("img" in path.name for path in locks)
    cache.remove_root_disk("vm")
    cache.remove_base("idle")
    clean_twice(cache, clock)
    cache.recover()
    assert names(cache) == set()
    assert {path: path.stat().st_ino for path in locks} == locks


def test_t4_bad_disks_stop_no_cleaning(rig: Rig) -> None:
    """Damaged, foreign, guest-written and vanished disks: what is idle goes all the same, what they use stays."""
    clock = Clock()
    instances = rig.dir / "instances"
    cache = open_cache(rig, clock, user_finders=[DiskDirectories([instances, rig.disks])])
    cache.create_root_disk("img", "vm", size=SIZE)
    cache.create_root_disk("ephemeral", "damaged", size=SIZE)
    for image_id in ("rescue", "idle"):
        cache.ensure_base(image_id)
    with (rig.disks / "damaged" / "disk").open("r+b") as file:
        file.write(bytes(64))
    for number, rubbish in enumerate((b"", b"QFI\xfb", b"QFI\xfb" + bytes([255] * 200), bytes(5000))):
        (instances / f"{number}").mkdir(parents=True)
        (instances / f"{number}" / "disk").write_bytes(rubbish)
    _foreign(rig, "rescue", instances / "foreign" / "disk.rescue")
    (instances / "dangling").symlink_to("/nowhere")
    report = clean_twice(cache, clock)
    assert report.removed == ("idle",)
    assert not report.failed
    assert names(cache) == {"img", "rescue", "ephemeral"}


@pytest.mark.parametrize("name", ["disk.eph1", "disk.swap", "disk.rescue"])
def test_t5_t6_t7_further_disks_of_an_instance(name: str, rig: Rig) -> None:
    """A second ephemeral's base, or a rescue disk's, is in use as any other, whatever its disk is called."""
    clock = Clock()
    cache = open_cache(rig, clock)
    cache.create_root_disk("img", UUID, size=SIZE)
    further = cache.create_root_disk("ephemeral", UUID, name=name, size=SIZE)
    cache.ensure_base("idle")
    assert clean_twice(cache, clock).removed == ("idle",)
    _reads(further, rig, "ephemeral")
    cache.remove_root_disk(UUID, name=name)
    assert clean_twice(cache, clock).removed == ("ephemeral",)
    rig.check(name)


def test_t7_a_rescue_disk_of_somebody_else(rig: Rig) -> None:
    """Made by other software, beside an instance's own disk: found by its header."""
    clock = Clock()
    cache = open_cache(rig, clock, user_finders=[DiskDirectories([rig.disks])])
    cache.create_root_disk("img", UUID, size=SIZE)
    cache.ensure_base("rescue")
    _foreign(rig, "rescue", rig.disks / UUID / "disk.rescue")
    clean_twice(cache, clock)
    assert names(cache) == {"img", "rescue"}


def test_t8_a_resize_that_waits_for_its_confirmation(rig: Rig) -> None:
    """The directory is renamed and its instance is another host's: the disk goes on, and comes back whole."""
    clock = Clock()
    cache = open_cache(rig, clock)
    disk = cache.create_root_disk("img", UUID, size=SIZE)
    waiting = rig.disks / f"{UUID}_resize"
    (rig.disks / UUID).rename(waiting)
    for _day in range(3):
        clean_twice(cache, clock)
        assert "img" in names(cache)
    compare(waiting / "disk", "qcow2", truth_file(SAMPLES["img"].guest, rig.scratch), "T8")
    waiting.rename(rig.disks / UUID)
    _reads(disk, rig, "img")
    cache.remove_root_disk(UUID)
    assert clean_twice(cache, clock).removed == ("img",)


def test_t11_nothing_is_in_use_says_the_driver(rig: Rig) -> None:
    """A stale answer of its database: what the storage and the directories know keeps the bases."""
    clock = Clock()
    instances = rig.dir / "elsewhere"
    finders: list[UserFinder] = [ImagesInUse(tuple), DiskDirectories([instances])]
    cache = open_cache(rig, clock, user_finders=finders)
    mine = cache.create_root_disk("img", "vm", size=SIZE)
    for image_id in ("rescue", "idle"):
        cache.ensure_base(image_id)
    theirs = _foreign(rig, "rescue", instances / "not-known-to-nova" / "snap")
    plan = cache.plan_cleanup(max_idle=0, in_use=())
    assert cache.cleanup(plan).removed == ("idle",)
    _reads(mine, rig, "img")
    compare(theirs, "qcow2", truth_file(SAMPLES["rescue"].guest, rig.scratch), "T11")


def test_t26_leftovers_go_and_a_live_writers_do_not(rig: Rig) -> None:
    """Of a fetch that was killed, of a disk half made, of a removal: all swept by cleanup; a live fetch's stay."""
    cache = open_cache(rig)
    rig.samples["killed"] = rig.samples["live"] = images.raw("killed")
    plans = {
        "fetch": (FaultPlan().kill("fs.write", match="killed"), lambda: rig.cache().ensure_base("killed")),
        "disk": (
            FaultPlan().kill("exec.run", nth=0),
            lambda: rig.cache().create_root_disk("img", "half", size=SIZE),
        ),
        "removal": (FaultPlan().kill("fs.rmtree", match="trash"), lambda: rig.cache().remove_base("idle")),
    }
    cache.ensure_base("idle")
    cache.ensure_base("img")
    for plan, act in plans.values():
        with child(lambda plan=plan, act=act: _under(plan, act)) as process:  # type: ignore[misc]  # bound now
            assert process.wait() < 0
    assert list(rig.root.glob("staging/killed.*"))
    live = FaultPlan()
    fetching = live.pause("fs.write", match="live")
    with live, ThreadPoolExecutor(1) as pool:
        made = pool.submit(rig.cache().ensure_base, "live")
        fetching.wait()
        report = cache.cleanup()
        assert report.swept
        assert list(rig.root.glob("staging/killed.*")) == []
        assert list(rig.root.glob("staging/live.*"))
        fetching.release()
        made.result(60)
    rig.check("T26")
    rig.check_tidy("T26")


def _under(plan: FaultPlan, act: object) -> None:
    assert callable(act)
    with plan:
        act()


def test_t27_figures_never_drop_under_churn(rig: Rig) -> None:
    """While bases come and go, what is there all the time is always counted: never zero, never less."""
    cache = open_cache(rig)
    for image_id in ("img", "rescue"):
        cache.ensure_base(image_id)
    least = sum(cache.base_usage(image_id).allocated for image_id in ("img", "rescue"))
    stop = threading.Event()

    def churn(image_id: str) -> None:
        with open_cache(rig) as other:
            while not stop.is_set():
                other.ensure_base(image_id)
                other.remove_base(image_id)

    with ThreadPoolExecutor(2) as pool:
        churning = [pool.submit(churn, image_id) for image_id in ("idle", "ephemeral")]
        try:
            for _look in range(200):
                before = inodes(rig.root)
                usage = cache.usage()
                reserved = cache.reserved_disk_mb(10)
                after = inodes(rig.root)
                # what du sees before and after was there all the time; what comes and goes is these two bases, and one
                # that moves while it is counted is counted twice
                stayed = sum(min(size, after[inode]) for inode, size in before.items() if inode in after)
                seen = sum({**before, **after}.values())
                assert stayed <= usage.allocated <= seen + 4 * MIB
                assert usage.bases >= least
                assert reserved >= 10 + least // MIB
        finally:
            stop.set()
        for done in churning:
            done.result(60)
    cache.recover()
    assert_counts_as_du(rig, cache.usage(), "T27")


@pytest.mark.parametrize(
    "jump", [-400 * DAY, -3 * DAY, -HOUR, HOUR, 3 * DAY, 400 * DAY], ids=lambda jump: f"{jump:.0f}"
)
@pytest.mark.parametrize("marked", [False, True], ids=["unmarked", "marked"])
def test_t34_the_clock_jumps(marked: bool, jump: float, rig: Rig) -> None:
    """Days in either direction: nothing in use goes, nothing goes at once, and nothing becomes immortal."""
    clock = Clock()
    cache = open_cache(rig, clock)
    disk = cache.create_root_disk("img", "vm", size=SIZE)
    cache.ensure_base("idle")
    if marked:
        cache.cleanup()
    clock.move(jump)
    if not marked or jump < DAY:
        assert cache.cleanup().removed == ()
    for _pass in range(3):
        clock.move(25 * HOUR)
        cache.cleanup()
    assert names(cache) == {"img"}
    _reads(disk, rig, "img")


def test_t34_touched_and_restored_trees(rig: Rig) -> None:
    """A restored or copied tree, with times of long ago or of the future: in use is in use, idle goes in its time."""
    clock = Clock()
    cache = open_cache(rig, clock)
    cache.create_root_disk("img", "vm", size=SIZE)
    for image_id in ("idle", "rescue"):
        cache.ensure_base(image_id)
    for image_id, when in (("img", 0.0), ("idle", clock.now + 1000 * DAY), ("rescue", 0.0)):
        for path in (rig.root / "bases" / image_id).iterdir():
            os.utime(path, (when, when))
    assert cache.cleanup().removed == ()
    assert names(cache) == {"img", "idle", "rescue"}
    clock.move(25 * HOUR)
    assert cache.cleanup().removed == ("idle", "rescue")


def test_t35_the_cache_reacts_to_space(rig: Rig) -> None:
    """The least recently used idle base makes room; what is in use never does; then the refusal has the figures."""
    clock = Clock()
    for number in range(3):
        rig.samples[f"dense-{number}"] = dense(f"t35 {number}")
    cache = open_cache(rig, clock, max_bytes=2 * MIB + 512 * 1024)
    cache.create_root_disk("dense-0", "vm", size=SIZE)
    cache.ensure_base("dense-1")
    for image_id in ("dense-0", "dense-1"):
        last_used(rig, image_id, clock.now - DAY)
    cache.ensure_base("dense-2")
    assert names(cache) == {"dense-0", "dense-2"}
    with pytest.raises(NoSpaceError) as caught:
        cache.ensure_base("dense-1")
    assert None not in (caught.value.needed, caught.value.free, caught.value.pinned, caught.value.in_use)
    assert counted(rig) <= 2 * MIB + 512 * 1024
    rig.check("T35")


def test_a_disk_that_moved_keeps_its_base_by_doubt(tmp_path: Path) -> None:
    """A path reference whose disk is not where it was: doubt, until it is seen again or removed."""
    rig = Rig(tmp_path, "path", SAMPLES)
    clock = Clock()
    cache: ImageCache = open_cache(rig, clock)
    cache.create_root_disk("img", "vm", size=SIZE)
    shutil.move(rig.disks / "vm", tmp_path / "moved")
    [user] = cache.users("img")
    assert (user.known_by, user.certain) == ("path", False)
    clean_twice(cache, clock)
    assert names(cache) == {"img"}
    shutil.move(tmp_path / "moved", rig.disks / "vm")
    assert cache.users("img")[0].certain
    cache.remove_root_disk("vm")
    assert clean_twice(cache, clock).removed == ("img",)


def test_t8_a_moved_disk_that_comes_back_keeps_its_base(tmp_path: Path) -> None:
    """Resize on the same host and revert: another disk of the same name, made and removed meanwhile, takes no
    reference along but its own."""
    rig = Rig(tmp_path, "path", {"img": images.raw("moved")})
    with open_cache(rig) as cache:
        cache.create_root_disk("img", "vm", size=4 * MIB)
        (rig.disks / "vm").rename(rig.disks / "vm_resize")
        cache.create_root_disk("img", "vm", size=8 * MIB)
        assert len(cache.users("img")) == 2
        cache.remove_root_disk("vm")
        assert [user.certain for user in cache.users("img")] == [False]
        (rig.disks / "vm_resize").rename(rig.disks / "vm")
        assert cache.cleanup(cache.plan_cleanup(max_idle=0)).removed == ()
        cache.attach_root_disk("img", "vm")
        assert [user.certain for user in cache.users("img")] == [True]
        cache.remove_root_disk("vm")
        assert cache.cleanup(cache.plan_cleanup(max_idle=0)).removed == ("img",)

"""A pass over all bases: what one bad base, a late comer or an old plan do to it."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness import places
from harness.children import child
from harness.images import MIB
from harness.rig import Rig
from harness.upkeep import DAY, HOUR, Clock, Events, clean_twice, dense, names, open_cache
from nova_imagecache import BaseImage, BaseInUseError, DiskUser, ImageCache, InvalidRequestError
from nova_imagecache.finders import DiskDirectories, ImagesInUse
from nova_imagecache.testing import FaultPlan

SAMPLES = {name: dense(f"passed {name}", 64 * 1024) for name in ("a", "b", "c")}


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with places.quick(tmp_path) as directory:
        rig = Rig(directory, "link", SAMPLES)
        rig.cache().ensure_bases(SAMPLES)
        yield rig


def _tree(root: Path) -> dict[str, tuple[int, int]]:
    """Everything below the root: inode and time of change."""
    found = {}
    for path in sorted(root.rglob("*")):
        if "locks" not in path.parts:
            known = path.lstat()
            found[str(path)] = (known.st_ino, known.st_mtime_ns)
    return found


# --- one bad base stops no pass


def _no_record(rig: Rig) -> None:
    (rig.root / "bases" / "b" / "base.json").unlink()


def _rubbish(rig: Rig) -> None:
    record = rig.root / "bases" / "b" / "base.json"
    record.unlink()
    record.write_bytes(b"\xff{")


def _no_disk(rig: Rig) -> None:
    (rig.root / "bases" / "b" / "disk").unlink()


def _pins_are_a_file(rig: Rig) -> None:
    (rig.root / "pins").mkdir(exist_ok=True)
    (rig.root / "pins" / "b").write_text("")


def _users_are_a_file(rig: Rig) -> None:
    (rig.root / "users").mkdir(exist_ok=True)
    (rig.root / "users" / "b").write_text("")


def _a_file(rig: Rig) -> None:
    (rig.root / "bases" / "0").write_text("")


def _an_empty_directory(rig: Rig) -> None:
    (rig.root / "bases" / "0").mkdir()


BAD = [_no_record, _rubbish, _no_disk, _pins_are_a_file, _users_are_a_file, _a_file, _an_empty_directory]


@pytest.mark.parametrize("spoil", BAD, ids=[spoil.__name__.strip("_") for spoil in BAD])
def test_one_bad_base_stops_no_pass(spoil: Callable[[Rig], None], rig: Rig) -> None:
    """The others are planned, marked and removed; figures can be had; room can be made."""
    clock = Clock()
    cache = open_cache(rig, clock)
    spoil(rig)
    assert {"a", "c"} <= {item.image_id for item in cache.plan_cleanup().items}
    report = clean_twice(cache, clock)
    assert {"a", "c"} <= set(report.removed)
    cache.usage()
    with open_cache(rig, clock, max_bytes=256 * 1024) as limited:
        limited.ensure_base("a")


@pytest.mark.parametrize("spoil", [_pins_are_a_file, _users_are_a_file], ids=["pins", "users"])
def test_doubt_keeps_the_bad_base(spoil: Callable[[Rig], None], rig: Rig) -> None:
    """What cannot be read may say that it is needed."""
    clock = Clock()
    cache = open_cache(rig, clock)
    spoil(rig)
    report = clean_twice(cache, clock)
    assert "b" in report.kept
    assert "b" in names(cache)


def test_pins_that_cannot_be_listed_keep_every_base(rig: Rig) -> None:
    """Anyone may be pinned; the figures can be had, and nothing counts as reclaimable."""
    clock = Clock()
    cache = open_cache(rig, clock)
    (rig.root / "pins").rmdir()
    (rig.root / "pins").write_text("no directory")
    assert set(clean_twice(cache, clock).kept) == set(SAMPLES)
    assert {item.reason for item in cache.plan_cleanup(max_idle=0).items} == {"pinned by unreadable"}
    usage = cache.usage()
    assert (usage.base_count, usage.reclaimable) == (3, 0)


STEPS = [
    ("fs.touch", "bases/b/unused-since", ()),
    ("fs.rename", "bases/b", ("a", "c")),
    ("fs.rename", "trash/b", ("a", "c")),
    ("fs.rmtree", "b.", ("a", "c")),
]


@pytest.mark.parametrize(("step", "match", "removed"), STEPS, ids=["mark", "retire", "to-trash", "purge"])
def test_a_removal_that_fails_is_told_and_the_rest_goes_on(
    step: str, match: str, removed: tuple[str, ...], rig: Rig
) -> None:
    """Whichever step of one base fails: it is in the report with its reason, and recover tidies up after it."""
    clock = Clock()
    cache = open_cache(rig, clock)
    if removed:
        cache.cleanup()
        clock.move(2 * DAY)
    with FaultPlan().fail(step, match=match, nth=0, error=PermissionError(1, "not permitted")):
        report = cache.cleanup(cache.plan_cleanup())
    assert any("not permitted" in reason for reason in report.failed.values())
    assert (report.removed or report.marked) == ("a", "c")
    again = cache.recover()
    assert not again.failed
    cache.ensure_base("b")
    rig.check("a removal failed")
    rig.check_tidy("a removal failed")


def test_a_restore_that_fails_is_made_good_by_recover(rig: Rig) -> None:
    """The base of a late comer cannot get its name back: it lies in the trash, whole, until recover restores it."""

    class Late:
        name = "late"
        looks = 0

        def find(self, bases: Sequence[BaseImage]) -> Iterator[DiskUser]:
            self.looks += 1
            if self.looks > 1:
                path = rig.disks / "vm" / "disk.base"
                if not path.exists():
                    path.parent.mkdir(parents=True)
                    [token] = (rig.root / "trash").glob("b.*")
                    path.hardlink_to(token / "disk")
                    (path.parent / "disk.snap").write_bytes(b"")
            return iter(())

    cache = open_cache(rig, user_finders=[Late()])
    plan = cache.plan_cleanup(max_idle=0)
    with FaultPlan().fail("fs.rename", match="bases/b", nth=2, error=PermissionError(1, "not permitted")):
        report = cache._engine.passes.carry_out(plan, observe=False)
    assert set(report.removed) == {"a", "c"}
    assert "b" in report.failed
    assert cache.recover().restored
    assert names(cache) == {"b"}


class Interrupt(BaseException):
    """What ends a thread's work and is no error: KeyboardInterrupt, or eventlet's Timeout."""


def test_an_interrupted_look_leaves_every_base_in_its_place(rig: Rig) -> None:
    """They were retired together; the process lives on, and a sweep leaves alone what a live one holds."""
    looks = []

    def in_use() -> list[str]:
        looks.append(len(list((rig.root / "trash").glob("*"))))
        if looks[-1]:
            raise Interrupt
        return []

    cache = open_cache(rig, user_finders=[ImagesInUse(in_use)])
    with pytest.raises(Interrupt):
        cache.cleanup(cache.plan_cleanup(max_idle=0))
    assert looks == [0, 3]
    assert names(cache) == {"a", "b", "c"}
    rig.check_tidy("an interrupted look")


def test_an_interrupted_purge_gives_back_what_it_did_not_come_to(rig: Rig) -> None:
    """The one in the middle of it is swept."""
    cache = open_cache(rig)
    plan = cache.plan_cleanup(max_idle=0)
    with FaultPlan().fail("fs.rmtree", match="b.", error=Interrupt()), pytest.raises(Interrupt):
        cache.cleanup(plan)
    assert names(cache) == {"c"}
    assert not cache.recover().failed
    rig.check_tidy("an interrupted purge")
    assert cache.cleanup(cache.plan_cleanup(max_idle=0)).removed == ("c",)


# --- plans


def test_a_dry_run_is_the_very_plan_and_changes_nothing(rig: Rig) -> None:
    """What is printed is what is done; looking leaves no trace."""
    clock = Clock()
    cache = open_cache(rig, clock)
    cache.create_root_disk("a", "vm")
    cache.pin("b", "me")
    cache.cleanup()
    clock.move(2 * DAY)
    before = _tree(rig.dir)
    plan = cache.plan_cleanup()
    assert cache.plan_cleanup() == plan
    assert _tree(rig.dir) == before
    assert all(item.reason for item in plan.items)
    assert {item.image_id: item.verdict for item in plan.items} == {"a": "keep", "b": "keep", "c": "remove"}
    assert plan.freeable == cache.base_usage("c").allocated
    report = cache.cleanup(plan)
    assert report.removed == ("c",)
    assert report.freed == plan.freeable
    assert report.kept == {item.image_id: item.reason for item in plan.items if item.verdict == "keep"}


def test_an_old_plan_is_judged_again(rig: Rig) -> None:
    """Since it was made one base was pinned, one used, one got a disk: nothing goes, and the report says why."""
    clock = Clock()
    cache = open_cache(rig, clock)
    cache.cleanup()
    clock.move(2 * DAY)
    plan = cache.plan_cleanup()
    assert [item.verdict for item in plan.items] == ["remove"] * 3
    cache.pin("a", "me")
    cache.ensure_base("b")
    cache.create_root_disk("c", "vm")
    report = cache.cleanup(plan)
    assert report.removed == ()
    assert "me" in report.kept["a"]
    assert "unused from now on" in report.kept["b"]
    assert "1 root disk" in report.kept["c"]
    assert names(cache) == {"a", "b", "c"}


def test_a_plan_for_bases_that_are_gone(rig: Rig) -> None:
    """Somebody else removed them: said, and no failure."""
    cache = open_cache(rig)
    plan = cache.plan_cleanup(max_idle=0)
    cache.remove_base("b")
    report = cache.cleanup(plan)
    assert report.removed == ("a", "c")
    assert report.kept == {"b": "it is gone already"}
    assert not report.failed


def test_a_busy_base_is_skipped_and_said_so(rig: Rig) -> None:
    """Somebody holds its lock: the pass does not wait."""
    cache = open_cache(rig)
    lock = cache._engine.locks.base("b")
    assert lock.attempt()
    report = cache.cleanup(cache.plan_cleanup(max_idle=0))
    lock.release()
    assert report.removed == ("a", "c")
    assert "works on it" in report.kept["b"]
    assert cache.cleanup(cache.plan_cleanup(max_idle=0)).removed == ("b",)


def test_observing_changes_nothing(rig: Rig) -> None:
    """With remove_unused off a pass says what it would do, for ever, and marks nothing."""
    clock = Clock()
    cache = open_cache(rig, clock, remove_unused=False)
    (rig.root / "staging" / "a.0123456789abcdef").mkdir(parents=True)
    before = _tree(rig.dir)
    for _day in range(3):
        report = cache.cleanup()
        assert (report.removed, report.marked, report.swept) == ((), (), ())
        assert all("remove_unused is off" in reason for reason in report.kept.values())
        clock.move(3 * DAY)
    assert _tree(rig.dir) == before


@pytest.mark.slow
def test_a_pass_over_many_bases_asks_finders_a_few_times(rig: Rig) -> None:
    """Once for the plan and once for each bundle that goes, not once for each base."""
    many = {f"many-{number:03}": SAMPLES["a"] for number in range(150)}
    rig.samples |= many

    class Counting(DiskDirectories):
        looks = 0

        def find(self, bases: Sequence[BaseImage]) -> Iterator[DiskUser]:
            self.looks += 1
            return super().find(bases)

    finder = Counting([rig.disks])
    cache = open_cache(rig, user_finders=[finder])
    cache.ensure_bases(many)
    cache.create_root_disk("many-077", "vm")
    descriptors = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - reason: names, not paths
    report = cache.cleanup(cache.plan_cleanup(max_idle=0))
    assert len(report.removed) == 152
    assert names(cache) == {"many-077"}
    assert finder.looks <= 5
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 2  # noqa: PTH208 - reason: names, not paths


def test_events_tell_what_went(rig: Rig) -> None:
    """One for each base, and one that the figures changed."""
    events = Events()
    cache = open_cache(rig, on_event=events.append)
    cache.create_root_disk("a", "vm")
    events.clear()
    cache.cleanup(cache.plan_cleanup(max_idle=0))
    assert events.kinds("removed") == ["b", "c"]
    assert events.kinds("usage-changed") == ["b", "c"]


# --- time


def test_two_passes_and_the_idle_time_between_them(rig: Rig) -> None:
    """The first marks; up to the end of the idle time it stays; then it goes."""
    clock = Clock()
    cache = open_cache(rig, clock)
    assert cache.cleanup().marked == ("a", "b", "c")
    clock.move(23 * HOUR)
    report = cache.cleanup()
    assert (report.removed, report.marked) == ((), ())
    clock.move(2 * HOUR)
    assert cache.cleanup().removed == ("a", "b", "c")


def test_a_disk_that_comes_and_goes_starts_the_time_anew(rig: Rig) -> None:
    """Its base was in use until just now."""
    clock = Clock()
    cache = open_cache(rig, clock)
    cache.cleanup()
    clock.move(20 * HOUR)
    cache.create_root_disk("a", "vm")
    clock.move(20 * HOUR)
    assert cache.cleanup().removed == ("b", "c")
    cache.remove_root_disk("vm")
    assert cache.cleanup().marked == ("a",)
    clock.move(20 * HOUR)
    assert cache.cleanup().removed == ()
    clock.move(20 * HOUR)
    assert cache.cleanup().removed == ("a",)


def test_a_pin_ends(rig: Rig) -> None:
    """Up to its end it holds, whatever is asked for; the idle time begins after it."""
    clock = Clock()
    cache = open_cache(rig, clock)
    cache.pin("a", "release", until=clock.now + 10 * DAY)
    assert clean_twice(cache, clock).removed == ("b", "c")
    assert "a" not in cache.cleanup(cache.plan_cleanup(max_idle=0)).removed
    clock.move(9 * DAY)
    assert cache.cleanup().marked == ("a",)
    clock.move(2 * DAY)
    assert cache.cleanup().removed == ("a",)


def test_a_pin_that_is_over_goes_with_a_pass(rig: Rig) -> None:
    """Also that of an image that never came; told as what was swept."""
    clock = Clock()
    cache = open_cache(rig, clock)
    for image_id in ("a", "never"):
        cache.pin(image_id, "release", until=clock.now + DAY)
    cache.pin("a", "me")
    assert cache.cleanup().swept == ()
    clock.move(2 * DAY)
    assert cache.cleanup().swept == ("pins/a/release", "pins/never/release")
    assert cache.recover().removed == ()
    assert [pin.owner for pin in cache.pins("a")] == ["me"]
    assert [path.name for path in (rig.root / "pins").iterdir()] == ["a"]


@pytest.mark.parametrize("ago", [0.0, 10 * DAY])
def test_a_pin_that_would_be_over_is_refused(ago: float, rig: Rig) -> None:
    """A wrong year must not take away the pin that the owner has."""
    clock = Clock()
    cache = open_cache(rig, clock)
    cache.pin("a", "release")
    with pytest.raises(InvalidRequestError, match="over already"):
        cache.pin("a", "release", until=clock.now - ago)
    assert [pin.until for pin in cache.pins("a")] == [None]


@pytest.mark.parametrize("end", ["time", "unpin"])
def test_the_idle_time_of_a_marked_base_begins_when_its_pin_is_over(end: str, rig: Rig) -> None:
    """It was unused and marked before it was pinned: it does not go at the first pass after the pin."""
    clock = Clock()
    cache = open_cache(rig, clock)
    assert cache.cleanup().marked == ("a", "b", "c")
    cache.pin("a", "release", until=clock.now + 10 * DAY if end == "time" else None)
    clock.move(2 * DAY)
    report = cache.cleanup()
    assert (report.removed, report.marked) == (("b", "c"), ("a",)), "the mark is taken away"
    clock.move(9 * DAY)
    if end == "unpin":
        assert cache.cleanup().kept == {"a": "pinned by release"}
        cache.unpin("a", "release")
    assert cache.cleanup().marked == ("a",)
    clock.move(23 * HOUR)
    assert cache.cleanup().removed == ()
    clock.move(2 * HOUR)
    assert cache.cleanup().removed == ("a",)


@pytest.mark.slow
def test_the_cost_of_a_pass_is_linear(tmp_path: Path) -> None:
    """Four times the bases, disks and old pins take four times as long, not sixteen: keeping, marking and removing."""
    with child(lambda: _costs(tmp_path / "small", 100)) as process:
        small = process.result()
    with child(lambda: _costs(tmp_path / "large", 400)) as process:
        large = process.result()
    for name, cost in large.items():
        assert cost.files < 4.2 * small[name].files, (name, cost, small[name])
        assert cost.lists_of_pins <= 3, name
        # other tests run beside, and a pass has a cost of its own: far from sixteen
        assert cost.seconds < 9 * max(small[name].seconds, 0.02), (name, cost, small[name])


@dataclass
class Cost:
    """Of one pass: processor seconds, files and directories opened, and how often all pins were listed."""

    seconds: float = 0.0
    files: int = 0
    lists_of_pins: int = 0


def _costs(directory: Path, count: int) -> dict[str, Cost]:
    """Each kind of pass over so many bases, half of them with a disk. In a process of its own: the look is for good."""
    costs: dict[str, Cost] = {}
    now = Cost()

    def look(event: str, arguments: tuple[object, ...]) -> None:
        if event in ("open", "os.listdir", "os.scandir"):
            now.files += 1
            now.lists_of_pins += str(arguments[0]).endswith("/pins")

    sys.addaudithook(look)
    with places.quick(directory) as where:
        rig = Rig(where, "link", {})
        _populate(rig, count)
        finder = DiskDirectories([rig.disks])
        for name, idle in (("keep and mark", DAY), ("keep and remove", 0.0), ("usage", None)):
            cache = open_cache(rig, user_finders=[finder])
            now = Cost()
            start = time.process_time()
            if idle is None:
                cache.usage()
            else:
                report = cache.cleanup(cache.plan_cleanup(max_idle=idle))
                assert len(report.marked if idle else report.removed) == count // 2
                assert not report.failed
            now.seconds = time.process_time() - start
            costs[name] = now
    return costs


def _populate(rig: Rig, count: int) -> None:
    """Bases by copies of one; every second one with a disk, and each with a pin that is over."""
    rig.samples = {"seed": SAMPLES["a"]}
    rig.cache().create_root_disk("seed", "seed-vm")
    seed, disk = rig.root / "bases" / "seed", rig.disks / "seed-vm"
    for number in range(count - 1):
        image_id = f"img-{number:04}"
        base, home = rig.root / "bases" / image_id, rig.disks / f"vm-{number:04}"
        shutil.copytree(seed, base)
        (base / "base.json").chmod(0o644)
        (base / "base.json").write_text((seed / "base.json").read_text().replace('"seed"', f'"{image_id}"'))
        (rig.root / "pins" / image_id).mkdir(parents=True)
        (rig.root / "pins" / image_id / "old.json").write_text('{"until": 1.0}')
        if number % 2:
            home.mkdir()
            (home / "disk.base").hardlink_to(base / "disk")
            shutil.copyfile(disk / "disk", home / "disk")
            (home / "disk.json").write_text((disk / "disk.json").read_text().replace('"seed"', f'"{image_id}"'))


def test_a_removal_by_hand_tells_who_is_in_the_way(rig: Rig) -> None:
    """Each disk by its name, however many know of it."""
    cache: ImageCache = open_cache(rig, user_finders=[DiskDirectories([rig.disks])])
    cache.create_root_disk("a", "vm", size=4 * MIB)
    with pytest.raises(BaseInUseError) as caught:
        cache.remove_base("a")
    assert {user.disk_id for user in caught.value.users} == {"vm"}
    assert "disk directories" in {user.known_by for user in caught.value.users}

"""Cleanup beside the making of disks, in every order of their steps: a guest's disk is always whole."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as StillRunningError
from contextlib import suppress
from pathlib import Path
from typing import Literal

import pytest

from harness import images
from harness.children import child
from harness.images import MIB
from harness.rig import Rig
from harness.upkeep import dense
from nova_imagecache import (
    BaseInUseError,
    BaseNotFoundError,
    CleanupReport,
    DiskExistsError,
    DiskNotFoundError,
    ImageCache,
    NoSpaceError,
    RootDisk,
)
from nova_imagecache.testing import FaultPlan, Step

KINDS = ("link", "path", "file")
SIZE = 4 * MIB
SAMPLES = {"img": images.raw("raced for")}
SOAK_SECONDS = 4


def _clean(rig: Rig) -> CleanupReport:
    with rig.cache() as cache:
        return cache.cleanup(cache.plan_cleanup(max_idle=0))


def _create(rig: Rig) -> RootDisk:
    return rig.cache().create_root_disk("img", "vm", size=SIZE)


def _trace(directory: Path, kind: str, act: Callable[[Rig], object]) -> tuple[Step, ...]:
    rig = _begin(directory / "trace", kind)
    with FaultPlan() as plan:
        act(rig)
    return plan.trace


def _begin(directory: Path, kind: str) -> Rig:
    directory.mkdir()
    rig = Rig(directory, kind, SAMPLES)
    rig.cache().ensure_base("img")
    return rig


def _patiently(future: Future[RootDisk]) -> None:
    """Give it the time to end, or to come to where it waits for the one that is held."""
    with suppress(StillRunningError):
        future.result(timeout=0.4)


@pytest.mark.parametrize("kind", KINDS)
def test_cleanup_held_at_each_step(kind: str, quick_path: Path) -> None:
    """A disk is made while a cleanup stands still before one of its steps: the disk is whole in the end."""
    for step in _trace(quick_path, kind, _clean):
        when = f"{kind}: made while cleanup stood before {step}"
        rig = _begin(quick_path / f"{step.index}", kind)
        plan = FaultPlan()
        pause = plan.pause(step.index)
        with plan, ThreadPoolExecutor(2) as pool:
            cleaning = pool.submit(_clean, rig)
            pause.wait()
            making = pool.submit(_create, rig)
            _patiently(making)
            pause.release()
            disk, report = making.result(60), cleaning.result(60)
        assert not report.failed, f"{when}: {report}"
        assert disk.virtual_size == SIZE, when
        _check_outcome(rig, report, when)


def _check_outcome(rig: Rig, report: CleanupReport, when: str) -> None:
    rig.check(when)
    rig.check_tidy(when)
    with rig.cache() as cache:
        there = [base.image_id for base in cache.bases()]
        if rig.kind == "path":
            assert there == ["img"], f"{when}: a path leads to a base that is gone"
        if "img" in report.kept:
            assert there == ["img"], f"{when}: reported kept and gone"
        assert [disk.disk_id for disk in cache.root_disks()] == ["vm"], when
        # whatever happened, the cache goes on
        cache.create_root_disk("img", "next", size=SIZE)
    rig.check(f"{when}, and another disk after that")


@pytest.mark.parametrize("kind", KINDS)
def test_create_held_at_each_step(kind: str, quick_path: Path) -> None:
    """A cleanup runs to its end while a creator stands still before one of its steps: the disk is whole in the end."""
    for step in _trace(quick_path, kind, _create):
        when = f"{kind}: cleaned while the creator stood before {step}"
        rig = _begin(quick_path / f"{step.index}", kind)
        plan = FaultPlan()
        pause = plan.pause(step.index)
        with plan, ThreadPoolExecutor(1) as pool:
            making = pool.submit(_create, rig)
            pause.wait()
            report = _clean(rig)
            pause.release()
            making.result(60)
        assert not report.failed, f"{when}: {report}"
        _check_outcome(rig, report, when)


@pytest.mark.parametrize("kind", KINDS)
def test_create_held_while_recover_runs(kind: str, quick_path: Path) -> None:
    """recover() beside a creator at any of its steps takes nothing of it away."""
    for step in _trace(quick_path, kind, _create):
        when = f"{kind}: recovered while the creator stood before {step}"
        rig = _begin(quick_path / f"{step.index}", kind)
        plan = FaultPlan()
        pause = plan.pause(step.index)
        with plan, ThreadPoolExecutor(1) as pool:
            making = pool.submit(_create, rig)
            pause.wait()
            report = rig.cache().recover()
            pause.release()
            making.result(60)
        assert not report.failed, f"{when}: {report}"
        rig.check(when)
        rig.check_tidy(when)


@pytest.mark.parametrize("kind", ["link", "path"])
def test_a_late_user_brings_the_base_back(kind: str, tmp_path: Path) -> None:
    """A disk that comes to a base between the two looks is seen at the second one, and the base is there again."""
    rig = _begin(tmp_path / "rig", kind)
    plan = FaultPlan()
    before_retiring = plan.pause("fs.rename", match="trash/img")
    with plan, ThreadPoolExecutor(1) as pool:
        cleaning = pool.submit(_clean, rig)
        before_retiring.wait()
        before = rig.backend().find_base("img")
        disk = _create(rig)
        before_retiring.release()
        report = cleaning.result(60)
    renames = [step for step in plan.trace if step.name == "fs.rename" and any("trash/img" in t for t in step.targets)]
    assert len(renames) == 2, f"retired and restored: {renames}"
    assert report.removed == ()
    assert "img" in report.kept, report
    after = rig.backend().find_base("img")
    assert after is not None
    assert before is not None
    assert after.record == before.record, "the very base is back"
    assert disk.reference == kind
    assert len(rig.cache().users("img")) == 1
    rig.check("a late user")
    rig.check_tidy("a late user")


def test_the_second_look_sees_a_pin(tmp_path: Path) -> None:
    """A pin that comes between the two looks brings the base back."""
    rig = _begin(tmp_path / "rig", "link")
    plan = FaultPlan()
    before_retiring = plan.pause("fs.rename", match="trash/img")
    with plan, ThreadPoolExecutor(1) as pool:
        cleaning = pool.submit(_clean, rig)
        before_retiring.wait()
        rig.cache().pin("img", "someone")
        before_retiring.release()
        report = cleaning.result(60)
    assert report.removed == ()
    assert "someone" in report.kept["img"]
    assert rig.cache().get_base("img").image_id == "img"


def test_other_bytes_do_not_come_under_a_path(tmp_path: Path) -> None:
    """A disk that names its base by path while other bytes of that id are fetched keeps its own: they do not come."""
    rig = _begin(tmp_path / "rig", "path")
    old = SAMPLES["img"]
    new = images.raw("other bytes of the id")
    rig.samples["img"] = new
    plan = FaultPlan()
    fetched = plan.pause("fs.rename", match="trash/img")
    with plan, ThreadPoolExecutor(1) as pool:
        replacing = pool.submit(lambda: rig.cache().ensure_base("img", expect=new.digest))
        fetched.wait()
        rig.cache().create_root_disk("img", "vm", size=SIZE)
        fetched.release()
        with pytest.raises(BaseInUseError):
            replacing.result(60)
    rig.samples["img"] = old
    rig.check("other bytes were refused")
    rig.check_tidy("other bytes were refused")


def test_a_purge_cannot_be_taken_back(tmp_path: Path) -> None:
    """A base that is half purged, by one who died at it or still is, never comes back under its name."""
    rig = _begin(tmp_path / "rig", "path")
    backend = rig.backend()
    base = backend.find_base("img")
    assert base is not None
    retired = backend.retire_base(base)
    with FaultPlan().fail("fs.rmtree", match="trash"), pytest.raises(OSError, match="No space"):
        backend.purge_base(retired)
    [half] = (rig.root / "trash").iterdir()
    (half / "disk").unlink()
    # somebody who is about to find the base gone has written his reference already
    user = backend.user_record("img", "late", "disk")
    user.parent.mkdir(parents=True)
    user.write_text("{}")
    rig.backend().restore_base(retired)
    assert rig.backend().find_base("img") is None, "restored"
    rig.cache().recover()
    assert rig.backend().find_base("img") is None, "recovered"
    assert list((rig.root / "trash").iterdir()) == []
    user.unlink()
    rig.cache().ensure_base("img")
    rig.check("fetched again")


# --- a base that is just ensured, while it is to make room or to go


def _cold_rig(tmp_path: Path) -> Rig:
    """One base that was used long ago, and one image that has room only without it."""
    rig = Rig(tmp_path, "link", {"img": dense("ensured", MIB), "large": dense("makes it go", MIB)})
    rig.cache().ensure_base("img")
    os.utime(rig.root / "bases" / "img" / "last-used", (0.0, 0.0))
    return rig


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_base_that_is_ensured_while_it_is_evicted_stays(when: Literal["before", "after"], tmp_path: Path) -> None:
    """However the two meet at the rename: whoever was given the base finds it there, and nothing was fetched again."""
    rig = _cold_rig(tmp_path)
    plan = FaultPlan()
    retiring = plan.pause("fs.rename", match="bases/img", when=when)
    source = rig.source()
    with plan, ThreadPoolExecutor(2) as pool:
        evicting = pool.submit(rig.cache(max_bytes=MIB + MIB // 2).ensure_base, "large")
        retiring.wait()
        ensuring = pool.submit(rig.cache(source=source).ensure_base, "img")
        if when == "before":
            # the hit needs no lock and is over before the name goes
            assert ensuring.result(60).image_id == "img"
            assert (rig.root / "bases" / "img").is_dir()
        retiring.release()
        if when == "before":
            with pytest.raises(NoSpaceError):
                evicting.result(60)
        else:
            # too late: the name was gone, and it is fetched again
            evicting.result(60)
        base = ensuring.result(60)
    assert rig.cache().get_base("img").record.image_id == base.image_id
    assert source.opens == (0 if when == "before" else 1)
    rig.check("ensured while it was evicted")


@pytest.mark.parametrize("step", ["fs.touch", "fs.unlink"])
def test_a_base_that_goes_while_its_use_is_noted_is_fetched_again(step: str, tmp_path: Path) -> None:
    """The hit found it, then it went: the caller gets a base that is there, not one that was."""
    rig = _cold_rig(tmp_path)
    source = rig.source()
    plan = FaultPlan()
    touching = plan.pause(step, match="bases/img")
    with plan, ThreadPoolExecutor(1) as pool:
        ensuring = pool.submit(rig.cache(source=source).ensure_base, "img")
        touching.wait()
        rig.cache().remove_base("img")
        touching.release()
        ensuring.result(60)
    assert source.opens == 1
    assert rig.cache().get_base("img")
    rig.check("fetched again")


def test_a_base_that_is_ensured_while_it_is_cleaned_stays(tmp_path: Path) -> None:
    """Its time was up; between the two looks of the pass somebody used it: the report says so."""
    rig = _cold_rig(tmp_path)
    cache = rig.cache()
    plan = FaultPlan()
    retiring = plan.pause("fs.rename", match="bases/img")
    with plan, ThreadPoolExecutor(1) as pool:
        cleaning = pool.submit(cache.cleanup, cache.plan_cleanup(max_idle=0))
        retiring.wait()
        rig.cache().ensure_base("img")
        retiring.release()
        report = cleaning.result(60)
    assert report.removed == ()
    assert report.kept["img"] == "it was used just now"
    assert rig.cache().get_base("img").last_used is not None
    rig.check_tidy("used meanwhile")


def test_a_hit_stays_cheap(tmp_path: Path) -> None:
    """Looking again after the use was noted is one stat: no lock, no change on disk but the mark."""
    rig = _cold_rig(tmp_path)
    cache = rig.cache()
    cache.ensure_base("img")
    with FaultPlan() as plan:
        cache.ensure_base("img")
    assert [step.name for step in plan.trace] == ["fs.unlink", "fs.touch"]
    start = time.process_time()
    for _hit in range(500):
        cache.ensure_base("img")
    # a tenth of a millisecond where nobody else is at work
    assert (time.process_time() - start) / 500 < 0.001


# --- everything at once

MANY = {f"img-{number}": images.raw(f"soak {number}") for number in range(3)}
EXPECTED = (DiskExistsError, DiskNotFoundError, BaseInUseError, BaseNotFoundError)
"""What a driver hears when others remove what it works on."""


class Soak:
    """Threads that do everything to three images and six disks until the time is up."""

    def __init__(self, rig: Rig, seed: int) -> None:
        self.rig = rig
        self.seed = seed
        self.until = time.monotonic() + SOAK_SECONDS
        self.failures: list[BaseException] = []
        self.done = 0

    def run(self) -> int:
        """How many calls came to their end; what was unexpected is raised."""
        cache = self.rig.cache()
        acts: list[Callable[[random.Random, ImageCache], object]] = [
            *(_soak_create, _soak_create, _soak_create, _soak_remove, _soak_remove, _soak_change),
            *(_soak_clean, _soak_recover, _soak_look),
        ]
        threads = [threading.Thread(target=self._loop, args=(number, act, cache)) for number, act in enumerate(acts)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.failures:
            raise self.failures[0]
        return self.done

    def _loop(self, number: int, act: Callable[[random.Random, ImageCache], object], cache: ImageCache) -> None:
        dice = random.Random(f"{self.seed} {number}")
        while time.monotonic() < self.until and not self.failures:
            try:
                act(dice, cache)
            except EXPECTED:
                pass
            except BaseException as err:  # noqa: BLE001 - reason: the test fails with it, in the main thread
                self.failures.append(err)
            self.done += 1


def _soak_create(dice: random.Random, cache: ImageCache) -> None:
    cache.create_root_disk(f"img-{dice.randrange(3)}", f"vm-{dice.randrange(6)}", size=SIZE)


def _soak_remove(dice: random.Random, cache: ImageCache) -> None:
    cache.remove_root_disk(f"vm-{dice.randrange(6)}")


def _soak_change(dice: random.Random, cache: ImageCache) -> None:
    if dice.random() < 0.5:
        cache.flatten_root_disk(f"vm-{dice.randrange(6)}")
    else:
        cache.attach_root_disk(f"img-{dice.randrange(3)}", f"vm-{dice.randrange(6)}")


def _soak_clean(dice: random.Random, cache: ImageCache) -> None:
    report = cache.cleanup(cache.plan_cleanup(max_idle=0))
    assert not report.failed, report
    time.sleep(dice.random() * 0.02)


def _soak_recover(dice: random.Random, cache: ImageCache) -> None:
    report = cache.recover()
    assert not report.failed, report
    time.sleep(dice.random() * 0.02)


def _soak_look(dice: random.Random, cache: ImageCache) -> None:
    assert cache.usage().complete
    list(cache.root_disks())
    cache.users(f"img-{dice.randrange(3)}")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_everything_at_once(kind: str, tmp_path: Path) -> None:
    """Two processes of many threads make, change, remove, clean and recover: nothing breaks, all is whole at last."""
    rig = Rig(tmp_path, kind, MANY)
    with child(Soak(rig, 1).run) as first, child(Soak(rig, 2).run) as second:
        assert min(first.result(), second.result()) > 0
    rig.check("after the soak")
    report = rig.cache().recover()
    assert not report.failed, report
    rig.check("after the soak, recovered")
    rig.check_tidy("after the soak, recovered")

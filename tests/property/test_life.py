"""The life of a cache by a state machine: after every step, all that is promised of bases, disks and figures holds."""

from __future__ import annotations

import shutil
import tempfile
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from harness import images, places
from harness.images import MIB
from harness.rig import Rig
from harness.upkeep import DAY, HOUR, Clock, assert_counts_as_du, names, open_cache
from nova_imagecache import BaseInUseError, BaseNotFoundError, BasePinnedError, DiskExistsError, ImageCache

SIZE = 4 * MIB
SAMPLES = {f"img-{number}": images.raw(f"life {number}", MIB) for number in range(3)}
IMAGES = st.sampled_from(sorted(SAMPLES))
DISKS = st.sampled_from(["vm-0", "vm-1", "vm-2"])
KINDS = ("link", "path", "file")


class CacheLife(RuleBasedStateMachine):
    """A cache and, beside it, a plain model: which disk is of which image and where, and who pinned what."""

    kind = "link"

    def __init__(self) -> None:
        super().__init__()
        parent = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
        self.dir = Path(tempfile.mkdtemp(dir=parent))
        self.rig = Rig(self.dir, self.kind, SAMPLES)
        self.clock = Clock()
        self.cache: ImageCache = open_cache(self.rig, self.clock, max_idle=timedelta(days=1))
        self.disks: dict[str, str] = {}
        self.moved: dict[str, str] = {}
        self.pinned: set[str] = set()

    def teardown(self) -> None:
        shutil.rmtree(self.dir)

    @initialize()
    def begin(self) -> None:
        assert names(self.cache) == set()

    # --- what happens

    @rule(image_id=IMAGES)
    def ensure(self, image_id: str) -> None:
        assert self.cache.ensure_base(image_id).image_id == image_id
        assert image_id in names(self.cache)

    @rule(image_id=IMAGES, disk_id=DISKS)
    def create(self, image_id: str, disk_id: str) -> None:
        # a directory that waits elsewhere still has its id
        if disk_id in self.moved:
            return
        if self.disks.get(disk_id, image_id) != image_id:
            with pytest.raises(DiskExistsError):
                self.cache.create_root_disk(image_id, disk_id, size=SIZE)
            return
        disk = self.cache.create_root_disk(image_id, disk_id, size=SIZE)
        assert (disk.image_id, disk.virtual_size) == (image_id, SIZE)
        self.disks[disk_id] = image_id

    @rule(disk_id=DISKS)
    def remove(self, disk_id: str) -> None:
        if disk_id not in self.moved:
            self.cache.remove_root_disk(disk_id)
            self.disks.pop(disk_id, None)

    @precondition(lambda self: self.disks)
    @rule(data=st.data())
    def move_away(self, data: st.DataObject) -> None:
        disk_id = data.draw(st.sampled_from(sorted(self.disks)))
        (self.rig.disks / disk_id).rename(self.dir / f"{disk_id}_resize")
        self.moved[disk_id] = self.disks.pop(disk_id)

    @precondition(lambda self: self.moved)
    @rule(data=st.data())
    def move_back(self, data: st.DataObject) -> None:
        disk_id = data.draw(st.sampled_from(sorted(self.moved)))
        self.rig.disks.mkdir(exist_ok=True)
        (self.dir / f"{disk_id}_resize").rename(self.rig.disks / disk_id)
        self.disks[disk_id] = self.moved.pop(disk_id)

    @rule(image_id=IMAGES)
    def pin(self, image_id: str) -> None:
        self.cache.pin(image_id, "owner")
        self.pinned.add(image_id)

    @rule(image_id=IMAGES)
    def unpin(self, image_id: str) -> None:
        self.cache.unpin(image_id, "owner")
        self.pinned.discard(image_id)

    @rule(seconds=st.sampled_from([HOUR, DAY + HOUR, 10 * DAY, -HOUR, -10 * DAY]))
    def clock_moves(self, seconds: float) -> None:
        self.clock.move(seconds)

    @rule()
    def clean(self) -> None:
        before = {base.image_id: base for base in self.cache.bases()}
        plan = self.cache.plan_cleanup()
        report = self.cache.cleanup(plan)
        assert not report.failed
        self._may_be_gone(set(report.removed))
        for image_id in report.removed:
            marked = before[image_id].unused_since
            assert marked is not None, f"{image_id} went at the first pass"
            assert self.clock.now - marked >= DAY, f"{image_id} went before its time"
        assert set(before) - set(report.removed) == names(self.cache)
        assert {item.image_id for item in plan.items} == set(before)
        assert all(item.reason for item in plan.items)

    @rule(in_use=st.sets(IMAGES))
    def clean_at_once(self, in_use: set[str]) -> None:
        before = names(self.cache)
        report = self.cache.cleanup(self.cache.plan_cleanup(max_idle=0, in_use=in_use))
        assert not report.failed
        self._may_be_gone(set(report.removed))
        assert set(report.removed) == before - self._used() - self.pinned - in_use
        assert before - set(report.removed) == names(self.cache)

    @rule(image_id=IMAGES)
    def remove_base(self, image_id: str) -> None:
        there = image_id in names(self.cache)
        try:
            self.cache.remove_base(image_id)
        except BaseNotFoundError:
            assert not there
        except BaseInUseError:
            assert image_id in self._used()
        except BasePinnedError:
            assert image_id in self.pinned
        else:
            self._may_be_gone({image_id})

    @rule()
    def recover(self) -> None:
        report = self.cache.recover()
        assert not report.failed
        assert not report.restored
        if not self.moved:
            self.rig.check_tidy("recovered")

    @rule()
    def another_process(self) -> None:
        self.cache.close()
        self.cache = open_cache(self.rig, self.clock, max_idle=timedelta(days=1))

    # --- what holds

    def _used(self) -> set[str]:
        """The images whose bases disks depend on, wherever those are now."""
        if not self.rig.references:
            return set()
        return {*self.disks.values(), *self.moved.values()}

    def _may_be_gone(self, removed: set[str]) -> None:
        assert not removed & self._used(), "a base in use was removed"
        assert not removed & self.pinned, "a pinned base was removed"

    @invariant()
    def disks_and_bases_are_whole(self) -> None:
        """What bases() yields is what was published; each disk opens and reads its own image; all can be counted."""
        self.rig.check("after a step")
        assert {disk.disk_id: disk.image_id for disk in self.cache.root_disks()} == self.disks

    @invariant()
    def bases_in_use_are_there(self) -> None:
        assert self._used() <= names(self.cache)
        for image_id in self._used():
            assert self.cache.users(image_id)

    @invariant()
    def nothing_is_left(self) -> None:
        assert list(self.rig.root.glob("staging/*")) == []
        assert list(self.rig.root.glob("trash/*")) == []

    @invariant()
    def figures_are_true(self) -> None:
        usage = self.cache.usage()
        assert usage.base_count == len(names(self.cache))
        assert_counts_as_du(self.rig, usage, "after a step")
        idle = names(self.cache) - self._used() - self.pinned
        assert usage.reclaimable == sum(self.cache.base_usage(image_id).allocated for image_id in idle)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_life_of_a_cache(kind: str, tmp_path: Path) -> None:
    """Twenty lives of twenty steps for each way in which disks refer to their bases."""
    machine = type(f"CacheLife{kind.title()}", (CacheLife,), {"kind": kind})
    with places.quick(tmp_path):
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=20, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
            ),
        )

"""Two disks of one instance lie in one directory: the second waits for the first as its own call wants to wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from harness import images
from harness.children import run_to_death
from harness.images import MIB
from harness.rig import Rig
from nova_imagecache import CancelledError, DeadlineError, LockTimeoutError, RootDisk
from nova_imagecache.testing import FaultPlan

SIZE = 64 * MIB


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    rig = Rig(tmp_path, "file", {"img": images.raw("two disks of one instance")})
    rig.cache().ensure_base("img")
    return rig


@pytest.fixture
def copying(rig: Rig) -> Iterator[Callable[[], RootDisk]]:
    """While the test runs, another thread is in the middle of the copy of vm/disk; calling it lets that end."""
    plan = FaultPlan()
    pause = plan.pause("fs.create", match="/.disk.", nth=2, when="after")  # the record's, then the copy
    with ThreadPoolExecutor(1) as pool, plan:
        first: Future[RootDisk] = pool.submit(rig.cache().create_root_disk, "img", "vm", size=SIZE)
        pause.wait()

        def end() -> RootDisk:
            pause.release()
            return first.result(60)

        yield end


def test_a_second_disk_is_made_after_the_first(rig: Rig, copying: Callable[[], RootDisk]) -> None:
    """Both come to be; neither is in the other's way."""
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(rig.cache().create_root_disk, "img", "vm", name="disk.rescue", size=SIZE)
        time.sleep(0.2)
        assert not second.done()
        assert copying().name == "disk"
        assert second.result(60).name == "disk.rescue"
    rig.check("both")
    rig.check_tidy("both")


def test_its_deadline_ends_the_wait(rig: Rig, copying: Callable[[], RootDisk]) -> None:
    """The call's own time counts, not a time that the library thinks a copy takes."""
    started = time.monotonic()
    with pytest.raises(DeadlineError):
        rig.cache().create_root_disk("img", "vm", name="disk.rescue", size=SIZE, deadline=0.5)
    assert time.monotonic() - started < 10
    copying()
    rig.check_tidy("too late")


def test_cancel_ends_the_wait(rig: Rig, copying: Callable[[], RootDisk]) -> None:
    """Within the time of a few polls."""
    cancel = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(rig.cache().create_root_disk, "img", "vm", name="disk.rescue", size=SIZE, cancel=cancel)
        time.sleep(0.2)
        cancel.set()
        assert isinstance(second.exception(10), CancelledError)
    copying()
    rig.check_tidy("cancelled")


@pytest.mark.parametrize(
    "act",
    [
        lambda cache: cache.create_root_disk("img", "vm", name="disk.rescue", size=SIZE),
        lambda cache: cache.remove_root_disk("vm", name="disk.rescue"),
    ],
    ids=["create", "remove"],
)
def test_lock_timeout_is_the_configured_one(
    rig: Rig, copying: Callable[[], RootDisk], act: Callable[[object], object]
) -> None:
    """A holder that makes no progress for that long is given up, whatever waits for it."""
    started = time.monotonic()
    with pytest.raises(LockTimeoutError) as caught:
        act(rig.cache(lock_timeout=0.5))
    assert time.monotonic() - started < 10
    assert caught.value.path == str(rig.disks / "vm")
    copying()
    rig.check_tidy("given up")


@pytest.mark.parametrize("name", ["disk", "disk.rescue"])
def test_a_directory_that_another_is_first_to_hold(name: str, tmp_path: Path) -> None:
    """Who made it comes second, to the same disk or to another: its name is durable, and it goes with the last disk."""
    rig = Rig(tmp_path, "link", {"img": images.raw("one directory")})
    rig.cache().ensure_base("img")
    plan = FaultPlan()
    made = plan.pause("fs.mkdir", match="disks/vm", when="after")
    with plan, ThreadPoolExecutor(1) as pool:
        maker = pool.submit(rig.cache().create_root_disk, "img", "vm", size=SIZE)
        made.wait()
        rig.cache().create_root_disk("img", "vm", name=name, size=SIZE)
        synced = [step.targets for step in plan.trace if step.name == "fs.fsync_dir"]
        assert (str(rig.disks),) in synced
        made.release()
        maker.result(60)
    for each in sorted({"disk", name}):
        assert (rig.disks / "vm").is_dir()
        rig.cache().remove_root_disk("vm", name=each)
    assert not (rig.disks / "vm").exists()


def test_a_directory_that_a_dead_maker_left_is_made_durable(tmp_path: Path) -> None:
    """It died when the directory and its record were there, and no more."""
    rig = Rig(tmp_path, "link", {"img": images.raw("one directory")})
    rig.cache().ensure_base("img")

    def make() -> None:
        with FaultPlan().kill("fs.fsync_dir", match=str(rig.disks)):
            rig.cache().create_root_disk("img", "vm", size=SIZE)

    assert run_to_death(make, "while it made a disk")
    for name, expected in (("disk", 1), ("disk.rescue", 0)):
        with FaultPlan() as plan:
            rig.cache().create_root_disk("img", "vm", name=name, size=SIZE)
        synced = [step for step in plan.trace if step.name == "fs.fsync_dir" and step.targets == (str(rig.disks),)]
        assert len(synced) == expected, name


def test_the_last_other_reference_may_go_while_a_disk_is_attached(tmp_path: Path) -> None:
    """Two disks referred to one base by its path; one is attached elsewhere, the other removed meanwhile."""
    same = images.raw("the same bytes")
    rig = Rig(tmp_path, "path", {"img": same, "twin": same})
    cache = rig.cache()
    cache.ensure_base("twin")
    for disk_id in ("vm", "neighbour"):
        cache.create_root_disk("img", disk_id, size=SIZE)
    plan = FaultPlan()
    forgetting = plan.pause("fs.fsync_dir", match="users/img")
    with plan, ThreadPoolExecutor(1) as pool:
        attaching = pool.submit(rig.cache().attach_root_disk, "twin", "vm")
        forgetting.wait()
        rig.cache().remove_root_disk("neighbour")
        forgetting.release()
        assert attaching.result(60).image_id == "twin"
    rig.check("attached")
    rig.check_tidy("attached")

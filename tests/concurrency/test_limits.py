"""Limits while many images come in at once: they hold at every moment, and everybody is served or told the figures."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import pytest

from harness import images, places
from harness.children import child
from harness.images import MIB, Sample
from harness.rig import Rig
from harness.upkeep import DAY, Clock, assert_counts_as_du, counted, dense, last_used, names, open_cache
from nova_imagecache import FileLocation, NoSpaceError
from nova_imagecache.testing import FakeSource, FaultPlan
from services.require import require

TEN = {f"img-{number}": dense(f"cold {number}", MIB) for number in range(10)}
AROUND = 32 * 1024
"""What stands around one base on the storage: directories, record, reservation."""

Outcome = dict[str, NoSpaceError | None]


class Sampler:
    """Looks at a figure all the time, and keeps the largest."""

    def __init__(self, figure: Callable[[], int]) -> None:
        self._figure = figure
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self.largest = 0
        self.looks = 0

    def _look(self) -> None:
        while not self._stop.is_set():
            self.largest = max(self.largest, self._figure())
            self.looks += 1

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop.set()
        self._thread.join()


def _ensure(rig: Rig, image_id: str, **limits: Any) -> NoSpaceError | None:
    source = FakeSource({image_id: rig.samples[image_id].fake}, chunk_size=16384)
    with open_cache(rig, source=source, max_concurrent_fetches=10, **limits) as cache:
        try:
            cache.ensure_base(image_id)
        except NoSpaceError as err:
            return err
    return None


def _threads(rig: Rig, limits: dict[str, Any]) -> Outcome:
    source = FakeSource({name: sample.fake for name, sample in rig.samples.items()}, chunk_size=16384)
    with open_cache(rig, source=source, max_concurrent_fetches=10, **limits) as cache:
        outcome: Outcome = {}
        for result in cache.ensure_bases(TEN):
            assert result.error is None or isinstance(result.error, NoSpaceError), result
            outcome[result.image_id] = result.error
    return outcome


def _processes(rig: Rig, limits: dict[str, Any]) -> Outcome:
    def one(image_id: str) -> Callable[[], NoSpaceError | None]:
        return lambda: _ensure(rig, image_id, **limits)

    with ExitStack() as stack:
        at_work = {image_id: stack.enter_context(child(one(image_id))) for image_id in TEN}
        return {image_id: process.result() for image_id, process in at_work.items()}


WAYS = {"threads": _threads, "processes": _processes}


def _judge(rig: Rig, outcome: Outcome, fits: range) -> None:
    for image_id, error in outcome.items():
        if error is not None:
            assert error.image_id == image_id
            assert None not in (error.needed, error.free, error.pinned, error.in_use)
            assert error.needed is not None
            assert error.free is not None
            assert error.needed > error.free
    there = {image_id for image_id, error in outcome.items() if error is None}
    with rig.cache() as cache:
        assert names(cache) == there
        assert len(there) in fits, f"{len(there)} of ten"
        assert_counts_as_du(rig, cache.usage(), "ten at once")
    rig.check("ten at once")
    rig.check_tidy("ten at once")


def _packed() -> dict[str, Sample]:
    """Ten images that unpack to 8 MiB each; made when they are needed, since every fork copies what a process holds."""
    return {f"img-{number}": images.qcow2.__wrapped__(f"cold {number}", 8 * MIB) for number in range(10)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", ["raw", "packed"])
def test_ten_cold_images_keep_max_bytes(form: str, way: str, quick_path: Path) -> None:
    """Four of ten fit: at no moment do bases and what is staged take more, and some came in."""
    rig = Rig(quick_path, "link", TEN if form == "raw" else _packed())
    limit = 4 * MIB + 10 * AROUND
    with Sampler(lambda: counted(rig)) as sampler:
        outcome = WAYS[way](rig, {"max_bytes": limit})
    assert sampler.looks > 10
    assert sampler.largest <= limit + 10 * AROUND
    # of packed ones the download and what it unpacks to count while both are there
    _judge(rig, outcome, range(3, 5) if form == "raw" else range(1, 8))


@contextmanager
def _small(where: Path, size: int) -> Iterator[Path]:
    """A filesystem of its own in memory."""
    where.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(where)], capture_output=True, text=True, check=False
    )
    require(None if mounted.returncode == 0 else f"no filesystem can be mounted: {mounted.stderr.strip()}")
    try:
        yield where
    finally:
        subprocess.run(["umount", str(where)], check=True)


def _taken(where: Path) -> int:
    figures = os.statvfs(where)
    return (figures.f_blocks - figures.f_bavail) * figures.f_frsize


@pytest.mark.services
@pytest.mark.parametrize("way", WAYS)
def test_ten_cold_images_keep_min_free_bytes(way: str, tmp_path: Path) -> None:
    """On a filesystem of 8 MiB, 4 of which stay free: they are free at every moment."""
    with _small(tmp_path / "small", 8 * MIB) as where:
        rig = Rig(where, "link", TEN)
        rig.scratch = tmp_path
        with Sampler(lambda: _taken(where)) as sampler:
            outcome = WAYS[way](rig, {"min_free_bytes": 4 * MIB})
        assert sampler.largest <= 4 * MIB + 10 * AROUND
        _judge(rig, outcome, range(2, 4))


@pytest.mark.parametrize("way", WAYS)
def test_ten_cold_images_that_fit_all_come_in(way: str, quick_path: Path) -> None:
    """Nobody is refused for what another one promised and has written, or for a base that is counted twice."""
    rig = Rig(quick_path, "link", TEN)
    outcome = WAYS[way](rig, {"max_bytes": 10 * MIB + 10 * 2 * AROUND})
    assert set(outcome.values()) == {None}


@pytest.mark.parametrize("way", WAYS)
def test_ten_cold_images_evict_idle_ones_only(way: str, quick_path: Path) -> None:
    """Four old bases, one in use and one pinned: the two others make room, and the new ones do not evict each other."""
    old = {f"old-{number}": dense(f"old {number}", MIB) for number in range(4)}
    rig = Rig(quick_path, "link", TEN | old)
    clock = Clock()
    with rig.cache() as cache:
        for number, image_id in enumerate(old):
            cache.ensure_base(image_id)
            last_used(rig, image_id, clock.now - (9 - number) * DAY)
        cache.create_root_disk("old-0", "vm", size=4 * MIB)
        last_used(rig, "old-0", clock.now - 9 * DAY)
        cache.pin("old-1", "me")
    limit = 4 * MIB + 10 * AROUND
    with Sampler(lambda: counted(rig)) as sampler:
        outcome = WAYS[way](rig, {"max_bytes": limit})
    assert sampler.largest <= limit + 10 * AROUND
    there = {image_id for image_id, error in outcome.items() if error is None}
    with rig.cache() as cache:
        assert names(cache) == {"old-0", "old-1", *there}
        assert len(there) == 2
    rig.check("evicted")
    rig.check_tidy("evicted")


# --- full in the middle


def _full_once(where: Path, rig: Rig, step: str, match: str, **config: Any) -> None:
    """Fetch "new" while others fill the storage; what they wrote stays."""
    plan = FaultPlan()
    pause = plan.pause(step, match=match)
    with plan, ThreadPoolExecutor(1) as pool:
        fetching = pool.submit(open_cache(rig, **config).ensure_base, "new")
        pause.wait()
        free = os.statvfs(where).f_bavail * os.statvfs(where).f_frsize
        (where / "others").write_bytes(bytes(max(free - 256 * 1024, 0)))
        pause.release()
        fetching.result(60)


FULL = {"raw": dense("new", 2 * MIB), "packed": images.qcow2("new", 8 * MIB)}


@pytest.mark.services
@pytest.mark.parametrize("form", FULL)
def test_a_storage_that_fills_up_in_the_middle(form: str, tmp_path: Path) -> None:
    """Others wrote to it meanwhile: an idle base goes, and the second try comes to its end. Never a third."""
    with _small(tmp_path / "small", 10 * MIB) as where:
        rig = Rig(where, "link", {"idle": dense("idle", 4 * MIB), "new": FULL[form]})
        rig.scratch = tmp_path
        rig.cache().ensure_base("idle")
        last_used(rig, "idle", Clock().now - DAY)
        _full_once(where, rig, "fs.write", "disk")
        with rig.cache() as cache:
            assert names(cache) == {"new"}
        (where / "others").unlink()
        rig.check("full in the middle")
        rig.check_tidy("full in the middle")


@pytest.mark.services
@pytest.mark.parametrize("form", FULL)
def test_a_storage_that_stays_full(form: str, tmp_path: Path) -> None:
    """Nothing can go: the error comes out, nothing is left, and the base in use is whole."""
    with _small(tmp_path / "small", 10 * MIB) as where:
        rig = Rig(where, "link", {"used": dense("used", 4 * MIB), "new": FULL[form]})
        rig.scratch = tmp_path
        rig.cache().create_root_disk("used", "vm", size=4 * MIB)
        last_used(rig, "used", Clock().now - DAY)
        with pytest.raises(NoSpaceError) as caught:
            _full_once(where, rig, "fs.write", "disk")
        assert caught.value.image_id == "new"
        (where / "others").unlink()
        with rig.cache() as cache:
            assert names(cache) == {"used"}
            rig.check("still full")
            rig.check_tidy("still full")
            assert isinstance(cache.ensure_base("new").location, FileLocation)


@pytest.mark.parametrize("step", ["fs.mkdir", "fs.create", "fs.write", "fs.fsync"])
@pytest.mark.parametrize("form", FULL)
def test_full_once_at_each_kind_of_step(form: str, step: str, tmp_path: Path) -> None:
    """Whatever of a fetch finds the storage full: with room to be made, it is tried once more."""
    with places.quick(tmp_path) as directory:
        rig = Rig(directory, "link", {"idle": dense("idle", MIB), "new": FULL[form]})
        rig.cache().ensure_base("idle")
        last_used(rig, "idle", Clock().now - DAY)
        with FaultPlan().fail(step, match="new.", nth=1):
            rig.cache().ensure_base("new")
        with rig.cache() as cache:
            assert names(cache) == {"new"}
        rig.check("full once")
        rig.check_tidy("full once")

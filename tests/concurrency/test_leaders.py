"""A leader that cannot go on ends alone; those who wait go on, see how far it is, and do not wait for the dead."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest

from harness import images
from harness.children import child
from harness.images import MIB
from harness.rig import Rig
from harness.waiting import Gate, GatedSource, until
from nova_imagecache import (
    BaseImage,
    CacheConfig,
    CancelledError,
    DeadlineError,
    DiskTooSmallError,
    FileLocation,
    ImageCache,
    ImageCacheError,
    ImageInfo,
    ImageRejectedError,
    LockTimeoutError,
    Progress,
    SourceForbiddenError,
)
from nova_imagecache.testing import FakeImage, FakeSource

SAMPLE = images.qcow2("led", 4 * MIB)
SAMPLES = {"img": SAMPLE}


@pytest.fixture
def gate() -> Iterator[Gate]:
    """A gate that is open in the end, so that no thread is left behind."""
    made = Gate()
    yield made
    made.open()
    time.sleep(0.05)


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path, "link", SAMPLES)


class RefusedSource(GatedSource):
    """Its token is refused, after a while."""

    def get(self, image_id: str) -> ImageInfo:
        self._gate.pass_through()
        raise SourceForbiddenError(image_id=image_id)


def _meet_deadline(cache: ImageCache, source: FakeSource, cancel: threading.Event) -> object:
    return cache.ensure_base("img", source=source, deadline=0.5)


def _be_cancelled(cache: ImageCache, source: FakeSource, cancel: threading.Event) -> object:
    return cache.ensure_base("img", source=source, cancel=cancel)


def _go_on(cache: ImageCache, source: FakeSource, cancel: threading.Event) -> object:
    return cache.ensure_base("img", source=source)


def _want_a_small_disk(cache: ImageCache, source: FakeSource, cancel: threading.Event) -> object:
    return cache.create_root_disk("img", "small", size=MIB, source=source)


LEADERS: dict[str, tuple[Callable[[ImageCache, FakeSource, threading.Event], object], type[ImageCacheError]]] = {
    "deadline": (_meet_deadline, DeadlineError),
    "cancel": (_be_cancelled, CancelledError),
    "token": (_go_on, SourceForbiddenError),
    "small-disk": (_want_a_small_disk, DiskTooSmallError),
}


def _lead(rig: Rig, gate: Gate, name: str, cache: ImageCache | None = None) -> type[ImageCacheError]:
    """Do what the leader of that name does, and say how it ended."""
    act, expected = LEADERS[name]
    source = (RefusedSource if name == "token" else GatedSource)(rig.source(), gate, after=0)
    cancel = threading.Event()
    if name == "cancel":
        threading.Timer(0.5, cancel.set).start()
    with pytest.raises(expected) as caught:
        act(cache or rig.cache(), source, cancel)
    return type(caught.value)


def _waiter(cache: ImageCache, source: FakeSource, seen: list[Progress]) -> BaseImage:
    return cache.ensure_base("img", source=source, progress=seen.append)


def _arrive_and_let_fail(name: str, gate: Gate, waiting: Future[BaseImage]) -> None:
    time.sleep(0.2)
    assert not waiting.done(), "the waiter did not wait"
    if name in ("token", "small-disk"):
        gate.open()


@pytest.mark.parametrize("name", LEADERS)
def test_a_leading_thread_fails_alone(name: str, rig: Rig, gate: Gate) -> None:
    """A thread that leads and cannot go on hears so; the thread that waited fetches the image with its own source."""
    cache = rig.cache()
    source = rig.source()
    with ThreadPoolExecutor(2) as pool:
        leading = pool.submit(_lead, rig, gate, name, cache)
        until(lambda: gate.arrived, "the leader's stream")
        waiting = pool.submit(_waiter, cache, source, [])
        _arrive_and_let_fail(name, gate, waiting)
        assert leading.result(30) is LEADERS[name][1]
        base = waiting.result(30)
    assert base.digest == SAMPLE.digest
    assert source.opens == 1, "the waiter used its own source"
    rig.check(name)
    rig.check_tidy(name)


@pytest.mark.parametrize("name", LEADERS)
def test_a_leading_process_fails_alone(name: str, rig: Rig, gate: Gate) -> None:
    """A process that leads and cannot go on hears so; the process that waited fetches the image."""
    source = rig.source()
    with child(lambda: _lead(rig, gate, name)) as leader:
        until(lambda: gate.arrived, "the leader's stream")
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(_waiter, rig.cache(), source, [])
            _arrive_and_let_fail(name, gate, waiting)
            assert leader.result() is LEADERS[name][1]
            base = waiting.result(30)
    assert base.digest == SAMPLE.digest
    assert source.opens == 1
    rig.check(name)
    rig.check_tidy(name)


def test_a_bad_image_is_everybodys(tmp_path: Path, gate: Gate) -> None:
    """What is wrong with the image itself is not tried again by each who waited with the same source."""
    rig = Rig(tmp_path, "link", {"img": images.Sample(guest=b"", served=b"no qcow2" * 8192, disk_format="qcow2")})
    cache = rig.cache()
    source = GatedSource(rig.source(), gate, after=0)
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(cache.ensure_base, "img", source=source) for _number in range(8)]
        until(lambda: gate.arrived, "the leader's stream")
        time.sleep(0.2)
        gate.open()
        for future in futures:
            with pytest.raises(ImageRejectedError):
                future.result(30)
    assert source.opens == 1
    rig.check_tidy("after a bad image")


def test_waiters_see_how_far_it_is(rig: Rig, gate: Gate) -> None:
    """Whoever waits for another process is told what that one has fetched, of how much."""
    sample = rig.samples["img"] = images.raw("followed", 8 * MIB)
    total = len(sample.served)
    seen: list[Progress] = []
    source = GatedSource(rig.source(), gate, after=total // 2)
    with child(lambda: rig.cache(source).ensure_base("img") and None) as leader:
        until(lambda: gate.arrived, "the leader's stream")
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(_waiter, rig.cache(), rig.source(), seen)
            until(lambda: any(one.stage == "wait" for one in seen), "progress")
            until(lambda: any(one.total == total and one.done > 0 for one in seen), "the leader's figures")
            gate.open()
            waiting.result(30)
        leader.result()
    assert {one.stage for one in seen} == {"wait"}


def test_a_leader_that_hangs(rig: Rig, gate: Gate) -> None:
    """Whoever waits for a process that makes no progress gets LockTimeoutError; the process is not harmed by it."""
    with child(lambda: rig.cache(GatedSource(rig.source(), gate, after=0)).ensure_base("img") and None) as leader:
        until(lambda: gate.arrived, "the leader's stream")
        leader.suspend()
        with pytest.raises(LockTimeoutError) as caught:
            rig.cache(lock_timeout=timedelta(seconds=0.5)).ensure_base("img")
        assert caught.value.waited >= 0.5
        assert caught.value.path.startswith(str(rig.root))
        assert caught.value.image_id == "img"
        gate.open()
        leader.resume()
        leader.result()
    assert rig.cache().get_base("img").digest == SAMPLE.digest
    rig.check_tidy("after a leader that hung")


def test_a_holder_of_a_disk_that_hangs(rig: Rig, gate: Gate) -> None:
    """The same for the lock of a root disk that is there; a new one needs none."""
    disk = rig.cache().create_root_disk("img", "vm")

    def hold() -> None:
        with rig.cache()._engine.disk_lock("vm", "disk"):
            gate.pass_through()

    with child(hold) as holder:
        until(lambda: gate.arrived, "the holder")
        with pytest.raises(LockTimeoutError) as caught:
            rig.cache(lock_timeout=timedelta(seconds=0.3)).resize_root_disk("vm", size=2 * disk.virtual_size)
        assert caught.value.disk_id == "vm"
        with pytest.raises(DeadlineError):
            rig.cache().attach_root_disk("img", "vm", deadline=0.3)
        rig.cache().create_root_disk("img", "vm", name="disk.rescue")
        gate.open()
        holder.result()
    assert rig.cache().resize_root_disk("vm", size=2 * disk.virtual_size).virtual_size == 2 * disk.virtual_size
    rig.check("after a holder that hung")


def test_a_leader_that_makes_progress_is_waited_for(rig: Rig) -> None:
    """The clock of whoever waits starts again whenever the leader gets on, however long the whole takes."""
    sample = images.raw("slow", 8 * MIB)
    rig.samples["img"] = sample

    class Slow(FakeSource):
        @contextmanager
        def open(self, image: ImageInfo, offset: int = 0) -> Iterator[Iterator[bytes]]:
            def chunks() -> Iterator[bytes]:
                for number in range(8):
                    yield sample.served[number * MIB : (number + 1) * MIB]
                    time.sleep(0.4)

            yield chunks()

    slow = Slow({"img": sample.fake})
    with child(lambda: rig.cache(slow).ensure_base("img") and None) as leader:
        until(lambda: list(rig.root.glob("staging/img.*/disk")), "the leader")
        base = rig.cache(lock_timeout=timedelta(seconds=2)).ensure_base("img")
        leader.result()
    assert base.digest == sample.digest


def test_a_leader_that_dies(rig: Rig, gate: Gate) -> None:
    """The death of the process that leads is noticed at once, not after a time-out: a waiter leads on."""
    source = rig.source()
    with child(lambda: rig.cache(GatedSource(rig.source(), gate, after=0)).ensure_base("img") and None) as leader:
        until(lambda: gate.arrived, "the leader's stream")
        with ThreadPoolExecutor(1) as pool:
            # an hour without progress would be granted
            waiting = pool.submit(_waiter, rig.cache(lock_timeout=timedelta(hours=1)), source, [])
            time.sleep(0.2)
            assert not waiting.done()
            leader.kill()
            base = waiting.result(30)
    assert base.digest == SAMPLE.digest
    assert source.opens == 1
    rig.check("after a leader died")
    assert rig.cache().recover().removed, "what the dead one had staged is swept"
    rig.check_tidy("after a leader died")


def test_the_deadline_of_many_images_is_that_of_the_call(rig: Rig) -> None:
    """Six images that stall, two at a time: no pair gets a deadline of its own; and what is there is a hit."""
    cache = rig.cache()
    cache.ensure_base("img")
    never = threading.Event()
    stalled = {f"stalled-{number}": FakeImage(data=b"x" * MIB, stall=never) for number in range(6)}
    config = CacheConfig(root=rig.root, disks_dir=rig.disks, backend="qcow2", max_concurrent_fetches=2)
    many = ImageCache(config, source=FakeSource(stalled), backend=rig.backend())
    start = time.monotonic()
    results = many.ensure_bases([*stalled, "img"], deadline=1.5)
    took = time.monotonic() - start
    never.set()
    assert took < 3
    assert [type(result.error) for result in results[:-1]] == [DeadlineError] * 6
    assert results[-1].base is not None


@pytest.mark.parametrize("name", ["deadline", "cancel"])
def test_nobody_waits_for_the_admission_lock_beyond_the_call(name: str, rig: Rig) -> None:
    """Whoever holds it stands still, and lock_timeout is an hour."""
    act, expected = LEADERS[name]
    cache = rig.cache()
    cache.recover()
    cancel = threading.Event()
    if name == "cancel":
        threading.Timer(0.5, cancel.set).start()
    start = time.monotonic()
    with cache._engine.locks.admission(), pytest.raises(expected):
        act(rig.cache(), rig.source(), cancel)
    assert time.monotonic() - start < 10


def test_cancel_ends_the_wait_for_a_base(rig: Rig) -> None:
    """Somebody works on the base that is to be repaired, or was found damaged."""
    cache = rig.cache()
    location = cache.ensure_base("img").location
    assert isinstance(location, FileLocation)
    lock = cache._engine.locks.base("img")
    cancel = threading.Event()
    cancel.set()
    assert lock.attempt()
    try:
        with pytest.raises(CancelledError):
            rig.cache().repair_base("img", cancel=cancel)
        location.path.chmod(0o600)
        with location.path.open("r+b") as file:
            file.write(b"damaged")
        cancel.clear()
        threading.Timer(1, cancel.set).start()
        with pytest.raises(CancelledError):
            rig.cache().verify_base("img", cancel=cancel)
    finally:
        lock.release()

"""The keeper of the limits: what is promised, what is evicted to make room, and what is refused."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness import places
from harness.children import child
from harness.images import MIB, qemu_img
from harness.rig import Rig
from harness.upkeep import DAY, HOUR, MINUTE, Clock, Events, allocated, dense, last_used, names, open_cache
from harness.waiting import Gate, until
from nova_imagecache import (
    BaseImage,
    CacheConfig,
    Capacity,
    DeadlineError,
    DiskUsage,
    DiskUser,
    ImageCache,
    NoSpaceError,
    Pin,
)
from nova_imagecache._engine import Engine
from nova_imagecache.testing import FakeImage, FakeSource, FaultPlan, MemoryBackend

KIB = 1024
SAMPLES = {f"img-{number}": dense(f"kept {number}") for number in range(8)}
TIGHT = 256 * KIB
"""What is left beside whole images: too little for one more."""


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with places.quick(tmp_path) as directory:
        yield Rig(directory, "link", SAMPLES)


def _engine(rig: Rig, **config: Any) -> Engine:
    cache = open_cache(rig, **config)
    cache.recover()
    return cache._engine


def _entry(engine: Engine, image_id: str) -> Path:
    """A fetch's entry of staging; not held."""
    path = engine.root.staging / f"{image_id}.{os.urandom(8).hex()}"
    path.mkdir(parents=True, mode=0o700)
    return path


class Held:
    """Entries as live fetches have them."""

    def __init__(self) -> None:
        self._fds: list[int] = []

    def entry(self, engine: Engine, image_id: str) -> Path:
        path = _entry(engine, image_id)
        fd = os.open(path, os.O_RDONLY)
        fcntl.flock(fd, fcntl.LOCK_EX)
        self._fds.append(fd)
        return path

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)


@pytest.fixture
def held() -> Iterator[Held]:
    made = Held()
    yield made
    made.close()


def _cold(rig: Rig, clock: Clock, *image_ids: str, hours: int = 10) -> ImageCache:
    """A cache with bases that were used one hour after the other, the first one longest ago."""
    cache = open_cache(rig, clock)
    for number, image_id in enumerate(image_ids):
        cache.ensure_base(image_id)
        last_used(rig, image_id, clock.now - (hours - number) * HOUR)
    return cache


# --- reservations


def test_reservations_of_one_process_are_summed(rig: Rig, held: Held) -> None:
    """Three fetches of a MiB each fit into three and a quarter; a fourth is refused, though nothing was written yet."""
    engine = _engine(rig, max_bytes=3 * MIB + TIGHT)
    for number in range(3):
        engine.keeper.reserve(f"img-{number}", held.entry(engine, f"img-{number}"), MIB, "admission")
    with pytest.raises(NoSpaceError) as caught:
        engine.keeper.reserve("img-3", held.entry(engine, "img-3"), MIB, "admission")
    assert (caught.value.needed, caught.value.limit, caught.value.image_id) == (MIB, "max_bytes", "img-3")
    assert caught.value.free is not None
    assert caught.value.free <= TIGHT


def test_reservations_of_other_processes_are_summed(rig: Rig, held: Held) -> None:
    """What live children reserved counts; when they are dead it does not, though their entries are still there."""
    engine = _engine(rig, max_bytes=3 * MIB + TIGHT)
    gate = Gate()

    def reserve(number: int) -> Callable[[], None]:
        def work() -> None:
            mine = _engine(rig, max_bytes=3 * MIB + TIGHT)
            entry = Held().entry(mine, f"img-{number}")
            mine.keeper.reserve(f"img-{number}", entry, MIB, "admission")
            gate.pass_through()

        return work

    entry = held.entry(engine, "img-5")
    with child(reserve(0)) as one, child(reserve(1)) as two, child(reserve(2)) as three:
        until(lambda: gate.arrived == 3, "three reservations")
        with pytest.raises(NoSpaceError):
            engine.keeper.reserve("img-5", entry, MIB, "admission")
        for process in (one, two, three):
            process.kill()
        assert len(list(engine.root.staging.glob("img-[012].*"))) == 3, "nobody tidied up"
        engine.keeper.reserve("img-5", entry, 3 * MIB, "admission")
    gate.close()


def test_what_a_fetch_has_written_is_not_counted_twice(rig: Rig, held: Held) -> None:
    """Half of what another fetch reserved is on the storage: the other half alone is still promised."""
    engine = _engine(rig, max_bytes=3 * MIB + TIGHT)
    other = held.entry(engine, "img-0")
    engine.keeper.reserve("img-0", other, 2 * MIB, "admission")
    # the bytes may lie in another entry of the same image: the writer's
    (held.entry(engine, "img-0") / "disk").write_bytes(bytes(b"x" * MIB))
    engine.keeper.reserve("img-1", held.entry(engine, "img-1"), MIB, "admission")


def test_a_second_reservation_adds_to_what_was_written(rig: Rig, held: Held) -> None:
    """A conversion takes room beside its download: both count for the others."""
    engine = _engine(rig, max_bytes=3 * MIB + TIGHT)
    entry = held.entry(engine, "img-0")
    engine.keeper.reserve("img-0", entry, MIB, "admission")
    (entry / "download").write_bytes(b"x" * MIB)
    engine.keeper.reserve("img-0", entry, MIB, "conversion")
    with pytest.raises(NoSpaceError):
        engine.keeper.reserve("img-1", held.entry(engine, "img-1"), MIB + TIGHT, "admission")
    engine.keeper.reserve("img-1", held.entry(engine, "img-1"), MIB - TIGHT, "admission")


def test_what_is_only_ahead_makes_no_room(rig: Rig, held: Held) -> None:
    """It is promised where it is free; where it is not, nothing is promised."""
    engine = _engine(rig, max_bytes=3 * MIB)
    entry = held.entry(engine, "img-0")
    assert engine.keeper.reserve_free("img-0", entry, 2 * MIB, "conversion")
    assert not engine.keeper.reserve_free("img-1", held.entry(engine, "img-1"), 2 * MIB, "conversion")
    engine.keeper.reserve("img-2", held.entry(engine, "img-2"), MIB, "admission")


def test_a_damaged_reservation_stops_nobody(rig: Rig, held: Held) -> None:
    """Rubbish in a live fetch's entry counts as what it takes."""
    engine = _engine(rig, max_bytes=2 * MIB)
    (held.entry(engine, "img-0") / "reserved").write_bytes(b"\xff rubbish")
    engine.keeper.reserve("img-1", held.entry(engine, "img-1"), MIB, "admission")


def test_free_space_that_others_will_write_to_is_not_given_away(
    rig: Rig, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    """min_free_bytes is kept by the sum of all promises, not by what is free now."""
    engine = _engine(rig, min_free_bytes=256 * MIB)
    # others write to this filesystem, too
    capacity = replace(engine.backend.capacity(), free=320 * MIB)
    monkeypatch.setattr(engine.backend, "capacity", lambda: capacity)
    engine.keeper.reserve("img-0", held.entry(engine, "img-0"), 40 * MIB, "admission")
    with pytest.raises(NoSpaceError) as caught:
        engine.keeper.reserve("img-1", held.entry(engine, "img-1"), 40 * MIB, "admission")
    assert caught.value.limit == "min_free_bytes"


def test_a_published_base_is_not_counted_twice(rig: Rig) -> None:
    """Between publishing and tidying up, a fetch promises nothing any more: another one that fits is let in."""
    cache = open_cache(rig, max_bytes=2 * MIB + TIGHT)
    plan = FaultPlan()
    published = plan.pause("fs.fsync_dir", match="/bases")
    with plan, ThreadPoolExecutor(1) as pool:
        first = pool.submit(cache.ensure_base, "img-0")
        published.wait()
        try:
            cache.ensure_base("img-1")
        finally:
            published.release()
        first.result(60)
    assert names(cache) == {"img-0", "img-1"}


def test_bases_that_are_published_while_they_are_counted(rig: Rig, held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other is published between a look at staging and one at the bases: what fits is let in."""
    engine = _engine(rig, max_bytes=5 * MIB + TIGHT)
    cache = rig.cache()
    staged = []
    for number in range(4):
        image_id = f"img-{number}"
        cache.ensure_base(image_id)
        parked = held.entry(engine, image_id) / "parked"
        (rig.root / "bases" / image_id).rename(parked)
        staged.append((parked, rig.root / "bases" / image_id))
    capacity = engine.backend.capacity

    def publish_one() -> Capacity:
        if staged:
            parked, final = staged.pop()
            parked.rename(final)
            parked.parent.rmdir()
        return capacity()

    monkeypatch.setattr(engine.backend, "capacity", publish_one)
    engine.keeper.reserve("img-5", held.entry(engine, "img-5"), MIB, "admission")
    assert staged == []


# --- storage that is not on this host


class Far(MemoryBackend):
    """Storage of a cluster: it tells what all fetches have staged as one figure."""

    properties = replace(MemoryBackend.properties, local=False, shared=True)


def _far(tmp_path: Path, source: FakeSource, *, backend: MemoryBackend | None = None, max_bytes: int) -> ImageCache:
    config = CacheConfig(root=tmp_path / "root", backend="memory", max_bytes=max_bytes)
    return ImageCache(config, source=source, backend=backend or Far())


@pytest.mark.parametrize("backend", [Far, MemoryBackend])
def test_what_a_fetch_has_placed_elsewhere_counts(tmp_path: Path, held: Held, backend: type[MemoryBackend]) -> None:
    """Three MiB are staged, and one more is asked for: into four it fits, into less it does not."""
    store = backend()
    writer = store.stage_base("img", "raw")
    for number in range(3):
        writer.write_at(number * MIB, memoryview(b"x" * MIB))
    for room, fits in ((4 * MIB, True), (4 * MIB - 1, False)):
        engine = _far(tmp_path, FakeSource({}), backend=store, max_bytes=room)._engine
        engine.root.prepare()
        expected = contextlib.nullcontext() if fits else pytest.raises(NoSpaceError, match="max_bytes")
        with expected:
            engine.keeper.reserve("img", held.entry(engine, "img"), MIB, "fetch", placed=3 * MIB)
    writer.discard()


def test_what_others_have_placed_elsewhere_is_not_counted_beside_their_promise(tmp_path: Path, held: Held) -> None:
    """Another fetch promised two MiB and has placed one of them; we have placed one, and want one more: four in all."""
    store = Far()
    engine = _far(tmp_path, FakeSource({}), backend=store, max_bytes=4 * MIB)._engine
    engine.root.prepare()
    engine.keeper.reserve("other", held.entry(engine, "other"), 2 * MIB, "admission")
    writers = [store.stage_base(image_id, "raw") for image_id in ("other", "img")]
    for writer in writers:
        writer.write_at(0, memoryview(b"x" * MIB))
    mine = held.entry(engine, "img")
    engine.keeper.reserve("img", mine, MIB, "fetch", placed=MIB)
    with pytest.raises(NoSpaceError):
        engine.keeper.reserve("third", held.entry(engine, "third"), 1, "admission")
    for writer in writers:
        writer.discard()


def test_zeros_that_were_placed_take_nothing_elsewhere(tmp_path: Path, held: Held) -> None:
    """A fetch that is far into an image of holes has taken what the storage says, not what it has passed."""
    engine = _far(tmp_path, FakeSource({}), max_bytes=2 * MIB)._engine
    engine.root.prepare()
    engine.keeper.reserve("img", held.entry(engine, "img"), MIB, "fetch", placed=500 * MIB)


def test_a_compressed_image_does_not_grow_through_the_limit_elsewhere(tmp_path: Path) -> None:
    """What it unpacks to turns out bit by bit: each bit is added to what was placed before."""
    raw, packed = tmp_path / "raw", tmp_path / "packed"
    raw.write_bytes(b"".join(os.urandom(512) + b"p" * 3584 for _ in range(16 * MIB // 4096)))
    qemu_img("convert", "-f", "raw", "-O", "qcow2", "-c", "-o", "cluster_size=4096", str(raw), str(packed))
    source = FakeSource({"img": FakeImage(data=packed.read_bytes(), disk_format="qcow2")}, chunk_size=4096)
    with pytest.raises(NoSpaceError) as caught:
        _far(tmp_path, source, max_bytes=10 * MIB).ensure_base("img")
    assert (caught.value.stage, caught.value.limit) == ("conversion", "max_bytes")
    base = _far(tmp_path, source, max_bytes=17 * MIB).ensure_base("img")
    assert base.virtual_size == 16 * MIB


# --- eviction


def test_the_longest_idle_goes_first(rig: Rig) -> None:
    """One base is in the way of the next image: the one that was used longest ago goes, and the driver is told."""
    clock = Clock()
    _cold(rig, clock, "img-2", "img-0", "img-1")
    events = Events()
    cache = open_cache(rig, clock, on_event=events.append, max_bytes=3 * MIB + TIGHT)
    cache.ensure_base("img-3")
    assert names(cache) == {"img-0", "img-1", "img-3"}
    assert events.kinds("evicted") == ["img-2"]
    assert [event.kind for event in events if event.image_id == "img-2"] == ["evicted", "usage-changed"]


def test_no_more_goes_than_is_needed(rig: Rig) -> None:
    """Two idle bases make room for an image of their size; the third stays."""
    clock = Clock()
    _cold(rig, clock, "img-0", "img-1", "img-2")
    rig.samples["large"] = dense("large", 2 * MIB)
    cache = open_cache(rig, clock, max_bytes=3 * MIB + TIGHT)
    cache.ensure_base("large")
    assert names(cache) == {"img-2", "large"}


def test_min_free_bytes_evicts_as_well(rig: Rig) -> None:
    """The storage's room is made as the cache's own limit is kept."""
    clock = Clock()
    engine = _cold(rig, clock, "img-0", "img-1")._engine
    free = engine.backend.capacity().free
    rig.samples["large"] = dense("large", 2 * MIB)
    # others may write to this filesystem meanwhile: whether one base or both go is theirs
    cache = open_cache(rig, clock, min_free_bytes=free - MIB)
    try:
        cache.ensure_base("large")
    except NoSpaceError as err:
        assert err.limit == "min_free_bytes"  # noqa: PT017 - reason: another test took the room
    assert "img-0" not in names(cache)


class Finder:
    """Knows users of some images."""

    name = "a finder"

    def __init__(self, *image_ids: str) -> None:
        self.image_ids = image_ids

    def find(self, bases: Sequence[BaseImage]) -> Iterator[DiskUser]:
        for base in bases:
            if base.image_id in self.image_ids:
                yield DiskUser(image_id=base.image_id, known_by=self.name)


def _by_link(rig: Rig) -> None:
    rig.cache().create_root_disk("img-0", "vm")


def _by_path(rig: Rig) -> None:
    rig.options = {"reference": "path"}
    rig.cache().create_root_disk("img-0", "vm")


def _by_pin(rig: Rig) -> None:
    rig.cache().pin("img-0", "operator")


@pytest.mark.parametrize("protect", [_by_link, _by_path, _by_pin])
def test_what_is_in_use_or_pinned_is_never_evicted(rig: Rig, protect: Callable[[Rig], None]) -> None:
    """However long ago it was used: the younger one goes, and then nothing more fits."""
    clock = Clock()
    _cold(rig, clock, "img-0", "img-1")
    protect(rig)
    last_used(rig, "img-0", clock.now - 300 * DAY)
    cache = open_cache(rig, clock, max_bytes=2 * MIB + TIGHT)
    cache.ensure_base("img-2")
    assert names(cache) == {"img-0", "img-2"}
    clock.move(HOUR)
    cache.ensure_base("img-3")
    assert names(cache) == {"img-0", "img-3"}
    rig.check("evicted")


def test_what_a_finder_knows_is_never_evicted(rig: Rig) -> None:
    """Somebody beside the storage depends on the oldest one."""
    clock = Clock()
    _cold(rig, clock, "img-0", "img-1")
    cache = open_cache(rig, clock, user_finders=[Finder("img-0")], max_bytes=2 * MIB + TIGHT)
    cache.ensure_base("img-2")
    assert names(cache) == {"img-0", "img-2"}


def test_doubt_evicts_nothing(rig: Rig) -> None:
    """A finder that cannot tell keeps every base, and the refusal says that they stand in the way."""

    class Lost:
        name = "lost"

        def find(self, bases: Sequence[BaseImage]) -> Iterator[DiskUser]:
            raise ConnectionError("gone")

    clock = Clock()
    _cold(rig, clock, "img-0", "img-1")
    cache = open_cache(rig, clock, user_finders=[Lost()], max_bytes=2 * MIB + TIGHT)
    with pytest.raises(NoSpaceError) as caught:
        cache.ensure_base("img-2")
    assert names(cache) == {"img-0", "img-1"}
    assert caught.value.in_use is not None
    assert caught.value.in_use >= 2 * MIB


def test_what_was_used_within_five_minutes_is_never_evicted(rig: Rig) -> None:
    """Whoever ensured it is about to make a disk. A little later it may go."""
    clock = Clock()
    cache = open_cache(rig, clock, max_bytes=2 * MIB + TIGHT)
    cache.ensure_base("img-0")
    cache.ensure_base("img-1")
    with pytest.raises(NoSpaceError) as caught:
        cache.ensure_base("img-2")
    assert names(cache) == {"img-0", "img-1"}
    error = caught.value
    assert (error.needed, error.pinned, error.in_use) == (MIB, 0, 0)
    assert error.recent == cache.usage().reclaimable >= 2 * MIB
    assert "five minutes" in str(error)
    assert "--max-idle 0" in str(error)
    last_used(rig, "img-1", clock.now - 6 * MINUTE)
    cache.ensure_base("img-2")
    assert names(cache) == {"img-0", "img-2"}


def test_a_hit_is_a_use(rig: Rig) -> None:
    """A base that was ensured again just now stays; the other one goes."""
    clock = Clock()
    _cold(rig, clock, "img-0", "img-1")
    cache = open_cache(rig, clock, max_bytes=2 * MIB + TIGHT)
    cache.ensure_base("img-0")
    cache.ensure_base("img-2")
    assert names(cache) == {"img-0", "img-2"}


def test_a_use_between_the_two_looks_keeps_a_base(rig: Rig) -> None:
    """While the first base is purged somebody ensures the second one: it is looked at again, and stays."""
    clock = Clock()
    _cold(rig, clock, "img-0", "img-1")
    rig.samples["large"] = dense("large", 2 * MIB)
    cache = open_cache(rig, clock, max_bytes=2 * MIB + TIGHT)
    plan = FaultPlan()
    purging = plan.pause("fs.rmtree", match="trash")
    with plan, ThreadPoolExecutor(1) as pool:
        fetching = pool.submit(cache.ensure_base, "large")
        purging.wait()
        rig.cache().ensure_base("img-1")
        purging.release()
        with pytest.raises(NoSpaceError):
            fetching.result(60)
    assert names(cache) == {"img-1"}


def test_an_eviction_that_fails_goes_on_with_the_next(rig: Rig) -> None:
    """The oldest cannot be retired: the second oldest goes instead."""
    clock = Clock()
    _cold(rig, clock, "img-0", "img-1")
    cache = open_cache(rig, clock, max_bytes=2 * MIB + TIGHT)
    with FaultPlan().fail("fs.rename", match="bases/img-0", error=PermissionError(13, "no")):
        cache.ensure_base("img-2")
    assert names(cache) == {"img-0", "img-2"}


def test_a_busy_base_is_passed_over(rig: Rig) -> None:
    """Somebody holds the oldest one's lock: the next one goes."""
    clock = Clock()
    _cold(rig, clock, "img-0", "img-1")
    cache = open_cache(rig, clock, max_bytes=2 * MIB + TIGHT)
    lock = cache._engine.locks.base("img-0")
    assert lock.attempt()
    cache.ensure_base("img-2")
    lock.release()
    assert names(cache) == {"img-0", "img-2"}


def test_litter_goes_before_bases_do(rig: Rig) -> None:
    """What a dead fetch left in staging is swept, and that is enough."""
    clock = Clock()
    engine = _cold(rig, clock, "img-0")._engine
    (_entry(engine, "img-7") / "disk").write_bytes(b"x" * MIB)
    cache = open_cache(rig, clock, max_bytes=2 * MIB + TIGHT)
    cache.ensure_base("img-1")
    assert names(cache) == {"img-0", "img-1"}
    assert list(rig.root.glob("staging/*")) == []


def test_removals_that_died_go_before_bases_do(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies in the trash takes room as litter in staging does: it is swept, and that is enough."""
    clock = Clock()
    engine = _cold(rig, clock, "img-0", "img-1")._engine
    base = engine.backend.find_base("img-1")
    assert base is not None
    with child(lambda: rig.backend().retire_base(base) and None) as process:
        process.result()
    [retired] = rig.root.glob("trash/img-1.*")
    retired.rename(retired.with_name(f".{retired.name}"))  # it had its second look, and was being purged
    # what is free now is not enough, and with what the trash holds it is; others write to this filesystem, too
    size = allocated(rig.root) + MIB // 4
    cache = open_cache(rig, clock)
    capacity = cache._engine.backend.capacity
    monkeypatch.setattr(
        cache._engine.backend, "capacity", lambda: replace(capacity(), free=max(size - allocated(rig.root), 0))
    )
    cache.ensure_base("img-2")
    assert names(cache) == {"img-0", "img-2"}
    assert list(rig.root.glob("trash/*")) == []


def test_what_a_live_process_removes_is_left_to_it(rig: Rig) -> None:
    """Between its two looks a base lies in the trash: whoever sweeps beside it knows nothing of its finders."""
    backend = _cold(rig, Clock(), "img-0")._engine.backend
    base = backend.find_base("img-0")
    assert base is not None
    retired = backend.retire_base(base)
    report = rig.cache().recover()
    assert (report.removed, report.restored, report.alive) == ((), (), (f"trash/{retired.token}",))
    backend.restore_base(retired)
    assert names(rig.cache()) == {"img-0"}
    assert rig.cache().recover().alive == ()


def test_without_removal_nothing_is_evicted(rig: Rig) -> None:
    """``remove_unused`` off only observes: what does not fit is refused, with the figures, and every base stays."""
    clock = Clock()
    _cold(rig, clock, "img-0", "img-1")
    cache = open_cache(rig, clock, max_bytes=2 * MIB + TIGHT, remove_unused=False)
    with pytest.raises(NoSpaceError) as caught:
        cache.ensure_base("img-2")
    assert (caught.value.needed, caught.value.limit) == (MIB, "max_bytes")
    assert names(cache) == {"img-0", "img-1"}
    # by hand it may go all the same
    cache.remove_base("img-0")
    cache.ensure_base("img-2")


def test_many_evictions_ask_the_finders_a_few_times(rig: Rig) -> None:
    """All bases that must go are retired together: a look at thousands of disks is not made for each."""
    many = {f"many-{number:02}": SAMPLES["img-0"] for number in range(30)}
    rig.samples = {**{name: dense(f"small {name}", 64 * KIB) for name in many}, "large": dense("large", 2 * MIB)}
    clock = Clock()
    _cold(rig, clock, *many, hours=100)

    class Counting(Finder):
        looks = 0

        def find(self, bases: Sequence[BaseImage]) -> Iterator[DiskUser]:
            self.looks += 1
            return super().find(bases)

    finder = Counting("many-29")
    cache = open_cache(rig, clock, user_finders=[finder], max_bytes=2 * MIB + TIGHT)
    cache.ensure_base("large")
    assert "large" in names(cache)
    assert len(names(cache)) < 6
    assert finder.looks <= 4


def test_the_callers_deadline_is_watched_while_room_is_made(rig: Rig) -> None:
    """A finder that is slow: the caller hears of its deadline between two evictions, and nothing is half removed."""
    clock = Clock()
    _cold(rig, clock, "img-0", "img-1")
    rig.samples["large"] = dense("large", 2 * MIB)

    class Slow(Finder):
        def find(self, bases: Sequence[BaseImage]) -> Iterator[DiskUser]:
            time.sleep(0.3)
            return super().find(bases)

    cache = open_cache(rig, clock, user_finders=[Slow()], max_bytes=2 * MIB + TIGHT)
    with pytest.raises(DeadlineError):
        cache.ensure_base("large", deadline=0.1)
    assert names(cache) == {"img-0", "img-1"}
    assert list(rig.root.glob("trash/*")) == list(rig.root.glob("staging/*")) == []


def test_bases_are_measured_outside_the_lock(rig: Rig, held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that were measured before cost a look at their names while others wait: what a base takes never changes."""
    _cold(rig, Clock(), *(f"img-{number}" for number in range(6)))
    engine = _engine(rig, max_bytes=20 * MIB)
    measured: list[tuple[str, bool]] = []
    inside = False
    usage, admission = engine.backend.usage, engine.locks.admission

    @contextlib.contextmanager
    def locked(check: Callable[[], None]) -> Iterator[None]:
        nonlocal inside
        with admission(check):
            inside = True
            yield
            inside = False

    def measure(base: BaseImage) -> DiskUsage:
        measured.append((base.image_id, inside))
        return usage(base)

    monkeypatch.setattr(engine.backend, "usage", measure)
    monkeypatch.setattr(engine.locks, "admission", locked)
    for number in range(3):
        engine.keeper.reserve("img-7", held.entry(engine, f"img-7{number}"), MIB, "admission")
    assert sorted(measured) == [(f"img-{number}", False) for number in range(6)]
    # one that is replaced is measured again
    rig.samples["img-0"] = dense("other bytes", 2 * MIB)
    rig.cache().remove_base("img-0")
    rig.cache().ensure_base("img-0")
    engine.keeper.reserve("img-7", held.entry(engine, "img-79"), MIB, "admission")
    assert measured[6:] == [("img-0", False)]


# --- refusal


def test_what_cannot_fit_is_refused_with_the_figures(rig: Rig) -> None:
    """Needed, free, pinned and in use; nothing was fetched and nothing is left."""
    clock = Clock()
    _cold(rig, clock, "img-0", "img-1")
    rig.cache().create_root_disk("img-0", "vm")
    rig.cache().pin("img-1", "operator")
    last_used(rig, "img-0", clock.now - DAY)
    source = rig.source()
    cache = open_cache(rig, clock, source=source, max_bytes=2 * MIB + TIGHT)
    in_use, pinned = (cache.base_usage(image_id).allocated for image_id in ("img-0", "img-1"))
    with pytest.raises(NoSpaceError) as caught:
        cache.ensure_base("img-2")
    error = caught.value
    assert (error.needed, error.pinned, error.in_use, error.limit) == (MIB, pinned, in_use, "max_bytes")
    assert error.free is not None
    assert 0 <= error.free < MIB
    for figure in (error.needed, error.free, error.pinned, error.in_use):
        assert str(figure) in str(error)
    assert source.opens == 0
    assert list(rig.root.glob("staging/*")) == []
    assert cache.pins("img-1") == (Pin(image_id="img-1", owner="operator", until=None),)


def test_a_pinned_base_is_told_as_pinned_also_while_it_is_new(rig: Rig) -> None:
    """Whoever unpins it makes room, in five minutes."""
    cache = open_cache(rig, Clock(), max_bytes=2 * MIB + TIGHT)
    cache.ensure_base("img-0")
    cache.pin("img-0", "operator")
    cache.create_root_disk("img-1", "vm")
    pinned, in_use = (cache.base_usage(image_id).allocated for image_id in ("img-0", "img-1"))
    with pytest.raises(NoSpaceError) as caught:
        cache.ensure_base("img-2")
    assert (caught.value.pinned, caught.value.in_use, caught.value.recent) == (pinned, in_use, 0)


def test_what_can_never_fit_costs_no_base(rig: Rig) -> None:
    """An image larger than everything that may go is refused, and what is cached stays cached."""
    clock = Clock()
    _cold(rig, clock, "img-0", "img-1")
    rig.samples["huge"] = dense("huge", 4 * MIB)
    cache = open_cache(rig, clock, max_bytes=2 * MIB + TIGHT)
    with pytest.raises(NoSpaceError) as caught:
        cache.ensure_base("huge")
    assert caught.value.needed == 4 * MIB
    assert names(cache) == {"img-0", "img-1"}


def test_room_that_another_takes_is_made_again(rig: Rig) -> None:
    """What was evicted for one fetch is taken by another one first: the next idle base goes, until there are none."""
    clock = Clock()
    cache = _cold(rig, clock, "img-0", "img-1", "img-2")
    engine = open_cache(rig, clock, max_bytes=3 * MIB + TIGHT)._engine
    del cache
    plan = FaultPlan()
    evicted = plan.pause("fs.rmtree", match="trash", when="after")
    with plan, ThreadPoolExecutor(1) as pool:
        first = pool.submit(open_cache(rig, clock, max_bytes=3 * MIB + TIGHT).ensure_base, "img-3")
        evicted.wait()
        thief = Held()
        engine.keeper.reserve("img-4", thief.entry(engine, "img-4"), MIB, "admission")
        evicted.release()
        first.result(60)
    thief.close()
    assert names(rig.cache()) == {"img-2", "img-3"}


def test_full_while_other_bytes_are_replaced(rig: Rig) -> None:
    """Others fill the storage after the old bytes went: room is made, and the new ones are fetched once more."""
    clock = Clock()
    open_cache(rig, clock).ensure_bases(["img-0", "img-1"])
    clock.move(DAY)
    rig.samples["img-0"] = dense("kept anew")
    cache = open_cache(rig, clock)
    with FaultPlan().fail("fs.rename", match="bases/img-0", nth=2):  # the first takes the old bytes away
        base = cache.ensure_base("img-0", expect=rig.samples["img-0"].digest)
    assert base.digest == rig.samples["img-0"].digest
    assert names(cache) == {"img-0"}

"""Single flight: one fetches, the others wait, and nobody suffers for another's reasons."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from nova_imagecache._flight import Flights, Leader
from nova_imagecache._locks import Locks
from nova_imagecache._models import BaseImage, BaseRecord, Digest, FileLocation, Progress
from nova_imagecache._watch import Watch
from nova_imagecache.exceptions import (
    BackendError,
    CancelledError,
    DeadlineError,
    DiskTooSmallError,
    ImageCacheError,
    ImageCorruptError,
    ImageNotActiveError,
    ImageNotFoundError,
    ImageRejectedError,
    LockTimeoutError,
    NoSpaceError,
    SourceForbiddenError,
    SourceUnavailableError,
)

BASE = BaseImage(
    image_id="img",
    location=FileLocation(path=Path("/base")),
    record=BaseRecord(
        image_id="img",
        format="raw",
        virtual_size=512,
        size=512,
        source_format="raw",
        source_size=512,
        source_digest=None,
        evidence="none",
        made_by="stored",
        source="fake",
        fetched_at=0.0,
    ),
)

ALONE: list[ImageCacheError] = [
    DeadlineError(image_id="img"),
    CancelledError(image_id="img"),
    DiskTooSmallError(1, 2, image_id="img"),
    BackendError("it broke", image_id="img"),
]
SHARED: list[ImageCacheError] = [
    ImageRejectedError("bad", image_id="img"),
    ImageCorruptError(Digest("md5", "0" * 32), Digest("md5", "1" * 32), image_id="img"),
    ImageNotActiveError("queued", image_id="img"),
    NoSpaceError(needed=2, free=1, image_id="img"),
    SourceForbiddenError("401", image_id="img"),
    SourceUnavailableError("gone", image_id="img"),
    ImageNotFoundError(image_id="img"),
]


class Storage:
    """What the flights fetch into, and what they fetch: counted, held, failing as told."""

    def __init__(self) -> None:
        self.published = threading.Event()
        self.fetches: list[str] = []
        self.go = threading.Event()
        self.errors: list[ImageCacheError] = []

    def find(self) -> BaseImage | None:
        return BASE if self.published.is_set() else None

    def fetch(self, who: str) -> Callable[[Leader], BaseImage]:
        def run(leader: Leader) -> BaseImage:
            self.fetches.append(who)
            leader.note(len(self.fetches), 10)
            assert self.go.wait(20)
            if self.errors:
                raise self.errors.pop(0)
            self.published.set()
            return BASE

        return run


@pytest.fixture
def storage() -> Storage:
    return Storage()


@pytest.fixture
def flights(tmp_path: Path) -> Flights:
    return Flights(Locks(tmp_path, timeout=20))


def anything(_base: BaseImage) -> bool:
    return True


def join(
    flights: Flights, storage: Storage, who: str = "a", *, request: object = 1, watch: Watch | None = None
) -> BaseImage:
    fetch = storage.fetch(who)
    return flights.join("img", request, find=storage.find, accepts=anything, fetch=fetch, watch=watch or Watch("img"))


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_other_processes_are_told_ten_times_a_second(
    flights: Flights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first and the last bytes at once, what comes between when its turn has come: a note is a write to a file."""
    now, notes = [100.0], []
    monkeypatch.setattr("nova_imagecache._flight.time.monotonic", lambda: now[0])

    def fetch(leader: Leader) -> BaseImage:
        for done in (1, 2, 3, 8, 9, 10):
            now[0] += 0.11 if done == 8 else 0.001
            leader.note(done, 10)
            notes.append(Locks(tmp_path, timeout=20).base("img").peek())
        return BASE

    assert flights.join("img", 1, find=lambda: None, accepts=anything, fetch=fetch, watch=Watch("img")) == BASE
    assert notes == [(1, 10), (1, 10), (1, 10), (8, 10), (8, 10), (10, 10)]


def test_of_many_one_fetches(flights: Flights, storage: Storage) -> None:
    """All get what it publishes."""
    with ThreadPoolExecutor(16) as pool:
        futures = [pool.submit(join, flights, storage, str(n)) for n in range(16)]
        until(lambda: len(storage.fetches) == 1)
        time.sleep(0.1)
        storage.go.set()
        assert [future.result(20) for future in futures] == [BASE] * 16
    assert len(storage.fetches) == 1


def test_flights_over_one_root_are_one(tmp_path: Path, storage: Storage) -> None:
    """Two caches of one process, as two processes: the lock is between them."""
    several = [Flights(Locks(tmp_path, timeout=20)) for _ in range(4)]
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(join, flights, storage, str(n)) for n, flights in enumerate(several * 2)]
        until(lambda: len(storage.fetches) == 1)
        time.sleep(0.1)
        storage.go.set()
        assert [future.result(20) for future in futures] == [BASE] * 8
    assert len(storage.fetches) == 1


def test_what_was_published_while_one_took_the_lock_is_not_fetched_again(flights: Flights, storage: Storage) -> None:
    """The leader looks once more under the lock."""
    storage.published.set()
    assert join(flights, storage) == BASE
    assert storage.fetches == []


def test_different_images_fly_at_once(flights: Flights, storage: Storage) -> None:
    """One image's fetch holds up no other."""
    other = Storage()
    other.go.set()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(join, flights, storage)
        until(lambda: bool(storage.fetches))
        flights.join("other", 1, find=other.find, accepts=anything, fetch=other.fetch("b"), watch=Watch("other"))
        storage.go.set()
        assert future.result(20) == BASE


@pytest.mark.parametrize("error", ALONE, ids=lambda error: type(error).__name__)
def test_a_leader_that_fails_for_reasons_of_its_own_fails_alone(
    flights: Flights, storage: Storage, error: ImageCacheError
) -> None:
    """The next leads on."""
    storage.errors.append(error)
    with ThreadPoolExecutor(3) as pool:
        leader = pool.submit(join, flights, storage, "leader")
        until(lambda: bool(storage.fetches))
        followers = [pool.submit(join, flights, storage, f"follower{n}") for n in range(2)]
        time.sleep(0.1)
        storage.go.set()
        with pytest.raises(type(error)) as caught:
            leader.result(20)
        assert caught.value is error
        assert [future.result(20) for future in followers] == [BASE, BASE]
    assert len(storage.fetches) == 2
    assert storage.fetches[1].startswith("follower")


@pytest.mark.parametrize("error", SHARED, ids=lambda error: type(error).__name__)
def test_what_is_wrong_with_image_or_source_is_everybodys_error(
    flights: Flights, storage: Storage, error: ImageCacheError
) -> None:
    """Neither a bad image nor a dead service is asked once per waiter; each gets an error of its own."""
    storage.errors.append(error)
    with ThreadPoolExecutor(4) as pool:
        leader = pool.submit(join, flights, storage, "leader")
        until(lambda: bool(storage.fetches))
        followers = [pool.submit(join, flights, storage, "follower") for _ in range(3)]
        time.sleep(0.1)
        storage.go.set()
        raised = []
        for future in (leader, *followers):
            with pytest.raises(type(error)) as caught:
                future.result(20)
            raised.append(caught.value)
    assert len({id(one) for one in raised}) == 4
    assert {str(one) for one in raised} == {str(error)}
    assert all(one.__cause__ is error for one in raised[1:])
    assert storage.fetches == ["leader"]


@pytest.mark.parametrize("error", SHARED, ids=lambda error: type(error).__name__)
def test_another_request_does_not_share_the_error(flights: Flights, storage: Storage, error: ImageCacheError) -> None:
    """Another source, or another digest, may well succeed: a user's bad token costs nobody else the image."""
    storage.errors.append(error)
    with ThreadPoolExecutor(2) as pool:
        leader = pool.submit(join, flights, storage, "leader", request="source 1")
        until(lambda: bool(storage.fetches))
        follower = pool.submit(join, flights, storage, "follower", request="source 2")
        time.sleep(0.1)
        storage.go.set()
        with pytest.raises(type(error)):
            leader.result(20)
        assert follower.result(20) == BASE
    assert storage.fetches == ["leader", "follower"]


def test_an_error_is_not_remembered(flights: Flights, storage: Storage) -> None:
    """Whoever comes after it tries for itself."""
    storage.errors.append(ImageRejectedError("bad", image_id="img"))
    storage.go.set()
    with pytest.raises(ImageRejectedError):
        join(flights, storage)
    assert join(flights, storage) == BASE


def test_an_exception_that_is_not_ours_leaves_no_flight_behind(flights: Flights, storage: Storage) -> None:
    """Not even a KeyboardInterrupt."""

    def fetch(_leader: Leader) -> BaseImage:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        flights.join("img", 1, find=storage.find, accepts=anything, fetch=fetch, watch=Watch("img"))
    storage.go.set()
    assert join(flights, storage) == BASE


def leading(pool: ThreadPoolExecutor, flights: Flights, storage: Storage) -> Future[BaseImage]:
    """A leader at work."""
    future = pool.submit(join, flights, storage, "leader")
    until(lambda: bool(storage.fetches))
    return future


def test_a_followers_deadline_is_its_own(flights: Flights, storage: Storage) -> None:
    """The leader goes on."""
    with ThreadPoolExecutor(1) as pool:
        leader = leading(pool, flights, storage)
        with pytest.raises(DeadlineError):
            join(flights, storage, "follower", watch=Watch("img", deadline=0.1))
        storage.go.set()
        assert leader.result(20) == BASE


def test_a_followers_cancel_is_its_own(flights: Flights, storage: Storage) -> None:
    """It is seen while the follower waits."""
    cancel = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        leader = leading(pool, flights, storage)
        follower = pool.submit(join, flights, storage, "follower", watch=Watch("img", cancel=cancel))
        time.sleep(0.05)
        cancel.set()
        with pytest.raises(CancelledError):
            follower.result(20)
        storage.go.set()
        assert leader.result(20) == BASE
    assert storage.fetches == ["leader"]


def test_a_waiter_sees_what_another_way_published(flights: Flights, storage: Storage) -> None:
    """It looks for the base, not for the leader's end."""
    with ThreadPoolExecutor(2) as pool:
        leader = leading(pool, flights, storage)
        follower = pool.submit(join, flights, storage, "follower")
        time.sleep(0.05)
        storage.published.set()
        assert follower.result(20) == BASE
        assert not leader.done()
        storage.go.set()
        leader.result(20)


def test_of_many_waiters_one_looks(flights: Flights, storage: Storage) -> None:
    """A hundred that ask the filesystem fifty times a second each would hold up the leader."""
    looks: list[str] = []

    def follow(who: int) -> BaseImage:
        def find() -> BaseImage | None:
            looks.append(threading.current_thread().name)
            return storage.find()

        fetch = storage.fetch(str(who))
        return flights.join("img", 1, find=find, accepts=anything, fetch=fetch, watch=Watch("img"))

    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(60) as pool:
        leader = leading(first, flights, storage)
        followers = [pool.submit(follow, n) for n in range(60)]
        until(lambda: len(looks) > 10)
        seen = len(looks)
        time.sleep(0.5)
        assert len(set(looks)) == 1
        assert len(looks) - seen < 60
        storage.go.set()
        assert [future.result(20) for future in (leader, *followers)] == [BASE] * 61
    # what it saw, and what was fetched, is everyone's; who wakes up just between the two looks once himself
    assert len(set(looks)) < 30


def test_who_does_not_accept_what_is_there_looks_for_another(flights: Flights, storage: Storage) -> None:
    """A caller that expects another digest than the leader's base has."""
    other = replace(BASE, unused_since=1.0)
    there = threading.Event()

    def follow() -> BaseImage:
        return flights.join(
            "img",
            1,
            find=lambda: other if there.is_set() else None,
            accepts=lambda base: base is other,
            fetch=lambda _leader: other,
            watch=Watch("img"),
        )

    with ThreadPoolExecutor(2) as pool:
        leader = leading(pool, flights, storage)
        follower = pool.submit(follow)
        time.sleep(0.1)
        there.set()
        storage.go.set()
        assert leader.result(20) is BASE
        assert follower.result(20) is other


@pytest.mark.parametrize("same_process", [True, False])
def test_waiters_hear_how_far_the_leader_is(tmp_path: Path, storage: Storage, same_process: bool) -> None:
    """In this process and in others."""
    flights = Flights(Locks(tmp_path, timeout=20))
    beside = flights if same_process else Flights(Locks(tmp_path, timeout=20))
    told: list[Progress] = []
    with ThreadPoolExecutor(2) as pool, Watch("img", progress=told.append) as watch:
        leader = leading(pool, flights, storage)
        follower = pool.submit(join, beside, storage, "follower", watch=watch)
        until(lambda: any(progress.done == 1 for progress in told))
        storage.go.set()
        leader.result(20)
        follower.result(20)
    assert Progress(image_id="img", stage="wait", done=1, total=10) in told


def test_a_leader_elsewhere_that_stands_still_is_a_time_out(tmp_path: Path, storage: Storage) -> None:
    """Its lock is named; the base was not published."""
    with ThreadPoolExecutor(1) as pool:
        leader = leading(pool, Flights(Locks(tmp_path, timeout=20)), storage)
        with pytest.raises(LockTimeoutError) as caught:
            join(Flights(Locks(tmp_path, timeout=0.2)), storage, "other")
        assert caught.value.image_id == "img"
        storage.go.set()
        leader.result(20)


def test_the_lock_is_free_after_a_failure(tmp_path: Path, storage: Storage) -> None:
    """For the next process."""
    storage.errors.append(ImageRejectedError("bad", image_id="img"))
    storage.go.set()
    locks = Locks(tmp_path, timeout=20)
    with pytest.raises(ImageRejectedError):
        join(Flights(locks), storage)
    lock = locks.base("img")
    assert lock.attempt()
    lock.release()

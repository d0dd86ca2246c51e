"""Single flight: of all who miss one base at once, one fetches and the others wait for what it publishes.

In a process, one thread leads and the rest follow. Between processes, the leaders contend for the base's lock. Whoever
waits looks for the published base and never queues for the lock after it; of a hundred followers one looks, and notes
the use, for all. A leader that fails for reasons of its own (deadline, cancel, a disk that is too small) fails alone,
and a follower leads on with its own source; what is wrong with the image, or with the source that they share, is every
follower's error, so that neither a bad image nor a dead service is asked once per waiter.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nova_imagecache._locks import Lock, Locks, Patience
from nova_imagecache.exceptions import (
    ImageCacheError,
    ImageCorruptError,
    ImageNotActiveError,
    ImageNotFoundError,
    ImageRejectedError,
    NoSpaceError,
    SourceForbiddenError,
    SourceUnavailableError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from nova_imagecache._models import BaseImage
    from nova_imagecache._watch import Watch

_POLL = 0.02
_CHECK = 0.1
_TELL = 0.1
_SHARED = (
    ImageCorruptError,
    ImageNotActiveError,
    ImageNotFoundError,
    ImageRejectedError,
    NoSpaceError,
    SourceForbiddenError,
    SourceUnavailableError,
)


@dataclass(slots=True)
class _Flight:
    request: object
    done: bool = False
    stir: threading.Event = field(default_factory=threading.Event)
    """It is done, or a base was seen."""

    base: BaseImage | None = None
    """What was seen, or fetched. Its use was noted since all who waited then had come."""

    scout: threading.Lock = field(default_factory=threading.Lock)
    """Held by the follower that looks for the base."""

    error: ImageCacheError | None = None
    note: tuple[int, int | None] | None = None


class Leader:
    """What the fetching thread tells its followers, here and, ten times a second, in other processes."""

    def __init__(self, flight: _Flight, lock: Lock) -> None:
        self._flight = flight
        self._lock = lock
        self._due = 0.0

    def note(self, done: int, total: int | None) -> None:
        """Tell all who wait how far the fetch is."""
        self._flight.note = (done, total)
        if (now := time.monotonic()) >= self._due or done == total:
            self._due = now + _TELL if done else now
            self._lock.note(done, total)


class Flights:
    """The flights of one process over one cache root."""

    def __init__(self, locks: Locks) -> None:
        self._locks = locks
        self._mutex = threading.Lock()
        self._flights: dict[str, _Flight] = {}

    def join(
        self,
        image_id: str,
        request: object,
        *,
        find: Callable[[], BaseImage | None],
        accepts: Callable[[BaseImage], bool],
        fetch: Callable[[Leader], BaseImage],
        watch: Watch,
    ) -> BaseImage:
        """The base, fetched by this thread or by whoever is at it already.

        ``find`` looks for it and notes its use; what one thread finds is every other's that ``accepts`` it. ``request``
        tells calls apart whose failures are not each other's (another source, another digest).

        Raises:
            LockTimeoutError: another process holds the lock and makes no progress.
            whatever ``fetch`` and ``watch.check`` raise.
        """
        while True:
            with self._mutex:
                flight = self._flights.get(image_id)
                leads = flight is None
                if flight is None:
                    flight = self._flights[image_id] = _Flight(request)
            if leads:
                return self._lead(image_id, flight, find, fetch, watch)
            if (base := self._follow(flight, request, find, accepts, watch)) is not None:
                return base

    def _lead(
        self,
        image_id: str,
        flight: _Flight,
        find: Callable[[], BaseImage | None],
        fetch: Callable[[Leader], BaseImage],
        watch: Watch,
    ) -> BaseImage:
        try:
            flight.base = self._contend(image_id, flight, find, fetch, watch)
        except _SHARED as err:
            flight.error = err
            raise
        else:
            return flight.base
        finally:
            with self._mutex:
                del self._flights[image_id]
            flight.done = True
            flight.stir.set()

    def _contend(
        self,
        image_id: str,
        flight: _Flight,
        find: Callable[[], BaseImage | None],
        fetch: Callable[[Leader], BaseImage],
        watch: Watch,
    ) -> BaseImage:
        lock = self._locks.base(image_id)
        patience = Patience(lock, self._locks.timeout, image_id)
        while not lock.attempt():
            watch.check("wait")
            flight.note = patience.wait()
            if flight.note is not None:
                watch.report("wait", *flight.note)
            if (base := find()) is not None:
                return base
        try:
            leader = Leader(flight, lock)
            leader.note(0, None)
            return find() or fetch(leader)
        finally:
            lock.release()

    def _follow(
        self,
        flight: _Flight,
        request: object,
        find: Callable[[], BaseImage | None],
        accepts: Callable[[BaseImage], bool],
        watch: Watch,
    ) -> BaseImage | None:
        if (base := self._await(flight, find, accepts, watch)) is not None:
            return base
        if flight.error is not None and flight.request == request:
            rebuild, arguments = flight.error.__reduce__()
            raise rebuild(*arguments) from flight.error
        watch.check("wait")
        return None

    def _await(
        self,
        flight: _Flight,
        find: Callable[[], BaseImage | None],
        accepts: Callable[[BaseImage], bool],
        watch: Watch,
    ) -> BaseImage | None:
        """The base, as soon as anybody has published it; None: the flight is over and there is none for us."""
        scouts = False
        try:
            while not flight.stir.wait(_POLL if scouts else _CHECK):
                watch.check("wait")
                if flight.note is not None:
                    watch.report("wait", *flight.note)
                scouts = scouts or flight.scout.acquire(blocking=False)
                if scouts and (base := find()) is not None:
                    flight.base = base
                    flight.stir.set()
                    return base
        finally:
            if scouts:
                flight.scout.release()
        if flight.base is not None and accepts(flight.base):
            return flight.base
        while True:
            over = flight.done
            if (base := find()) is not None or over:
                return base
            watch.check("wait")  # what was seen is not what this caller expects
            time.sleep(_POLL)

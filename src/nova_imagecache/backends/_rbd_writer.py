"""A base in Ceph in the making: an image under a staging name, written with several writes in flight."""

from __future__ import annotations

import itertools
import threading
import time
from contextlib import ExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING

from nova_imagecache import _records
from nova_imagecache._models import round_up
from nova_imagecache.backends import (
    BackendError,
    BaseImage,
    BaseRecord,
    BaseWriter,
    _rados,
    _rbd_forks,
    _rbd_look,
)
from nova_imagecache.backends._rados_errors import ExistsError, StuckError, error_of
from nova_imagecache.backends._rbd_names import FINAL, LAST_USED, RECORD, SNAPSHOT, SUMS, base_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from nova_imagecache.backends._rbd_bases import RbdBases

_IN_FLIGHT = 8
"""Writes at once; each is at most as long as what the core hands over, one object of 4 MiB."""

_STEP = 2**30
"""Bytes by which an image of unknown length grows."""


class RbdWriter(BaseWriter):
    """An image ``staging.<image-id>.<random>``, kept open so that everybody sees that it is alive."""

    path = None

    def __init__(self, bases: RbdBases, image_id: str) -> None:
        self._bases = bases
        self._store = bases.store
        self._image_id = image_id
        self._final = base_name(image_id)
        self._lock = threading.Lock()
        self._landing = threading.Condition()
        self._in_flight: set[int] = set()
        self._numbers = itertools.count()
        self._failure: int | None = None
        self._size = self._room = 0
        self._published = self._stuck = False
        self._rbd_id: str | None = None
        self._image: _rados.Image | None = None
        _rbd_forks.note(self)
        self._life = ExitStack()
        self._staging = self._life.enter_context(self._store.staging(image_id))
        self._store.endings.add(self._end)
        self._life.callback(self._store.endings.discard, self._end)
        try:
            with self._store.room():
                _rados.create(self._store.io, self._staging, 0, self._store.features())
                self._image = _rados.open_for_writing(self._store.io, name=self._staging)
                self._rbd_id = self._image.id()
        except BaseException:
            self.discard()
            raise

    # --- bytes

    def set_size(self, size: int) -> None:
        with self._lock:
            self._size = size
            self._resize(size)

    def _resize(self, room: int) -> None:
        if room != self._room:
            with self._store.room():
                _rados.resize(self._live(), room, shrink=True)
            self._room = room

    def write_at(self, offset: int, buffer: bytes | bytearray | memoryview) -> None:
        end = offset + len(buffer)
        with self._lock:
            if end > self._room:
                self._resize(end if end <= self._size else -(-end // _STEP) * _STEP)
            self._size = max(self._size, end)
        self._raise_failure()
        self._begin(lambda image, ended: _rados.write(image, offset, bytes(buffer), ended))

    def _begin(self, operation: Callable[[_rados.Image, Callable[[int], None]], None]) -> None:
        """Start what calls its second argument when it has ended or failed; few are in flight at once."""
        with self._landing:
            self._wait_for(lambda: len(self._in_flight) < _IN_FLIGHT)
            number = next(self._numbers)
            self._in_flight.add(number)
        try:
            operation(self._live(), partial(self._ended, number))
        except BaseException:
            self._ended(number, 0)
            raise

    def _ended(self, number: int, code: int) -> None:
        # in a thread of librbd
        with self._landing:
            if code < 0 and self._failure is None:
                self._failure = -code
            self._in_flight.discard(number)
            self._landing.notify_all()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            with self._store.room():
                raise error_of(self._failure, f"writing {self._staging} failed")

    def _settle(self) -> None:
        """Come back when nothing is in flight that was when it was called."""
        with self._landing:
            waiting = set(self._in_flight)
            while left := waiting & self._in_flight:
                self._wait_for(partial(left.difference, self._in_flight))  # those that have landed
            self._stuck = False

    def _wait_for(self, landed: Callable[[], object]) -> None:
        if not self._landing.wait_for(landed, 0 if self._stuck else self._store.longest):
            self._stuck = True
            raise StuckError(f"writes to {self._staging} neither end nor fail")

    def read_at(self, offset: int, length: int) -> bytes:
        self._settle()
        self._raise_failure()
        return _rbd_look.read(self._live(), offset, length).ljust(length, b"\0")

    def write_sums(self, sums: bytes | memoryview) -> None:
        # not in the image's metadata, which every clone begins with a copy of
        with self._store.room():
            _rados.put_object(self._store.io, f"{SUMS}{self._rbd_id}", bytes(sums))

    def sync(self) -> None:
        self._settle()
        self._raise_failure()
        self._begin(_rados.flush)
        self._settle()
        self._raise_failure()

    # --- the end

    def publish(self, record: BaseRecord) -> BaseImage:
        rbd_id = self._rbd_id
        with self._lock:
            # in whole sectors, so that every clone is
            self._settle()
            self._resize(round_up(self._size))
        self.sync()
        if rbd_id is None:
            raise BackendError("the writer has been closed", image_id=self._image_id, stage="publish")
        image = self._live()
        with self._store.room():
            _rados.create_snapshot(image, SNAPSHOT)
            if self._store.clones_need_protection():
                _rados.protect(image, SNAPSHOT)
            now = time.time()
            notes = {RECORD: _records.dump_base(record).decode(), LAST_USED: repr(now), FINAL: self._final}
            _rados.set_metadata(self._store.io, rbd_id, notes)
            self._close()
            winner = self._publish(rbd_id)
        self.discard()
        if (found := winner or self._bases.find_own(self._image_id)) is not None:
            return found
        # retired just now. Whoever did that has it in the trash, and gives it its name back or frees it
        location = self._store.location(self._final, SNAPSHOT)
        return BaseImage(
            image_id=self._image_id, location=location, record=record, last_used=now, inspected=record.inspector
        )

    def _publish(self, rbd_id: str) -> BaseImage | None:
        """Take the name; the winner if somebody else was first."""
        trashed = False
        for _attempt in range(3):
            try:
                if trashed:
                    _rados.trash_restore(self._store.io, rbd_id, self._final)
                else:
                    trashed = True
                    self._store.publish(rbd_id, self._staging, self._final)
            except ExistsError:
                if (winner := self._bases.find_own(self._image_id)) is not None:
                    return winner
                continue  # retired just now
            self._published = True
            return None
        detail = f"the base cannot be published: something else has the name {self._final}"
        raise BackendError(
            detail, image_id=self._image_id, stage="publish", todo="Call recover, or look at that image in the pool"
        )

    def _live(self) -> _rados.Image:
        if self._image is None:
            raise BackendError("the writer has been closed", image_id=self._image_id, stage="writing")
        return self._image

    def _close(self) -> None:
        image, self._image = self._image, None
        if image is not None:
            try:
                self._settle()
            except StuckError:
                self._store.left.leave(image, lambda: not self._in_flight)
            else:
                _rados.close_image(image)

    def leave_to_parent(self) -> None:
        """In a forked child: the image is its parent's."""
        image, self._image = self._image, None
        if image is not None:
            _rados.abandon(image)

    def _end(self) -> None:
        with suppress(BackendError):  # left to recover
            self.discard()

    def discard(self) -> None:
        if self._staging == "":
            return
        staging, self._staging = self._staging, ""
        with self._life:  # whatever is left is recover's from here on
            try:
                self._close()
            finally:
                if not self._published and not self._stuck:  # else this process has it open
                    self._store.drop(self._rbd_id or self._store.id_of(staging), staging, self._final)

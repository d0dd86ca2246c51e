"""A source's bytes in large pieces, hashed on the way: three threads over a ring of buffers.

The first reads and looks (is this what was announced?); what it has read the second hashes while the caller takes it.
Reading, hashing and writing all run without Python's lock: a fetch takes as long as the slowest of them, and the ring
is all the memory it needs.
"""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Self

from nova_imagecache import _extents
from nova_imagecache.exceptions import SourceUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import TracebackType

    from nova_imagecache._guard_source import GuardedSource
    from nova_imagecache._models import ImageInfo

MIB = 1 << 20
PIECE = 2 * MIB
"""The largest cluster of a qcow2 file, so that a piece holds whole ones."""

_RING = 8
_AT_ONCE = 256 * 1024
"""Bytes asked for at once: what a break in the middle of them loses."""

_POLL = 0.1
_PATIENCE = 0.5
"""Seconds for the threads to end; one that hangs in its source is left behind."""


@dataclass(slots=True)
class _Filled:
    buffer: memoryview
    length: int
    users: int = 2
    """Who still need it: the hash, the caller, and whoever holds it."""


_Item = _Filled | BaseException | None


class Stream:
    """The image's bytes as pieces of 2 MiB (the last may be shorter); iterate inside the context.

    A piece is the caller's until it asks for the next one, or longer (``hold``). ``look`` is called in the reading
    thread with all bytes, as they come, at most 256 KiB at a time; what it raises ends the stream. ``check`` is called
    before every piece and ten times a second while none comes; what it raises ends the waiting: a thread that hangs in
    its source is left behind, and ends with the source's own read time-out. After the context nothing is looked at any
    more.
    """

    def __init__(
        self,
        source: GuardedSource,
        image: ImageInfo,
        *,
        algorithms: Iterable[str],
        look: Callable[[memoryview], None],
        check: Callable[[], None],
    ) -> None:
        import hashlib

        self._source = source
        self._image = image
        self._look = look
        self._check = check
        self._hashes = {algorithm: hashlib.new(algorithm, usedforsecurity=False) for algorithm in algorithms}
        self._empty: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        self._for_hash: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self._for_caller: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self._mutex = threading.Lock()
        self._all_hashed = False
        self._stop = threading.Event()
        self._ring = _extents.blank(_RING * PIECE)
        self._made = 0
        self._given: _Filled | None = None
        self._threads = [
            threading.Thread(target=target, name=f"{what}-{image.image_id}", daemon=True)
            for what, target in (("fetch", self._fill), ("hash", self._hash))
        ]

    def digest(self, algorithm: str) -> str:
        """The hexadecimal digest of all bytes; after the last piece. Waits for the hash, as iterating does."""
        hashing = self._threads[-1]
        while hashing.is_alive():
            self._check()
            hashing.join(_POLL)
        if not self._all_hashed:
            raise SourceUnavailableError("the hashing thread ended early", image_id=self._image.image_id)
        return self._hashes[algorithm].hexdigest()

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        until = time.monotonic() + _PATIENCE
        for thread in self._threads:
            thread.join(timeout=max(0.0, until - time.monotonic()))

    def __iter__(self) -> Iterator[memoryview]:
        while True:
            self._check()
            try:
                item = self._for_caller.get(timeout=_POLL)
            except queue.Empty:
                if not self._threads[0].is_alive() and self._for_caller.empty():
                    text = "the reading thread ended early"
                    raise SourceUnavailableError(text, image_id=self._image.image_id) from None
                continue
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            self._given = item
            yield item.buffer[: item.length]
            self._given = None
            self._done(item)

    def hold(self) -> Callable[[], None]:
        """Let the piece that was given out last stay as it is until the answer is called, once and in any thread.

        While all pieces are held no other comes.
        """
        held = self._given
        if held is None:
            raise RuntimeError("no piece is given out")
        with self._mutex:
            held.users += 1
        return partial(self._done, held)

    def _done(self, item: _Filled) -> None:
        """One of those who need it needs it no longer."""
        with self._mutex:
            item.users -= 1
            over = not item.users
        if over:
            self._empty.put(item.buffer)

    def _hand_on(self, item: _Item) -> None:
        self._for_hash.put(item)
        self._for_caller.put(item)

    # --- in the reading thread

    def _fill(self) -> None:
        last: _Item = None
        try:
            self._fill_pieces()
        except BaseException as err:  # noqa: BLE001 - handed to the thread that waits; reason: it must hear of anything
            last = err
        self._hand_on(last)

    def _fill_pieces(self) -> None:
        with self._source.open(self._image) as chunks:
            # without a copy, where the source can
            read = getattr(chunks, "readinto", None) or self._copying(chunks)
            while (buffer := self._buffer()) is not None:
                length = self._fill_piece(buffer, read)
                if length and not self._stop.is_set():
                    self._hand_on(_Filled(buffer, length))
                if length < PIECE:
                    return

    def _fill_piece(self, buffer: memoryview, read: Callable[[memoryview], int]) -> int:
        """Fill the buffer, while anybody wants it; how far: less than a piece where the image ends."""
        length = 0
        while length < PIECE and not self._stop.is_set():
            count = read(buffer[length : length + _AT_ONCE])
            if not count:
                break
            self._look(buffer[length : length + count])
            length += count
        return length

    def _copying(self, chunks: Iterator[bytes]) -> Callable[[memoryview], int]:
        """What reads chunks of any size into buffers, as DirectChunks.readinto does."""
        rest = memoryview(b"")

        def read(buffer: memoryview) -> int:
            nonlocal rest
            while not rest:
                chunk = next(chunks, None)
                if chunk is None or self._stop.is_set():  # a chunk may be empty, and the next one as well
                    return 0
                rest = memoryview(chunk)
            count = min(len(rest), len(buffer))
            buffer[:count] = rest[:count]
            rest = rest[count:]
            return count

        return read

    def _buffer(self) -> memoryview | None:
        """An empty buffer, None: nobody wants any more."""
        while not self._stop.is_set():
            if self._made < _RING and self._empty.empty():
                self._made += 1
                return self._ring[(self._made - 1) * PIECE : self._made * PIECE]
            try:
                return self._empty.get(timeout=_POLL)
            except queue.Empty:
                continue
        return None

    # --- in the hashing thread

    def _hash(self) -> None:
        while isinstance(item := self._for_hash.get(), _Filled):
            if not self._stop.is_set():
                with item.buffer[: item.length] as piece:
                    for hasher in self._hashes.values():
                        hasher.update(piece)
            self._done(item)
        self._all_hashed = item is None and not self._stop.is_set()

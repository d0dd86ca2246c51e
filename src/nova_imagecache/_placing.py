"""Puts guest bytes where they belong in a base: zeros left out, checksums made on the way, clusters unpacked."""

from __future__ import annotations

import os
import threading
from collections import deque
from typing import TYPE_CHECKING, Self

from nova_imagecache import _extents, _fs, _sums
from nova_imagecache._batches import MOST, Batches
from nova_imagecache._decoder import Decoder, Keep, Plain
from nova_imagecache._inflate import PackedError, unpacker
from nova_imagecache._packed import Packed, SurpriseError
from nova_imagecache._sums import MIB

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future, ThreadPoolExecutor
    from pathlib import Path

    from nova_imagecache._batches import Batch
    from nova_imagecache._inflate import Buffer
    from nova_imagecache._qcow2 import Qcow2Header
    from nova_imagecache.backends import BaseWriter

_PART = 4 * MIB
"""A write does not cross a multiple of this: it is an object of Ceph's, and no filesystem is slower for more."""

_MOST_THREADS = 4

_STEP = 64 * MIB
"""How far the promised space grows at a time: asking for it takes as long as placing some clusters."""


class Placer:
    """Takes bytes of the guest to a writer. ``placed`` counts them, zeros included."""

    def __init__(self, writer: BaseWriter, size: int) -> None:
        self._writer = writer
        self._sums = _sums.Running(size)
        self._mutex = threading.Lock()
        self.placed = 0

    def put(self, offset: int, data: bytes | memoryview) -> None:
        """Write what is not zeros; in several threads at once. Buffers may be used again when this returns."""
        write_runs(self._writer.write_at, offset, data)
        with self._mutex:
            self._sums.add(offset, data)
            self.placed += len(data)

    def sums(self, *, check: Callable[[], None]) -> memoryview | None:
        """The checksums of all MiBs; those whose bytes came out of order are read back. None: they cannot be.

        ``check`` is called for each of those; what it raises ends the reading.
        """
        missing = list(self._sums.missing())
        if missing:
            from concurrent.futures import ThreadPoolExecutor

            with ThreadPoolExecutor(_MOST_THREADS, "read-back") as pool:
                if not all(pool.map(lambda piece: self._read_back(piece, check), missing)):
                    return None
        return self._sums.digest()

    def _read_back(self, piece: tuple[int, int], check: Callable[[], None]) -> bool:
        """Sum one MiB as it was written; whether the writer can read."""
        check()
        offset, length = piece
        data = self._writer.read_at(offset, length)
        if data is None:
            return False
        self._sums.set(offset, data)
        return True


def write_runs(write_at: Callable[[int, memoryview], None], offset: int, data: bytes | memoryview) -> None:
    """Write what is not zeros of ``data``, in parts that do not cross a boundary of 4 MiB."""
    for start, run in _extents.nonzero_runs(data):
        at, rest = offset + start, run
        while rest:
            step = _PART - at % _PART
            write_at(at, rest[:step])
            at, rest = at + step, rest[step:]


class Spool:
    """A sparse file of bytes of the source, by their place in it; made when first needed. A context manager."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_failure: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            _fs.unlink(self._path)

    def keep(self, offset: int, data: memoryview) -> None:
        """Keep the bytes."""
        if self._fd < 0:
            self._fd = _fs.create(self._path, 0o600)
        write_runs(lambda at, run: _fs.write(self._fd, at, run), offset, data)

    def recall(self, offset: int, length: int) -> bytes:
        """Bytes that were kept."""
        return os.pread(self._fd, length, offset).ljust(length, b"\0")


class Qcow2Placer:
    """A qcow2 file on its way into a writer as raw bytes; use it as a context manager.

    ``spool`` takes bytes of the file whose meaning is not known yet. ``hold()`` has the piece that is fed stay as it is
    until its answer is called, once and in any thread. ``admit(bytes)`` is asked before more is placed and kept than
    the file is long: its tables tell what it unpacks to before it is unpacked. ``admit_free(bytes)`` says whether so
    much is free and promised now, so that ``admit`` is asked only where little is left. ``check()`` is asked all the
    time; what it raises ends the work. Compressed clusters are unpacked and placed by threads, in any order.

    Raises:
        SurpriseError: the header tells that this file cannot be decoded here.
    """

    def __init__(
        self,
        header: Qcow2Header,
        file_size: int | None,
        placer: Placer,
        spool: Spool,
        *,
        hold: Callable[[], Callable[[], None]],
        admit: Callable[[int], None],
        admit_free: Callable[[int], bool],
        check: Callable[[], None],
    ) -> None:
        if file_size is None:
            raise SurpriseError("a length that is not announced")
        self._decoder = Decoder(header, file_size, spool.recall)
        self._placer = placer
        self._spool = spool
        self._admit = admit
        self._admit_free = admit_free
        self._check = check
        self._file_size = self._admitted = file_size
        self._kept = 0  # bytes in the spool, which stand there beside those that are placed
        self._step = _STEP
        self._size = header.virtual_size
        self._cluster = header.cluster_size
        self._compression = header.compression or "zlib"
        try:
            unpacker(self._compression, self._cluster)
        except PackedError as err:
            raise SurpriseError(str(err)) from err
        self._threads = min(len(os.sched_getaffinity(0)), _MOST_THREADS)
        self._pool: ThreadPoolExecutor | None = None
        self._own = threading.local()  # each of its threads' own
        self._filling = Batches(hold)
        self._being_placed: deque[Future[None]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_failure: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def feed(self, piece: memoryview) -> None:
        """Place the next bytes of the file.

        Raises:
            SurpriseError: the file cannot be decoded; what was placed is worth nothing.
        """
        for batch in self._filling.begin_piece():
            self._submit(batch)
        for found in self._decoder.feed(piece):
            self._check()
            more = len(found.data) if isinstance(found, Keep) else 0
            if self._decoder.planned + self._kept + more > self._admitted:
                self._grow(self._decoder.planned, self._kept + more)
            if isinstance(found, Keep):
                self._spool.keep(found.offset, found.data)
                self._kept += more
            elif isinstance(found, Plain) and not self._filling and not self._being_placed:
                self._placer.put(found.guest, found.data)
            elif isinstance(found, Plain):
                # with its neighbours that are being unpacked, so that checksums are made in order
                self._queue(found, len(found.data))
            else:
                self._queue(found, self._cluster)

    def _grow(self, planned: int, kept: int) -> None:
        """Have so many bytes promised, with those that stand there; in long steps, and to the byte where none fits.

        Raises:
            NoSpaceError: as ``admit``.
        """
        total, standing = planned + kept, self._placer.placed + self._kept
        # the guest's bytes, and what may be kept of the file: a step more than is
        guest = -(-self._size // self._cluster) * self._cluster
        most = guest + min((kept // _STEP + 1) * _STEP, self._file_size)
        while self._step >= self._cluster and total < most:
            ahead = min(total + self._step, most)
            if self._admit_free(ahead - standing):
                self._admitted = ahead
                self._step = min(2 * self._step, _STEP)
                return
            self._step //= 2
        self._admit(total - standing)
        self._admitted = total
        self._step = max(self._step, self._cluster)

    def finish(self) -> None:
        """The file has ended; all is placed when this returns.

        Raises:
            SurpriseError: as ``feed``.
        """
        self._decoder.finish()
        for batch in self._filling.rest():
            self._submit(batch)
        while self._being_placed:
            self._settle_first()

    def _queue(self, found: Plain | Packed, weight: int) -> None:
        if (batch := self._filling.add(found, weight)) is not None:
            self._submit(batch)
        while len(self._being_placed) > self._threads + 1 or (self._being_placed and self._being_placed[0].done()):
            self._settle_first()

    def _submit(self, batch: Batch) -> None:
        if self._pool is None:
            from concurrent.futures import ThreadPoolExecutor

            self._pool = ThreadPoolExecutor(self._threads, "unpack")
        self._being_placed.append(self._pool.submit(self._place, batch))

    def _settle_first(self) -> None:
        self._check()
        try:
            self._being_placed.popleft().result()
        except PackedError as err:
            raise SurpriseError(str(err)) from err

    # --- in the pool's threads

    def _place(self, batch: Batch) -> None:
        try:
            self._place_found(batch)
        finally:
            batch.let_go()

    def _place_found(self, batch: Batch) -> None:
        """Unpack the clusters and place them, neighbours in one piece and in order, as far as one batch goes."""
        unpack, buffer = self._tools(batch.weight)
        start = end = 0  # of the guest's bytes that wait in the buffer
        for found in sorted(batch.found, key=lambda found: found.guest):
            data = found.data if isinstance(found, Plain) else unpack(found.data)
            if found.guest != end:
                self._put(start, buffer[: end - start])
                start = end = found.guest
            buffer[end - start : end - start + len(data)] = data
            end += len(data)
        batch.let_go()  # before the last is written, which may take long
        self._put(start, buffer[: end - start])

    def _tools(self, room: int) -> tuple[Callable[[Buffer], bytes], memoryview]:
        """The thread's own unpacker, and its buffer of so many bytes at least: both cost more to make than to use."""
        own = self._own
        if not hasattr(own, "unpack"):
            own.unpack, own.buffer = unpacker(self._compression, self._cluster), _extents.blank(MOST + self._cluster)
        if len(own.buffer) < room:
            own.buffer = _extents.blank(room)
        return own.unpack, own.buffer

    def _put(self, guest: int, data: memoryview) -> None:
        if data:
            self._placer.put(guest, data[: self._size - guest])

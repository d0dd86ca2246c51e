"""A pass from Glance to a base and its disk with no library around it: ``python -m benchmarks.bare_pass TASK``.

What is left when everything that makes a cache is taken away: two requests, one for the image and one for its data;
a thread that reads into a ring of buffers, one that hashes, one that writes; the sync and the name of the base, and a
disk of a few KiB beside it, synced as well. Where every part of the image belongs is known beforehand. There is no
lock, record, inspection, checksum of parts, retry, or limit, and nothing is unpacked.
"""

from __future__ import annotations

import ctypes
import hashlib
import http.client
import json
import mmap
import os
import queue
import threading
import urllib.parse
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import layouts, meter

if TYPE_CHECKING:
    from benchmarks.meter import Figures

_PIECE = 2 * 2**20
_RING = 8
_AT_ONCE = 256 * 1024
_DISK = 192 * 1024
_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h


class _Ring:
    """Buffers that two threads need after they were filled."""

    def __init__(self) -> None:
        self._room = memoryview(mmap.mmap(-1, _RING * _PIECE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        self._users = [0] * _RING
        self._mutex = threading.Lock()
        self.empty: queue.SimpleQueue[int] = queue.SimpleQueue()
        for number in range(_RING):
            self.empty.put(number)

    def buffer(self, number: int) -> memoryview:
        return self._room[number * _PIECE : (number + 1) * _PIECE]

    def filled(self, number: int) -> None:
        self._users[number] = 2

    def done(self, number: int) -> None:
        with self._mutex:
            self._users[number] -= 1
            over = not self._users[number]
        if over:
            self.empty.put(number)


_Pieces = queue.SimpleQueue[tuple[int, int] | None]


class _Pass:
    def __init__(self, task: Figures) -> None:
        url = urllib.parse.urlsplit(task["url"])
        self._task = task
        self._path, self._headers = url.path, {"X-Auth-Token": task["token"]}
        self._runs = layouts.runs(Path(task["file"]), task["disk_format"])
        self._glance = http.client.HTTPConnection(url.netloc)
        self._ring = _Ring()
        self._for_hash: _Pieces = queue.SimpleQueue()
        self._for_file: _Pieces = queue.SimpleQueue()
        self._early = ctypes.CDLL(None, use_errno=True).sync_file_range
        self.show()

    def show(self) -> Figures:
        """What Glance says of the image."""
        self._glance.request("GET", self._path.removesuffix("/file"), headers=self._headers)
        answer: Figures = json.loads(self._glance.getresponse().read())
        return answer

    def run(self) -> None:
        """From the first request to the disk."""
        image = self.show()
        digest = hashlib.new(image["os_hash_algo"], usedforsecurity=False)
        threads = [threading.Thread(target=self._read), threading.Thread(target=self._hash, args=(digest,))]
        for thread in threads:
            thread.start()
        directory = Path(self._task["directory"])
        file = os.open(directory / "unfinished", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        os.ftruncate(file, self._task["virtual_size"])
        self._write(file)
        os.fsync(file)
        for thread in threads:
            thread.join()
        if digest.hexdigest() != image["os_hash_value"]:
            raise SystemExit("another digest: the image was changed")
        os.close(file)
        above = os.open(directory, os.O_RDONLY)
        (directory / "unfinished").rename(directory / "base")
        os.fsync(above)
        disk = os.open(directory / "disk", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        os.write(disk, bytes(_DISK))
        for one in (disk, above):
            os.fsync(one)
            os.close(one)

    def _read(self) -> None:
        self._glance.request("GET", self._path, headers=self._headers)
        answer = self._glance.getresponse()
        length = _PIECE
        while length == _PIECE:
            number = self._ring.empty.get()
            buffer, length = self._ring.buffer(number), 0
            while length < _PIECE and (count := answer.readinto(buffer[length : length + _AT_ONCE])):
                length += count
            self._ring.filled(number)
            for pieces in (self._for_hash, self._for_file):
                pieces.put((number, length))
        for pieces in (self._for_hash, self._for_file):
            pieces.put(None)

    def _hash(self, digest: hashlib._Hash) -> None:
        while piece := self._for_hash.get():
            number, length = piece
            digest.update(self._ring.buffer(number)[:length])
            self._ring.done(number)

    def _write(self, file: int) -> None:
        runs = iter(self._runs)
        run = next(runs, None)
        start = 0
        while piece := self._for_file.get():
            number, length = piece
            buffer = self._ring.buffer(number)
            while run is not None and run[0] < start + length:
                offset, count, place = run
                here = min(count, start + length - offset)
                os.pwrite(file, buffer[offset - start : offset - start + here], place)
                self._early(file, ctypes.c_int64(place), ctypes.c_int64(here), _SYNC_FILE_RANGE_WRITE)
                run = (offset + here, count - here, place + here) if here < count else next(runs, None)
            start += length
            self._ring.done(number)


def main() -> None:
    """Do it once."""
    task = meter.task()
    work = _Pass(task)
    meter.ready()
    with meter.Meter() as costs:
        work.run()
    _compare(Path(task["directory"], "base"), Path(task["raw"]))
    meter.answer(costs.figures)


def _compare(base: Path, raw: Path) -> None:
    """Refuse a base that has not the data of ``raw``."""
    with base.open("rb") as file, raw.open("rb") as other:
        for start, end in layouts.extents(other.fileno()):
            for offset in range(start, end, _PIECE):
                places = min(_PIECE, end - offset), offset
                if os.pread(file.fileno(), *places) != os.pread(other.fileno(), *places):
                    raise SystemExit(f"another base than {raw}: see the 2 MiB from {offset} on")


if __name__ == "__main__":
    main()

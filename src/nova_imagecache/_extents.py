"""Reads files by their data: extents, content, runs that are not zeros, allocated bytes. Changes nothing."""

from __future__ import annotations

import errno
import logging
import mmap
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from nova_imagecache._models import Extent

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20
_BLOCK = 4096
_ZEROS = bytes(64 * 1024)
_ZERO_BLOCK = bytes(_BLOCK)

_log = logging.getLogger(__name__)


def data_extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, end) of each run of allocated bytes below ``size``."""
    position = 0
    while position < size:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as err:
            if err.errno == errno.ENXIO:  # only a hole is left
                return
            raise
        end = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        yield start, end
        position = end


def read_extents(path: Path) -> Iterator[Extent]:
    """The data of a file or block device in pieces of at most 1 MiB, none across a MiB boundary; holes left out."""
    with path.open("rb", buffering=0) as file:
        fd = file.fileno()
        size = os.lseek(fd, 0, os.SEEK_END)
        last = 0
        for start, end in data_extents(fd, size):
            # whole MiBs, so that extents of one MiB come as one piece
            for offset in range(max(start - start % MIB, last), end, MIB):
                data = os.pread(fd, min(MIB, size - offset), offset)
                last = offset + MIB
                yield Extent(offset=offset, data=data)


def blank(length: int) -> memoryview:
    """``length`` zero bytes to write to, which take memory where that was done."""
    # anonymous memory, which is there when it is written to; a bytearray is filled with its zeros at once
    return memoryview(mmap.mmap(-1, max(length, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))[:length]


def content(path: Path) -> memoryview:
    """All bytes of a file, of which its holes take no memory."""
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        whole = blank(size)
        for start, end in data_extents(file.fileno(), size):
            position = start
            while position < end:
                count = os.preadv(file.fileno(), [whole[position:end]], position)
                if not count:  # cut off meanwhile
                    return whole[:position]
                position += count
    return whole


def nonzero_runs(buffer: bytes | bytearray | memoryview) -> Iterator[tuple[int, memoryview]]:
    """(offset, piece) of the parts of ``buffer`` that hold anything but zeros, in steps of 4 KiB."""
    view = memoryview(buffer)
    # one look at the first byte of each block: where none is zero, and so it is in most data, no block is zeros
    if 0 not in view[::_BLOCK].tobytes():
        if view:
            yield 0, view
        return
    start: int | None = None
    for offset in _block_edges(view):
        if offset >= 0:
            start = offset if start is None else start
        elif start is not None:
            yield start, view[start:~offset]
            start = None
    if start is not None:
        yield start, view[start:]


def _block_edges(view: memoryview) -> Iterator[int]:
    """The offset of every block with data, and ~offset of every one of zeros; large runs are told once."""
    size = len(view)
    for outer in range(0, size, len(_ZEROS)):
        part = view[outer : outer + len(_ZEROS)]
        heads = part[::_BLOCK].tobytes()
        if 0 not in heads:
            yield outer
            continue
        # a copy, since only bytes compare at memory speed
        data = part.tobytes()
        if data == _ZEROS[: len(data)]:
            yield ~outer
            continue
        for number, head in enumerate(heads):
            at = number * _BLOCK
            zeros = head == 0 and data.startswith(_ZERO_BLOCK[: len(data) - at], at)
            yield ~(outer + at) if zeros else outer + at


def allocated(path: Path) -> int:
    """Allocated bytes of one file or directory by itself; 0 if it is not there."""
    with suppress(FileNotFoundError):
        return path.lstat().st_blocks * 512
    return 0


def allocated_tree(path: Path) -> tuple[int, bool]:
    """(allocated bytes of all below ``path``, each inode once; whether everything could be counted)."""
    total, complete = 0, True
    seen: set[tuple[int, int]] = set()
    stack = [path]
    while stack:
        try:
            with os.scandir(stack.pop()) as entries:
                for entry in entries:
                    try:
                        found = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:  # gone meanwhile: it takes no space any more
                        continue
                    if (found.st_dev, found.st_ino) not in seen:
                        seen.add((found.st_dev, found.st_ino))
                        total += found.st_blocks * 512
                    if stat.S_ISDIR(found.st_mode):
                        stack.append(Path(entry.path))
        except FileNotFoundError:  # likewise
            continue
        except OSError as err:
            _log.warning("cannot count %s: %s", path, err)
            complete = False
    return total, complete

"""disk.sums: one xxh3 (64 bit, big-endian) per MiB of a base, to verify bytes that are not the source's.

A MiB of zeros has the sum 0: the sums of a large and empty disk are a large and empty file, and take no memory.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from nova_imagecache import _extents

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from xxhash import xxh3_64

    from nova_imagecache._models import Extent

MIB = 1 << 20
WIDTH = 8
_ZEROS = memoryview(bytes(MIB))
_MOST_BEGUN = 64


_NOTHING = bytes(WIDTH)


@lru_cache(maxsize=4)
def _of_zeros(length: int) -> bytes:
    from xxhash import xxh3_64_digest

    return bytes(xxh3_64_digest(bytes(length)))


def of_piece(data: bytes | bytearray | memoryview) -> bytes:
    """The sum of one MiB (or of the shorter last piece)."""
    from xxhash import xxh3_64_digest

    return _sum(xxh3_64_digest(data), len(data))


def _sum(digest: bytes, length: int) -> bytes:
    return _NOTHING if digest == _of_zeros(length) else digest


def of_extents(extents: Iterable[Extent], size: int) -> memoryview:
    """The sums of ``size`` bytes of which only the extents are not zeros; each extent is one MiB's whole content."""
    sums = _extents.blank(WIDTH * -(-size // MIB))
    for extent in extents:
        index = extent.offset // MIB
        sums[index * WIDTH : (index + 1) * WIDTH] = of_piece(extent.data)
    return sums


@dataclass(slots=True)
class _Begun:
    state: xxh3_64
    position: int = 0


def _begin() -> _Begun:
    from xxhash import xxh3_64

    return _Begun(xxh3_64())


class Running:
    """The sums of ``size`` bytes that come in parts; what does not come is zeros.

    Parts of one MiB that come in order are summed as they pass; of those that do not, ``missing`` tells the MiBs, to be
    read and handed in by ``set``. At most 64 MiBs are begun at a time.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._sums = of_extents((), size)
        self._begun: OrderedDict[int, _Begun] = OrderedDict()
        self._summed: set[int] = set()
        self._missing: set[int] = set()

    def add(self, offset: int, data: bytes | memoryview) -> None:
        """The next part; parts do not overlap."""
        view = memoryview(data)
        while view:
            index, start = divmod(offset, MIB)
            part = view[: MIB - start]
            self._add(index, start, part)
            offset, view = offset + len(part), view[len(part) :]

    def _add(self, index: int, start: int, part: memoryview) -> None:
        if index in self._missing:
            return
        begun = self._begun.get(index)
        if begun is None:
            if index in self._summed:
                self._missing.add(index)
                return
            if len(part) == self._length(index):
                self._set(index, of_piece(part))
                return
            if len(self._begun) >= _MOST_BEGUN:
                self._end(*self._begun.popitem(last=False))
            begun = self._begun[index] = _begin()
        if start < begun.position:
            del self._begun[index]
            self._missing.add(index)
            return
        begun.state.update(_ZEROS[: start - begun.position])
        begun.state.update(part)
        begun.position = start + len(part)
        if begun.position == self._length(index):
            self._end(index, self._begun.pop(index))

    def _end(self, index: int, begun: _Begun) -> None:
        begun.state.update(_ZEROS[: self._length(index) - begun.position])
        self._set(index, _sum(begun.state.digest(), self._length(index)))

    def _set(self, index: int, summed: bytes) -> None:
        self._sums[index * WIDTH : (index + 1) * WIDTH] = summed
        self._summed.add(index)

    def _length(self, index: int) -> int:
        return min(MIB, self._size - index * MIB)

    def missing(self) -> Iterator[tuple[int, int]]:
        """(offset, length) of each MiB whose parts came out of order."""
        for index in sorted(self._missing):
            yield index * MIB, self._length(index)

    def set(self, offset: int, data: bytes) -> None:
        """The whole content of the MiB at ``offset``."""
        self._set(offset // MIB, of_piece(data))

    def digest(self) -> memoryview:
        """All sums, one after the other; nothing is added any more."""
        while self._begun:
            self._end(*self._begun.popitem())
        return self._sums

"""Compressed clusters of a qcow2 file as they pass: the decoder's bookkeeping for what lies at no cluster's edge. Pure.

A compressed cluster begins at any byte, is named in whole sectors, and shares clusters of the file with others. What of
such a cluster no known one takes may belong to one whose table comes later, and has to be kept.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

SECTOR = 512
NONE = 0xFFFF
"""No sector: a cluster has 4096 at most."""

_MOST_AHEAD = 1 << 17
"""Compressed clusters that are known and have not passed; QEMU writes a table just before what it names."""

_MOST_BEGUN = 16 << 20
"""Bytes held of compressed clusters whose end has not passed. Of those that lie one after the other only one is begun
at a time, 4 MiB at most; a stranger's file may let any number of guest clusters name the same bytes."""


class SurpriseError(ValueError):
    """A file that this decoder does not take; the text says why. qemu-img may."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A compressed cluster of the guest at ``guest``; ``data`` may go on behind its end.

    The buffer may be the caller's own piece: hold that, or use it before the next one is fed.
    """

    guest: int
    data: bytearray | memoryview


class PackedClusters:
    """The compressed clusters of one file that are known and have not passed wholly."""

    def __init__(self, cluster_size: int) -> None:
        self._cluster = cluster_size
        self._bits = cluster_size.bit_length() - 1
        self._ahead: list[tuple[int, int, int]] = []  # (file offset, length, guest offset), a heap
        self._begun: list[tuple[int, bytearray, int]] = []  # (guest offset, bytes so far, bytes missing)
        self._held = 0  # bytes in them

    def __bool__(self) -> bool:
        return bool(self._ahead or self._begun)

    def expect(self, offset: int, length: int, guest: int) -> None:
        """One that has not begun yet."""
        if len(self._ahead) >= _MOST_AHEAD:
            raise SurpriseError("too many compressed clusters far behind their tables")
        heappush(self._ahead, (offset, length, guest))

    def go_on(self, guest: int, data: bytearray | memoryview, missing: int) -> Iterator[Packed]:
        """One whose first bytes are there already."""
        if missing <= 0:
            yield Packed(guest, data)
        else:
            self._held += len(data)
            if self._held > _MOST_BEGUN:
                raise SurpriseError("too many compressed clusters that lie over one another")
            self._begun.append((guest, bytearray(data), missing))

    def hand_out(self, piece: memoryview, start: int, unnamed: array[int]) -> Iterator[Packed]:
        """Those that end in the piece at ``start``. ``unnamed`` is told, per cluster of the piece, from which sector on
        there are bytes that none takes."""
        covered, end = start, start + len(piece)
        begun, self._begun, self._held = self._begun, [], 0
        for guest, head, missing in begun:
            covered = max(covered, start + min(missing, len(piece)))
            yield from self.go_on(guest, head + piece[:missing], missing - len(piece))
        while self._ahead and self._ahead[0][0] < end:
            offset, length, guest = heappop(self._ahead)
            data = piece[offset - start : offset - start + length]
            yield from self.go_on(guest, data, length - len(data))
            self._note_unnamed(unnamed, covered - start, offset - start)
            covered = max(covered, offset + length)
        self._note_unnamed(unnamed, covered - start, len(piece))

    def _note_unnamed(self, unnamed: array[int], start: int, end: int) -> None:
        """None takes what lies from ``start`` to the end of the cluster of ``end``."""
        if start >= end:
            return
        # lengths are in whole sectors: the next one may begin in the last sector of this one
        start = max(start - SECTOR, 0)
        first = start >> self._bits
        unnamed[first] = min(unnamed[first], (start & (self._cluster - 1)) // SECTOR)
        for number in range(first + 1, -(-end >> self._bits)):
            unnamed[number] = 0

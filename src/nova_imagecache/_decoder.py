"""Says, while a qcow2 file passes, where each of its bytes goes: the decoder of one-pass ingest. Pure: no I/O.

QEMU's docs/interop/qcow2.txt specifies the format. A file is a sequence of clusters; the header names the L1 table,
which names L2 tables, each of whose entries says where the bytes of one guest cluster lie. The decoder is fed the file
in order and yields, for each piece:

- ``Plain``: bytes of the guest, at their offset;
- ``Packed``: a compressed cluster of the guest;
- ``Keep``: bytes whose meaning is not known yet, to be kept by their place in the file. Should a table that comes later
  name them, the decoder asks for them by ``recall``; so any legal order gives the right result. Behind the last table
  there are none.

The bytes come from strangers. Every offset, length and flag is checked; whatever this decoder cannot prove to mean one
thing only raises ``SurpriseError``, and the caller takes the long way (qemu-img). It never yields bytes outside the
virtual size, nor one guest cluster twice.
"""

from __future__ import annotations

import sys
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nova_imagecache import _qcow2
from nova_imagecache._packed import NONE, SECTOR, Packed, PackedClusters, SurpriseError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from nova_imagecache._qcow2 import Qcow2Header

_OFFSET = 0x00FF_FFFF_FFFF_FE00
"""Bits 9 to 55 of a table's entry: where in the file."""

_COPIED = 1 << 63
_COMPRESSED = 1 << 62
_ZERO = 1
_ENTRY = 8

# what stands in the map for a cluster of the file; 0: not known (yet); below 2**62: a guest cluster's number + 1
_TABLE = 1 << 62  # an L2 table that has not passed; its number in the low bits
_SPOOLED = 2 << 62  # it has passed, and was kept from the sector in the low bits on
_DONE = 3 << 62  # it has passed, or is metadata, and nobody may name it as data any more
_KIND = 3 << 62

_MOST_CLUSTERS = 1 << 22
"""Of the file: the map takes eight bytes for each. 256 GiB of the default clusters."""

_MOST_TABLES = 1 << 20


@dataclass(frozen=True, slots=True)
class Plain:
    """Bytes of the guest at ``guest``. Their buffer may be the caller's piece: hold that, or use it before the next."""

    guest: int
    data: memoryview


@dataclass(frozen=True, slots=True)
class Keep:
    """Bytes at ``offset`` of the file whose meaning is not known yet."""

    offset: int
    data: memoryview


Found = Plain | Packed | Keep


class Decoder:
    """One qcow2 file on its way. Feed it pieces of whole clusters (the last may be shorter), then call ``finish``.

    ``recall(offset, length)`` gives bytes that were yielded as ``Keep``; it is asked while ``feed`` is iterated.
    ``planned`` is how many bytes of the guest the tables seen so far name, the upper bound of what they take on disk.

    Raises:
        SurpriseError: at once, what the header tells.
    """

    def __init__(self, header: Qcow2Header, file_size: int, recall: Callable[[int, int], bytes]) -> None:
        self.planned = 0
        self._recall = recall
        self._size = header.virtual_size
        self._file_size = file_size
        self._cluster = header.cluster_size
        self._bits = header.cluster_size.bit_length() - 1
        self._zeros_known = header.version >= 3
        self._start = 0  # of the piece that is being looked at: what lies before it has passed
        self._end = 0
        self._per_table = self._cluster // _ENTRY
        self._tables = -(-self._size // (self._cluster * self._per_table))
        self._tables_left = 0
        clusters = -(-file_size // self._cluster)
        _judge(header, self._tables, clusters, file_size)
        self._l1_offset = header.l1_offset
        self._l1: bytearray | None = bytearray()
        self._map = array("Q", bytes(_ENTRY * clusters))
        self._mark(0, self._cluster, "the header")
        self._mark(self._l1_offset, self._tables * _ENTRY, "the L1 table")
        self._packed = PackedClusters(self._cluster)

    def feed(self, piece: memoryview) -> Iterator[Found]:
        """What the next bytes of the file are. Iterate to the end before the next piece is fed.

        Raises:
            SurpriseError: the file cannot be decoded here; what was yielded may be wrong or incomplete.
        """
        self._start, self._end = self._end, self._end + len(piece)
        if self._end > self._file_size:
            raise SurpriseError("it is longer than was announced")
        yield from self._look_at_l1(piece)
        if self._tables_left:
            for number in range(self._start >> self._bits, -(-self._end >> self._bits)):
                if self._map[number] & _KIND == _TABLE:
                    at = (number << self._bits) - self._start
                    table = self._map[number] & ~_KIND
                    self._map[number] = _DONE
                    self._tables_left -= 1
                    yield from self._look_at_l2(table, bytes(piece[at : at + self._cluster]))
        yield from self._hand_out(piece)

    def finish(self) -> None:
        """The file has ended.

        Raises:
            SurpriseError: tables or clusters that were named never came.
        """
        if self._l1 is not None or self._tables_left or self._packed:
            raise SurpriseError("it ends before its tables or data do")

    # --- tables

    def _look_at_l1(self, piece: memoryview) -> Iterator[Found]:
        """Note where the L2 tables lie, once the L1 table is whole; look at those that have passed."""
        if self._l1 is None:
            return
        missing = self._tables * _ENTRY - len(self._l1)
        first = self._l1_offset + len(self._l1) - self._start
        if not 0 <= first < len(piece):
            return
        self._l1 += piece[first : first + missing]
        if len(self._l1) < self._tables * _ENTRY:
            return
        entries, self._l1 = _entries(self._l1), None
        late = [(table, entry & _OFFSET) for table, entry in enumerate(entries) if self._note_table(table, entry)]
        for table, offset in late:
            yield from self._look_at_l2(table, self._recall(offset, self._cluster))

    def _note_table(self, table: int, entry: int) -> bool:
        """Whether the L2 table that an L1 entry names has passed."""
        offset = entry & _OFFSET
        if entry & ~(_OFFSET | _COPIED):
            raise SurpriseError("an L1 entry with reserved bits")
        if not offset:
            return False
        number = self._cluster_at(offset, "an L2 table")
        if offset + self._cluster > self._file_size:
            raise SurpriseError("an L2 table beyond the file's end")
        if self._map[number] == _SPOOLED:
            self._map[number] = _DONE
            return True
        if self._map[number] or offset < self._start:
            raise SurpriseError("an L2 table where something else lies")
        self._map[number] = _TABLE | table
        self._tables_left += 1
        return False

    def _look_at_l2(self, table: int, data: bytes) -> Iterator[Found]:
        if len(data) != self._cluster:
            raise SurpriseError("an L2 table that is cut off")
        guest = table * self._per_table * self._cluster
        for entry in _entries(data):
            if entry and guest < self._size:
                yield from self._look_at_entry(entry, guest)
            guest += self._cluster

    def _look_at_entry(self, entry: int, guest: int) -> Iterator[Found]:
        """Note where a guest cluster lies; yield it if that has passed."""
        if entry & _COMPRESSED:
            yield from self._note_packed(entry, guest)
            return
        if entry & ~(_OFFSET | _COPIED | _ZERO) or (entry & _ZERO and not self._zeros_known):
            raise SurpriseError("an L2 entry with reserved bits")
        offset = entry & _OFFSET
        if not offset:
            return  # nothing was ever written there, or zeros
        number = self._cluster_at(offset, "a data cluster")
        known = self._map[number]
        if entry & _ZERO:  # allocated, and reads as zeros all the same
            if known == 0 and offset >= self._start:
                self._map[number] = _DONE
            return
        self.planned += self._cluster
        if known == 0 and offset >= self._start:
            self._map[number] = (guest >> self._bits) + 1
        elif known == _SPOOLED:
            self._map[number] = _DONE
            length = min(self._cluster, self._size - guest, self._file_size - offset)
            yield Plain(guest, memoryview(self._recall(offset, length)))
        else:
            raise SurpriseError("a data cluster where something else lies")

    def _note_packed(self, entry: int, guest: int) -> Iterator[Found]:
        if entry & _COPIED:
            raise SurpriseError("a compressed cluster that is marked as a plain one")
        # bits of the offset: 62 - (cluster_bits - 8); above them the number of sectors behind the first
        shift = 70 - self._bits
        offset = entry & ((1 << shift) - 1)
        if offset < self._cluster or offset >= self._file_size:
            raise SurpriseError("a compressed cluster outside of the file")
        sectors = (entry & (_COMPRESSED - 1)) >> shift
        length = min((sectors + 1) * SECTOR - offset % SECTOR, self._file_size - offset)
        self.planned += self._cluster
        if offset >= self._start:
            self._packed.expect(offset, length, guest)
            return
        passed = min(length, self._start - offset)
        sector = (offset & (self._cluster - 1)) // SECTOR
        for number in range(offset >> self._bits, ((offset + passed - 1) >> self._bits) + 1):
            known = self._map[number]
            if known & _KIND != _SPOOLED or known & ~_KIND > sector:
                raise SurpriseError("a compressed cluster where something else lies")
            sector = 0
        yield from self._packed.go_on(guest, bytearray(self._recall(offset, passed)), length - passed)

    def _cluster_at(self, offset: int, what: str) -> int:
        if offset & (self._cluster - 1) or offset >= self._file_size:
            raise SurpriseError(f"{what} that is not at a cluster of the file")
        return offset >> self._bits

    def _mark(self, offset: int, length: int, what: str) -> None:
        """Nobody may name these clusters as data."""
        for number in range(offset >> self._bits, -(-(offset + length) >> self._bits)):
            if self._map[number]:
                raise SurpriseError(f"{what} lies where something else does")
            self._map[number] = _DONE

    # --- data

    def _hand_out(self, piece: memoryview) -> Iterator[Found]:
        # per cluster, from which of its sectors on there are bytes that no compressed cluster takes
        unnamed = array("H", [NONE]) * -(-len(piece) >> self._bits)
        yield from self._packed.hand_out(piece, self._start, unnamed)
        first = self._start >> self._bits
        number, behind = first, first + len(unnamed)
        may_be_named = self._l1 is not None or self._tables_left > 0
        while number < behind:
            begun, kind = number, self._map[number]
            number += 1
            if 0 < kind < _TABLE:
                while number < behind and self._map[number] == kind + number - begun:
                    number += 1
                guest = (kind - 1) << self._bits
                data = self._part(piece, begun - first, number - first)
                yield Plain(guest, data[: self._size - guest])
                self._pass(begun, number, _DONE)
            elif may_be_named and kind == 0 and (sector := unnamed[begun - first]) != NONE:
                while number < behind and self._map[number] == unnamed[number - first] == 0:
                    number += 1
                data = self._part(piece, begun - first, number - first)[sector * SECTOR :]
                yield Keep((begun << self._bits) + sector * SECTOR, data)
                self._pass(begun, number, _SPOOLED)
                self._map[begun] |= sector
            else:
                self._map[begun] = _DONE

    def _part(self, piece: memoryview, first: int, behind: int) -> memoryview:
        return piece[first << self._bits : behind << self._bits]

    def _pass(self, first: int, behind: int, how: int) -> None:
        for number in range(first, behind):
            self._map[number] = how


def _judge(header: Qcow2Header, tables: int, clusters: int, file_size: int) -> None:
    """Refuse what the header tells: features and sizes that the decoder does not take."""
    # wrong reference counts do not matter to a reader; extended L2 entries (0x10) do
    unknown = header.incompatible & ~(_qcow2.DIRTY | _qcow2.COMPRESSION)
    reasons = {
        "a backing file": header.backing_offset != 0,
        "encryption": header.encrypted,
        f"incompatible features {unknown:#x}": unknown != 0,
        "an unknown compression": header.compression is None,
        "a virtual size that is no multiple of 512": header.virtual_size % SECTOR != 0 or header.virtual_size == 0,
        "too many clusters": clusters > _MOST_CLUSTERS or tables > _MOST_TABLES,
        "an L1 table that is too short": header.l1_entries < tables,
        "an L1 table out of place": header.l1_offset % header.cluster_size != 0
        or not header.cluster_size <= header.l1_offset <= file_size - tables * _ENTRY,
    }
    for reason, applies in reasons.items():
        if applies:
            raise SurpriseError(reason)


def _entries(data: bytes | bytearray) -> array[int]:
    """A table's entries; the file has them big-endian."""
    found = array("Q", bytes(data))
    if sys.byteorder == "little":
        found.byteswap()
    return found

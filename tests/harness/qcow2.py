"""qcow2 files made by hand, in any order that the format allows, and the decoder run over bytes in memory."""

from __future__ import annotations

import random
import struct
import zlib
from dataclasses import dataclass, field

import zstandard

from nova_imagecache import _qcow2
from nova_imagecache._decoder import Decoder, Keep, Plain
from nova_imagecache._inflate import unpacker

PIECE = 4 << 20
_HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQIIB7x")
_COPIED = 1 << 63
_PACKED = 1 << 62


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a hand-made image is like. ``kinds`` says per guest cluster: "plain", "packed", "zero", "zero-allocated" or
    "hole"; ``seed`` shuffles where everything lies in the file, None: in the order in which QEMU writes."""

    cluster_bits: int
    kinds: tuple[str, ...]
    version: int = 3
    zstd: bool = False
    seed: int | None = None
    near: int | None = None
    """Clusters lie in the guest's order, but for so many places at most."""
    tail: int = 0
    """Bytes by which the virtual size is less than whole clusters; a multiple of 512."""


@dataclass(kw_only=True)
class Made:
    """The file, and the bytes that a guest sees in it."""

    file: bytes
    guest: bytes
    tables: list[tuple[int, int]] = field(default_factory=list)
    """(offset, length) of the header, the L1 table and each L2 table: what a stranger would tamper with."""


def make(layout: Layout) -> Made:
    """An image of this layout."""
    size = 1 << layout.cluster_bits
    rng = random.Random(layout.seed if layout.seed is not None else len(layout.kinds))
    guest = bytearray(size * len(layout.kinds))
    per_table = size // 8
    tables = -(-len(layout.kinds) // per_table)
    plain: dict[int, bytes] = {}
    packed: dict[int, bytes] = {}
    for number, kind in enumerate(layout.kinds):
        if kind not in ("plain", "packed"):
            continue
        data = _content(rng, size)
        guest[number * size : (number + 1) * size] = data
        if kind == "packed" and len(squeezed := _squeeze(data, zstd=layout.zstd)) < size:
            packed[number] = squeezed
        else:
            plain[number] = data

    # runs of whole clusters that are laid into the file one after the other
    l1_clusters = -(-tables * 8 // size)
    runs: list[tuple[str, int, int]] = [("refcounts", 0, 1), ("l1", 0, l1_clusters)]
    for table in range(tables):
        runs.append(("l2", table, 1))
        mine = range(table * per_table, min((table + 1) * per_table, len(layout.kinds)))
        runs += [("plain", n, 1) for n in mine if n in plain or layout.kinds[n] == "zero-allocated"]
        runs += [
            ("packed", number, count) for number, count in _bundles([n for n in mine if n in packed], packed, size)
        ]
    if layout.near is not None:
        places = {run: run[1] + rng.random() * layout.near for run in runs if run[0] in ("plain", "packed")}
        runs.sort(key=lambda run: places.get(run, -1))
    elif layout.seed is not None:
        rng.shuffle(runs)
    where: dict[tuple[str, int], int] = {}
    end = 1
    for what, number, clusters in runs:
        where[what, number] = end * size
        end += clusters
    file = bytearray(end * size)

    l2_entries = [[0] * per_table for _ in range(tables)]
    for number, kind in enumerate(layout.kinds):
        entry = 0
        if number in plain:
            at = where["plain", number]
            file[at : at + size] = plain[number]
            entry = at | _COPIED
        elif kind == "zero":
            entry = 1
        elif kind == "zero-allocated":
            at = where["plain", number]
            file[at : at + size] = b"\xaa" * size  # reads as zeros all the same
            entry = at | _COPIED | 1
        l2_entries[number // per_table][number % per_table] = entry
    for what, number in [key for key in where if key[0] == "packed"]:
        at = where[what, number]
        for member in _members(number, packed, size, per_table):
            data = packed[member]
            file[at : at + len(data)] = data
            sectors = (at % 512 + len(data) - 1) // 512
            l2_entries[member // per_table][member % per_table] = _PACKED | sectors << (70 - layout.cluster_bits) | at
            at += len(data)

    made = Made(file=b"", guest=bytes(guest[: len(guest) - layout.tail]))
    l1 = where["l1", 0]
    made.tables = [(0, 112), (l1, tables * 8)]
    for table, entries in enumerate(l2_entries):
        at = where["l2", table]
        struct.pack_into(f">{per_table}Q", file, at, *entries)
        struct.pack_into(">Q", file, l1 + 8 * table, at | _COPIED)
        made.tables.append((at, size))
    v3 = layout.version == 3
    _HEADER.pack_into(
        *(file, 0, b"QFI\xfb", layout.version, 0, 0, layout.cluster_bits, len(made.guest), 0, tables, l1),
        *(where["refcounts", 0], 1, 0, 0, 8 if layout.zstd else 0, 0, 0, 4 if v3 else 0, 112 if v3 else 0),
        int(layout.zstd),
    )
    made.file = bytes(file)
    return made


def one_for_all(count: int) -> bytes:
    """A legal image of 14 MiB whose ``count`` guest clusters of 2 MiB are all the same compressed bytes, which begin in
    the third piece of 4 MiB and end in the fourth."""
    size = 1 << 21
    file = bytearray(7 * size)
    header = (b"QFI\xfb", 3, 0, 0, 21, count * size, 0, 1, size, 0, 0, 0, 0, 0, 0, 0, 4, 112, 0)
    _HEADER.pack_into(file, 0, *header)
    table, at = 2 * size, 4 * size + 512
    struct.pack_into(">Q", file, size, table | _COPIED)
    sectors = 2 * size // 512 - 1
    struct.pack_into(f">{count}Q", file, table, *[_PACKED | sectors << (70 - 21) | at] * count)
    packed = _squeeze(b"x" * size, zstd=False)
    file[at : at + len(packed)] = packed
    return bytes(file)


def decode(file: bytes, piece: int = PIECE) -> tuple[bytes, int]:
    """What the decoder makes of a file, and how many bytes it had kept for later.

    Raises:
        SurpriseError, PackedError: it does not take the file.
        AssertionError: it went outside of the virtual size, or wrote something twice.
    """
    header = _qcow2.parse_header(file[: _qcow2.HEADER_BYTES])
    spool = bytearray(len(file))
    guest = bytearray(min(header.virtual_size, 1 << 30))
    written = bytearray(-(-header.virtual_size // header.cluster_size) if header.virtual_size < 1 << 40 else 0)
    kept = 0
    decoder = Decoder(header, len(file), lambda offset, length: bytes(spool[offset : offset + length]))
    unpack = unpacker(header.compression or "zlib", header.cluster_size)
    view = memoryview(file)
    for start in range(0, len(file), piece):
        for found in decoder.feed(view[start : start + piece]):
            if isinstance(found, Keep):
                spool[found.offset : found.offset + len(found.data)] = found.data
                kept += len(found.data)
                continue
            data = found.data if isinstance(found, Plain) else unpack(found.data)[: header.virtual_size - found.guest]
            assert 0 <= found.guest <= found.guest + len(data) <= header.virtual_size, "outside of the virtual size"
            first, last = found.guest // header.cluster_size, (found.guest + len(data) - 1) // header.cluster_size
            assert not any(written[first : last + 1]), "written twice"
            written[first : last + 1] = b"\1" * (last + 1 - first)
            guest[found.guest : found.guest + len(data)] = data
    decoder.finish()
    assert sum(written) * header.cluster_size == decoder.planned, "planned something else"
    return bytes(guest), kept


def _content(rng: random.Random, size: int) -> bytes:
    """A cluster: noise, text, or text with a hole."""
    kind = rng.random()
    if kind < 0.3:
        return rng.randbytes(size)
    text = bytes(rng.choices(b"abcdefgh \n", k=min(size, 700)))
    data = (text * (size // len(text) + 1))[:size]
    return data if kind < 0.8 else data[: size // 2] + bytes(size - size // 2)


def _squeeze(data: bytes, *, zstd: bool) -> bytes:
    if zstd:
        return zstandard.ZstdCompressor().compress(data)
    packer = zlib.compressobj(6, zlib.DEFLATED, -12)
    return packer.compress(data) + packer.flush()


def _bundles(numbers: list[int], packed: dict[int, bytes], size: int) -> list[tuple[int, int]]:
    """Neighbours that share clusters of the file, as QEMU packs them: (first of them, clusters)."""
    found = []
    for start in range(0, len(numbers), _BUNDLE):
        members = numbers[start : start + _BUNDLE]
        found.append((members[0], -(-sum(len(packed[n]) for n in members) // size)))
    return found


def _members(first: int, packed: dict[int, bytes], size: int, per_table: int) -> list[int]:
    del size
    table = first // per_table
    return [n for n in sorted(packed) if n >= first and n // per_table == table][:_BUNDLE]


_BUNDLE = 5

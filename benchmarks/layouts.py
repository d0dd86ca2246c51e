"""Where the parts of an image lie, read from it beforehand, without checks: the images are the benchmarks' own."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_OFFSET = 0x00FF_FFFF_FFFF_FE00
_COMPRESSED = 1 << 62
_ZEROS = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Compressed:
    """The compressed clusters of a qcow2 file, by where they lie."""

    cluster_size: int
    zstd: bool
    places: tuple[tuple[int, int], ...]


def compressed_clusters(path: Path) -> Compressed:
    """Read from the file's tables."""
    with path.open("rb") as file:
        header = file.read(112)
    (bits,) = struct.unpack_from(">I", header, 20)
    (length,) = struct.unpack_from(">I", header, 100)
    shift = 62 - (bits - 8)
    places = []
    for _, entry in _clusters(path):
        if entry & _COMPRESSED:
            offset = entry & ((1 << shift) - 1)
            sectors = ((entry & (_COMPRESSED - 1)) >> shift) + 1
            places.append((offset, sectors * 512 - offset % 512))
    zstd = length > 104 and header[104] == 1
    return Compressed(cluster_size=1 << bits, zstd=zstd, places=tuple(places))


def runs(path: Path, disk_format: str) -> list[tuple[int, int, int]]:
    """Data as they lie in the file, one after the other: where, how many bytes, and at which place of the disk."""
    if disk_format == "raw":
        with path.open("rb") as file:
            return [(start, end - start, start) for start, end in extents(file.fileno())]
    with path.open("rb") as file:
        file.seek(20)
        (bits,) = struct.unpack(">I", file.read(4))
    found: list[tuple[int, int, int]] = []
    for place, entry in sorted(_clusters(path), key=lambda one: one[1] & _OFFSET):
        offset = entry & _OFFSET
        if not offset or entry & (_COMPRESSED | _ZEROS):
            continue
        start, length, first = found[-1] if found else (0, 0, 0)
        if start + length == offset and first + length == place:
            found[-1] = (start, length + (1 << bits), first)
        else:
            found.append((offset, 1 << bits, place))
    return found


def _clusters(path: Path) -> Iterator[tuple[int, int]]:
    """The place on the disk, and the entry, of each cluster that the tables of a qcow2 file name."""
    with path.open("rb") as file:
        header = file.read(48)
        (bits,) = struct.unpack_from(">I", header, 20)
        count, table = struct.unpack_from(">IQ", header, 36)
        each = (1 << bits) // 8
        file.seek(table)
        for number, entry in enumerate(struct.unpack(f">{count}Q", file.read(8 * count))):
            if second := entry & _OFFSET:
                file.seek(second)
                for cluster, one in enumerate(struct.unpack(f">{each}Q", file.read(8 * each))):
                    if one:
                        yield (number * each + cluster) << bits, one


def extents(file: int) -> Iterator[tuple[int, int]]:
    """Where an open file has data: first byte, and the one after the last."""
    size = os.fstat(file).st_size
    position = 0
    while position < size:
        try:
            start = os.lseek(file, position, os.SEEK_DATA)
        except OSError:  # ENXIO: no data after this
            return
        position = os.lseek(file, start, os.SEEK_HOLE)
        yield start, position

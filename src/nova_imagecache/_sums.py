"""disk.sums: one xxh3 (64 bit, big-endian) per MiB of a base, to verify bytes that are not the source's."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from nova_imagecache._models import Extent

MIB = 1 << 20
WIDTH = 8


@lru_cache(maxsize=4)
def _of_zeros(length: int) -> bytes:
    return of_piece(bytes(length))


def of_piece(data: bytes | memoryview) -> bytes:
    """The sum of one MiB (or of the shorter last piece)."""
    from xxhash import xxh3_64_digest

    return bytes(xxh3_64_digest(data))


def of_extents(extents: Iterable[Extent], size: int) -> bytes:
    """The sums of ``size`` bytes of which only the extents are not zeros; each extent is one MiB's whole content."""
    count = (size + MIB - 1) // MIB
    sums = bytearray(_of_zeros(MIB) * count)
    if size % MIB:
        sums[-WIDTH:] = _of_zeros(size % MIB)
    for extent in extents:
        index = extent.offset // MIB
        sums[index * WIDTH : (index + 1) * WIDTH] = of_piece(extent.data)
    return bytes(sums)

"""One cluster is unpacked as if it were the first, whatever its thread has unpacked before."""

from __future__ import annotations

import random
import zlib
from typing import Literal

import pytest
import zstandard

from nova_imagecache._inflate import PackedError, unpacker

CLUSTER = 65536
DATA = random.Random(5).randbytes(CLUSTER // 2) + bytes(CLUSTER // 2)


def packed(data: bytes, compression: Literal["zlib", "zstd"]) -> bytes:
    """The bytes as qcow2 holds them."""
    if compression == "zstd":
        return zstandard.ZstdCompressor().compress(data)
    squeeze = zlib.compressobj(wbits=-12)
    return squeeze.compress(data) + squeeze.flush()


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
def test_what_came_before_does_not_matter(compression: Literal["zlib", "zstd"]) -> None:
    """A cluster that is cut off, damaged, or goes on behind its end; and what lies behind a whole one."""
    unpack = unpacker(compression, CLUSTER)
    whole, longer = packed(DATA, compression), packed(2 * DATA, compression)
    for before in (whole[:1000], b"\xff" * 1000):
        with pytest.raises(PackedError):
            unpack(before)
        assert unpack(whole) == DATA
    assert unpack(longer) == DATA
    assert unpack(whole + longer[:512]) == DATA

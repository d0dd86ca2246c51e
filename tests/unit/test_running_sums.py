"""Checksums made on the way are those of the finished bytes, whatever order the parts came in."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from nova_imagecache import _sums

MIB = 1 << 20


def of(data: bytes) -> bytes:
    return b"".join(_sums.of_piece(data[at : at + MIB]) for at in range(0, len(data), MIB))


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 6 * MIB),
    parts=st.lists(st.integers(0, 96), unique=True, max_size=40),
    shuffle=st.one_of(st.none(), st.integers(0, 1 << 20)),
)
def test_sums_are_those_of_the_whole(size: int, parts: list[int], shuffle: int | None) -> None:
    """What came in order is not read again; what did not is asked for; what never came is zeros."""
    step = 64 * 1024
    data = bytearray(size)
    spans = [(n * step, min((n + 1) * step, size)) for n in sorted(parts) if n * step < size]
    for start, end in spans:
        data[start:end] = random.Random(start).randbytes(end - start)
    if shuffle is not None:
        random.Random(shuffle).shuffle(spans)
    running = _sums.Running(size)
    for start, end in spans:
        running.add(start, bytes(data[start:end]))
    missing = list(running.missing())
    assert shuffle is not None or missing == []
    for offset, length in missing:
        running.set(offset, bytes(data[offset : offset + length]))
    assert running.digest() == of(bytes(data))


def test_parts_may_be_long() -> None:
    """One of many MiBs is summed as it is."""
    data = random.Random(1).randbytes(5 * MIB + 77)
    running = _sums.Running(len(data))
    running.add(0, data)
    assert list(running.missing()) == []
    assert running.digest() == of(data)


def test_more_begun_than_are_kept() -> None:
    """A guest that writes a little everywhere: what is forgotten is asked for when it goes on."""
    size = 200 * MIB
    running = _sums.Running(size)
    for index in range(200):
        running.add(index * MIB, b"x" * 512)
    running.add(100, b"")
    running.add(1000, b"y" * 24)
    assert list(running.missing()) == [(0, MIB)]
    content = bytearray(MIB)
    content[:512] = b"x" * 512
    content[1000:1024] = b"y" * 24
    running.set(0, bytes(content))
    rest = _sums.of_piece(b"x" * 512 + bytes(MIB - 512))
    assert running.digest() == _sums.of_piece(content) + rest * 199


def test_a_mib_of_zeros_has_the_sum_zero() -> None:
    """Whether its zeros came, in one part or many, or did not; the last one may be short."""
    assert _sums.of_piece(bytes(MIB)) == _sums.of_piece(bytes(100)) == bytes(8)
    assert _sums.of_piece(b"x" + bytes(MIB - 1)) != bytes(8)
    running = _sums.Running(3 * MIB + 100)
    running.add(0, bytes(MIB))
    running.add(MIB, bytes(4096))
    running.add(MIB + 8192, bytes(4096))
    running.add(3 * MIB, bytes(100))
    assert running.digest() == bytes(4 * 8)

"""Properties of how bytes are read and summed."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nova_imagecache import _sums
from nova_imagecache._extents import data_extents, nonzero_runs, read_extents
from nova_imagecache._models import round_up

KIB = 1 << 10
MIB = 1 << 20

# what decides are block edges, so pieces are drawn around them
LENGTHS = st.one_of(
    st.integers(0, 3), st.sampled_from([4095, 4096, 4097, 8192, 65535, 65536, 65537]), st.integers(1, 70000)
)
BUFFERS = st.lists(st.tuples(st.sampled_from([b"\0", b"\0", b"\x01", b"\xff"]), LENGTHS), max_size=12).map(
    lambda parts: b"".join(byte * length for byte, length in parts)
)
PIECES = st.lists(st.tuples(st.integers(0, 5 * MIB), st.integers(1, 200 * KIB)), max_size=6)


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


def written(path: Path, size: int, pieces: list[tuple[int, int]], *, dense: bool) -> bytes:
    """A file with data at some places, and its content."""
    content = bytearray(size)
    for offset, length in pieces:
        end = min(offset + length, size)
        content[offset:end] = b"\xa5" * max(end - offset, 0)
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        if dense:
            file.write(content)
        else:
            file.truncate(size)
            for offset, length in pieces:
                os.pwrite(file.fileno(), bytes(content[offset : offset + length]), offset)
    return bytes(content)


class TestRuns:
    """nonzero_runs: what is written of a buffer, and what becomes a hole."""

    @given(BUFFERS)
    def test_they_rebuild_the_buffer(self, buffer: bytes) -> None:
        """Over zeros."""
        rebuilt = bytearray(len(buffer))
        for offset, piece in nonzero_runs(buffer):
            rebuilt[offset : offset + len(piece)] = piece
        assert rebuilt == buffer

    @given(BUFFERS)
    def test_no_block_of_zeros_is_written(self, buffer: bytes) -> None:
        """Every 4 KiB block in a run holds something; runs are in order and never touch."""
        last = -1
        for offset, piece in nonzero_runs(buffer):
            assert offset % 4096 == 0
            assert offset > last
            assert len(piece) > 0
            for start in range(0, len(piece), 4096):
                assert any(piece[start : start + 4096])
            last = offset + len(piece)
            assert last % 4096 == 0 or last == len(buffer)


class TestFiles:
    """Extents and sums of files with and without holes."""

    @given(size=st.integers(0, 5 * MIB), pieces=PIECES)
    def test_extents_hold_all_data(self, directory: Path, size: int, pieces: list[tuple[int, int]]) -> None:
        """In order, disjoint, and what lies between reads as zeros."""
        path = directory / "sparse"
        content = written(path, size, [p for p in pieces if p[0] < size], dense=False)
        rebuilt, last = bytearray(size), 0
        for extent in read_extents(path):
            assert extent.offset >= last
            assert extent.offset // MIB == (extent.offset + len(extent.data) - 1) // MIB
            rebuilt[extent.offset : extent.offset + len(extent.data)] = extent.data
            last = extent.offset + len(extent.data)
        assert rebuilt == content
        with path.open("rb") as file:
            runs = list(data_extents(file.fileno(), size))
        assert all(0 <= start < end <= size for start, end in runs)
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(runs))

    @given(size=st.integers(0, 5 * MIB), pieces=PIECES)
    def test_sums_of_sparse_and_dense_files_are_equal(
        self, directory: Path, size: int, pieces: list[tuple[int, int]]
    ) -> None:
        """How a file is stored says nothing of what it holds."""
        kept = [p for p in pieces if p[0] < size]
        content = written(directory / "a", size, kept, dense=False)
        assert written(directory / "b", size, kept, dense=True) == content
        sums = _sums.of_extents(read_extents(directory / "a"), size)
        assert sums == _sums.of_extents(read_extents(directory / "b"), size)
        assert sums == b"".join(_sums.of_piece(content[at : at + MIB]) for at in range(0, size, MIB))
        assert len(sums) == _sums.WIDTH * -(-size // MIB)


class TestRounding:
    """Sizes as a guest sees them."""

    @given(st.integers(0, 1 << 63))
    def test_rounding_up_is_to_the_next_sector(self, size: int) -> None:
        """Never down, never by a whole sector, twice as once."""
        rounded = round_up(size)
        assert rounded % 512 == 0
        assert 0 <= rounded - size < 512
        assert round_up(rounded) == rounded

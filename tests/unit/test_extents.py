"""Files are read by their data: holes and zeros cost nothing and are told apart from it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nova_imagecache._extents import allocated_tree, content, data_extents, nonzero_runs, read_extents

KIB = 1 << 10
MIB = 1 << 20


def sparse(path: Path, size: int, *pieces: tuple[int, bytes]) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
        for offset, data in pieces:
            os.pwrite(file.fileno(), data, offset)
    return path


def extents(path: Path, size: int | None = None) -> list[tuple[int, int]]:
    with path.open("rb") as file:
        return list(data_extents(file.fileno(), path.stat().st_size if size is None else size))


def test_only_data_is_visited(tmp_path: Path) -> None:
    """A hole before, between and after."""
    path = sparse(tmp_path / "x", 10 * MIB, (MIB, b"a" * 4096), (5 * MIB, b"b" * 8192))
    assert extents(path) == [(MIB, MIB + 4096), (5 * MIB, 5 * MIB + 8192)]


def test_content_is_the_whole_file(tmp_path: Path) -> None:
    """With its holes, to the last byte; also where there is nothing."""
    path = sparse(tmp_path / "x", 3 * MIB + 5, (MIB - 3, b"abcdefg"), (3 * MIB + 3, b"yz"))
    assert content(path) == path.read_bytes()
    assert content(sparse(tmp_path / "hole", MIB)) == bytes(MIB)
    assert bytes(content(sparse(tmp_path / "empty", 0))) == b""


def test_files_without_data_have_no_extents(tmp_path: Path) -> None:
    """Empty, or one hole."""
    assert extents(sparse(tmp_path / "empty", 0)) == []
    assert extents(sparse(tmp_path / "hole", 10 * MIB)) == []


def test_extents_end_at_the_size_that_is_asked_for(tmp_path: Path) -> None:
    """What grew meanwhile is somebody else's."""
    assert extents(sparse(tmp_path / "x", MIB, (0, b"a" * MIB)), 5000) == [(0, 5000)]


def test_pieces_never_cross_a_mebibyte(tmp_path: Path) -> None:
    """A sum is of one MiB: its extent begins on it and holds all of it up to the end of the file."""
    size = 5 * MIB + 1234
    pieces = [(MIB - 4096, b"a" * 8192), (3 * MIB + 65536, b"b" * 10), (size - 4, b"tail")]
    path = sparse(tmp_path / "x", size, *pieces)
    found = list(read_extents(path))
    assert [extent.offset for extent in found] == [0, MIB, 3 * MIB, 5 * MIB]
    assert [len(extent.data) for extent in found] == [MIB, MIB, MIB, 1234]
    content = path.read_bytes()
    assert all(content[extent.offset :].startswith(extent.data) for extent in found)


def test_a_piece_is_read_once(tmp_path: Path) -> None:
    """Many small runs of data in one MiB give one extent."""
    path = sparse(tmp_path / "x", 2 * MIB, *((n * 65536, b"x") for n in range(16)))
    assert [extent.offset for extent in read_extents(path)] == [0]


def test_runs_leave_zero_blocks_out() -> None:
    """In steps of 4 KiB, from the front, the middle and the end."""
    buffer = bytearray(64 * KIB)
    buffer[4096] = 1
    buffer[8191 + 4096] = 1
    buffer[-1] = 1
    runs = [(offset, len(piece)) for offset, piece in nonzero_runs(bytes(buffer))]
    assert runs == [(4096, 8192), (60 * KIB, 4096)]


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 65536, 65537, MIB])
def test_zeros_give_no_runs(size: int) -> None:
    """However many, and whatever their last block's length."""
    assert list(nonzero_runs(bytes(size))) == []


def test_data_gives_one_run() -> None:
    """A full buffer is written in one piece."""
    assert [(offset, bytes(piece)) for offset, piece in nonzero_runs(b"x" * 100_001)] == [(0, b"x" * 100_001)]


def test_an_inode_is_counted_once(tmp_path: Path) -> None:
    """Links cost nothing; directories cost their own blocks."""
    (tmp_path / "tree" / "deep").mkdir(parents=True)
    path = sparse(tmp_path / "tree" / "x", MIB, (0, b"a" * 65536))
    one, complete = allocated_tree(tmp_path / "tree")
    assert complete
    os.link(path, tmp_path / "tree" / "deep" / "y")
    assert allocated_tree(tmp_path / "tree") == (one, True)
    assert 65536 <= one < 65536 + 64 * KIB


def test_a_tree_that_is_not_there_takes_nothing(tmp_path: Path) -> None:
    """And nothing was missed."""
    assert allocated_tree(tmp_path / "none") == (0, True)


def test_symbolic_links_are_not_followed(tmp_path: Path) -> None:
    """What they point to is not the cache's."""
    (tmp_path / "tree").mkdir()
    sparse(tmp_path / "outside", MIB, (0, b"a" * MIB))
    (tmp_path / "tree" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "tree" / "loop").symlink_to(tmp_path / "tree")
    total, complete = allocated_tree(tmp_path / "tree")
    assert complete
    assert total < 64 * KIB

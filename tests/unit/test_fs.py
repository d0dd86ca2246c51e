"""Durable steps on files: whole or not at all, exact modes, holes kept, nothing left behind."""

from __future__ import annotations

import errno
import os
import random
import stat
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from nova_imagecache import _fs
from nova_imagecache._extents import data_extents
from nova_imagecache.testing import FaultPlan

KIB = 1 << 10
MIB = 1 << 20
DATA = random.Random(7).randbytes(300 * KIB + 77)


def sparse(path: Path, size: int = 32 * MIB) -> Path:
    """Data at the front, in the middle and up to the last byte, holes between."""
    with path.open("wb") as file:
        file.truncate(size)
        for offset in (0, 10 * MIB, size - len(DATA)):
            os.pwrite(file.fileno(), DATA, offset)
    return path


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


def holes(path: Path) -> list[tuple[int, int]]:
    with path.open("rb") as file:
        return list(data_extents(file.fileno(), path.stat().st_size))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.fixture
def descriptors() -> Iterator[list[int]]:
    """Descriptors to be closed at the end."""
    opened: list[int] = []
    yield opened
    for fd in opened:
        os.close(fd)


@pytest.fixture
def narrow_umask() -> Iterator[None]:
    old = os.umask(0o077)
    yield
    os.umask(old)


@pytest.fixture
def without_tmpfile(monkeypatch: pytest.MonkeyPatch) -> None:
    """A filesystem that has no O_TMPFILE, as seen by ``_fs`` alone."""

    def refuse(path: Any, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "no such thing here")
        return os.open(path, flags, mode)

    shim = types.ModuleType("os")
    shim.__dict__.update(vars(os), open=refuse)
    monkeypatch.setattr(_fs, "os", shim)


# --- steps -----------------------------------------------------------------------------------------------------------


def test_every_step_is_a_function_of_the_module() -> None:
    """A fault plan replaces them by name."""
    assert all(callable(getattr(_fs, name)) for name in _fs.SEAMS)
    assert len(set(_fs.SEAMS)) == len(_fs.SEAMS)


@pytest.mark.usefixtures("narrow_umask")
@pytest.mark.parametrize("wanted", [0o700, 0o711, 0o750, 0o755])
def test_directories_have_exactly_the_mode_asked_for(tmp_path: Path, wanted: int) -> None:
    """Whatever the umask takes away."""
    _fs.mkdir(tmp_path / "new", wanted)
    assert mode(tmp_path / "new") == wanted
    with pytest.raises(FileExistsError):
        _fs.mkdir(tmp_path / "new", wanted)


def test_a_directory_swept_right_after_it_was_made_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty one that nobody holds yet may go; whoever goes on to use it makes another."""

    def made_and_swept(path: Path, mode: int) -> None:
        os.mkdir(path, mode)  # noqa: PTH102 - as in _fs
        path.rmdir()

    shim = types.ModuleType("os")
    shim.__dict__.update(vars(os), mkdir=made_and_swept)
    monkeypatch.setattr(_fs, "os", shim)
    _fs.mkdir(tmp_path / "new", 0o700)
    assert not (tmp_path / "new").exists()


def test_parents_are_made_and_what_is_there_is_left_as_it_is(tmp_path: Path) -> None:
    """Only new directories get the mode; doing it twice is fine."""
    (tmp_path / "a").mkdir(mode=0o700)
    _fs.make_dirs(tmp_path / "a" / "b" / "c", 0o750)
    _fs.make_dirs(tmp_path / "a" / "b" / "c", 0o700)
    assert [mode(tmp_path / part) for part in ("a", "a/b", "a/b/c")] == [0o700, 0o755, 0o750]


def test_a_new_directory_is_durable_in_its_parent(tmp_path: Path) -> None:
    """Each name is synced where it stands."""
    with FaultPlan() as plan:
        _fs.make_dirs(tmp_path / "a" / "b", 0o755)
    steps = [(step.name, step.targets) for step in plan.trace]
    assert steps == [
        ("fs.mkdir", (str(tmp_path / "a"),)),
        ("fs.fsync_dir", (str(tmp_path),)),
        ("fs.mkdir", (str(tmp_path / "a" / "b"),)),
        ("fs.fsync_dir", (str(tmp_path / "a"),)),
    ]


def test_whoever_was_second_to_make_a_directory_makes_it_durable_too(tmp_path: Path) -> None:
    """The first may not have come to that yet, or die before it."""
    plan = FaultPlan()
    second = plan.pause("fs.mkdir")
    first = plan.pause("fs.fsync_dir")
    with plan, ThreadPoolExecutor(2) as pool:
        late = pool.submit(_fs.make_dirs, tmp_path / "a", 0o755)
        second.wait()
        early = pool.submit(_fs.make_dirs, tmp_path / "a", 0o755)
        first.wait()
        second.release()
        late.result(20)
        assert [step.name for step in plan.trace] == ["fs.mkdir", "fs.mkdir", "fs.fsync_dir", "fs.fsync_dir"]
        first.release()
        early.result(20)


def test_a_file_where_a_directory_should_be_is_an_error(tmp_path: Path) -> None:
    """It is somebody's, so it stays."""
    (tmp_path / "x").write_text("mine")
    with pytest.raises(OSError, match="x"):
        _fs.make_dirs(tmp_path / "x" / "y", 0o755)
    assert (tmp_path / "x").read_text() == "mine"


def test_a_new_file_never_hides_behind_a_link(tmp_path: Path) -> None:
    """Neither an existing name nor a dangling symbolic link is written through."""
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "file").write_text("old")
    for name in ("link", "file"):
        with pytest.raises(FileExistsError):
            _fs.write_file(tmp_path / name, b"new", 0o644)
    assert not (tmp_path / "elsewhere").exists()
    assert (tmp_path / "file").read_text() == "old"


def test_a_written_file_is_synced_before_it_is_closed(tmp_path: Path) -> None:
    """Content first, name later: the directory is the caller's."""
    with FaultPlan() as plan:
        _fs.write_file(tmp_path / "new", DATA, 0o640)
    assert [step.name for step in plan.trace] == ["fs.create", "fs.write", "fs.fsync"]
    assert (tmp_path / "new").read_bytes() == DATA


def test_writes_go_where_they_are_told(tmp_path: Path, descriptors: list[int]) -> None:
    """All of the buffer, at its offset; what lies before reads as zeros."""
    fd = _fs.create(tmp_path / "x", 0o600)
    descriptors.append(fd)
    _fs.write(fd, MIB, memoryview(DATA)[7:])
    _fs.write(fd, 3, bytearray(b"abc"))
    _fs.write(fd, 0, b"")
    content = (tmp_path / "x").read_bytes()
    assert content == b"\0\0\0abc".ljust(MIB, b"\0") + DATA[7:]


def test_publishing_takes_no_name_that_is_taken(tmp_path: Path) -> None:
    """Of two, one wins, and the loser's file is still the loser's to remove."""
    (tmp_path / "new").write_text("new")
    (tmp_path / "final").write_text("old")
    with pytest.raises(FileExistsError):
        _fs.publish_file(tmp_path / "new", tmp_path / "final")
    assert (tmp_path / "final").read_text() == "old"
    (tmp_path / "final").unlink()
    _fs.publish_file(tmp_path / "new", tmp_path / "final")
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert (tmp_path / "final").stat().st_nlink == 1


def test_a_symbolic_link_is_linked_as_itself(tmp_path: Path) -> None:
    """What it points to never gets a name in the cache."""
    (tmp_path / "secret").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "secret")
    _fs.link(tmp_path / "link", tmp_path / "second")
    assert (tmp_path / "second").is_symlink()


def test_removing_what_is_not_there_is_fine(tmp_path: Path) -> None:
    """Somebody else may have been first."""
    _fs.unlink(tmp_path / "none")
    _fs.rmtree(tmp_path / "none")
    assert _fs.rmdir(tmp_path / "none") is True


def test_a_directory_with_somebodys_files_stays(tmp_path: Path) -> None:
    """Only empty ones go; what is no directory is an error."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert _fs.rmdir(tmp_path / "full") is False
    assert (tmp_path / "full" / "file").exists()
    _fs.unlink(tmp_path / "full" / "file")
    assert _fs.rmdir(tmp_path / "full") is True
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        _fs.rmdir(tmp_path / "file")


def test_a_touch_makes_a_mark_of_the_time_asked_for(tmp_path: Path) -> None:
    """New or old; without a time it is now."""
    path = tmp_path / "mark"
    _fs.touch(path, 1234.5)
    assert path.stat().st_mtime == 1234.5
    _fs.touch(path, 99.0)
    assert path.stat().st_mtime == 99.0
    _fs.touch(path)
    assert path.stat().st_mtime > 1_600_000_000
    with pytest.raises(FileNotFoundError):
        _fs.touch(tmp_path / "none" / "mark")


def test_allocating_keeps_length_and_content(tmp_path: Path, descriptors: list[int]) -> None:
    """Blocks are reserved; the file reads as before."""
    fd = _fs.create(tmp_path / "x", 0o600)
    descriptors.append(fd)
    _fs.write(fd, 0, b"abc")
    _fs.allocate(fd, 4 * MIB)
    assert (tmp_path / "x").read_bytes() == b"abc"
    assert allocated(tmp_path / "x") >= 4 * MIB


def test_an_allocation_that_cannot_be_is_an_error(descriptors: list[int]) -> None:
    """With the kernel's own word for it."""
    reading, writing = os.pipe()
    descriptors += [reading, writing]
    with pytest.raises(OSError) as caught:  # noqa: PT011 - any that carries a number
        _fs.allocate(writing, 4096)
    assert caught.value.errno in (errno.ESPIPE, errno.EBADF, errno.ENODEV)


# --- copies ----------------------------------------------------------------------------------------------------------


def test_a_copy_holds_the_same_bytes_and_holes(tmp_path: Path, descriptors: list[int]) -> None:
    """On a filesystem with or without reflinks."""
    source = sparse(tmp_path / "source")
    target = tmp_path / "target"
    descriptors += [os.open(source, os.O_RDONLY), _fs.create(target, 0o600)]
    _fs.copy_content(*descriptors)
    assert target.read_bytes() == source.read_bytes()
    assert holes(target) == holes(source)
    assert allocated(target) <= allocated(source) + 64 * KIB


def test_without_reflinks_only_data_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, descriptors: list[int]
) -> None:
    """The steps say so: one range for each run of data."""
    source = sparse(tmp_path / "source")
    descriptors += [os.open(source, os.O_RDONLY), _fs.create(tmp_path / "target", 0o600)]
    monkeypatch.setattr(_fs, "clone_file", lambda _source, _target: False)
    copied: list[tuple[int, int]] = []
    original = _fs.copy_range

    def recording(source: int, target: int, offset: int, length: int) -> None:
        copied.append((offset, offset + length))
        original(source, target, offset, length)

    monkeypatch.setattr(_fs, "copy_range", recording)
    _fs.copy_content(*descriptors)
    assert copied == holes(source)
    assert sum(end - start for start, end in copied) < 2 * MIB
    assert (tmp_path / "target").read_bytes() == source.read_bytes()


def test_empty_files_are_copied(tmp_path: Path, descriptors: list[int]) -> None:
    """No data, or one hole, of the right length."""
    for size in (0, 5 * MIB):
        source, target = tmp_path / f"source{size}", tmp_path / f"target{size}"
        source.touch()
        os.truncate(source, size)
        fds = [os.open(source, os.O_RDONLY), _fs.create(target, 0o600)]
        descriptors += fds
        _fs.copy_content(*fds)
        assert target.stat().st_size == size
        assert allocated(target) <= 4 * KIB


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no second filesystem")
def test_copies_cross_filesystems(tmp_path: Path, open_path: Path, descriptors: list[int]) -> None:
    """No shared blocks there; the kernel or this process carries the bytes."""
    source = sparse(tmp_path / "source", 12 * MIB)
    target = Path("/dev/shm") / open_path.name
    try:
        descriptors += [os.open(source, os.O_RDONLY), _fs.create(target, 0o600)]
        if source.stat().st_dev == target.stat().st_dev:
            pytest.skip("one filesystem holds both")
        assert _fs.clone_file(*descriptors) is False
        _fs.copy_content(*descriptors)
        assert target.read_bytes() == source.read_bytes()
    finally:
        target.unlink(missing_ok=True)


def test_a_source_that_became_shorter_ends_the_copy(tmp_path: Path, descriptors: list[int]) -> None:
    """No endless loop; the caller compares sizes."""
    (tmp_path / "source").write_bytes(b"abc")
    descriptors += [os.open(tmp_path / "source", os.O_RDONLY), _fs.create(tmp_path / "target", 0o600)]
    _fs.copy_range(descriptors[0], descriptors[1], 0, MIB)
    assert (tmp_path / "target").read_bytes() == b"abc"


@pytest.mark.services
def test_xfs_copies_share_their_blocks(xfs_path: Path, descriptors: list[int]) -> None:
    """A copy of 100 MiB takes no space and next to no time."""
    source, target = xfs_path / "source", xfs_path / "target"
    source.write_bytes(os.urandom(MIB) * 100)
    os.truncate(source, 200 * MIB)
    descriptors += [os.open(source, os.O_RDONLY), _fs.create(target, 0o600)]
    os.sync()
    before = os.statvfs(xfs_path).f_bfree
    with FaultPlan() as plan:
        _fs.copy_content(*descriptors)
    os.fsync(descriptors[1])
    figures = os.statvfs(xfs_path)
    assert (before - figures.f_bfree) * figures.f_frsize < 4 * MIB
    assert [step.name for step in plan.trace] == ["fs.clone_file"]
    assert target.stat().st_size == 200 * MIB
    assert holes(target) == holes(source)
    os.pwrite(descriptors[1], b"changed", 0)
    assert source.read_bytes()[:7] != b"changed"


@pytest.mark.services
def test_a_full_filesystem_refuses_an_allocation(xfs_path: Path, descriptors: list[int]) -> None:
    """ENOSPC, and the file is as before."""
    fd = _fs.create(xfs_path / "x", 0o600)
    descriptors.append(fd)
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the number says it
        _fs.allocate(fd, 2 << 30)
    assert caught.value.errno == errno.ENOSPC
    assert (xfs_path / "x").stat().st_size == 0


# --- publishing a copy -----------------------------------------------------------------------------------------------


@pytest.fixture(params=["tmpfile", "hidden name"])
def either_way(request: pytest.FixtureRequest) -> str:
    """With O_TMPFILE and without."""
    if request.param == "hidden name":
        request.getfixturevalue("without_tmpfile")
    return str(request.param)


@pytest.mark.usefixtures("either_way")
def test_a_published_copy_keeps_holes_and_has_the_exact_size(tmp_path: Path, descriptors: list[int]) -> None:
    """Shorter, equal or longer than its source; nothing else is left in the directory."""
    source = sparse(tmp_path / "source")
    fd = os.open(source, os.O_RDONLY)
    descriptors.append(fd)
    content = source.read_bytes()
    (tmp_path / "out").mkdir()
    for size in (32 * MIB, 11 * MIB + 5, 40 * MIB + 1):
        final = tmp_path / "out" / f"copy{size}"
        _fs.publish_copy(fd, final, size)
        assert final.read_bytes() == content[:size].ljust(size, b"\0")
        assert allocated(final) <= allocated(source) + 64 * KIB
        assert final.stat().st_nlink == 1
    assert len(list((tmp_path / "out").iterdir())) == 3


@pytest.mark.usefixtures("either_way")
def test_a_published_copy_takes_no_name_that_is_taken(tmp_path: Path, descriptors: list[int]) -> None:
    """The file that was there is untouched, and there is no litter."""
    descriptors.append(os.open(sparse(tmp_path / "source"), os.O_RDONLY))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "final").write_text("old")
    with pytest.raises(FileExistsError):
        _fs.publish_copy(descriptors[0], tmp_path / "out" / "final", 4096)
    assert (tmp_path / "out" / "final").read_text() == "old"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["final"]


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("step", ["fs.clone_file", "fs.truncate", "fs.fsync"])
def test_a_copy_that_fails_leaves_no_litter(tmp_path: Path, descriptors: list[int], step: str) -> None:
    """Disk full at any step: no name was ever there, or it is gone."""
    descriptors.append(os.open(sparse(tmp_path / "source"), os.O_RDONLY))
    (tmp_path / "out").mkdir()
    with FaultPlan().fail(step), pytest.raises(OSError, match="fault"):
        _fs.publish_copy(descriptors[0], tmp_path / "out" / "final", 4096)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_published_copy_is_synced_before_it_has_a_name(tmp_path: Path, descriptors: list[int]) -> None:
    """Then the name is."""
    descriptors.append(os.open(sparse(tmp_path / "source"), os.O_RDONLY))
    with FaultPlan() as plan:
        _fs.publish_copy(descriptors[0], tmp_path / "final", 4096)
    names = [step.name for step in plan.trace]
    assert names[-4:] == ["fs.truncate", "fs.fsync", "fs.give_name", "fs.fsync_dir"]


def test_an_unnamed_file_gets_its_name_once(tmp_path: Path, descriptors: list[int]) -> None:
    """Of a name that is taken nothing is overwritten."""
    fd = os.open(tmp_path, os.O_RDWR | os.O_TMPFILE, 0o600)
    descriptors.append(fd)
    os.write(fd, b"new")
    (tmp_path / "taken").write_text("old")
    with pytest.raises(FileExistsError):
        _fs.give_name(fd, tmp_path / "taken")
    _fs.give_name(fd, tmp_path / "final")
    assert (tmp_path / "final").read_bytes() == b"new"
    assert not (tmp_path / "final").is_symlink()
    assert (tmp_path / "taken").read_text() == "old"


def test_random_suffixes_differ() -> None:
    """Sixteen hexadecimal digits, as recover expects them."""
    suffixes = {_fs.random_suffix() for _ in range(100)}
    assert len(suffixes) == 100
    assert all(len(suffix) == 16 and int(suffix, 16) >= 0 for suffix in suffixes)


def test_writeback_changes_nothing(tmp_path: Path) -> None:
    """It is a hint: bytes, size and holes stay; a range beyond the file is none."""
    fd = _fs.create(tmp_path / "x", 0o600)
    _fs.write(fd, 1 << 20, b"x" * 8192)
    for offset, length in ((0, 0), (1 << 20, 8192), (1 << 40, 1)):
        _fs.start_writeback(fd, offset, length)
    os.close(fd)
    assert (tmp_path / "x").read_bytes() == bytes(1 << 20) + b"x" * 8192
    assert (tmp_path / "x").stat().st_blocks * 512 <= 16384

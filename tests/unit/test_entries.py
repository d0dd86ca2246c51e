"""Entries: what a live process holds stays, what a dead one left goes."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import threading
import time
import types
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from harness.children import child
from nova_imagecache import _entries, _fs
from nova_imagecache.exceptions import CancelledError, LockTimeoutError
from nova_imagecache.testing import FaultPlan

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def holder() -> Iterator[Callable[[Path], BaseProcess]]:
    """Starts a process that makes an entry below a directory, holds it, and says so."""
    started: list[BaseProcess] = []

    def start(parent: Path) -> BaseProcess:
        ready = FORK.Event()

        def work() -> None:
            entry = _entries.new_entry(parent, "img", 0o700)
            (entry.path / "half").write_bytes(b"x")
            ready.set()
            time.sleep(60)

        process = FORK.Process(target=work)
        process.start()
        started.append(process)
        assert ready.wait(20)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


def test_a_new_entry_is_held_and_named_after_its_stem(tmp_path: Path) -> None:
    """Stem, dot, sixteen random digits; exactly the mode."""
    entry = _entries.new_entry(tmp_path, "img", 0o711)
    stem, _, suffix = entry.path.name.rpartition(".")
    assert (stem, len(suffix)) == ("img", 16)
    assert entry.path.stat().st_mode & 0o777 == 0o711
    assert _entries.hold(entry.path, wait=False) is None
    entry.release()
    entry.release()
    again = _entries.hold(entry.path, wait=False)
    assert again is not None
    again.release()


def test_what_is_no_directory_cannot_be_held(tmp_path: Path) -> None:
    """Nor what a symbolic link points to."""
    (tmp_path / "file").touch()
    assert _entries.hold(tmp_path / "none", wait=False) is None
    assert _entries.hold(tmp_path / "file", wait=False) is None
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert _entries.hold(tmp_path / "link", wait=False) is None


def test_a_hold_ends_with_its_process_and_not_with_what_that_forked(tmp_path: Path) -> None:
    """A child that was forked meanwhile lives on."""
    here, there = FORK.Pipe(duplex=False)

    def work() -> None:
        entry = _entries.new_entry(tmp_path, "img", 0o700)
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        there.send((child, entry.path.name))
        time.sleep(60)

    process = FORK.Process(target=work)
    process.start()
    child, name = here.recv()
    try:
        assert _entries.sweep(tmp_path) == ([], [name])
        process.kill()
        process.join()
        assert _entries.sweep(tmp_path) == ([name], [])
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_forked_child_ends_no_hold_of_its_parents(tmp_path: Path) -> None:
    """Whatever it does with what it got from its parent; its own holds are its own."""
    entry = _entries.new_entry(tmp_path, "img", 0o700)

    def work() -> None:
        entry.release()
        mine = _entries.new_entry(tmp_path, "mine", 0o700)
        assert _entries.alive(mine.path)
        assert _entries.alive(entry.path)

    process = FORK.Process(target=work)
    process.start()
    process.join(20)
    assert process.exitcode == 0
    assert _entries.alive(entry.path)
    entry.release()
    assert not _entries.alive(entry.path)


def test_holds_live_while_their_process_does(tmp_path: Path, holder: Callable[[Path], BaseProcess]) -> None:
    """Kill -9 frees them: the kernel does, nobody else could."""
    process = holder(tmp_path)
    (path,) = tmp_path.iterdir()
    assert _entries.sweep(tmp_path) == ([], [path.name])
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert _entries.sweep(tmp_path) == ([path.name], [])
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_takes_the_dead_and_leaves_the_living(tmp_path: Path, holder: Callable[[Path], BaseProcess]) -> None:
    """Entries of this process live as well."""
    holder(tmp_path)
    alive = {path.name for path in tmp_path.iterdir()}
    mine = _entries.new_entry(tmp_path, "mine", 0o700)
    (tmp_path / "dead.0123456789abcdef" / "deep").mkdir(parents=True)
    (tmp_path / "dead.0123456789abcdef" / "deep" / "file").touch()
    removed, left = _entries.sweep(tmp_path)
    assert removed == ["dead.0123456789abcdef"]
    assert set(left) == alive | {mine.path.name}
    mine.release()


def test_a_sweep_of_nothing_is_fine(tmp_path: Path) -> None:
    """No such directory, or an empty one; a stray file is not an entry."""
    assert _entries.sweep(tmp_path / "none") == ([], [])
    (tmp_path / "file").touch()
    assert _entries.sweep(tmp_path) == ([], [])
    assert (tmp_path / "file").exists()


def test_a_hold_waits_for_the_one_before(tmp_path: Path) -> None:
    """And gets the directory when it is free."""
    first = _entries.hold(tmp_path, wait=True)
    assert first is not None
    got: list[_entries.Held | None] = []
    thread = threading.Thread(target=lambda: got.append(_entries.hold(tmp_path, wait=True)))
    thread.start()
    time.sleep(0.1)
    assert got == []
    first.release()
    thread.join(10)
    assert got[0] is not None
    got[0].release()


@pytest.mark.slow
def test_a_hold_waits_for_as_long_as_its_holder_gets_on(tmp_path: Path) -> None:
    """A copy of any size is waited for: what grows in the directory, or is made in it, starts the clock again."""
    first = _entries.hold(tmp_path, wait=True)
    assert first is not None
    (tmp_path / ".disk.1").mkdir()
    growing = tmp_path / ".disk.1" / "disk"
    until = time.monotonic() + 1.2

    def work() -> None:
        while time.monotonic() < until:
            with growing.open("ab") as file:
                file.write(bytes(4096))
            time.sleep(0.05)
        first.release()

    thread = threading.Thread(target=work)
    thread.start()
    with _entries.patience(0.6, None):
        second = _entries.hold(tmp_path, wait=True)
    assert second is not None
    assert time.monotonic() >= until
    second.release()
    thread.join()


def test_a_holder_that_is_stopped_is_given_up(tmp_path: Path) -> None:
    """Nothing changes for as long as the call wants to wait: the error says for what, and for how long."""
    first = _entries.hold(tmp_path, wait=True)
    assert first is not None
    (tmp_path / "disk").write_bytes(b"half")
    started = time.monotonic()
    with _entries.patience(0.4, None), pytest.raises(LockTimeoutError) as caught, _entries.held(tmp_path):
        pytest.fail("two hold it")
    assert 0.4 <= time.monotonic() - started < 5
    assert caught.value.path == str(tmp_path)
    assert caught.value.waited >= 0.4
    first.release()


def test_a_call_that_may_not_go_on_ends_its_waiting(tmp_path: Path) -> None:
    """Deadline and cancel are seen while a hold is waited for; not those of another thread's call."""
    first = _entries.hold(tmp_path, wait=True)
    assert first is not None
    asked: list[float] = []

    def check() -> None:
        asked.append(time.monotonic())
        if len(asked) > 10:
            raise CancelledError

    with _entries.patience(60, check), pytest.raises(CancelledError):
        _entries.hold(tmp_path, wait=True)
    got: list[_entries.Held | None] = []
    with _entries.patience(60, check):
        thread = threading.Thread(target=lambda: got.append(_entries.hold(tmp_path, wait=True)))
        thread.start()
        time.sleep(0.1)
        first.release()
        thread.join(10)
    assert got[0] is not None
    got[0].release()


def test_a_directory_removed_while_one_waits_is_not_held(tmp_path: Path) -> None:
    """The waiter looks again by name: gone is gone, made anew is the new one."""
    path = tmp_path / "vm"
    path.mkdir()
    first = _entries.hold(path, wait=True)
    assert first is not None
    got: list[_entries.Held | None] = []
    thread = threading.Thread(target=lambda: got.append(_entries.hold(path, wait=True)))
    thread.start()
    time.sleep(0.1)
    path.rmdir()
    first.release()
    thread.join(10)
    assert got == [None]


def test_a_directory_renamed_while_one_takes_it_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nova renames an instance's directory when it is resized: the hold is on what has the name, on nothing else."""
    path = tmp_path / "vm"
    path.mkdir()
    opened: list[int] = []

    def flock(fd: int, operation: int) -> None:
        if not opened:
            opened.append(fd)
            path.rename(tmp_path / "vm_resize")
            path.mkdir()
        fcntl.flock(fd, operation)

    shim = types.ModuleType("fcntl")
    shim.__dict__.update(vars(fcntl), flock=flock)
    monkeypatch.setattr(_entries, "fcntl", shim)
    first = _entries.hold(path, wait=True)
    assert first is not None
    assert _entries.hold(path, wait=False) is None
    other = _entries.hold(tmp_path / "vm_resize", wait=False)
    assert other is not None
    other.release()
    first.release()


def test_what_has_the_name_of_a_directory_is_refused(tmp_path: Path) -> None:
    """A file and a link to nothing are; a directory, a link to one and a free name are not."""
    (tmp_path / "file").touch()
    (tmp_path / "nowhere").symlink_to("none")
    (tmp_path / "to-file").symlink_to("file")
    (tmp_path / "to-directory").symlink_to(".")
    for name in ("file", "nowhere", "to-file"):
        with pytest.raises(NotADirectoryError, match=name):
            _entries.refuse_other(tmp_path / name)
    for name in ("to-directory", "free", "."):
        _entries.refuse_other(tmp_path / name)


def test_a_directory_that_comes_and_goes_is_not_refused(tmp_path: Path) -> None:
    """Whenever one looks: another process makes and removes disks of this id all the time."""
    path = tmp_path / "vm"
    over = tmp_path / "over"

    def come_and_go() -> None:
        while not over.exists():
            path.mkdir()
            path.rmdir()

    with child(come_and_go) as other:
        for _look in range(20_000):
            _entries.refuse_other(path)
        over.touch()
        other.result()


def test_a_held_block_makes_its_directory_again(tmp_path: Path) -> None:
    """Whoever removed it between two steps is followed by a new one."""
    path = tmp_path / "vm"
    path.mkdir()
    first = _entries.hold(path, wait=True)
    assert first is not None
    inside, leave = threading.Event(), threading.Event()

    def work() -> None:
        with _entries.held(path):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.1)
    path.rmdir()
    first.release()
    assert inside.wait(10)
    assert path.is_dir()
    assert _entries.hold(path, wait=False) is None
    leave.set()
    thread.join(10)


def test_names_are_sorted_and_none_where_nothing_is(tmp_path: Path) -> None:
    """A directory that is not there yet has no entries."""
    for name in ("b", "a", ".c"):
        (tmp_path / name).touch()
    assert _entries.names(tmp_path) == [".c", "a", "b"]
    assert _entries.names(tmp_path / "none") == []
    assert _entries.names(tmp_path / "a") == []


def test_a_replaced_file_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    """A reader beside many writers never sees another content, nor none."""
    staging = tmp_path / "staging"
    staging.mkdir()
    path = tmp_path / "file"
    contents = [bytes([n]) * 5000 for n in range(65, 70)]
    _entries.replace_file(path, contents[0], 0o644, staging=staging)
    stop = threading.Event()
    seen: set[bytes] = set()

    def read() -> None:
        while not stop.is_set():
            seen.add(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(10):
        for content in contents:
            _entries.replace_file(path, content, 0o644, staging=staging)
    stop.set()
    reader.join(10)
    assert seen <= set(contents)
    assert list(staging.iterdir()) == []


@pytest.mark.parametrize("step", ["fs.create", "fs.write", "fs.fsync", "fs.rename"])
def test_a_replacement_that_fails_leaves_the_old_file(tmp_path: Path, step: str) -> None:
    """And nothing in staging."""
    (tmp_path / "staging").mkdir()
    (tmp_path / "file").write_text("old")
    with FaultPlan().fail(step), pytest.raises(OSError, match="fault"):
        _entries.replace_file(tmp_path / "file", b"new", 0o644, staging=tmp_path / "staging")
    assert (tmp_path / "file").read_text() == "old"
    assert list((tmp_path / "staging").iterdir()) == []


def test_a_replacement_that_dies_leaves_what_a_sweep_finds(tmp_path: Path) -> None:
    """Kill -9 before the rename: the old file, and an entry that nobody holds."""
    (tmp_path / "staging").mkdir()
    (tmp_path / "file").write_text("old")

    def work() -> None:
        with FaultPlan().kill("fs.rename"):
            _entries.replace_file(tmp_path / "file", b"new", 0o644, staging=tmp_path / "staging")

    process = FORK.Process(target=work)
    process.start()
    process.join(20)
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "file").read_text() == "old"
    removed, alive = _entries.sweep(tmp_path / "staging")
    assert (len(removed), alive) == (1, [])


def test_a_new_entry_survives_a_sweeper_that_looks_in_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The empty directory is swept before it could be held: another is made."""
    original = _fs.mkdir
    swept: list[str] = []

    def mkdir(path: Path, mode: int) -> None:
        original(path, mode)
        if not swept:
            swept.extend(_entries.sweep(path.parent)[0])

    monkeypatch.setattr(_fs, "mkdir", mkdir)
    entry = _entries.new_entry(tmp_path, "img", 0o700)
    assert swept
    assert entry.path.is_dir()
    assert entry.path.name not in swept
    entry.release()

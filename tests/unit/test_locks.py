"""Locks between processes: exclusive, freed by death, never unlinked, patient with those who get on."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from nova_imagecache._locks import Lock, Locks, Patience
from nova_imagecache.exceptions import LockTimeoutError

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def locks(tmp_path: Path) -> Locks:
    return Locks(tmp_path, timeout=0.3)


@pytest.fixture
def holder() -> Iterator[Callable[[Callable[[], Lock]], BaseProcess]]:
    """Starts a process that makes a lock, takes it and keeps it."""
    started: list[BaseProcess] = []

    def start(make: Callable[[], Lock]) -> BaseProcess:
        ready = FORK.Event()

        def work() -> None:
            lock = make()
            assert lock.attempt()
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


def exhausted(patience: Patience) -> LockTimeoutError:
    """How waiting ends."""
    try:
        while True:
            patience.wait()
    except LockTimeoutError as err:
        return err


def test_a_lock_is_exclusive_in_this_process(locks: Locks) -> None:
    """Each use is a lock of its own, also in one thread."""
    first, second = locks.base("img"), locks.base("img")
    assert first.attempt()
    assert not second.attempt()
    assert locks.base("other").attempt()
    first.release()
    assert second.attempt()
    second.release()


def test_a_lock_is_exclusive_between_processes_and_freed_by_death(
    locks: Locks, holder: Callable[[Callable[[], Lock]], BaseProcess]
) -> None:
    """Kill -9 of the holder frees it at once."""
    process = holder(lambda: locks.base("img"))
    lock = locks.base("img")
    assert not lock.attempt()
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert lock.attempt()
    lock.release()


def test_lock_files_are_never_unlinked(locks: Locks, tmp_path: Path) -> None:
    """Two that hold a file of one name would both be inside if one were made anew (a bug that Nova has)."""
    lock = locks.base("img")
    assert lock.attempt()
    inode = lock.path.stat().st_ino
    lock.release()
    with locks.disk("vm", "disk"):
        pass
    assert lock.path.stat().st_ino == inode
    again = locks.base("img")
    assert again.attempt()
    again.release()
    assert lock.path.stat().st_ino == inode
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.slow
def test_disks_share_a_fixed_set_of_lock_files(locks: Locks, tmp_path: Path) -> None:
    """The directory does not grow with the instances that ever were."""
    for number in range(2000):
        with locks.disk(f"vm-{number}", "disk"):
            pass
    assert len(list(tmp_path.iterdir())) <= 256


def test_waiting_for_a_disk_ends_in_a_time_out(locks: Locks) -> None:
    """The error names the lock, the wait and the disk."""
    with locks.disk("vm", "disk"):
        start = time.monotonic()
        with pytest.raises(LockTimeoutError) as caught, locks.disk("vm", "disk"):
            pytest.fail("two were inside")
    assert 0.3 <= time.monotonic() - start < 10
    assert caught.value.waited > 0.3
    assert caught.value.disk_id == "vm"
    assert Path(caught.value.path).name.startswith("disk.")


def test_waiting_for_a_disk_asks_for_deadline_and_cancel(locks: Locks) -> None:
    """What the check raises ends the wait."""
    patient = Locks(Path(locks.base("x").path).parent, timeout=60)

    def check() -> None:
        raise KeyError("cancelled")

    with locks.disk("vm", "disk"), pytest.raises(KeyError), patient.disk("vm", "disk", check):
        pytest.fail("two were inside")


def test_a_disks_lock_is_given_on(tmp_path: Path) -> None:
    """Of many threads one is inside at a time, and all get their turn."""
    locks = Locks(tmp_path, timeout=30)
    inside: list[int] = []
    most: list[int] = []

    def work() -> None:
        for _ in range(5):
            with locks.disk("vm", "disk"):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.001)
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert most == [1] * 30


def test_a_lock_is_free_after_an_error_inside(locks: Locks) -> None:
    """However the block ends."""
    with pytest.raises(KeyError), locks.disk("vm", "disk"):
        raise KeyError("x")
    with locks.disk("vm", "disk"):
        pass


def test_notes_are_read_as_they_were_told(locks: Locks) -> None:
    """A shorter one leaves nothing of a longer one behind."""
    lock = locks.base("img")
    assert lock.peek() is None
    assert lock.attempt()
    for done, total in ((0, None), ((1 << 62), (1 << 62) + 5), (7, 9), (0, 0), (7, None)):
        lock.note(done, total)
        assert locks.base("img").peek() == (done, total)
    lock.release()
    assert lock.peek() == (7, None)


@pytest.mark.parametrize("content", [b"", b"x", b"1", b"1 2 3", b"\xff\xff", b"1.5 2"])
def test_a_note_that_cannot_be_read_is_none(locks: Locks, content: bytes) -> None:
    """Losing one is harmless."""
    lock = locks.base("img")
    lock.path.write_bytes(content)
    assert lock.peek() is None


def test_a_note_without_a_lock_file_is_lost(locks: Locks) -> None:
    """Nobody waits then."""
    locks.base("img").note(1, 2)
    assert locks.base("img").peek() is None


def test_patience_ends_with_a_holder_that_stands_still(locks: Locks) -> None:
    """Its lock and the image are named."""
    lock = locks.base("img")
    assert lock.attempt()
    patience = Patience(lock, 0.2, "img")
    start = time.monotonic()
    error = exhausted(patience)
    assert 0.2 <= time.monotonic() - start < 10
    assert (error.image_id, error.path) == ("img", str(lock.path))
    assert error.waited > 0.2
    lock.release()


@pytest.mark.slow
def test_patience_begins_anew_with_every_note(locks: Locks) -> None:
    """A long fetch that gets on is waited for, however long it takes; the waiter hears how far it is."""
    lock = locks.base("img")
    assert lock.attempt()
    lock.note(0, 100)
    patience = Patience(locks.base("img"), 0.6, "img")
    start = time.monotonic()
    heard = set()
    done = 0
    while time.monotonic() - start < 1.3:
        done += 1
        lock.note(done, 100)
        heard.add(patience.wait())
    assert len(heard) > 10
    exhausted(patience)
    lock.release()


def test_a_lock_directory_that_is_gone_is_no_silent_success(tmp_path: Path) -> None:
    """Somebody removed the root: that is an error, not a free lock."""
    lock = Locks(tmp_path / "none" / "locks", 1).base("img")
    try:
        taken = lock.attempt()
    except OSError:
        return
    assert taken
    assert lock.path.exists()
    lock.release()

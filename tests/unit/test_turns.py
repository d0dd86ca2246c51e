"""Turns: one thread at a time, nobody waits for long, and who waits for something else keeps nobody."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import InChild
from harness import images
from harness.images import MIB
from harness.rig import Rig
from harness.waiting import until
from nova_imagecache import _fs, _turns
from nova_imagecache.testing import FakeSource, FaultPlan


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody goes on without a turn."""
    monkeypatch.setattr(_turns, "_LONGEST", -1)


@pytest.fixture
def other() -> Iterator[ThreadPoolExecutor]:
    """Threads beside the test's."""
    with ThreadPoolExecutor(2) as threads:
        yield threads


def _has_turn() -> bool:
    with _turns.taken():
        return _turns._mine.has_turn


def test_of_many_threads_one_has_the_turn() -> None:
    inside, most = 0, 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(50):
            with _turns.taken():
                inside += 1
                most = max(most, inside)
                _fs.start_writeback(0, 0, 0)  # lets go of Python's lock
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_who_waits_for_something_else_gives_it_up(other: ThreadPoolExecutor) -> None:
    with _turns.taken():
        with _turns.given_up():
            assert other.submit(_has_turn).result(20)
            with _turns.given_up():  # nothing to give
                pass
        assert _turns._mine.has_turn
        beside = other.submit(_has_turn)
        with pytest.raises(TimeoutError):
            beside.result(0.1)
    assert beside.result(20)


def test_an_error_gives_it_back(other: ThreadPoolExecutor) -> None:
    with pytest.raises(OSError, match="inner"), _turns.taken(), _turns.given_up():
        raise OSError("inner")
    assert other.submit(_has_turn).result(20)


def test_who_gets_none_goes_on_without(other: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has it may stand still in a system call; and gives back none that is not its own."""
    monkeypatch.setattr(_turns, "_LONGEST", 0.01)
    with _turns.taken():
        assert other.submit(_has_turn).result(20) is False
        assert _turns._lock.locked()
    assert other.submit(_has_turn).result(20)


def test_a_forked_child_waits_for_nobody(in_child: InChild) -> None:
    with _turns.taken():
        assert in_child(_has_turn)
        assert _turns._lock.locked()


# --- disks


def test_disks_are_made_in_turn(tmp_path: Path, other: ThreadPoolExecutor) -> None:
    """While one is written another waits; when it is synced, the other is made."""
    rig = Rig(tmp_path, "link", {"img": images.raw("turns")})
    cache = rig.cache()
    cache.create_root_disk("img", "first", size=4 * MIB)
    with FaultPlan() as plan:
        writing = plan.pause("fs.write")
        slow = other.submit(cache.create_root_disk, "img", "slow", size=4 * MIB)
        writing.wait()
        quick = other.submit(cache.create_root_disk, "img", "quick", size=4 * MIB)
        with pytest.raises(TimeoutError):
            quick.result(0.2)
        writing.release()
        assert (slow.result(20).disk_id, quick.result(20).disk_id) == ("slow", "quick")


def test_a_disk_that_is_synced_keeps_no_other(
    tmp_path: Path, other: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Rig(tmp_path, "link", {"img": images.raw("synced")}).cache()
    cache.create_root_disk("img", "first", size=4 * MIB)
    inner, reached, opened = os.fsync, threading.Event(), threading.Event()

    def fsync(fd: int) -> None:
        if not reached.is_set():
            reached.set()
            assert opened.wait(20)
        inner(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    slow = other.submit(cache.create_root_disk, "img", "slow", size=4 * MIB)
    try:
        assert reached.wait(20)
        assert other.submit(cache.create_root_disk, "img", "quick", size=4 * MIB).result(20).disk_id == "quick"
    finally:
        opened.set()
    slow.result(20)


def test_a_disk_whose_base_is_fetched_keeps_no_other(tmp_path: Path, other: ThreadPoolExecutor) -> None:
    rig = Rig(tmp_path, "link", {"img": images.raw("here")})
    far, arrives = images.raw("far away").fake, threading.Event()
    cache = rig.cache(FakeSource({"img": rig.samples["img"].fake, "far": replace(far, stall=arrives)}))
    cache.create_root_disk("img", "first", size=4 * MIB)
    slow = other.submit(cache.create_root_disk, "far", "slow", size=4 * MIB)
    try:
        until(lambda: any((rig.root / "staging").glob("far.*")), "a base in the making")
        assert other.submit(cache.create_root_disk, "img", "quick", size=4 * MIB).result(20).disk_id == "quick"
    finally:
        arrives.set()
    slow.result(20)

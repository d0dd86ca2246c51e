"""Turns: of the threads that make root disks at one moment one runs, and the others wait for it.

A disk is a hundred short system calls. At each of them a thread lets go of Python's lock and wants it back, and many
threads together spend longer on handing it on than on the disks. Who waits for a turn waits without wanting that lock.
Whoever waits for a disk, a child process or another thread gives the turn up meanwhile.

Nothing depends on turns: who gets none within ``_LONGEST`` goes on without.
"""

from __future__ import annotations

import os
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_LONGEST = 0.25
"""Seconds; those who make some hundred disks at once have theirs by then."""


class _Mine(threading.local):
    has_turn = False


_mine = _Mine()
_lock = threading.Lock()


@contextmanager
def taken() -> Iterator[None]:
    """Have the turn while the block runs, but for where it is given up. Not to be nested."""
    _take()
    try:
        yield
    finally:
        _give()


@contextmanager
def given_up() -> Iterator[None]:
    """Let others have the turn, if it is ours, while the block waits for something."""
    if not _mine.has_turn:
        yield
        return
    _give()
    try:
        yield
    finally:
        _take()


def _take() -> None:
    _mine.has_turn = _lock.acquire(timeout=_LONGEST)


def _give() -> None:
    if _mine.has_turn:
        _mine.has_turn = False
        _lock.release()


def _in_child() -> None:
    global _lock
    # of the threads that had the turn, or waited for it, none is here but the one that forked
    _lock, _mine.has_turn = threading.Lock(), False


os.register_at_fork(after_in_child=_in_child)

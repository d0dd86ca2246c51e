"""Entries: directories that a live process holds, so that what a dead one left can be told and swept.

The hold is a flock on the directory itself: the kernel ends it with the process, and it needs no file of its own.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
import time
import weakref
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nova_imagecache import _fs, _turns
from nova_imagecache.exceptions import LockTimeoutError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


_log = logging.getLogger(__name__)
_POLL = 0.005
_LOOK = 0.25
_LONGEST = 120.0
"""Seconds without progress, for whoever waits outside of a call that says it better."""


@dataclass(frozen=True, slots=True)
class _Patience:
    timeout: float
    check: Callable[[], None] | None


_patience: ContextVar[_Patience | None] = ContextVar("patience", default=None)
"""The running call's. A backend's methods know nothing of a call's deadline, and yet it is they that wait."""


@contextmanager
def patience(timeout: float, check: Callable[[], None] | None) -> Iterator[None]:
    """How long this thread waits for holds while the block runs: ``timeout`` seconds for a holder without progress.

    ``check`` is called while it waits; what it raises ends the waiting.
    """
    token = _patience.set(_Patience(timeout, check))
    try:
        yield
    finally:
        _patience.reset(token)


def go_on() -> None:
    """Between the pieces of what takes long: raises what ends the running call, its deadline or its cancel."""
    patience = _patience.get()
    if patience is not None and patience.check is not None:
        patience.check()


class Held:
    """A directory that this process is at work in. The kernel ends the hold with the process, however it ends."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd: int | None = fd
        _HELD.add(self)

    def release(self) -> None:
        """End the hold; more than once is fine."""
        if self._fd is not None:
            # closing alone would leave the hold to a child that is forked just now
            fcntl.flock(self._fd, fcntl.LOCK_UN)
            self.leave()

    def leave(self) -> None:
        """Forget the hold without ending it: in a forked child it is the parent's, and must end with that."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


_HELD: weakref.WeakSet[Held] = weakref.WeakSet()


def _in_child() -> None:
    for each in list(_HELD):
        each.leave()


os.register_at_fork(after_in_child=_in_child)


def hold(path: Path, *, wait: bool, follow: bool = False) -> Held | None:
    """A hold on the directory; None if another holds it (``wait=False``) or it is not there.

    Waits as ``patience`` says. ``follow``: it may be a symbolic link to one, as an operator leaves where he moved it.

    Raises:
        LockTimeoutError: another holds it and makes no progress; it may be stopped.
    """
    waiting: _Waiting | None = None
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    while True:
        try:
            fd = os.open(path, flags)
        except (FileNotFoundError, NotADirectoryError):
            return None
        held = Held(path, fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=follow)):  # noqa: PTH116 - one call
                return held
        except BlockingIOError:
            held.leave()
            if not wait:
                return None
            waiting = _Waiting(path) if waiting is None else waiting
            waiting.wait()
            continue
        except (FileNotFoundError, NotADirectoryError):
            pass
        except BaseException:
            held.leave()
            raise
        held.release()  # removed or renamed while we looked: look again by name


class _Waiting:
    """For the holder of a directory. What changes in it, or one level below, is progress: the clock starts again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._patience = _patience.get() or _Patience(_LONGEST, None)
        self._marks = _marks(path)
        self._since = self._looked = time.monotonic()

    def wait(self) -> None:
        """Sleep a little."""
        if self._patience.check is not None:
            self._patience.check()
        now = time.monotonic()
        if now - self._looked > _LOOK:
            self._looked = now
            if (marks := _marks(self._path)) != self._marks:
                self._marks, self._since = marks, now
        if (waited := now - self._since) > self._patience.timeout:
            raise LockTimeoutError(str(self._path), waited, stage="holding a disk's directory")
        with _turns.given_up():
            time.sleep(_POLL)


def _marks(path: Path, depth: int = 2) -> frozenset[tuple[str, int, int, int]]:
    """Names, lengths, blocks and times of what stands in a directory: what a copy in the making changes."""
    found = set()
    for name in names(path):
        below = path / name
        with suppress(OSError):  # gone meanwhile, or not ours to see
            status = below.lstat()
            found.add((str(below), status.st_size, status.st_blocks, status.st_mtime_ns))
            if depth > 1 and stat.S_ISDIR(status.st_mode):
                found |= _marks(below, depth - 1)
    return frozenset(found)


@contextmanager
def held(path: Path) -> Iterator[bool]:
    """Wait for and keep a hold on the directory while the block runs; whether it was made now, by us or by another who
    came at the same time.

    The name of one that was made is durable when the caller has synced its parent.

    Raises:
        LockTimeoutError: another holds it and makes no progress.
        NotADirectoryError: something else has its name.
    """
    made = False
    while True:
        made = not path.is_dir()
        if made:
            _fs.make_dirs(path.parent, 0o755)
            with suppress(FileExistsError):  # somebody was first
                _fs.mkdir(path, 0o755)
        if (held_ := hold(path, wait=True, follow=True)) is not None:
            break
        refuse_other(path)
    try:
        yield made
    finally:
        held_.release()


def refuse_other(path: Path) -> None:
    """Pass where a directory has the name, or nothing, also while others make and remove it.

    Raises:
        NotADirectoryError: a file has it, or a symbolic link that leads nowhere.
    """
    try:
        mode = path.lstat().st_mode  # one look: between two of them a directory comes or goes
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(mode) and not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "it should be a directory, or lead to one", str(path))


@contextmanager
def entry(parent: Path, stem: str, mode: int) -> Iterator[Path]:
    """A new directory ``<stem>.<random>`` below ``parent``, held and there while the block runs."""
    made = new_entry(parent, stem, mode)
    try:
        yield made.path
    finally:
        try:
            _fs.rmtree(made.path)
        finally:  # what cannot be removed now must not look alive: a sweep takes it later
            made.release()


def new_entry(parent: Path, stem: str, mode: int) -> Held:
    """A new directory ``<stem>.<random>`` below ``parent``, held by this process."""
    while True:
        path = parent / f"{stem}.{_fs.random_suffix()}"
        _fs.mkdir(path, mode)
        if (made := hold(path, wait=False)) is not None:
            return made
        # a sweeper looked between the two steps and takes the empty directory away


def alive(path: Path) -> bool:
    """Whether a live process holds the directory."""
    free = hold(path, wait=False)
    if free is None:
        return path.is_dir()
    free.release()
    return False


def sweep(parent: Path, failed: dict[str, str] | None = None) -> tuple[list[str], list[str]]:
    """Remove the entries below ``parent`` that no live process holds: (names removed, names alive).

    One that cannot be removed stops no other; ``failed`` is told its name and the reason.
    """
    removed, alive = [], []
    for name in names(parent):
        path = parent / name
        dead = None
        try:
            dead = hold(path, wait=False)
            if dead is None:
                if path.is_dir():
                    alive.append(name)
                continue
            _fs.rmtree(path)
        except OSError as err:
            _log.warning("%s cannot be removed: %s", path, err)
            if failed is not None:
                failed[name] = str(err)
        else:
            removed.append(name)
        finally:
            if dead is not None:
                dead.release()
    return removed, alive


def names(parent: Path) -> list[str]:
    """The names below a directory, sorted; none where it is not there."""
    try:
        return sorted(os.listdir(parent))  # noqa: PTH208 - names, not paths
    except (FileNotFoundError, NotADirectoryError):  # none made yet, or removed meanwhile
        return []


def replace_file(path: Path, data: bytes, mode: int, *, staging: Path) -> None:
    """``path`` holds ``data`` from one moment to the next, durably, whatever it held before.

    It is made in an entry of ``staging`` (same filesystem), where a sweep finds it should we die.
    """
    with entry(staging, path.name, 0o700) as making:
        _fs.write_file(making / "new", data, mode)
        _fs.rename(making / "new", path)
        _fs.fsync_dir(path.parent)

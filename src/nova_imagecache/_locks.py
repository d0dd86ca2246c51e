"""Locks between processes: one per base, a fixed set of shards for disks. The only importer of filelock.

The locks save work (one download instead of ten); safety never depends on them. Lock files are never unlinked: a
process that waits on an unlinked file and one that makes a new file would both be inside (a bug that Nova has).
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
import zlib
from contextlib import contextmanager
from typing import TYPE_CHECKING

from nova_imagecache import _turns
from nova_imagecache.exceptions import BackendError, LockTimeoutError, NoSpaceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from filelock import UnixFileLock

_SHARDS = 256
_POLL = 0.02
_NOTE = 40
"""Bytes of the note in a lock file: two numbers of at most 19 digits, a space, a newline."""


class Lock:
    """One exclusive lock, made afresh for each use."""

    def __init__(self, path: Path) -> None:
        from filelock import UnixFileLock

        self.path = path
        # fallback_to_soft would turn a filesystem without flock into files that outlive their owner
        self._lock: UnixFileLock = UnixFileLock(
            path, timeout=0, mode=0o644, thread_local=False, fallback_to_soft=False, preserve_lock_file=True
        )

    def attempt(self) -> bool:
        """Take the lock if it is free; whether it is ours now.

        Raises:
            NoSpaceError, BackendError: the lock file cannot be made or opened.
        """
        from filelock import Timeout

        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            return False
        except OSError as err:
            if err.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoSpaceError(stage="lock") from err
            raise BackendError(f"the lock {self.path} cannot be taken: {err.strerror or err}", stage="lock") from err
        return True

    def release(self) -> None:
        """Give the lock back."""
        self._lock.release()

    def note(self, done: int, total: int | None) -> None:
        """Tell those who wait how far we are. Losing a note is harmless."""
        with contextlib.suppress(OSError), self.path.open("r+b", buffering=0) as file:
            os.pwrite(file.fileno(), f"{done} {-1 if total is None else total}".ljust(_NOTE - 1).encode() + b"\n", 0)

    def peek(self) -> tuple[int, int | None] | None:
        """What the holder told last: (done, total); None: nothing."""
        try:
            with self.path.open("rb", buffering=0) as file:
                done, total = (int(word) for word in file.read(_NOTE).split())
        except (OSError, ValueError):
            return None
        return done, None if total < 0 else total


class Locks:
    """The locks of one cache root. ``timeout`` is seconds without progress of whoever holds a lock."""

    def __init__(self, directory: Path, timeout: float) -> None:
        self._directory = directory
        self.timeout = timeout

    def base(self, image_id: str) -> Lock:
        """The lock of one base's miss path and removal."""
        return Lock(self._directory / f"base.{image_id}.lock")

    @contextmanager
    def disk(self, disk_id: str, name: str, check: Callable[[], None] | None = None) -> Iterator[None]:
        """Keep others from working on the same root disk while the block runs.

        Raises:
            LockTimeoutError: somebody kept it for longer than ``timeout``.
        """
        shard = zlib.crc32(f"{disk_id}/{name}".encode()) % _SHARDS
        with self._waited(Lock(self._directory / f"disk.{shard:02x}.lock"), check, disk_id):
            yield

    @contextmanager
    def admission(self, check: Callable[[], None] | None = None) -> Iterator[None]:
        """Keep others from reserving space while the block runs; for a few stats. What ``check`` raises ends the wait.

        Raises:
            LockTimeoutError: somebody kept it for longer than ``timeout``.
        """
        with self._waited(Lock(self._directory / "admission.lock"), check, None):
            yield

    @contextmanager
    def _waited(self, lock: Lock, check: Callable[[], None] | None, disk_id: str | None) -> Iterator[None]:
        start = time.monotonic()
        pause = 0.001
        while not lock.attempt():
            if check is not None:
                check()
            if (waited := time.monotonic() - start) > self.timeout:
                raise LockTimeoutError(str(lock.path), waited, disk_id=disk_id)
            with _turns.given_up():
                time.sleep(pause)
            pause = min(pause * 2, _POLL)
        try:
            yield
        finally:
            lock.release()


class Patience:
    """How long to wait for the holder of a lock: the clock starts again whenever the holder's note changes."""

    def __init__(self, lock: Lock, timeout: float, image_id: str) -> None:
        self._lock = lock
        self._timeout = timeout
        self._image_id = image_id
        self._start = time.monotonic()
        self._seen = lock.peek()

    def wait(self) -> tuple[int, int | None] | None:
        """Sleep a little and return what the holder told last.

        Raises:
            LockTimeoutError: the holder made no progress for ``timeout`` seconds.
        """
        time.sleep(_POLL)
        note = self._lock.peek()
        if note != self._seen:
            self._seen = note
            self._start = time.monotonic()
        waited = time.monotonic() - self._start
        if waited > self._timeout:
            raise LockTimeoutError(str(self._lock.path), waited, image_id=self._image_id)
        return note

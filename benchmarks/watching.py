"""What a measurement costs outside the process that is measured: disk that is in use meanwhile, CPU of the servers."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Self

_BLOCK = 512


def allocated(directory: Path) -> int:
    """Bytes that the directory's files take, each inode once; files that vanish meanwhile are left out."""
    seen: set[tuple[int, int]] = set()
    total = 0
    for path, _, names in os.walk(directory):
        for name in names:
            try:
                found = os.lstat(os.path.join(path, name))  # noqa: PTH118 - a hundred times a second
            except FileNotFoundError:
                continue
            if (found.st_dev, found.st_ino) not in seen:
                seen.add((found.st_dev, found.st_ino))
                total += found.st_blocks * _BLOCK
    return total


class DiskWatch:
    """The most that a directory takes during the block, sampled: ``before``, ``peak`` and ``after`` in bytes."""

    def __init__(self, directory: Path, interval: float = 0.01) -> None:
        self._directory = directory
        self._interval = interval
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self.before = self.peak = self.after = 0

    def __enter__(self) -> Self:
        self.before = self.peak = allocated(self._directory)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self.after = allocated(self._directory)
        self.peak = max(self.peak, self.after)

    def _look(self) -> None:
        while not self._ended.wait(self._interval):
            self.peak = max(self.peak, allocated(self._directory))


def descendants(ancestor: int) -> list[int]:
    """The processes below ``ancestor``."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                text = (entry / "stat").read_text(encoding="utf-8", errors="replace")
            except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
                continue
            # the name, in parentheses, may hold anything
            parents[int(entry.name)] = int(text.rpartition(")")[2].split()[1])
    found = {ancestor}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found - {ancestor})


def cpu_of(processes: list[int]) -> float:
    """CPU seconds that these processes have used, in nanosecond steps; those that ended are left out."""
    total = 0.0
    for pid in processes:
        try:
            # the clock of another process: CPUCLOCK_SCHED (2), linux/posix-timers.h; what clock_getcpuclockid gives
            total += time.clock_gettime((~pid << 3) | 2)
        except OSError:
            continue
    return total

"""What a piece of work costs, measured inside the process that does it.

Standard library alone, since the peers' environments run it too. A measuring process gets its task as JSON in its
first argument, says ``ready`` when all is prepared, waits for a line, works, and answers with one line of JSON.
"""

from __future__ import annotations

import functools
import json
import multiprocessing.util
import os
import re
import resource
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Sequence

Figures = dict[str, Any]
"""What was measured, by name: seconds, bytes, counts."""


class Meter:
    """Counts from ``with`` to its end: time, CPU, bytes written, memory, child processes.

    ``memory_before`` is what the process held after its imports (``memory()``); the peak is counted from there. None:
    from where it is on entering.
    """

    def __init__(self, memory_before: int | None = None) -> None:
        self._memory_before = memory_before
        self.figures: Figures = {}

    def __enter__(self) -> Self:
        _start_counting_children()
        before = memory()
        self._memory_before = before if self._memory_before is None else self._memory_before
        # the kernel forgets the highest point so far
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self._children = len(_children)
        self._written = written()
        self._cpu = _cpu()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        seconds = time.perf_counter() - self._start
        peak = memory("VmHWM")
        (own, children), (own_before, children_before) = _cpu(), self._cpu
        self.figures = {
            "seconds": seconds,
            "cpu": own - own_before,
            "cpu_children": children - children_before,
            "written": written() - self._written,
            "memory_peak": peak,
            "memory_grown": peak - (self._memory_before or 0),
            "children": len(_children) - self._children,
            "commands": sorted(set(_children[self._children :])),
        }


def memory(figure: str = "VmRSS") -> int:
    """Resident bytes of this process now, or ``VmHWM``: at the highest point."""
    found = re.search(rf"^{figure}:\s+(\d+) kB$", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def written() -> int:
    """Bytes that this process and its ended children caused to be written to storage so far."""
    found = re.search(r"^write_bytes: (\d+)$", Path("/proc/self/io").read_text(encoding="ascii"), re.MULTILINE)
    return int(found[1]) if found else 0


def _cpu() -> tuple[float, float]:
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time(), ended.ru_utime + ended.ru_stime


# --- child processes -------------------------------------------------------------------------------------------------

_children: list[str] = []


@functools.cache
def _start_counting_children() -> None:
    # an audit hook cannot be taken back: once for a process
    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "subprocess.Popen":
            _children.append(_brief(arguments[1]))
        elif event in {"os.fork", "os.forkpty", "os.posix_spawn", "os.system"}:
            _children.append(event)

    sys.addaudithook(hook)
    # multiprocessing spawns beneath the audited calls
    beneath: Any = multiprocessing.util
    spawn = beneath.spawnv_passfds

    def counted(path: Any, arguments: Sequence[Any], descriptors: Any) -> Any:
        _children.append(_brief(arguments))
        return spawn(path, arguments, descriptors)

    beneath.spawnv_passfds = counted


def _brief(argv: Any) -> str:
    """The program of a command line, with its first word; the program that it starts in its place, if it does."""
    words = [argv] if isinstance(argv, str | bytes) else list(argv)
    text = [os.fsdecode(word) for word in words]
    for program in ("qemu-img", "rbd"):
        if program in text[1:]:
            return " ".join(text[text.index(program) :][:2])
    return " ".join([Path(text[0]).name, *text[1:2]])


# --- figures of many -------------------------------------------------------------------------------------------------


def spread(seconds: Sequence[float]) -> Figures:
    """Percentiles of many times."""
    ordered = sorted(seconds)
    return {
        "n": len(ordered),
        "p50": statistics.median(ordered),
        "p95": percentile(ordered, 95),
        "max": ordered[-1],
        "min": ordered[0],
    }


def percentile(ordered: Sequence[float], percent: int) -> float:
    """The value below which ``percent`` of the ordered values lie (nearest rank)."""
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


def together(count: int, work: Any) -> float:
    """Call ``work(number)`` in ``count`` threads that begin at one moment; the seconds from then until all ended.

    The first error is raised when all ended.
    """
    begun: list[float] = []
    barrier = threading.Barrier(count, lambda: begun.append(time.perf_counter()))
    errors: list[BaseException] = []

    def one(number: int) -> None:
        try:
            barrier.wait()
            work(number)
        except BaseException as err:  # noqa: BLE001 - reason: raised below, in the thread that asked
            errors.append(err)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ended = time.perf_counter()
    if errors:
        raise errors[0]
    return ended - begun[0]


# --- talking to the parent -------------------------------------------------------------------------------------------


def task() -> Figures:
    """What this process is to do."""
    _start_counting_children()
    given: Figures = json.loads(sys.argv[1])
    return given


def ready() -> None:
    """Say that everything is prepared, and wait for the word to begin."""
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()


def answer(figures: Figures) -> None:
    """Say what was measured."""
    sys.stdout.write(json.dumps(figures) + "\n")
    sys.stdout.flush()

"""Runs one measurement: a fresh process or several at once, watched from outside."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.watching import DiskWatch, cpu_of, descendants

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.meter import Figures

REPO = Path(__file__).resolve().parents[1]


class MeasureError(Exception):
    """A measuring process failed; holds what it said."""


@contextmanager
def fresh(directory: Path) -> Iterator[Path]:
    """A new directory below ``directory``, removed afterwards."""
    path = Path(tempfile.mkdtemp(prefix="run-", dir=directory))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def free(directory: Path) -> None:
    """Give back the space of what lies below ``directory``, whose files and directories stay.

    ext4 without a journal passes one by one over the inodes that were freed in the last minutes: what a measurement
    removed is then measured in the next one.
    """
    for path in directory.rglob("*"):
        if path.is_file() and not path.is_symlink():
            os.truncate(path, 0)


def python_of(name: str) -> Path:
    """The interpreter of a peer's environment."""
    return REPO / f".venv-{name}" / "bin" / "python"


def measure(module: str, task: Figures, *, watched: Path | None = None, python: Path | None = None) -> Figures:
    """What ``python -m module`` measured, with what could be seen from outside."""
    return measure_together(module, [task], watched=watched, python=python)[0]


def measure_together(
    module: str, tasks: Sequence[Figures], *, watched: Path | None = None, python: Path | None = None
) -> list[Figures]:
    """One process for each task; all begin when the last one is ready.

    The first answer carries what was seen from outside: ``cpu_servers``, of the processes that this one has started
    before, and ``disk_before``, ``disk_peak``, ``disk_after``, of a directory that is ``watched``. Watching takes time
    from what is measured: some hundredths of a core, and more where there are many files.
    """
    servers = descendants(os.getpid())
    with tempfile.TemporaryFile() as words:
        processes = [_start(module, task, python or Path(sys.executable), words) for task in tasks]
        try:
            for process in processes:
                _expect_ready(process, module, words)
            os.sync()
            before = cpu_of(servers)
            with DiskWatch(watched) if watched else nullcontext() as disk:
                for process in processes:
                    _say(process, "go\n")
                answers = [_answer_of(process, module, words) for process in processes]
                used = cpu_of(servers) - before
        finally:
            for process in processes:
                _end(process)
    answers[0]["cpu_servers"] = used
    if disk is not None:
        answers[0] |= {"disk_before": disk.before, "disk_peak": disk.peak, "disk_after": disk.after}
    return answers


def _start(module: str, task: Figures, python: Path, words: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(python), "-m", module, json.dumps(task)],
        cwd=REPO,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=words,
        text=True,
    )


def _expect_ready(process: subprocess.Popen[str], module: str, words: Any) -> None:
    assert process.stdout is not None  # noqa: S101 - a pipe, as asked for
    if process.stdout.readline() != "ready\n":
        raise _failed(process, module, words)


def _say(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None  # noqa: S101 - as above
    process.stdin.write(line)
    process.stdin.flush()


def _answer_of(process: subprocess.Popen[str], module: str, words: Any) -> Figures:
    assert process.stdout is not None  # noqa: S101 - as above
    line = process.stdout.readline()
    if not line:
        raise _failed(process, module, words)
    figures: Figures = json.loads(line)
    return figures


def _failed(process: subprocess.Popen[str], module: str, words: Any) -> MeasureError:
    process.kill()
    code = process.wait()
    words.seek(0)
    return MeasureError(f"{module} ended with {code}: {words.read()[-3000:].decode(errors='replace')}")


def _end(process: subprocess.Popen[str]) -> None:
    with process:  # closes its pipes
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()

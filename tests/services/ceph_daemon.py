"""A process that serves a test: it is ended by the object that started it, and with the test run if that is killed."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


class Daemon:
    """One program that stays in the foreground, its output in ``log``.

    The kernel kills it when the thread that started it ends (PR_SET_PDEATHSIG): ``starter`` must have one thread that
    lives as long as the daemon is needed.
    """

    def __init__(self, name: str, command: Sequence[str], log: Path, starter: ThreadPoolExecutor) -> None:
        self.name = name
        self._command = ["setpriv", "--pdeathsig", "KILL", *command]
        self._log = log
        self._starter = starter
        self._process: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        return f"<Daemon {self.name} pid={self.pid}>"

    @property
    def pid(self) -> int | None:
        """Its process id while it is started."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start it; it must not be running."""
        if self._process is not None:
            raise RuntimeError(f"{self.name} is started already")
        self._process = self._starter.submit(self._spawn).result()

    def stop(self) -> None:
        """Ask it to end, kill it after ten seconds; idempotent."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Kill it; idempotent."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """Stop it where it is: its connections stay open and nobody answers."""
        self._signal(signal.SIGSTOP)
        assert self._process is not None
        # kill(2) returns while other threads of it may still be working; the parent is told when all of them stand
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def resume(self) -> None:
        """Take ``pause`` back."""
        self._signal(signal.SIGCONT)

    def check(self) -> None:
        """RuntimeError with the end of its log unless it runs."""
        if self._process is None:
            raise RuntimeError(f"{self.name} is not started")
        if self._process.poll() is not None:
            end = self._log.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"{self.name} has ended with {self._process.returncode}:\n{end}")

    def _spawn(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(
                self._command,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _signal(self, number: signal.Signals) -> None:
        self.check()
        assert self._process is not None
        self._process.send_signal(number)

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(number)
        # one that is paused gets its SIGTERM only when it goes on
        process.send_signal(signal.SIGCONT)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def run(command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """A tool that has been started, its output in ``log``; ``finish`` waits for it."""
    with log.open("ab") as output:
        return subprocess.Popen(command, env=environment(), stdin=subprocess.DEVNULL, stdout=output, stderr=output)


def finish(process: subprocess.Popen[bytes], log: Path) -> None:
    """Return when the tool is done; RuntimeError with the end of ``log`` if it failed or takes a minute."""
    try:
        status: int | None = process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        status = None
    if status != 0:
        end = log.read_text(errors="replace")[-2000:]
        raise RuntimeError(f"{process.args!r}: {'no end' if status is None else f'status {status}'}:\n{end}")


def environment() -> dict[str, str]:
    """The environment of this process without what Ceph's programs would take as arguments."""
    return {name: value for name, value in os.environ.items() if not name.startswith("CEPH_")}

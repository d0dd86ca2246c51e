"""Forked children: they do one thing, and their result, error or death is told to the test."""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import select
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

_T = TypeVar("_T")
_PATIENCE = 60.0


class ChildError(AssertionError):
    """A child ended in another way than the test expects."""


class Child(Generic[_T]):
    """A process that runs ``work`` and ends without returning into the test."""

    def __init__(self, work: Callable[[], _T]) -> None:
        reading, writing = os.pipe()
        with warnings.catch_warnings():
            # from Python 3.12: the child runs this thread alone, and never comes back into pytest
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            gc.disable()  # a collection would copy every page of the parent
            os.close(reading)
            _work_and_end(work, writing)
        os.close(writing)
        self._pipe = reading
        self._code: int | None = None

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self._signal(signal.SIGKILL)
        self.wait()

    def suspend(self) -> None:
        """SIGSTOP; returns when all of its threads stand still."""
        self._signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def resume(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)

    def wait(self) -> int:
        """The exit code, negative for a signal."""
        if self._code is None:
            self._code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._code

    def result(self) -> _T:
        """What ``work`` returned; what it raised is raised here.

        Raises:
            ChildError: it died, or does not come to an end.
        """
        data = b""
        deadline = time.monotonic() + _PATIENCE
        try:
            while True:
                if not select.select([self._pipe], [], [], max(deadline - time.monotonic(), 0))[0]:
                    self.kill()
                    raise ChildError(f"the child did not end within {_PATIENCE:.0f} s")
                if not (piece := os.read(self._pipe, 65536)):
                    break
                data += piece
        finally:
            os.close(self._pipe)
            self._pipe = -1
        code = self.wait()
        if not data:
            raise ChildError(f"the child died: {code}")
        error, value, trace = pickle.loads(data)
        if error is not None:
            error.add_note(f"in a child:\n{trace}")
            raise error
        result: _T = value
        return result

    def close(self) -> None:
        """Kill it if it lives, and give everything back."""
        if self._code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self.wait()
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1

    def _signal(self, number: int) -> None:
        if self._code is None:
            os.kill(self.pid, number)


@contextlib.contextmanager
def child(work: Callable[[], _T]) -> Iterator[Child[_T]]:
    """A child that is dead after the block."""
    process = Child(work)
    try:
        yield process
    finally:
        process.close()


def run_to_death(work: Callable[[], object], when: str) -> bool:
    """Run ``work`` in a child; whether it was killed by SIGKILL. What it raises fails the test."""
    with child(work) as process:
        if process.wait() == -signal.SIGKILL:
            return True
        try:
            process.result()
        except BaseException as err:
            err.add_note(when)
            raise
        return False


def _work_and_end(work: Callable[[], Any], writing: int) -> None:
    code = 70
    try:
        try:
            answer: tuple[BaseException | None, Any, str] = (None, work(), "")
        except BaseException as err:  # noqa: BLE001 - reason: told to the parent, whatever it is
            answer = (err, None, traceback.format_exc())
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(pickle.dumps(answer))
        code = 0
    except BaseException:  # noqa: BLE001 - reason: a forked child must not come back into pytest
        traceback.print_exc()
    finally:
        os._exit(code)

"""Another host: a Python process of its own, which is told lines and heard."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

_TESTS = str(Path(__file__).parents[1])
_PATIENCE = 60.0


class Host:
    """A process that runs ``code``, with these arguments; a context manager that ends it."""

    def __init__(self, code: str, *arguments: str) -> None:
        command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {_TESTS!r})\n{code}", *arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        self._heard = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def say(self, line: str) -> None:
        """Tell it a line."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n".encode())

    def hear(self) -> str:
        """The next line that it says, "" at its end; AssertionError if it says nothing for a minute."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + _PATIENCE
        while b"\n" not in self._heard:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "the other host says nothing"
            piece = os.read(self.process.stdout.fileno(), 65536)
            if not piece:
                break
            self._heard += piece
        line, _, self._heard = self._heard.partition(b"\n")
        return line.decode()

    def end(self) -> int:
        """Its exit code, when it has been told all."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(_PATIENCE)

    def kill(self) -> None:
        """End it as a power cut does; one that has ended is left as it is."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

"""Waits for what another thread or process does, and sources that go on when they are told to."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

from nova_imagecache import ImageInfo
from nova_imagecache.testing import FakeSource

_T = TypeVar("_T")
_PATIENCE = 60.0


def until(condition: Callable[[], _T], what: str) -> _T:
    """The first true value of ``condition``; AssertionError if it takes a minute."""
    deadline = time.monotonic() + _PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.005)
    return value


class Gate:
    """A source's gate, which works between a process and its forked children: closed until it is opened.

    ``arrived`` says how often a stream came to it.
    """

    def __init__(self) -> None:
        self._arrivals = os.pipe()
        self._tokens = os.pipe()
        os.set_blocking(self._arrivals[0], False)
        self._seen = 0

    def open(self) -> None:
        """Let everybody through from now on."""
        os.write(self._tokens[1], b"x")

    @property
    def arrived(self) -> int:
        """How many streams came to the gate; asked in one process only."""
        with suppress(BlockingIOError):
            self._seen += len(os.read(self._arrivals[0], 4096))
        return self._seen

    def pass_through(self) -> None:
        """Wait until it is open."""
        os.write(self._arrivals[1], b"x")
        # the token goes back for the next one
        os.write(self._tokens[1], os.read(self._tokens[0], 1))

    def close(self) -> None:
        """Give the pipes back."""
        for fd in (*self._arrivals, *self._tokens):
            os.close(fd)


class GatedSource(FakeSource):
    """A FakeSource whose streams wait at a gate after ``after`` bytes."""

    def __init__(self, source: FakeSource, gate: Gate, after: int) -> None:
        super().__init__()
        self.images = source.images
        self._gate = gate
        self._after = after

    @contextmanager
    def open(self, image: ImageInfo, offset: int = 0) -> Iterator[Iterator[bytes]]:
        with super().open(image, offset) as chunks:
            yield self._gated(chunks)

    def _gated(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        done = 0
        waited = False
        for chunk in chunks:
            if done >= self._after and not waited:
                self._gate.pass_through()
                waited = True
            yield chunk
            done += len(chunk)

"""Stopping a thread where the library has no step to stop at."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest


class Gate:
    """Stops the first call of a function that ``which`` is true of, before it or, ``after``, with its answer."""

    def __init__(
        self,
        patch: pytest.MonkeyPatch,
        owner: object,
        name: str,
        which: Callable[..., bool] = lambda *_: True,
        *,
        after: bool = False,
    ) -> None:
        self._reached, self._opened, self._once = threading.Event(), threading.Event(), threading.Lock()
        inner = getattr(owner, name)

        def stopping(*args: Any) -> Any:
            answer = inner(*args) if after else None
            if which(*args) and self._once.acquire(blocking=False):
                self._reached.set()
                assert self._opened.wait(60)
            return answer if after else inner(*args)

        patch.setattr(owner, name, stopping)

    def wait(self) -> None:
        """Until a thread stands there."""
        assert self._reached.wait(60)

    def open(self) -> None:
        """Let it go on."""
        self._opened.set()

"""Asks a question that may hang in a thread, so that whoever waits for the answer also sees a deadline or a cancel."""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING, TypeVar, cast

if TYPE_CHECKING:
    from collections.abc import Callable

_POLL = 0.1
_T = TypeVar("_T")


def attended(question: Callable[[], _T], check: Callable[[], None]) -> _T:
    """The answer to a question that may hang; ``check`` is called ten times a second until it comes.

    What ``check`` raises ends the waiting; a thread that still hangs ends with the source's own time-out.
    """
    answer: queue.Queue[tuple[_T, None] | tuple[None, BaseException]] = queue.Queue(maxsize=1)

    def ask() -> None:
        try:
            answer.put((question(), None))
        except BaseException as err:  # noqa: BLE001 - reason: the thread that waits must hear of anything
            answer.put((None, err))

    threading.Thread(target=ask, name="source", daemon=True).start()
    while True:
        check()
        try:
            result, error = answer.get(timeout=_POLL)
        except queue.Empty:
            continue
        if error is not None:
            raise error
        return cast("_T", result)

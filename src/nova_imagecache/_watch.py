"""One call's deadline, cancel event and progress."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Self, TypeVar

from nova_imagecache._models import Progress
from nova_imagecache.exceptions import CancelledError, DeadlineError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

_TICK = 0.1
_T = TypeVar("_T")

_log = logging.getLogger(__name__)


class Watch:
    """What a long step asks and tells while it runs.

    ``progress`` is called by a thread of its own, ten times a second at most and once at the end, so that a slow or
    re-entrant callback never runs under a lock or holds up the data. What it raises is logged and dropped.
    """

    def __init__(
        self,
        image_id: str,
        *,
        deadline: float | None = None,
        cancel: threading.Event | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self.image_id = image_id
        self._until = None if deadline is None else time.monotonic() + deadline
        self._cancel = cancel
        self._progress = progress
        self._now = Progress(image_id=image_id, stage="wait", done=0, total=None)
        self._told: Progress | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def check(self, stage: str | None = None) -> None:
        """Come back while the call may go on.

        Raises:
            CancelledError: the caller set its event.
            DeadlineError: the time is up.
        """
        if self._cancel is not None and self._cancel.is_set():
            raise CancelledError(image_id=self.image_id, stage=stage or self._now.stage)
        if self._until is not None and time.monotonic() > self._until:
            raise DeadlineError(image_id=self.image_id, stage=stage or self._now.stage)

    def report(self, stage: str, done: int, total: int | None) -> None:
        """Remember how far the call is; the progress thread tells the caller."""
        self._now = Progress(image_id=self.image_id, stage=stage, done=done, total=total)
        if self._thread is None and self._progress is not None and not self._ended.is_set():
            self._thread = threading.Thread(target=self._tick, name=f"progress-{self.image_id}", daemon=True)
            self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._tell()

    def _tick(self) -> None:
        while not self._ended.wait(_TICK):
            self._tell()

    def _tell(self) -> None:
        now = self._now
        if now != self._told and self._progress is not None:
            self._told = now
            call_safely(self._progress, now)


def call_safely(callback: Callable[[_T], None], value: _T) -> None:
    """Call the caller's code; what it raises is logged and dropped, since our work must not fail of it."""
    try:
        callback(value)
    except Exception:  # noqa: BLE001 - reason: whatever a caller's callback raises
        _log.exception("callback %r failed", callback)

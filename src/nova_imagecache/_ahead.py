"""Asks and reads a source in a thread, so that whoever waits for it also sees a deadline, a cancel, a dead source."""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING, Self, TypeVar, cast

from nova_imagecache.exceptions import SourceUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from nova_imagecache._guard import GuardedSource
    from nova_imagecache._models import ImageInfo

MIB = 1 << 20
_AHEAD = 8
"""MiB that the reader may be ahead."""

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


class ReadAhead:
    """The image's bytes in chunks of at most 1 MiB; iterate inside the context.

    ``check`` is called before every chunk and ten times a second while none comes; what it raises ends the reading. A
    thread that hangs in its source is left behind and ends with the source's own read time-out.
    """

    def __init__(self, source: GuardedSource, image: ImageInfo, check: Callable[[], None]) -> None:
        self._source = source
        self._image = image
        self._check = check
        self._chunks: queue.Queue[bytes | BaseException | None] = queue.Queue(maxsize=_AHEAD)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, name=f"fetch-{image.image_id}", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=0.5)

    def __iter__(self) -> Iterator[bytes]:
        while True:
            self._check()
            try:
                item = self._chunks.get(timeout=_POLL)
            except queue.Empty:
                if not self._thread.is_alive() and self._chunks.empty():
                    text = "the reading thread ended early"
                    raise SourceUnavailableError(text, image_id=self._image.image_id) from None
                continue
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    # --- in the reading thread

    def _read(self) -> None:
        try:
            with self._source.open(self._image) as stream:
                for chunk in stream:
                    # a source may give chunks of any size; the queue counts MiBs
                    for start in range(0, len(chunk), MIB):
                        if not self._put(chunk[start : start + MIB]):
                            return
            self._put(None)
        except BaseException as err:  # noqa: BLE001 - handed to the thread that waits; reason: it must hear of anything
            self._put(err)

    def _put(self, item: bytes | BaseException | None) -> bool:
        while not self._stop.is_set():
            try:
                self._chunks.put(item, timeout=_POLL)
            except queue.Full:
                continue
            return True
        return False

"""Images in which an operation hangs: they can be closed only once it has ended, and nobody waits for that."""

from __future__ import annotations

import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from nova_imagecache.backends import _rados
from nova_imagecache.backends._rados_errors import StuckError
from nova_imagecache.exceptions import BackendError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class LeftImages:
    """Those of one backend. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left: list[tuple[_rados.Image, Callable[[], bool]]] = []

    def leave(self, image: _rados.Image, has_ended: Callable[[], bool]) -> None:
        """Have ``close_ended`` close the image when ``has_ended`` says so."""
        _rados.abandon(image)
        with self._lock:
            self._left.append((image, has_ended))

    @contextmanager
    def closing(self, image: _rados.Image, has_ended: Callable[[], bool]) -> Iterator[None]:
        """Close the image after the block; after a StuckError leave it."""
        try:
            yield
        except StuckError:
            self.leave(image, has_ended)
            raise
        except BaseException:
            _rados.close_image(image)
            raise
        _rados.close_image(image)

    def close_ended(self) -> None:
        """Close those that no longer hang."""
        with self._lock:
            ended = [image for image, has_ended in self._left if has_ended()]
            self._left = [one for one in self._left if one[0] not in ended]
        for image in ended:
            with suppress(BackendError):
                _rados.close_image(image)

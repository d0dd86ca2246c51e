"""A process's sign of life in a pool, by which others tell what it works on from what a dead one left.

``staging._owner.<token>`` is an empty image that the process keeps open. Ceph watches whoever has an image open, and
drops the watch when its connection has been silent for ``osd_client_watch_timeout`` (30 s by default), however the
process ended. Names of unfinished things end in the token of their maker and a random part of their own.
"""

from __future__ import annotations

import re
import secrets
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from nova_imagecache.backends import _rados, _rbd_forks, _rbd_look
from nova_imagecache.backends._rados_errors import BusyError, ExistsError, NotThereError
from nova_imagecache.exceptions import BackendError, BackendUnavailableError

if TYPE_CHECKING:
    from nova_imagecache.backends._rados import Image
    from nova_imagecache.backends._rbd_connection import Connection

STAGING = "staging."
OWNER = "staging._owner."
"""No id begins with an underscore, so nobody's staging name begins like this."""

LOOK_AGAIN = 5.0
"""Seconds after which a process looks whether others still see it: well below the time that Ceph needs to forget it."""

_LAYERING = 1  # RBD_FEATURE_LAYERING: nothing that needs a lock or a map
_UNFINISHED = re.compile(r"staging\.[A-Za-z0-9].*\.[0-9a-f]{16}")
_SIGN = re.compile(r"staging\._owner\.[0-9a-f]{8}")


def is_unfinished(image_name: str) -> bool:
    """Whether a name is one that ``Owner.new_name`` gives; whatever else begins like it is somebody else's image."""
    return _UNFINISHED.fullmatch(image_name) is not None


def is_sign(image_name: str) -> bool:
    """Whether a name is that of a process's sign of life."""
    return _SIGN.fullmatch(image_name) is not None


class Owner:
    """The process itself, in one pool. Shared by all of its backends on one connection; thread-safe."""

    def __init__(self, connection: Connection, pool: str) -> None:
        self._connection = connection
        self._pool = pool
        self._lock = threading.Lock()
        self._making: set[str] = set()
        self._token: str | None = None
        self._image: Image | None = None
        self._showing = threading.Lock()  # held over I/O, by those who show or look at the sign and nobody else
        self._shown = 0.0
        self._failed: tuple[float, BackendUnavailableError] | None = None
        _rbd_forks.note(self)

    def new_name(self, stem: str, *, wait: bool = True) -> str:
        """A name for something unfinished; ``done`` says that it is finished or gone.

        Raises:
            BusyError: another thread is showing the sign of life, and nobody is to ``wait`` for it.
        """
        token = self._seen(wait=wait)
        with self._lock:
            name = f"{STAGING}{stem}.{token}{secrets.token_hex(4)}"
            self._making.add(name)
            return name

    def done(self, name: str) -> None:
        """It is finished, gone, or left to ``recover``."""
        with self._lock:
            self._making.discard(name)

    def _seen(self, *, wait: bool) -> str:
        """The token, of a sign that others saw a moment ago."""
        asked = time.monotonic()
        token = self._token
        if token is not None and asked - self._shown < LOOK_AGAIN:
            return token
        if not self._showing.acquire(blocking=wait):
            raise BusyError("another thread shows this process's sign of life just now")
        try:
            if self._token is not None and self._shown >= asked:
                return self._token
            # of many that wait for a cluster that is down, one finds out
            if self._failed is not None and self._failed[0] >= asked:
                raise BackendUnavailableError(self._failed[1].detail) from self._failed[1]
            try:
                token = self._show()
            except BackendUnavailableError as err:
                self._failed = (time.monotonic(), err)
                raise
            self._shown = time.monotonic()
            return token
        finally:
            self._showing.release()

    def _show(self) -> str:
        if self._token is not None and self._connection.client() in self._watchers(self._token):
            return self._token
        # who was silent for too long may have been swept: the same token again, for what is in the making
        token = self._token or secrets.token_hex(4)
        ioctx = self._connection.pool(self._pool)
        if _rbd_look.read_object(ioctx, _rados.TRASH) is None:
            _rados.make_trash(ioctx)  # before there is anything that must go some day
        old, self._image = self._image, None
        if old is not None:
            with suppress(BackendError):
                _rados.close_image(old)
        while self._image is None:
            with suppress(ExistsError):
                _rados.create(ioctx, OWNER + token, 0, _LAYERING)
            with suppress(NotThereError):  # a sweeper came between the two steps
                self._image = _rados.open_for_writing(ioctx, name=OWNER + token)
        with self._lock:
            self._token = token
        self._connection.at_end(self._end)
        return token

    def _watchers(self, token: str) -> set[int]:
        try:
            with _rbd_look.opened(self._connection.pool(self._pool), OWNER + token) as image:
                return _rbd_look.watching(image)
        except NotThereError:
            return set()

    def leave_to_parent(self) -> None:
        """In a forked child: the sign of life is its parent's."""
        image, self._image = self._image, None
        if image is not None:
            _rados.abandon(image)

    def _end(self) -> None:
        with self._lock:
            token, image, self._token, self._image = self._token, self._image, None, None
        if token is None or image is None:
            return
        try:
            _rados.close_image(image)
            _rados.remove(self._connection.pool(self._pool), OWNER + token)
        except BackendError:  # recover finds it without a watcher
            return

    def is_alive(self, name: str) -> bool:
        """Whether the maker of something unfinished is at work on it."""
        token = name.rpartition(".")[2][:8]
        with self._lock:
            if token == self._token:
                return name in self._making
        return bool(self.signs(OWNER + token))

    def is_own(self, owner: str) -> bool:
        """Whether this is the process's own sign of life."""
        with self._lock:
            return self._token is not None and owner == OWNER + self._token

    def signs(self, image_name: str) -> list[str]:
        """Who has the image open for writing; nobody if it is not there."""
        try:
            with _rbd_look.opened(self._connection.pool(self._pool), image_name) as image:
                return _rbd_look.watchers(image)
        except NotThereError:
            return []

"""A process's sign of life in a pool, by which others tell what it works on from what a dead one left.

``staging._owner.<token>`` is an empty image that the process keeps open. Ceph watches whoever has an image open, and
drops the watch when its connection has been silent for ``osd_client_watch_timeout`` (30 s by default), however the
process ended. Names of unfinished things end in the token of their maker and a random part of their own.
"""

from __future__ import annotations

import secrets
import threading
from typing import TYPE_CHECKING

from nova_imagecache.backends import _rados, _rbd_look
from nova_imagecache.backends._rados_errors import NotThereError
from nova_imagecache.exceptions import BackendError

if TYPE_CHECKING:
    from nova_imagecache.backends._rados import Image
    from nova_imagecache.backends._rbd_connection import Connection

STAGING = "staging."
OWNER = "staging._owner."
"""No id begins with an underscore, so nobody's staging name begins like this."""

_LAYERING = 1  # RBD_FEATURE_LAYERING: nothing that needs a lock or a map


class Owner:
    """The process itself, in one pool. Shared by all of its backends on one connection; thread-safe."""

    def __init__(self, connection: Connection, pool: str) -> None:
        self._connection = connection
        self._pool = pool
        self._lock = threading.Lock()
        self._token: str | None = None
        self._image: Image | None = None
        self._making: set[str] = set()

    def new_name(self, stem: str) -> str:
        """A name for something unfinished; ``done`` says that it is finished or gone."""
        with self._lock:
            if self._token is None:
                self._token = self._begin()
            name = f"{STAGING}{stem}.{self._token}{secrets.token_hex(4)}"
            self._making.add(name)
            return name

    def done(self, name: str) -> None:
        """It is finished, gone, or left to ``recover``."""
        with self._lock:
            self._making.discard(name)

    def _begin(self) -> str:
        ioctx = self._connection.pool(self._pool)
        while True:
            token = secrets.token_hex(4)
            _rados.create(ioctx, OWNER + token, 0, _LAYERING)
            try:
                self._image = _rados.open_for_writing(ioctx, name=OWNER + token)
            except NotThereError:  # a sweeper came between the two steps
                continue
            self._connection.at_end(self._end)
            return token

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

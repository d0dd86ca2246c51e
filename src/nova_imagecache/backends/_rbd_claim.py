"""The right to bring one image in for a whole cluster: a lock on the object ``claim.<image-id>`` in the pool.

The lock ends by itself, and a thread renews it while the import runs: who dies gives it back within ``SECONDS`` and
two. It saves work, so nothing fails for want of it; where Glance copies the image it also keeps two from asking at
once, which Glance may answer by deleting the first's copy. The object goes with the lock; one that a dead process
leaves is empty, and goes when the image is brought in again.
"""

from __future__ import annotations

import logging
import secrets
import threading
from typing import TYPE_CHECKING

from nova_imagecache.backends import BackendError, Claim, NoSpaceError, _rados_claims
from nova_imagecache.backends._rados_errors import BusyError

if TYPE_CHECKING:
    from nova_imagecache.backends._rbd_store import Store

_log = logging.getLogger(__name__)

OBJECT = "claim."
"""What the name of the object begins with; the image id follows. Ceph's own objects of images begin with ``rbd_``."""

SECONDS = 20
"""How long a claim lasts that nobody renews."""

RENEWAL = 5.0
"""Seconds between two renewals."""

_WHY = "bringing the image in"


def claim_import(store: Store, image_id: str) -> Claim | None:
    """The right to bring the image in; None: somebody else of the cluster has it."""
    cookie = secrets.token_hex(8)
    try:
        with store.room():
            _rados_claims.claim(store.io, OBJECT + image_id, cookie, SECONDS, _WHY)
    except BusyError:
        return None
    except NoSpaceError as err:
        # the import says so itself where it matters, and the core makes room then
        _log.warning("image %s: brought in without a claim: %s", image_id, err)
        return Claim()
    return _Held(store, image_id, cookie)


class _Held(Claim):
    """A claim, and the thread that renews it."""

    def __init__(self, store: Store, image_id: str, cookie: str) -> None:
        self._store = store
        self._image_id = image_id
        self._cookie = cookie
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._renew, name=f"claim of {image_id}", daemon=True)
        self._thread.start()
        store.endings.add(self.release)

    def release(self) -> None:
        if self._released.is_set():
            return
        self._released.set()
        self._store.endings.discard(self.release)
        self._thread.join()  # a renewal after the removal would make the object again
        try:
            _rados_claims.remove_claimed(self._store.io, OBJECT + self._image_id, self._cookie)
        except BackendError as err:  # it ends by itself, or has ended
            _log.info("image %s: the claim was not given back: %s", self._image_id, err)

    def _renew(self) -> None:
        while not self._released.wait(RENEWAL):
            try:
                _rados_claims.claim(self._store.io, OBJECT + self._image_id, self._cookie, SECONDS, _WHY, renewing=True)
            except BusyError:
                _log.warning("image %s: the claim had ended, and is somebody else's now", self._image_id)
                return
            except BackendError as err:
                _log.warning("image %s: the claim was not renewed: %s", self._image_id, err)

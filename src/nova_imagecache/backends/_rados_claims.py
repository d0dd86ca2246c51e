"""Claims: locks on rados objects that end by themselves. Steps that change a pool, as those of ``_rados``."""

from __future__ import annotations

import struct
from typing import Any

from nova_imagecache.backends._rados import answers, bindings, encoded, header
from nova_imagecache.backends._rados_errors import NotThereError
from nova_imagecache.exceptions import BackendUnavailableError

SEAMS = ("claim", "claim_image", "remove_claimed")
"""Functions of this module that change a pool."""

_CLAIM = "nova_imagecache.claim"
_MAY_RENEW = 1  # LIBRADOS_LOCK_FLAG_RENEW


def claim(ioctx: Any, key: str, cookie: str, seconds: int, why: str, *, renewing: bool = False) -> None:
    """Lock this object for a use of ours; BusyError: another has. Ends by itself, two seconds after ``seconds``."""
    with answers(f"claim {key}"):
        ioctx.lock_exclusive(key, _CLAIM, cookie, why, seconds, _MAY_RENEW if renewing else 0)


def claim_image(ioctx: Any, image_id: str, cookie: str, seconds: int, why: str) -> str:
    """As ``claim``, on the header of this image, whose key is returned; NotThereError: it has none."""
    key = f"rbd_header.{image_id}"
    # struct cls_lock_lock_op: name, type 1 (exclusive), cookie, no tag, why, seconds and nanoseconds, no flags
    held = encoded(_CLAIM) + b"\1" + encoded(cookie) + encoded("") + encoded(why) + struct.pack("<IIB", seconds, 0, 0)
    with answers(f"claim {key}"), header(ioctx, image_id) as operation:
        operation.execute("lock", "lock", struct.pack("<BBI", 1, 1, len(held)) + held)
    return key


def disclaim(ioctx: Any, key: str, cookie: str) -> None:
    """End a claim; one that has ended, or whose object is gone, is fine."""
    try:
        with answers(f"disclaim {key}"):
            ioctx.unlock(key, _CLAIM, cookie)
    except (NotThereError, BackendUnavailableError):  # it ends by itself
        return


def remove_claimed(ioctx: Any, key: str, cookie: str) -> None:
    """Remove an object and our claim of it in one step; BusyError: it is not ours any more."""
    rados, _ = bindings()
    # struct cls_lock_assert_op: name, type 1 (exclusive), cookie, no tag
    held = encoded(_CLAIM) + b"\1" + encoded(cookie) + encoded("")
    with answers(f"remove {key} and its claim"), rados.WriteOpCtx() as operation:
        operation.execute("lock", "assert_locked", struct.pack("<BBI", 1, 1, len(held)) + held)
        operation.remove()
        ioctx.operate_write_op(operation, key)

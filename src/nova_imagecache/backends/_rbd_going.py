"""Root disks in the trash: the mark that says why and when they went, and which disk takes the place; the replaced."""

from __future__ import annotations

import json
import logging
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, Literal

from nova_imagecache.backends import BackendError, _rados, _rbd_look
from nova_imagecache.backends._rados_errors import BusyError, NotThereError, SnapshotsError
from nova_imagecache.backends._rbd_store import GOING

if TYPE_CHECKING:
    from nova_imagecache.backends._rados import Ioctx
    from nova_imagecache.backends._rbd_store import Store

_log = logging.getLogger(__name__)

_WHYS: Final[dict[str, Literal["removed", "replaced"]]] = {"removed": "removed", "replaced": "replaced"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Going:
    """What ``recover`` must know of a disk that it finds in the trash.

    ``at``: POSIX seconds. ``by``: the RBD id of the successor of a "replaced" one; None in marks of older versions.
    """

    why: Literal["removed", "replaced"]
    at: float
    by: str | None = None

    def dump(self) -> str:
        """The mark as it is written."""
        return json.dumps(asdict(self))


def going(*, by: str | None = None) -> Going:
    """The mark of a disk that goes now, for good or for its successor of that RBD id."""
    return Going(why="removed" if by is None else "replaced", at=time.time(), by=by)


def load(text: str) -> Going:
    """The mark that was written.

    Raises:
        BackendError: it cannot be read.
    """
    try:
        values = json.loads(text)
        mark = Going(why=_WHYS[values["why"]], at=float(values["at"]), by=values.get("by"))
    except (ValueError, TypeError, KeyError) as err:
        raise BackendError(f"its {GOING} cannot be read: {text[:80]!r}", todo="Remove or restore it by hand") from err
    return mark


def replaced(ioctx: Ioctx, name: str) -> dict[str, str | None]:
    """The "replaced" disks of that name in the trash, which is listed for that: RBD ids, and those of their successors.

    One whose mark cannot be read is left out: ``recover`` tells of it, and nothing happens to it.
    """
    found = {}
    for entry in _rbd_look.trash(ioctx):
        text = _rbd_look.metadata_of(ioctx, entry.image_id, GOING) if entry.name == name else None
        if text is None:
            continue
        try:
            mark = load(text)
        except BackendError as err:
            _log.warning("disk %s, RBD id %s in the trash: %s", name, entry.image_id, err)
            continue
        if mark.why == "replaced":
            found[entry.image_id] = mark.by
    return found


def remove_replaced(store: Store, name: str) -> None:
    """Remove what had the name until a successor took it, or was to take it.

    One whose name leads to yet another disk stays: nobody knows which of the two is wanted.

    Raises:
        BusyError: somebody has it open, or is putting the successor in its place.
        SnapshotsError: it has snapshots.
    """
    named = _rbd_look.named(store.io, name)
    found = replaced(store.io, name)
    for rbd_id, by in found.items():
        if named in (None, rbd_id, by) or by in found:
            with suppress(NotThereError):  # somebody else removed it, or gave it the name back
                store.patiently(partial(_refuse_used, store, rbd_id, None if by == named else by))
                with _rados.changing(store.io, image_id=rbd_id) as image:
                    _rados.set_metadata(image, GOING, going().dump())
                store.patiently(partial(store.empty, rbd_id, name))


def _refuse_used(store: Store, rbd_id: str, coming: str | None) -> None:
    with _rbd_look.opened_by_id(store.io, rbd_id) as image:
        watchers, snapshots = _rbd_look.watchers(image), _rbd_look.snapshots(image)
    if watchers:
        raise BusyError(f"the root disk is in use (open at {', '.join(watchers)})")
    if coming is not None and _rbd_look.is_watched(store.io, coming):
        raise BusyError("the root disk is in use (being attached to another base)")
    if snapshots:
        raise SnapshotsError(f"the root disk is in use (snapshots: {', '.join(snapshots)})")

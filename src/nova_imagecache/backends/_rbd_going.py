"""Root disks on their way to the trash and back: the mark that says why and when, and which disk takes the place."""

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
from nova_imagecache.backends._rbd_names import GOING
from nova_imagecache.backends._rbd_store import DELAY

if TYPE_CHECKING:
    from nova_imagecache.backends._rados import Ioctx
    from nova_imagecache.backends._rbd_store import Store

_log = logging.getLogger(__name__)

_WHYS: Final[dict[str, Literal["removed", "replaced"]]] = {"removed": "removed", "replaced": "replaced"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Going:
    """What ``recover`` must know of a disk that it finds in the trash.

    ``at``: POSIX seconds. Of a "replaced" one ``by``: the RBD id of its successor, ``maker``: the staging name of that;
    None in marks of older versions.
    """

    why: Literal["removed", "replaced"]
    at: float
    by: str | None = None
    maker: str | None = None

    def dump(self) -> str:
        """The mark as it is written."""
        return json.dumps(asdict(self))


def going(*, by: str | None = None, maker: str | None = None) -> Going:
    """The mark of a disk that goes now, for good or for its successor of that RBD id and staging name."""
    return Going(why="removed" if by is None else "replaced", at=time.time(), by=by, maker=maker)


def load(text: str) -> Going:
    """The mark that was written.

    Raises:
        BackendError: it cannot be read.
    """
    try:
        values = json.loads(text)
        mark = Going(why=_WHYS[values["why"]], at=float(values["at"]), by=values.get("by"), maker=values.get("maker"))
    except (ValueError, TypeError, KeyError) as err:
        raise BackendError(f"its {GOING} cannot be read: {text[:80]!r}", todo="Remove or restore it by hand") from err
    return mark


def take_out(store: Store, rbd_id: str, name: str, mark: Going) -> None:
    """Move the disk of that id and name to the trash, marked so that ``recover`` knows what was meant.

    Raises:
        NotThereError: the name is gone, or another disk's.
    """
    with store.claimed(rbd_id, "taking the disk out"):
        if store.id_of(name) != rbd_id:
            raise NotThereError(f"{name} is gone, or another disk")
        _rados.set_metadata(store.io, rbd_id, {GOING: mark.dump()})
        before = _trashed(store, name)
        # what is replaced is all that there is of the disk until its successor is whole
        _rados.trash_move(store.io, name, DELAY if mark.why == "replaced" else 0)
    # the claim ends under whoever is slow, and it is the name that was moved, not the id
    after = _trashed(store, name)
    others = after - before - {rbd_id}
    for other in others:
        if _rbd_look.metadata_of(store.io, other, GOING) is None:
            store.restore(other, name)
    if others or rbd_id not in after:
        raise NotThereError(f"{name} is gone, or another disk")


def _trashed(store: Store, name: str) -> set[str]:
    return {entry.image_id for entry in _rbd_look.trash(store.io) if entry.name == name}


def put_back(store: Store, rbd_id: str, name: str, mark: Going | None = None) -> None:
    """Give a disk its name back and take its mark away; nothing happens where that is another than ``mark`` by now.

    Raises:
        ExistsError: the name is another disk's.
    """
    # all of it at once: with its name and the mark of a removal it looks like one that is half-way out
    with suppress(NotThereError), store.claimed(rbd_id, "giving the name back"):
        if mark is not None and not _is_marked(store, rbd_id, mark):
            return
        with suppress(NotThereError):
            store.restore(rbd_id, name)
        _rados.set_metadata(store.io, rbd_id, {GOING: None})


def _is_marked(store: Store, rbd_id: str, mark: Going) -> bool:
    text = _rbd_look.metadata_of(store.io, rbd_id, GOING)
    return text is not None and load(text) == mark


def replaced(ioctx: Ioctx, name: str) -> dict[str, Going]:
    """The "replaced" disks of that name in the trash, which is listed for that: RBD ids, and their marks.

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
            found[entry.image_id] = mark
    return found


def remove_replaced(store: Store, name: str, of: str | None = None) -> None:
    """Remove what had the name until a successor took it, or was to take it.

    One whose name leads to yet another disk stays: nobody knows which of the two is wanted. With ``of`` only the disk
    of that RBD id goes, or one whose successor that is.

    Raises:
        BusyError: somebody has it open, or is putting the successor in its place.
        SnapshotsError: it has snapshots.
    """
    named = _rbd_look.named(store.io, name)
    found = replaced(store.io, name)
    for rbd_id, mark in found.items():
        both = (rbd_id, mark.by)
        if (named in (None, *both) and of in (None, *both)) or mark.by in found:
            with suppress(NotThereError):  # somebody else removed it, or gave it the name back
                store.patiently(partial(_refuse_used, store, rbd_id, None if mark.by == named else mark))
                _mark_removed(store, rbd_id, mark)
                store.patiently(partial(store.empty, rbd_id, name))


def _mark_removed(store: Store, rbd_id: str, mark: Going) -> None:
    with store.claimed(rbd_id, "removing it"):
        if not _is_marked(store, rbd_id, mark):
            raise NotThereError("it has its name back")
        _rados.set_metadata(store.io, rbd_id, {GOING: going().dump()})


def is_coming(store: Store, mark: Going) -> bool:
    """Whether somebody is at work on the successor of a replaced disk: has it open, or is publishing it."""
    if mark.by is None:
        return False
    if _rbd_look.is_watched(store.io, mark.by):
        return True
    # looked at in the order in which it goes: open, closed, in the trash on its way to its name
    if mark.maker is None or not store.owner.is_alive(mark.maker):
        return False
    if _rbd_look.named(store.io, mark.maker) == mark.by:
        return True
    entry = _rbd_look.trash_entry(store.io, mark.by)
    return entry is not None and entry.name == mark.maker


def _refuse_used(store: Store, rbd_id: str, mark: Going | None) -> None:
    with _rbd_look.opened_by_id(store.io, rbd_id) as image:
        watchers, snapshots = _rbd_look.watchers(image), _rbd_look.snapshots(image)
    if watchers:
        raise BusyError(f"the root disk is in use (open at {', '.join(watchers)})")
    if mark is not None and is_coming(store, mark):
        raise BusyError("the root disk is in use (being attached to another base)")
    if snapshots:
        raise SnapshotsError(f"the root disk is in use (snapshots: {', '.join(snapshots)})")

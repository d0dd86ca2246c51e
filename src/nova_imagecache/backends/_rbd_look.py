"""Looks into a pool and changes nothing: images, snapshots, clones, the trash, metadata, extents."""

from __future__ import annotations

import json
import struct
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC
from typing import TYPE_CHECKING, Any

from nova_imagecache.backends._rados import answers, bindings, close_unwritten, encoded
from nova_imagecache.backends._rados_errors import NotThereError, error_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nova_imagecache.backends._rados import Image, Ioctx

_FAST_DIFF = 16  # RBD_FEATURE_FAST_DIFF
_MAP_INVALID = 3  # RBD_FLAG_MAP_INVALID | RBD_FLAG_FAST_DIFF_INVALID
_MIB = 2**20
_KEYS = 64
"""Metadata asked for at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Child:
    """A clone, as its parent lists it. ``trash``: it lies in its pool's trash."""

    pool: str
    name: str
    image_id: str
    trash: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Trashed:
    """An entry of a pool's trash: the image's id and last name; POSIX seconds when it was moved there."""

    image_id: str
    name: str
    moved_at: float


@contextmanager
def opened(ioctx: Ioctx, name: str, *, snapshot: str | None = None) -> Iterator[Image]:
    """The image of that name, for reading; NotThereError if it, or the snapshot, is not there."""
    _, rbd = bindings()
    with answers(f"open {name}"):
        image = rbd.Image(ioctx, name, snapshot=snapshot, read_only=True)
    try:
        yield image
    finally:
        close_unwritten(ioctx, image)


@contextmanager
def opened_by_id(ioctx: Ioctx, image_id: str) -> Iterator[Image]:
    """The image of that id, for reading, also one in the trash."""
    _, rbd = bindings()
    with answers(f"open image id {image_id}"):
        image = rbd.Image(ioctx, image_id=image_id, read_only=True)
    try:
        yield image
    finally:
        close_unwritten(ioctx, image)


def named(ioctx: Ioctx, name: str) -> str | None:
    """The id of the image to which the name leads, from the pool's directory alone: opening it costs 30 times that.

    None: nobody has the name. Half a removed image may still have it.
    """
    # "rbd_id.<name>" holds the id with its length before it, in four bytes
    found = read_object(ioctx, f"rbd_id.{name}")
    return None if found is None else found[4:].decode()


def has_header(ioctx: Any, image_id: str) -> bool:
    """Whether there is more of the image than a name."""
    try:
        with answers(f"look at {image_id}"):
            ioctx.stat(f"rbd_header.{image_id}")
    except NotThereError:
        return False
    return True


def names(ioctx: Ioctx) -> list[str]:
    """The images of the pool, trash left out."""
    _, rbd = bindings()
    with answers("list the pool"):
        return sorted(rbd.RBD().list(ioctx))


def trash(ioctx: Ioctx) -> list[Trashed]:
    """The pool's trash."""
    _, rbd = bindings()
    with answers("list the trash"):
        return [_trashed(entry) for entry in rbd.RBD().trash_list(ioctx)]


def trash_entry(ioctx: Ioctx, image_id: str) -> Trashed | None:
    """The entry of one image id, None: it is not in the trash."""
    _, rbd = bindings()
    try:
        with answers(f"look for {image_id} in the trash"):
            return _trashed(rbd.RBD().trash_get(ioctx, image_id))
    except NotThereError:
        return None


def _trashed(entry: Any) -> Trashed:
    moved_at = entry["deletion_time"].replace(tzinfo=UTC).timestamp()
    return Trashed(image_id=entry["id"], name=entry["name"], moved_at=moved_at)


def metadata(image: Any, key: str) -> str | None:
    """A value of the image's metadata."""
    with answers(f"read metadata {key}"):
        try:
            value: str = image.metadata_get(key)
        except KeyError:
            return None
        return value


def metadata_of(ioctx: Any, image_id: str, key: str) -> str | None:
    """A value of the metadata of an image that is not opened for it; None also where there is no such image."""
    try:
        with answers(f"read metadata {key} of {image_id}"):
            return _ask(ioctx, image_id, "metadata_get", encoded(key))[4:].decode()
    except NotThereError:
        return None


def has_snapshot(ioctx: Any, image_id: str, snapshot: str) -> bool:
    """Whether an image that is not opened for it has this snapshot; NotThereError: there is no such image."""
    with answers(f"list the snapshots of {image_id}"):
        # every release answers these, since the kernel's driver asks the same: the latest snapshot's number, how many
        # there are, and their numbers; then the name of each
        numbers = struct.iter_unpack("<Q", _ask(ioctx, image_id, "get_snapcontext")[12:])
        names = (_ask(ioctx, image_id, "get_snapshot_name", struct.pack("<Q", number)) for (number,) in numbers)
        return encoded(snapshot) in names


def all_metadata(ioctx: Any, image_id: str) -> dict[str, str]:
    """All metadata of an image that is not opened for it, also one in the trash; NotThereError: there is none."""
    values: dict[str, str] = {}
    last, count = "", _KEYS
    with answers(f"read the metadata of {image_id}"):
        while count == _KEYS:
            found = _ask(ioctx, image_id, "metadata_list", encoded(last) + struct.pack("<Q", _KEYS))
            (count,) = struct.unpack_from("<I", found)
            words = _strings(found[4:], 2 * count)
            values |= dict(zip(words[::2], words[1::2], strict=True))
            last = words[-2] if words else ""
    return values


def _strings(data: bytes, count: int) -> list[str]:
    """Strings as Ceph writes them, one behind the other."""
    found, at = [], 0
    for _number in range(count):
        (length,) = struct.unpack_from("<I", data, at)
        found.append(data[at + 4 : at + 4 + length].decode())
        at += 4 + length
    return found


def _ask(ioctx: Any, image_id: str, method: str, data: bytes = b"") -> bytes:
    _, found = ioctx.execute(f"rbd_header.{image_id}", "rbd", method, data, _MIB)
    return bytes(found)


def snapshots(image: Any) -> list[str]:
    """Names of the image's snapshots, those that wait for their last clone left out."""
    with answers("list snapshots"):
        return [snap["name"] for snap in image.list_snaps() if snap.get("namespace", 0) == 0]


def is_protected(image: Any, snapshot: str) -> bool:
    """Whether the snapshot is protected, as clones of format 1 need it."""
    with answers(f"look at snapshot {snapshot}"):
        return bool(image.is_protected_snap(snapshot))


def children(image: Any) -> list[Child]:
    """All clones of all the image's snapshots: formats 1 and 2, other pools, and the trash.

    Raises:
        ForbiddenError: there may be some in a pool that this user cannot see.
    """
    # list_children (without the 2) hides clones that lie in a trash
    with answers("list clones"):
        return [
            Child(pool=child["pool"], name=child["image"], image_id=child["id"], trash=bool(child["trash"]))
            for child in image.list_children2()
        ]


def parent(image: Any) -> tuple[str, str, str] | None:
    """(pool, image id, snapshot) of what the image is a clone of, None: it stands alone."""
    try:
        with answers("look at the parent"):
            return image.get_parent_image_spec()["pool_name"], image.parent_id(), image.parent_info()[2]
    except NotThereError:
        return None


def watchers(image: Any) -> list[str]:
    """Who has the image open for writing, as "client <number> at <address>"."""
    with answers("list watchers"):
        return [f"client {one['id']} at {one['addr']}" for one in image.watchers_list()]


def is_watched(ioctx: Ioctx, image_id: str) -> bool:
    """Whether somebody has the image of that id open for writing."""
    try:
        with opened_by_id(ioctx, image_id) as image:
            return bool(watchers(image))
    except NotThereError:
        return False


def watching(image: Any) -> set[int]:
    """The numbers of the clients that have the image open for writing."""
    with answers("list watchers"):
        return {int(one["id"]) for one in image.watchers_list()}


def data_extents(image: Any, *, fixed: bool) -> list[tuple[int, int]]:
    """(offset, length) of what is allocated, a parent's included.

    ``fixed``: the image is open at a snapshot, so that nobody resizes what is looked at. Only then the object map is
    asked, in whole objects and at no cost: librbd aborts the process when an image is resized while it reads its map.
    Otherwise each object is looked at.
    """
    found: list[tuple[int, int]] = []

    def note(offset: int, length: int, exists: bool) -> None:
        if exists:
            found.append((offset, length))

    with answers("list extents"):
        whole = fixed and bool(image.features() & _FAST_DIFF) and not image.flags() & _MAP_INVALID
        if size := image.size():
            image.diff_iterate(0, size, None, note, include_parent=True, whole_object=whole)
    return found


def read(image: Any, offset: int, length: int) -> bytes:
    """Bytes of the image."""
    with answers("read"):
        data: bytes = image.read(offset, length)
        return data


def read_object(ioctx: Any, key: str) -> bytes | None:
    """All of a rados object, None: it is not there."""
    data = bytearray()
    try:
        with answers(f"read object {key}"):
            while piece := ioctx.read(key, _MIB, len(data)):
                data += piece
    except NotThereError:
        return None
    return bytes(data)


def command(cluster: Any, prefix: str, **arguments: str) -> Any:
    """The monitors' answer to a command, from JSON; a few answer in plain text whatever they are asked for.

    Raises:
        BackendError: they refuse, or do not answer.
    """
    with answers(prefix):
        code, answer, words = cluster.mon_command(json.dumps({"prefix": prefix, "format": "json", **arguments}), b"")
    if code:
        raise error_of(-code, f"{prefix}: {words}")
    try:
        return json.loads(answer)
    except ValueError:
        return answer.decode().strip()

"""What the library's values are called in the answers: one place for the names that programs rely on."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from nova_imagecache import RbdLocation, UsersUnknownError
from nova_imagecache.cli._cells import Cell, Lines, Number, Size, Users, iso

if TYPE_CHECKING:
    from collections.abc import Iterable

    from nova_imagecache import BaseImage, DiskUser, ImageCache, Pin, RootDisk
    from nova_imagecache.cli._base import Row

DISK_COLUMNS = ("disk_id", "name", "image_id", "format", "virtual_size", "reference", "location", "location_type")

RECORD_COLUMNS = (
    "image_id", "format", "virtual_size", "size", "location", "location_type", "managed", "digest", "evidence",
    "made_by", "source", "source_format", "source_size", "fetched_at", "last_used", "unused_since", "inspector",
)  # fmt: skip


def location_text(location: object) -> str:
    """A path, or ``rbd:pool/image@snapshot``."""
    if isinstance(location, RbdLocation):
        return f"rbd:{location.pool}/{location.name}" + (f"@{location.snapshot}" if location.snapshot else "")
    return str(getattr(location, "path", location))


def location_type(location: object) -> str:
    """The kind of place: "file", "block" or "rbd"."""
    return type(location).__name__.removesuffix("Location").lower()


def disk_facts(disk: RootDisk) -> Row:
    """A value for each of ``DISK_COLUMNS``."""
    return {
        "disk_id": disk.disk_id,
        "name": disk.name,
        "image_id": disk.image_id,
        "format": disk.format,
        "virtual_size": Size(disk.virtual_size),
        "reference": disk.reference,
        "location": location_text(disk.location),
        "location_type": location_type(disk.location),
    }


def record_facts(base: BaseImage) -> Row:
    """A value for each of ``RECORD_COLUMNS``: what the base itself says, without looking anything up."""
    record = base.record
    return {
        "image_id": base.image_id,
        "format": base.format,
        "virtual_size": Size(base.virtual_size),
        "size": Size(record.size),
        "location": location_text(base.location),
        "location_type": location_type(base.location),
        "managed": Cell(base.managed),
        "digest": Cell(None if base.digest is None else str(base.digest)),
        "evidence": record.evidence,
        "made_by": record.made_by,
        "source": record.source,
        "source_format": record.source_format,
        "source_size": Size(record.source_size),
        "fetched_at": Cell(iso(record.fetched_at)),
        "last_used": Cell(iso(base.last_used)),
        "unused_since": Cell(iso(base.unused_since)),
        "inspector": Number(max(base.inspected, record.inspector)),
    }


def idle_seconds(base: BaseImage, users: int | None) -> int | None:
    """Since when nobody uses the base, in seconds; None where it has users, or where nobody can say."""
    marks = [mark for mark in (base.unused_since, base.last_used) if mark is not None]
    if users is None or users or not marks:
        return None
    return max(0, int(time.time() - max(marks)))


def known_users(cache: ImageCache, image_id: str) -> list[DiskUser] | None:
    """The base's users; None where the storage cannot tell."""
    try:
        return list(cache.users(image_id))
    except UsersUnknownError:
        return None


def user_facts(users: list[DiskUser] | None) -> Users:
    """The users of a base, and how each is known."""
    if users is None:
        return Users(None)
    fields = ("disk_id", "name", "known_by", "certain", "detail")
    return Users([{field: getattr(user, field) for field in fields} for user in users])


def pin_facts(pins: Iterable[Pin]) -> Lines:
    """The pins of a base."""
    return Lines([{"owner": pin.owner, "until": iso(pin.until)} for pin in pins])


def error_facts(error: Exception | None) -> dict[str, Any]:
    """An error's class and message, None and None where there is none."""
    if error is None:
        return {"error_type": Cell(None), "error": Cell(None)}
    return {"error_type": Cell(type(error).__name__), "error": Cell(str(error))}

"""What things in the pool are called, and the keys of their metadata.

::

    <pool>/base.<image-id>@base              a base; its record and marks are in the image's metadata
           <disk-id>_<name>                  a root disk; its record likewise
           staging.<image-id>.<token><random>, staging.<disk-id>_<name>.<token><random>    unfinished
           staging._owner.<token>            a process's sign of life
           (trash)                           retired bases; disks on their way out; things in the middle of publishing
"""

from __future__ import annotations

from nova_imagecache.exceptions import InvalidRequestError

BASE = "base."
SNAPSHOT = "base"
RECORD = "nova_imagecache.base"
LAST_USED = "nova_imagecache.last-used"
UNUSED_SINCE = "nova_imagecache.unused-since"
DAMAGED = "nova_imagecache.damaged"
DISK = "nova_imagecache.disk"
FINAL = "nova_imagecache.final"
GOING = "nova_imagecache.going"
RETIRED = "nova_imagecache.retired"
SUMS = "nova_imagecache.sums."

_RESERVED = (BASE, "staging.", "trash.")


def checked(value: str, what: str) -> str:
    """An image or disk id, unless it begins like a name that is ours.

    Raises:
        InvalidRequestError: it does.
    """
    if value.startswith(_RESERVED):
        todo = f"Use an id that does not begin with {', '.join(_RESERVED)}"
        raise InvalidRequestError(f"{what} {value!r} cannot be used on RBD", stage="arguments", todo=todo)
    return value


def base_name(image_id: str) -> str:
    """The name of an image's base."""
    return BASE + checked(image_id, "image id")


def disk_name(disk_id: str, name: str) -> str:
    """The name of a root disk."""
    return f"{checked(disk_id, 'disk id')}_{name}"


def split_disk_name(image_name: str) -> tuple[str, str] | None:
    """(disk id, name) of a root disk's name, None: it is none. A disk's own name has no underscore."""
    disk_id, found, name = image_name.rpartition("_")
    return (disk_id, name) if found and disk_id and name and not image_name.startswith(_RESERVED) else None

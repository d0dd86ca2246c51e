"""What one fetch is asked for, and what refuses an image by figures: its metadata, and the virtual size it claims."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nova_imagecache._inspect import RAW_FORMATS, StreamInspector
from nova_imagecache._models import Digest, ImageInfo, round_up
from nova_imagecache.exceptions import DiskTooSmallError, ImageNotActiveError, ImageRejectedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is asked of one fetch.

    ``base_format`` is what the base shall be; ``disk_size`` the size of the disk it is fetched for (None: any);
    ``expect`` the digest the caller knows; ``admit(bytes, stage, placed)`` raises NoSpaceError when so much does not
    fit beside the ``placed`` bytes that the base in the making has already; ``admit_free``, of the same arguments,
    makes no room, and says whether so much is promised.
    """

    base_format: str
    disk_size: int | None
    max_virtual_size: int | None
    expect: Digest | None
    allow_unverified: bool
    admit: Callable[[int, str, int], None]
    admit_free: Callable[[int, str, int], bool]


def base_format(disk_format: str, wanted: str | None, possible: Iterable[str]) -> str:
    """The format that a base of an image has: the wanted one; with None the image's own, where bases may have it."""
    own = "raw" if disk_format in RAW_FORMATS else disk_format
    if wanted is not None:
        return wanted
    return own if own in possible else "raw"


def admit_metadata(image: ImageInfo, request: Request) -> None:
    """Refuse from what the source says, before a byte is asked for.

    Raises:
        ImageNotActiveError, ImageRejectedError, DiskTooSmallError, NoSpaceError.
    """
    if image.status != "active":
        raise ImageNotActiveError(image.status, image_id=image.image_id)
    StreamInspector(image.disk_format, image_id=image.image_id)
    if image.size == 0:
        raise ImageRejectedError("it has no data", image_id=image.image_id, stage="metadata")
    if image.digest is None and request.expect is None and not request.allow_unverified:
        reason = "no digest of it is known, and allow_unverified is off"
        todo = "Give the image a digest, or turn on allow_unverified in the configuration"
        raise ImageRejectedError(reason, image_id=image.image_id, stage="metadata", todo=todo)
    if request.disk_size is not None and image.min_disk > request.disk_size:
        raise DiskTooSmallError(request.disk_size, image.min_disk, image_id=image.image_id)
    if image.disk_format in RAW_FORMATS and image.size is not None:
        judge_size(round_up(image.size), image.image_id, request)
    request.admit(image.size or 0, "admission", 0)


def judge_size(virtual_size: int, image_id: str, request: Request) -> None:
    """Refuse a virtual size that the cap or the disk does not allow.

    Raises:
        ImageRejectedError: above ``max_virtual_size``.
        DiskTooSmallError: above the disk's size; this caller's error alone.
    """
    if request.max_virtual_size is not None and virtual_size > request.max_virtual_size:
        reason = f"its virtual size {virtual_size} is above max_virtual_size {request.max_virtual_size}"
        raise ImageRejectedError(reason, image_id=image_id)
    if request.disk_size is not None and virtual_size > request.disk_size:
        raise DiskTooSmallError(request.disk_size, virtual_size, image_id=image_id)

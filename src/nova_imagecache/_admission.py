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
class Limits:
    """What bounds an image's virtual size: ``disk_size`` is the size of the disk it is wanted for (None: any)."""

    disk_size: int | None
    max_virtual_size: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Request(Limits):
    """What is asked of one fetch.

    ``base_format`` is what the base shall be; ``expect`` the digest the caller knows; ``admit(bytes, stage, placed)``
    raises NoSpaceError when so much does not fit beside the ``placed`` bytes that the base in the making has already;
    ``admit_free``, of the same arguments, makes no room, and says whether so much is promised.
    """

    base_format: str
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


def judge_metadata(image: ImageInfo, limits: Limits) -> None:
    """Refuse from what the source says, wherever the image's bytes are to lie.

    Raises:
        ImageNotActiveError, ImageRejectedError, DiskTooSmallError.
    """
    if image.status != "active":
        raise ImageNotActiveError(image.status, image_id=image.image_id)
    StreamInspector(image.disk_format, image_id=image.image_id)
    if image.size == 0:
        raise ImageRejectedError("it has no data", image_id=image.image_id, stage="metadata")
    if limits.disk_size is not None and image.min_disk > limits.disk_size:
        raise DiskTooSmallError(limits.disk_size, image.min_disk, image_id=image.image_id)
    if image.disk_format in RAW_FORMATS and image.size is not None:
        judge_size(round_up(image.size), image.image_id, limits)


def admit_metadata(image: ImageInfo, request: Request) -> None:
    """Refuse from what the source says, before a byte is asked for.

    Raises:
        ImageNotActiveError, ImageRejectedError, DiskTooSmallError, NoSpaceError.
    """
    judge_metadata(image, request)
    if image.digest is None and request.expect is None and not request.allow_unverified:
        reason = "no digest of it is known, and allow_unverified is off"
        todo = "Give the image a digest, or turn on allow_unverified in the configuration"
        raise ImageRejectedError(reason, image_id=image.image_id, stage="metadata", todo=todo)
    request.admit(image.size or 0, "admission", 0)


def judge_size(virtual_size: int, image_id: str, limits: Limits) -> None:
    """Refuse a virtual size that the cap or the disk does not allow.

    Raises:
        ImageRejectedError: above ``max_virtual_size``.
        DiskTooSmallError: above the disk's size; this caller's error alone.
    """
    if limits.max_virtual_size is not None and virtual_size > limits.max_virtual_size:
        reason = f"its virtual size {virtual_size} is above max_virtual_size {limits.max_virtual_size}"
        raise ImageRejectedError(reason, image_id=image_id)
    if limits.disk_size is not None and virtual_size > limits.disk_size:
        raise DiskTooSmallError(limits.disk_size, virtual_size, image_id=image_id)

"""Whether a fetch may take what it needs: decided from figures, before the bytes come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nova_imagecache.exceptions import NoSpaceError

if TYPE_CHECKING:
    from nova_imagecache._models import Capacity


@dataclass(frozen=True, slots=True, kw_only=True)
class SpacePolicy:
    """``max_bytes``: what all bases may take (None: no limit); ``min_free_bytes``: what stays free on the storage."""

    max_bytes: int | None = None
    min_free_bytes: int = 0


def admit(
    needed: int,
    *,
    capacity: Capacity,
    taken: int,
    policy: SpacePolicy,
    image_id: str,
    stage: str,
    promised: int = 0,
) -> None:
    """Come back if ``needed`` more bytes fit: ``promised`` is what other fetches may still write, ``taken`` what the
    cache takes already, promises included.

    Raises:
        NoSpaceError: with the figures, and which limit stands in the way.
    """
    free = max(capacity.free - promised - policy.min_free_bytes, 0)
    if needed > free:
        limit = "min_free_bytes" if needed <= capacity.free - promised else None
        raise NoSpaceError(needed=needed, free=free, limit=limit, image_id=image_id, stage=stage)
    if policy.max_bytes is not None and taken + needed > policy.max_bytes:
        left = max(policy.max_bytes - taken, 0)
        raise NoSpaceError(needed=needed, free=left, in_use=taken, limit="max_bytes", image_id=image_id, stage=stage)

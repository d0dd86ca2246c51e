"""What sources have in common when they read an image's properties."""

from __future__ import annotations

import re

from nova_imagecache._models import Digest, Evidence
from nova_imagecache.exceptions import InvalidRequestError

GIB = 2**30

_PLAIN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,126}")


def is_plain_id(image_id: str) -> bool:
    """Whether the id can be one part of a path or URL: it names no other place by slashes, dots or escapes."""
    return _PLAIN_ID.fullmatch(image_id) is not None


def announced_digest(
    os_hash_algo: str | None, os_hash_value: str | None, checksum: str | None
) -> tuple[Digest | None, Evidence]:
    """The best digest that the image's properties give, and the property it came from.

    ``os_hash_value`` comes before the md5 ``checksum``. A value that is no digest, or of an algorithm unknown here, is
    passed over: the image then counts as less verified, never as more.
    """
    candidates: tuple[tuple[str | None, str | None, Evidence], ...] = (
        (os_hash_algo, os_hash_value, "os_hash"),
        ("md5", checksum, "checksum"),
    )
    for algorithm, value, evidence in candidates:
        if not algorithm or not value:
            continue
        try:
            return Digest(algorithm, value), evidence
        except InvalidRequestError:
            continue
    return None, "unverified"

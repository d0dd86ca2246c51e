"""What callers hand in: ids, names, sizes, times. They become path parts and RBD names, so they are judged strictly."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import TypeVar

from nova_imagecache._models import Digest, round_up
from nova_imagecache.exceptions import InvalidRequestError

_T = TypeVar("_T")

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,126}", re.ASCII)
_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,31}", re.ASCII)
_LARGEST = (1 << 63) - 512


def image_id(value: str) -> str:
    """An image id: 1 to 127 of A-Z a-z 0-9 . _ -, beginning with a letter or digit."""
    return _identifier(value, "image id")


def disk_id(value: str) -> str:
    """A disk id, in the image ids' grammar."""
    return _identifier(value, "disk id")


def owner(value: str) -> str:
    """A pin's owner, in the image ids' grammar."""
    return _identifier(value, "owner")


def _identifier(value: object, what: str) -> str:
    if not isinstance(value, str) or not _ID.fullmatch(value):
        shown = repr(value)[:80]
        todo = "Use 1 to 127 of A-Z a-z 0-9 . _ - beginning with a letter or digit"
        raise InvalidRequestError(f"{what} {shown} cannot be used", stage="arguments", todo=todo)
    return value


def several(values: Iterable[_T], what: str) -> tuple[_T, ...]:
    """All the values of a list or another iterable. A single text, whose letters would pass for values, is none."""
    if not _is_list(values):
        todo = "Give a list, also for one alone"
        raise InvalidRequestError(f"{what} {values!r:.80} is no list", stage="arguments", todo=todo)
    return tuple(values)


def _is_list(value: object) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str | bytes)


def expect(value: object) -> None:
    """Refuse what is neither the digest that an image must have nor None, for any."""
    if value is not None and not isinstance(value, Digest):
        todo = 'Give a Digest("sha512", "<hexadecimal digits>")'
        raise InvalidRequestError(f"expect {value!r:.80} is no Digest", stage="arguments", todo=todo)


def deadline(value: float | None) -> float | None:
    """Seconds from now, not below 0; None: no deadline."""
    # NaN is no time either
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0):
        todo = "Give seconds from now, a number from 0 up"
        raise InvalidRequestError(f"deadline {value!r:.80} cannot be used", stage="arguments", todo=todo)
    return value


def disk_name(value: str) -> str:
    """A disk's name: 1 to 32 of a-z 0-9 . -, beginning with a letter or digit, not ending in .base or .json."""
    if not isinstance(value, str) or not _NAME.fullmatch(value) or value.endswith((".base", ".json")):
        todo = "Use 1 to 32 of a-z 0-9 . - beginning with a letter or digit, and not ending in .base or .json"
        raise InvalidRequestError(f"disk name {value!r:.80} cannot be used", stage="arguments", todo=todo)
    return value


def size(value: int) -> int:
    """Bytes, rounded up to whole sectors of 512."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _LARGEST:
        todo = "Give a whole number of bytes above 0"
        raise InvalidRequestError(f"size {value!r:.80} cannot be used", stage="arguments", todo=todo)
    return round_up(value)


def seconds(value: timedelta | float) -> float:
    """A duration as seconds, not below 0."""
    if isinstance(value, timedelta):
        value = value.total_seconds()
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise InvalidRequestError(
            f"duration {value!r} cannot be used", stage="arguments", todo="Give seconds from 0 up"
        )
    return float(value)


def moment(value: datetime | float | None) -> float | None:
    """A point in time as POSIX seconds."""
    if isinstance(value, datetime):
        if value.tzinfo is None:
            raise InvalidRequestError(f"{value!r} has no time zone", stage="arguments", todo="Give an aware datetime")
        return value.timestamp()
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value)):
        raise InvalidRequestError(f"{value!r} is no point in time", stage="arguments")
    return value

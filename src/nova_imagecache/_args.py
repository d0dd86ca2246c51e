"""What callers hand in: ids, names, sizes, times. They become path parts and RBD names, so they are judged strictly."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

from nova_imagecache._models import CleanupPlan, Digest, round_up
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
    number = _number(value)
    if value is not None and (number is None or number < 0):
        todo = "Give seconds from now, a number from 0 up"
        raise InvalidRequestError(f"deadline {value!r:.80} cannot be used", stage="arguments", todo=todo)
    return number


def _number(value: object) -> float | None:
    """A number as a float; None: it is none, or none that a float holds."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return None if math.isnan(number) else number


def cancel(value: object) -> None:
    """Refuse what nobody could set to end a call, but for None."""
    if value is not None and not callable(getattr(value, "is_set", None)):
        todo = "Give a threading.Event, and set it to end the call"
        raise InvalidRequestError(f"cancel {value!r:.80} is no event", stage="arguments", todo=todo)


def progress(value: object) -> None:
    """Refuse what cannot be called, but for None."""
    if value is not None and not callable(value):
        todo = "Give a function of one argument, a Progress"
        raise InvalidRequestError(f"progress {value!r:.80} cannot be called", stage="arguments", todo=todo)


def plan(value: object) -> None:
    """Refuse what ``plan_cleanup`` does not give, but for None."""
    if value is not None and not isinstance(value, CleanupPlan):
        todo = "Give what plan_cleanup() answered, or nothing"
        raise InvalidRequestError(f"plan {value!r:.80} is no CleanupPlan", stage="arguments", todo=todo)


def static_mb(value: int) -> int:
    """MiB, a whole number from 0 up."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        todo = "Give a whole number of MiB from 0 up"
        raise InvalidRequestError(f"static_mb {value!r:.80} cannot be used", stage="arguments", todo=todo)
    return value


def target(value: object) -> Path:
    """The absolute path of a file that is to be made, in a directory that is there."""
    path = Path(value) if isinstance(value, str | Path) and "\0" not in str(value) else None
    if path is None or not path.is_absolute() or not path.name or not path.parent.is_dir():
        todo = "Give an absolute path in a directory that exists"
        raise InvalidRequestError(f"{value!s:.4096} cannot be written", stage="copy", todo=todo)
    return path


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
    number = _number(value.total_seconds() if isinstance(value, timedelta) else value)
    if number is None or number < 0:
        todo = "Give seconds from 0 up"
        raise InvalidRequestError(f"duration {value!r:.80} cannot be used", stage="arguments", todo=todo)
    return number


def moment(value: datetime | float | None) -> float | None:
    """A point in time as POSIX seconds, one that a calendar has."""
    if value is None:
        return None
    if isinstance(value, datetime) and value.tzinfo is None:
        raise InvalidRequestError(f"{value!r} has no time zone", stage="arguments", todo="Give an aware datetime")
    number = value.timestamp() if isinstance(value, datetime) else _number(value)
    try:
        if number is not None:
            datetime.fromtimestamp(number, UTC)
            return number
    except (OverflowError, ValueError, OSError):  # milliseconds, for one
        pass
    todo = "Give POSIX seconds, or an aware datetime"
    shown = str(value) if isinstance(value, datetime) else repr(value)
    raise InvalidRequestError(f"{shown:.80} is no point in time", stage="arguments", todo=todo)

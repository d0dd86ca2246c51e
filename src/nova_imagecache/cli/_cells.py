"""Values as the command line reads and shows them: exact for programs, short for people."""

from __future__ import annotations

import argparse
import json
import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from cliff.columns import FormattableColumn

_SIZE = re.compile(r"([0-9]+)\s*(?:([KMGTP])(?:i?B)?)?", re.IGNORECASE)
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([smhdw]?)")
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def human_size(size: float) -> str:
    """Bytes in the largest unit that fits, powers of 1024: "512 B", "1.2 GiB", "20 GiB"."""
    value, unit = float(size), 0
    # 1023.95 would be rounded to 1024.0 of the smaller unit
    while value >= 1023.95 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.1f}".removesuffix(".0") + f" {_UNITS[unit]}"


def human_duration(seconds: float) -> str:
    """A duration in its two largest units: "42s", "12m", "3h 12m", "2d 4h"."""
    left = int(seconds)
    if left < 60:
        return f"{left}s"
    if left < 3600:
        return f"{left // 60}m"
    if left < 86400:
        return f"{left // 3600}h {left % 3600 // 60}m"
    return f"{left // 86400}d {left % 86400 // 3600}h"


def iso(when: float | None) -> str | None:
    """POSIX seconds as ISO 8601 in UTC, whole seconds, None as None."""
    if when is None:
        return None
    try:
        shown = datetime.fromtimestamp(when, UTC)
    except (OverflowError, ValueError, OSError):  # in no calendar: somebody wrote milliseconds
        return f"{when:g}"
    return shown.replace(microsecond=0, tzinfo=None).isoformat() + "Z"


def one_line(text: object) -> str:
    """The text on one line, without anything that moves a terminal's cursor."""
    return " ".join("".join(char if char.isprintable() else " " for char in str(text)).split())


if TYPE_CHECKING:
    _Column = FormattableColumn[Any]
else:
    # generic for type checkers only: in cliff 4.6 it is not
    _Column = FormattableColumn


class Cell(_Column):
    """A value that tables show as a person reads it, and every other format as it is. Sorts, None first."""

    nothing = "-"

    def human_readable(self) -> str:
        """The text for a table."""
        value = self._value
        if value is None:
            return self.nothing
        return self.text(value)

    def text(self, value: Any) -> str:
        """The text for a table, of a value that is not None."""
        if isinstance(value, bool):
            return "yes" if value else "no"
        return str(value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Cell) and bool(self._value == other._value)

    def __hash__(self) -> int:
        return hash(str(self._value))

    def __lt__(self, other: object) -> bool:
        if not isinstance(other, Cell):
            return NotImplemented
        if self._value is None or other._value is None:
            return self._value is None and other._value is not None
        return bool(self._value < other._value)


def plain(cell: Any, nothing: str) -> Any:
    """A cell's value for programs that read text: ``nothing`` for None, true and false, a list as JSON."""
    if not isinstance(cell, Cell):
        return cell
    value = cell.machine_readable()
    if value is None:
        return nothing
    return str(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else json.dumps(value)


class Number(Cell):
    """A count."""


class UserCount(Number):
    """How many root disks use a base; None: the storage cannot tell."""

    nothing = "unknown"


class Size(Cell):
    """Bytes."""

    def text(self, value: Any) -> str:
        """Bytes in a handy unit."""
        return human_size(value)


class Duration(Cell):
    """Seconds."""

    def text(self, value: Any) -> str:
        """Seconds in handy units."""
        return human_duration(value)


class Lines(Cell):
    """A list of mappings or texts; one line each in a table."""

    unsaid: tuple[Any, ...] = (None, "")

    def text(self, value: Any) -> str:
        """One line for each element, the mapping's values that say something side by side."""
        lines = []
        for item in value:
            fields = item.items() if isinstance(item, dict) else [("", item)]
            said = [(key, field) for key, field in fields if field not in self.unsaid]
            lines.append(", ".join(f"{key}={Cell(field)}" if key else str(field) for key, field in said))
        return "\n".join(lines) or "none"


class Users(Lines):
    """The users of a base; None: the storage cannot tell. A table says of a user only when it is not certain."""

    unsaid = (None, "", True)
    nothing = "unknown"


def size_argument(text: str) -> int:
    """Bytes of "512", "20G", "512MiB" (powers of 1024), for argparse."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise argparse.ArgumentTypeError(f'{text!r} is no size: give bytes, or text such as "20G"')
    power = " KMGTP".index(found[2].upper()) if found[2] else 0
    return int(found[1]) << 10 * power


def duration_argument(text: str) -> timedelta:
    """A duration from "90", "40m", "24h", "7d", for argparse."""
    found = _DURATION.fullmatch(text.strip())
    if found is None:
        raise argparse.ArgumentTypeError(f'{text!r} is no duration: give seconds, or text such as "24h"')
    try:
        return timedelta(seconds=float(found[1]) * _SECONDS[found[2]])
    except OverflowError as err:
        raise argparse.ArgumentTypeError(f"{text!r} is too long") from err


def time_argument(text: str) -> datetime:
    """A point in time from ISO 8601, for argparse; UTC where the text names no zone."""
    try:
        when = datetime.fromisoformat(text.strip())
    except ValueError as err:
        problem = f"{text!r} is no ISO 8601 time: give one such as 2030-01-31T12:00:00Z"
        raise argparse.ArgumentTypeError(problem) from err
    return when if when.tzinfo is not None else when.replace(tzinfo=UTC)


def count_argument(text: str) -> int:
    """A whole number, zero or more, for argparse."""
    if re.fullmatch(r"[0-9]+", text.strip()) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number")
    return int(text)

"""Figures as a reader likes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_STEP = 1024
NOTHING = "Not measured in this run."


def seconds(value: float | None) -> str:
    """Three digits, in s, ms or us; nothing for None."""
    if value is None:
        return ""
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "µs")):
        shown = value * factor
        if shown >= 1 or unit == "µs":
            return f"{_three(shown)} {unit}"
    raise AssertionError


def _three(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def ratio(value: float | None) -> str:
    """As in 2.4x."""
    if value is None:
        return ""
    return f"{value:.2f}x" if value < 10 else f"{value:,.0f}x"


def bytes_of(value: float | None) -> str:
    """In the largest unit that leaves a number above one."""
    if value is None:
        return ""
    number, unit = float(value), 0
    while abs(number) >= _STEP and unit + 1 < len(_UNITS):
        number /= _STEP
        unit += 1
    return f"{number:.0f} {_UNITS[unit]}" if number >= 100 or unit == 0 else f"{number:.1f} {_UNITS[unit]}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown; a sentence where there are no rows."""
    lines = [list(row) for row in rows]
    if not lines:
        return NOTHING
    made = [list(head), ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in made)

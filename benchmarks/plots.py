"""Plots as small SVG files, without a plotting library: bars in groups, and lines over two logarithmic axes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from benchmarks.floors import floor_of
from benchmarks.results import Case, cases
from benchmarks.words import seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.meter import Figures

_GREY = "#7f7f7f"  # readable on white and on black
_WIDTH = 720
_LEFT, _RIGHT, _TOP, _BOTTOM = 110, 90, 48, 34
_BAR, _GAP = 15, 14


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Values by the name of their group, or by their place on the axis."""

    name: str
    colour: str
    values: dict[str, float]


def bars(title: str, groups: Sequence[str], series: Sequence[Series], *, logarithmic: bool = False) -> str:
    """Horizontal bars of seconds, in groups: each group on a scale of its own, or all on one that is logarithmic."""
    everything = [value for one in series for value in one.values.values()]
    if not everything:
        return _svg(_TOP, title, [])
    room = _WIDTH - _LEFT - _RIGHT
    parts = _legend(series)
    y = float(_TOP)
    for group in groups:
        present = [(one.colour, one.values[group]) for one in series if group in one.values]
        if not present:
            continue
        scale = (
            _logarithmic(min(everything), max(everything), room)
            if logarithmic
            else _linear(max(value for _, value in present), room)
        )
        parts.append(_text(_LEFT - 8, y + len(present) * _BAR / 2 + 4, group, anchor="end"))
        for colour, value in present:
            width = max(1.0, scale(value))
            parts.append(f'<rect x="{_LEFT}" y="{y:.1f}" width="{width:.1f}" height="{_BAR - 2}" fill="{colour}"/>')
            parts.append(_text(_LEFT + width + 5, y + _BAR - 5, seconds(value), size=10))
            y += _BAR
        y += _GAP
    return _svg(y, title, parts)


def lines(title: str, axis: str, series: Sequence[Series]) -> str:
    """Seconds over counts, both logarithmic; the keys of the values are the counts."""
    height = 280
    counts = sorted({float(count) for one in series for count in one.values})
    taken = [value for one in series for value in one.values.values()]
    if not counts:
        return _svg(_TOP, title, [])
    across = _logarithmic(counts[0], counts[-1], _WIDTH - _LEFT - _RIGHT, floor=0)
    up = _logarithmic(min(taken), max(taken), height - _TOP - _BOTTOM - 20)
    bottom = height - _BOTTOM
    parts = _legend(series)
    parts.append(f'<path d="M{_LEFT} {_TOP - 10}V{bottom}H{_WIDTH - _RIGHT + 20}" fill="none" stroke="{_GREY}"/>')
    for count in counts:
        parts.append(_text(_LEFT + across(count), bottom + 16, f"{count:,.0f}", anchor="middle", size=10))
    parts.append(_text(_WIDTH - _RIGHT + 24, bottom + 4, axis, size=10))
    for one in series:
        points = sorted((float(count), value) for count, value in one.values.items())
        places = [(_LEFT + across(count), bottom - up(value), value) for count, value in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in places)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{one.colour}" stroke-width="2"/>')
        for x, y, value in places:
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{one.colour}"/>')
            parts.append(_text(x + 6, y - 6, seconds(value), size=10))
    return _svg(height, title, parts)


def _linear(high: float, room: float) -> Callable[[float], float]:
    """From a value to its length."""
    return lambda value: value / high * room


def _logarithmic(low: float, high: float, room: float, *, floor: float = 0.08) -> Callable[[float], float]:
    """From a value to its length; ``floor`` of the room is the smallest value's."""
    span = math.log(high / low) or 1.0
    return lambda value: room * (floor + (1 - floor) * math.log(value / low) / span)


def _legend(series: Sequence[Series]) -> list[str]:
    parts, x = [], float(_LEFT)
    for one in series:
        parts.append(f'<rect x="{x:.0f}" y="{_TOP - 21}" width="10" height="10" fill="{one.colour}"/>')
        parts.append(_text(x + 14, _TOP - 12, one.name, size=11))
        x += 30 + 6.5 * len(one.name)
    return parts


def _text(x: float, y: float, words: str, *, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(words)}</text>'


def _svg(height: float, title: str, parts: Sequence[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" role="img" '
        f'font-family="sans-serif" fill="{_GREY}">'
    )
    return "\n".join([head, f"<title>{escape(title)}</title>", _text(_LEFT, 18, title, size=14), *parts, "</svg>\n"])


# --- the plots of the documentation ----------------------------------------------------------------------------------

_LOOKS = {
    "ours": ("ours", "#2f7ed8"),
    "nova": ("Nova", "#c0504d"),
    "ironic": ("Ironic", "#e0a030"),
    "qemu-img create": ("bare qemu-img create", _GREY),
}


def cold(document: Figures) -> str:
    """From Glance to the first root disk, by image."""
    groups = cases(document, "cold")
    series = [_series(document, "cold", who, groups, "seconds") for who in ("ours", "nova", "ironic")]
    floors = {group: found.floor for group in groups if (found := floor_of(document, group)) is not None}
    series.append(Series(name="the machine's limit", colour=_GREY, values=floors))
    return bars("From Glance to the first root disk; each image on a scale of its own", groups, _present(series))


def warm(document: Figures) -> str:
    """A root disk of a base that is there."""
    groups = [name for name in cases(document, "warm") if name != "a link"]
    series = [_series(document, "warm", who, groups, "p50") for who in ("ours", "qemu-img create", "nova")]
    title = "A root disk of a base that is there, p50 (logarithmic)"
    return bars(title, groups, _present(series), logarithmic=True)


def cleanup(document: Figures) -> str:
    """A cleanup pass over more and more bases."""
    groups = cases(document, "cleanup")
    series = [_series(document, "cleanup", who, groups, "seconds") for who in ("ours", "nova")]
    return lines("A cleanup pass, seconds", "bases", _present(series))


def _series(document: Figures, work: str, who: str, groups: Sequence[str], figure: str) -> Series:
    found = {group: Case(document, work, group).median(who, figure) for group in groups}
    name, colour = _LOOKS[who]
    return Series(
        name=name, colour=colour, values={group: value for group, value in found.items() if value is not None}
    )


def _present(series: Sequence[Series]) -> list[Series]:
    return [one for one in series if one.values]


PLOTS: dict[str, Callable[[Figures], str]] = {"cold": cold, "warm": warm, "cleanup": cleanup}
"""By the names of their files."""

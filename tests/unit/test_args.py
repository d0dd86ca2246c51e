"""Ids, names, sizes and times that callers hand in are judged before they become paths."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from nova_imagecache import _args
from nova_imagecache.exceptions import InvalidRequestError

BAD_IDS: list[Any] = [
    "",
    ".",
    "..",
    "../x",
    "a/b",
    "a\0b",
    "\0",
    "x" * 1024,
    "x" * 128,
    "bild-ä",
    "\uff11\uff12",
    "\u0663",
    ".hidden",
    "-rf",
    "_x",
    "a b",
    "a\n",
    "a\\b",
    "a:b",
    "a%2eb",
    "a@b",
    "*",
    None,
    b"bytes",
    7,
    True,
    ["a"],
]
GOOD_IDS = ["a", "7", "x" * 127, "A.b_c-D", "a..b", "9f8e7d6c-0000-4000-8000-000000000000", "a.base", "base.a"]
GIB = 1 << 30


@pytest.mark.parametrize("judge", [_args.image_id, _args.disk_id, _args.owner])
@pytest.mark.parametrize("value", BAD_IDS, ids=lambda value: repr(value)[:20])
def test_ids_that_are_no_path_parts_are_refused(judge: Callable[[Any], str], value: Any) -> None:
    """Nothing that climbs, splits, hides, ends a string early or is too long becomes a file name."""
    with pytest.raises(InvalidRequestError) as caught:
        judge(value)
    assert caught.value.exit_code == 2
    assert caught.value.stage == "arguments"
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("judge", [_args.image_id, _args.disk_id, _args.owner])
@pytest.mark.parametrize("value", GOOD_IDS)
def test_ids_in_the_grammar_are_taken_as_they_are(judge: Callable[[str], str], value: str) -> None:
    """No id is changed on its way to a path."""
    assert judge(value) == value


@pytest.mark.parametrize(
    "value",
    [
        "",
        ".x",
        "-x",
        "Disk",
        "disk_1",
        "a/b",
        "..",
        "a\0",
        "x" * 33,
        "ä",
        "disk.base",
        "disk.json",
        "a.b.json",
        None,
        1,
    ],
    ids=repr,
)
def test_disk_names_outside_the_grammar_are_refused(value: Any) -> None:
    """A name must not be another disk's reference or record either."""
    with pytest.raises(InvalidRequestError):
        _args.disk_name(value)


@pytest.mark.parametrize(
    "value", ["disk", "disk.rescue", "a", "0", "x" * 32, "base", "json", "a.base.x", "disk.config"]
)
def test_disk_names_in_the_grammar_are_taken(value: str) -> None:
    """What drivers call disks."""
    assert _args.disk_name(value) == value


@pytest.mark.parametrize(
    ("value", "expected"), [(1, 512), (511, 512), (512, 512), (513, 1024), (GIB, GIB), (GIB - 1, GIB)]
)
def test_sizes_are_rounded_up_to_sectors(value: int, expected: int) -> None:
    """A guest sees whole sectors."""
    assert _args.size(value) == expected


@pytest.mark.parametrize("value", [0, -1, -512, True, False, "512", "20G", 1.5, 512.0, None, math.inf, 1 << 63])
def test_values_that_are_no_sizes_are_refused(value: Any) -> None:
    """Nothing is guessed from text or truth values."""
    with pytest.raises(InvalidRequestError):
        _args.size(value)


def test_the_largest_size_is_what_an_offset_can_hold() -> None:
    """Rounding never leaves the range of off_t."""
    largest = (1 << 63) - 512
    assert _args.size(largest) == largest
    with pytest.raises(InvalidRequestError):
        _args.size(largest + 1)


@pytest.mark.parametrize(("value", "expected"), [(0, 0.0), (1.5, 1.5), (timedelta(hours=1), 3600.0)])
def test_durations_become_seconds(value: Any, expected: float) -> None:
    """A timedelta or a number."""
    assert _args.seconds(value) == expected


@pytest.mark.parametrize("value", [-1, -0.5, timedelta(seconds=-1), math.nan, True, "24h", None])
def test_values_that_are_no_durations_are_refused(value: Any) -> None:
    """Below zero, or no number."""
    with pytest.raises(InvalidRequestError):
        _args.seconds(value)


def test_points_in_time_are_aware_or_posix() -> None:
    """The same moment, however it is said; None stays None."""
    assert _args.moment(datetime(2030, 1, 1, tzinfo=UTC)) == 1893456000.0
    assert _args.moment(datetime(2030, 1, 1, 2, tzinfo=timezone(timedelta(hours=2)))) == 1893456000.0
    assert _args.moment(1893456000.0) == 1893456000.0
    assert _args.moment(None) is None


@pytest.mark.parametrize("value", [datetime(2030, 1, 1), "2030-01-01", True, math.nan], ids=repr)  # noqa: DTZ001 - naive on purpose
def test_values_that_are_no_points_in_time_are_refused(value: Any) -> None:
    """A time without its zone means another moment on another host; NaN would never end and never hold."""
    with pytest.raises(InvalidRequestError):
        _args.moment(value)

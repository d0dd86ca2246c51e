"""Values as people read and write them."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime, timedelta, timezone

import pytest

from nova_imagecache.cli import _cells as cells


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (2**20 - 1, "1 MiB"),
        (20 * 2**30, "20 GiB"),
        (1300000000, "1.2 GiB"),
        (2**50 * 5000, "5000 PiB"),
    ],
)
def test_sizes_are_shown_in_the_largest_unit_that_fits(size: int, text: str) -> None:
    """A size never reads as 1024 of a unit."""
    assert cells.human_size(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.9, "59s"), (60, "1m"), (3599, "59m"), (3600, "1h 0m"), (11520, "3h 12m"), (187200, "2d 4h")],
)
def test_durations_are_shown_in_two_units(seconds: float, text: str) -> None:
    """A duration is short and never rounded up."""
    assert cells.human_duration(seconds) == text


def test_times_are_iso_8601_in_utc() -> None:
    """A point in time has whole seconds and a Z, whatever the host's zone."""
    assert cells.iso(0.9) == "1970-01-01T00:00:00Z"
    assert cells.iso(None) is None
    assert cells.iso(1.9e12) == "1.9e+12", "a pin's end in milliseconds, written by somebody else"
    assert cells.iso(float("inf")) == "inf"


@pytest.mark.parametrize(
    ("text", "size"), [("0", 0), ("512", 512), ("20G", 20 * 2**30), ("1 MiB", 2**20), ("3kb", 3072), (" 2t ", 2**41)]
)
def test_sizes_are_read_as_powers_of_1024(text: str, size: int) -> None:
    """The units are those of the configuration file."""
    assert cells.size_argument(text) == size


@pytest.mark.parametrize("text", ["", "-1", "1.5G", "G", "20X", "0x10", "\u0663", "1e3"])
def test_what_is_no_size_is_refused(text: str) -> None:
    """A mistyped size never becomes another size."""
    with pytest.raises(argparse.ArgumentTypeError, match="is no size"):
        cells.size_argument(text)


@pytest.mark.parametrize(
    ("text", "duration"),
    [
        ("0", timedelta(0)),
        ("90", timedelta(seconds=90)),
        ("1.5h", timedelta(minutes=90)),
        ("24h", timedelta(days=1)),
        ("7d", timedelta(days=7)),
        ("2w", timedelta(days=14)),
    ],
)
def test_durations_are_read_with_their_unit(text: str, duration: timedelta) -> None:
    """A number alone is seconds."""
    assert cells.duration_argument(text) == duration


@pytest.mark.parametrize("text", ["", "-1h", "h", "1y", "1h30m", "inf", "nan", "9" * 40 + "w"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    """A mistyped duration, or one beyond all clocks, is a usage error."""
    with pytest.raises(argparse.ArgumentTypeError):
        cells.duration_argument(text)


def test_times_are_read_in_utc_unless_they_say_otherwise() -> None:
    """The host's zone never moves the end of a pin."""
    assert cells.time_argument("2030-01-31T12:00:00") == datetime(2030, 1, 31, 12, tzinfo=UTC)
    assert cells.time_argument("2030-01-31T12:00:00Z") == datetime(2030, 1, 31, 12, tzinfo=UTC)
    zone = timezone(timedelta(hours=2))
    assert cells.time_argument("2030-01-31T12:00+02:00") == datetime(2030, 1, 31, 12, tzinfo=zone)
    with pytest.raises(argparse.ArgumentTypeError, match="ISO 8601"):
        cells.time_argument("tomorrow")


def test_messages_are_one_line_and_move_no_cursor() -> None:
    """What a child process or an image service says cannot take the terminal over."""
    assert cells.one_line("a\n  b\tc\x1b[2Jd\x07") == "a b c [2Jd"


def test_nothing_sorts_first() -> None:
    """A column with gaps can be sorted."""
    column = [cells.Size(2), cells.Size(None), cells.Size(1), cells.Size(None)]
    assert [cell.machine_readable() for cell in sorted(column)] == [None, None, 1, 2]


def test_lists_are_one_line_an_element_in_a_table() -> None:
    """A table leaves out what says nothing; other formats leave nothing out."""
    cell = cells.Lines([{"owner": "me", "until": None}, {"owner": "you", "until": "2030-01-01T00:00:00Z"}])
    assert cell.human_readable() == "owner=me\nowner=you, until=2030-01-01T00:00:00Z"
    assert cell.machine_readable()[0] == {"owner": "me", "until": None}
    assert cells.Lines([]).human_readable() == "none"
    users = [{"disk_id": "a", "certain": True}, {"disk_id": "b", "certain": False}]
    assert cells.Users(users).human_readable() == "disk_id=a\ndisk_id=b, certain=no"
    assert cells.Users(None).human_readable() == "unknown"

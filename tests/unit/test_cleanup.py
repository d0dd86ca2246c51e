"""Which bases go: one rule after the other, over figures."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nova_imagecache._cleanup import BaseFacts, judge, plan
from nova_imagecache._models import CleanupItem

NOW = 1_700_000_000.0
DAY = 86400.0
IDLE = BaseFacts(
    image_id="img",
    managed=True,
    users=0,
    pins=(),
    last_used=NOW - 10 * DAY,
    unused_since=NOW - 2 * DAY,
    allocated=4096,
)


def look(base: BaseFacts, *, now: float = NOW, max_idle: float = DAY, in_use: bool = False) -> CleanupItem:
    return judge(base, now=now, max_idle=max_idle, in_use=in_use)


def test_a_base_that_was_idle_long_enough_goes() -> None:
    """Nobody used it since its mark was set, two days ago; one is granted."""
    item = look(IDLE)
    assert (item.verdict, item.idle, item.allocated, item.users) == ("remove", 2 * DAY, 4096, 0)


def test_a_base_that_was_not_idle_long_enough_stays() -> None:
    """Up to the very moment."""
    assert look(IDLE, max_idle=2 * DAY + 1).verdict == "keep"
    assert look(IDLE, max_idle=2 * DAY).verdict == "remove"
    assert "idle for" in look(IDLE, max_idle=3 * DAY).reason


def test_an_adopted_base_always_stays() -> None:
    """It is the image service's, also where no idle time is granted."""
    for max_idle in (0.0, DAY):
        assert look(replace(IDLE, managed=False), max_idle=max_idle).verdict == "keep"


def test_doubt_about_users_keeps_a_base() -> None:
    """Unknown is not zero."""
    for max_idle in (0.0, DAY):
        item = look(replace(IDLE, users=None), max_idle=max_idle)
        assert (item.verdict, item.users) == ("keep", None)
        assert "unknown" in item.reason
    assert look(replace(IDLE, users=None, doubt="libvirt is away")).reason == "its users are unknown: libvirt is away"


@pytest.mark.parametrize("max_idle", [0.0, DAY])
def test_users_keep_a_base_and_take_its_mark(max_idle: float) -> None:
    """So that its idle time begins anew when the last of them leaves."""
    item = look(replace(IDLE, users=3), max_idle=max_idle)
    assert (item.verdict, item.users) == ("unmark", 3)
    assert look(replace(IDLE, users=3, unused_since=None), max_idle=max_idle).verdict == "keep"


@pytest.mark.parametrize("max_idle", [0.0, DAY])
def test_the_callers_word_keeps_a_base(max_idle: float) -> None:
    """A driver knows of instances that the storage cannot count."""
    assert look(IDLE, in_use=True, max_idle=max_idle).verdict == "unmark"
    assert look(replace(IDLE, unused_since=None), in_use=True, max_idle=max_idle).verdict == "keep"


@pytest.mark.parametrize("max_idle", [0.0, DAY])
def test_a_pin_keeps_a_base(max_idle: float) -> None:
    """And the verdict says whose it is."""
    item = look(replace(IDLE, pins=("nova", "me"), unused_since=None), max_idle=max_idle)
    assert item.verdict == "keep"
    assert "nova, me" in item.reason


@pytest.mark.parametrize("max_idle", [0.0, DAY])
def test_a_pin_takes_the_mark_away(max_idle: float) -> None:
    """The idle time begins when the last pin is over, as it does with users."""
    assert look(replace(IDLE, pins=("nova",)), max_idle=max_idle).verdict == "unmark"


def test_the_first_pass_only_marks() -> None:
    """However long ago the last use was."""
    assert look(replace(IDLE, unused_since=None)).verdict == "mark"
    assert look(replace(IDLE, unused_since=None, last_used=None)).verdict == "mark"


def test_no_idle_time_skips_the_first_pass() -> None:
    """An operator who says 0 means now."""
    assert look(replace(IDLE, unused_since=None, last_used=NOW), max_idle=0).verdict == "remove"


def test_a_use_after_the_mark_counts() -> None:
    """The mark may have been lost to a race; the later of the two is when it was idle first."""
    item = look(replace(IDLE, last_used=NOW - 100))
    assert (item.verdict, item.idle) == ("keep", 100)


def test_a_base_never_used_is_judged_by_its_mark() -> None:
    """Its last use is not known."""
    assert look(replace(IDLE, last_used=None)).verdict == "remove"


def test_a_mark_in_the_future_is_set_anew() -> None:
    """The clock was put back: the idle time begins now."""
    item = look(replace(IDLE, unused_since=NOW + 1))
    assert item.verdict == "mark"
    assert "clock" in item.reason


def test_a_last_use_in_the_future_does_not_keep_a_base_for_ever() -> None:
    """The clock was put back; the mark alone counts."""
    assert look(replace(IDLE, last_used=NOW + 1000 * DAY)).verdict == "remove"
    assert look(replace(IDLE, last_used=NOW + 1000 * DAY, unused_since=NOW - 5)).verdict == "keep"


def test_a_clock_put_forward_still_needs_a_mark() -> None:
    """A base without one is safe from any jump."""
    assert look(replace(IDLE, unused_since=None), now=NOW + 10000 * DAY).verdict == "mark"


def test_a_plan_judges_every_base_by_itself() -> None:
    """In the order given, with the ids in use picked out."""
    bases = [replace(IDLE, image_id=name) for name in ("a", "b", "c")]
    made = plan(bases, now=NOW, max_idle=DAY, in_use=frozenset({"b"}))
    assert [(item.image_id, item.verdict) for item in made.items] == [("a", "remove"), ("b", "unmark"), ("c", "remove")]
    assert (made.max_idle, made.in_use, made.freeable) == (DAY, frozenset({"b"}), 8192)
    assert plan([], now=NOW, max_idle=DAY, in_use=frozenset()).items == ()


def test_every_verdict_has_a_reason() -> None:
    """An operator reads why."""
    for base in (IDLE, replace(IDLE, users=1), replace(IDLE, users=None), replace(IDLE, managed=False)):
        assert look(base).reason

"""Which bases go: a pure decision over figures. No I/O, no clock."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nova_imagecache._models import CleanupItem, CleanupPlan

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseFacts:
    """What is known of one base. ``users`` None: nobody can say, and ``doubt`` is why. Times in POSIX seconds, sizes in
    bytes."""

    image_id: str
    managed: bool
    users: int | None
    pins: tuple[str, ...]
    last_used: float | None
    unused_since: float | None
    allocated: int
    doubt: str = ""


def plan(bases: Iterable[BaseFacts], *, now: float, max_idle: float, in_use: frozenset[str]) -> CleanupPlan:
    """A verdict and its reason for every base."""
    items = tuple(judge(base, now=now, max_idle=max_idle, in_use=base.image_id in in_use) for base in bases)
    return CleanupPlan(items=items, max_idle=max_idle, in_use=in_use)


def judge(base: BaseFacts, *, now: float, max_idle: float, in_use: bool) -> CleanupItem:  # noqa: PLR0911 - one return a rule
    """One base's verdict. Doubt keeps it; an unused one is marked first and removed by a later pass.

    ``max_idle`` 0 removes what is unused without a first pass.
    """

    def item(verdict: str, reason: str, idle: float | None = None) -> CleanupItem:
        return CleanupItem(
            image_id=base.image_id,
            verdict=verdict,  # type: ignore[arg-type]  # the literals below
            reason=reason,
            allocated=base.allocated,
            idle=idle,
            users=base.users,
        )

    if not base.managed:
        return item("keep", "adopted: it belongs to the image service")
    if base.users is None:
        return item("keep", f"its users are unknown: {base.doubt}" if base.doubt else "its users are unknown")
    if in_use or base.users:
        reason = "its image is in use, says the caller" if in_use else f"{base.users} root disk(s) depend on it"
        return item("keep" if base.unused_since is None else "unmark", reason)
    if base.pins:  # it goes as with users: the idle time begins when the last pin is over
        return item("keep" if base.unused_since is None else "unmark", f"pinned by {', '.join(base.pins)}")
    if max_idle <= 0:
        return item("remove", "unused, and no idle time is granted", 0.0)
    if base.unused_since is None:
        return item("mark", "unused from now on")
    if base.unused_since > now:
        return item("mark", "unused, but its mark lies in the future: the clock was changed")
    # a use takes the mark away, so a last use after now is a clock that was changed, and the mark alone counts
    started = max(base.unused_since, base.last_used if base.last_used is not None and base.last_used <= now else 0.0)
    idle = now - started
    if idle < max_idle:
        return item("keep", f"idle for {idle:.0f} s of {max_idle:.0f} s", idle)
    return item("remove", f"idle for {idle:.0f} s, {max_idle:.0f} s are granted", idle)


RECENT = 300.0
"""Seconds after a use in which a base is never evicted: whoever ensured it is about to make a disk."""


def eviction_order(bases: Iterable[BaseFacts], *, now: float) -> list[CleanupItem]:
    """The bases that may go to make room, the longest idle first."""
    candidates = []
    for base in bases:
        item = judge(base, now=now, max_idle=0.0, in_use=False)
        if item.verdict != "remove" or recently_used(base, now):
            continue
        candidates.append((max(base.last_used or 0.0, base.unused_since or 0.0), item))
    return [item for _since, item in sorted(candidates, key=lambda pair: (pair[0], pair[1].image_id))]


def recently_used(base: BaseFacts, now: float, seconds: float = RECENT) -> bool:
    """Whether the base was used within the last ``seconds``.

    A use as near in the future is one too: a file server's clock sets the mark. Farther off, a clock was changed.
    """
    return base.last_used is not None and abs(now - base.last_used) < seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Immovable:
    """Bytes that eviction cannot free: of bases with users or unknown ones, of pinned ones, and of the rest those that
    were used just now."""

    pinned: int
    in_use: int
    recent: int


def immovable(bases: Iterable[BaseFacts], *, now: float) -> Immovable:
    """What stands in the way of making room."""
    pinned = in_use = recent = 0
    for base in bases:
        if base.users != 0:
            in_use += base.allocated
        elif base.pins:
            pinned += base.allocated
        elif base.managed and recently_used(base, now):
            recent += base.allocated
    return Immovable(pinned=pinned, in_use=in_use, recent=recent)

"""Passes over all bases: the plan, carrying it out, and making room. One bad base stops no pass."""

from __future__ import annotations

import logging
import os
import resource
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nova_imagecache import _cleanup, _users
from nova_imagecache._models import CleanupReport
from nova_imagecache._removal import BaseBusyError
from nova_imagecache.backends import Survey
from nova_imagecache.exceptions import (
    BaseInUseError,
    BaseNotFoundError,
    BasePinnedError,
    ImageCacheError,
    UsersUnknownError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from nova_imagecache._locks import Lock
    from nova_imagecache._models import BaseImage, CleanupItem, CleanupPlan, DiskUser, Retired
    from nova_imagecache._removal import Remover

_FEWEST, _MOST = 64, 16384
_DESCRIPTORS = 3
"""Of each base on its way out, at most: its lock and the backend's hold on what is retired."""

_log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class _Going:
    """A base on its way out: retired, its lock held."""

    base: BaseImage
    allocated: int
    retired: Retired
    lock: Lock


class _Outcome:
    """What a pass did so far."""

    def __init__(self) -> None:
        self.removed: list[str] = []
        self.marked: list[str] = []
        self.kept: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        self.freed = 0

    def stays(self, image_id: str, err: ImageCacheError) -> None:
        """Sort an error that kept one base: expected, or a failure."""
        if isinstance(err, BaseNotFoundError):
            self.kept[image_id] = "it is gone already"
        elif isinstance(err, BaseBusyError | BaseInUseError | BasePinnedError | UsersUnknownError):
            self.kept[image_id] = err.detail
        else:
            _log.warning("base %s cannot be cleaned: %s", image_id, err)
            self.failed[image_id] = str(err)


class Passes:
    """The passes over one cache's bases."""

    def __init__(self, remover: Remover) -> None:
        self._remover = remover
        self._backend = remover.backend

    def now(self) -> float:
        """POSIX seconds, by the cache's clock."""
        return self._remover.clock()

    # --- looking

    def plan(self, *, max_idle: float, in_use: frozenset[str]) -> CleanupPlan:
        """What a cleanup would do now."""
        return _cleanup.plan(self.facts(), now=self._remover.clock(), max_idle=max_idle, in_use=in_use)

    def facts(self) -> list[_cleanup.BaseFacts]:
        """What is known of every base, the finders asked once for all of them."""
        surveys = list(self._backend.survey())
        found: dict[str, list[DiskUser]] = {}
        doubt = ""
        try:
            found = _users.from_finders(self._remover.finders, [survey.base for survey in surveys])
        except UsersUnknownError as err:
            _log.warning("every base is kept: %s", err)
            doubt = err.detail
        pinned = self._remover.root.pinned()
        facts = []
        for survey in surveys:
            image_id = survey.base.image_id
            fact = self._facts(survey, found.get(image_id, ()), doubt, pinned=pinned is None or image_id in pinned)
            if fact is not None:
                facts.append(fact)
        return facts

    def _facts(
        self, survey: Survey, found: Sequence[DiskUser], doubt: str = "", *, pinned: bool = True
    ) -> _cleanup.BaseFacts | None:
        """What is known of one base, None: it is gone. ``found`` is the finders'; ``pinned``: a pin may be there."""
        base, stored, allocated = survey.base, survey.users, survey.allocated
        pins = self._remover.root.pins(base.image_id, self.now()) if pinned else ()
        users: int | None = None
        try:
            counted = _users.count(self._backend.iter_users(base) if stored is None else stored, found)
            if allocated is None:
                allocated = self._backend.usage(base).allocated
            users = None if doubt else counted
        except BaseNotFoundError:  # removed while we looked
            return None
        except ImageCacheError as err:
            _log.warning("base %s is kept: %s", base.image_id, err)
            doubt = doubt or err.detail
        return _cleanup.BaseFacts(
            image_id=base.image_id,
            managed=base.managed,
            users=users,
            pins=tuple(pin.owner for pin in pins),
            last_used=base.last_used,
            unused_since=base.unused_since,
            allocated=allocated or 0,
            doubt=doubt,
        )

    # --- doing

    def carry_out(self, plan: CleanupPlan, *, observe: bool) -> CleanupReport:
        """Do what the plan says, after looking at every base again; one base's failure stops no other."""
        outcome = _Outcome()
        going: list[CleanupItem] = []
        for item in plan.items:
            if item.verdict == "keep":
                outcome.kept[item.image_id] = item.reason
            elif observe:
                outcome.kept[item.image_id] = f"remove_unused is off ({item.verdict}: {item.reason})"
            elif item.verdict == "remove":
                going.append(item)
            else:
                self._mark(item, plan, outcome)
        size = _at_once()
        for start in range(0, len(going), size):
            self._remove(going[start : start + size], plan.max_idle, plan.in_use, outcome)
        return CleanupReport(
            removed=tuple(outcome.removed),
            marked=tuple(outcome.marked),
            kept=outcome.kept,
            failed=outcome.failed,
            freed=outcome.freed,
        )

    def evictable(self) -> list[CleanupItem]:
        """The bases that may go to make room, the longest idle first.

        Bases with users or pins stay, and those used within the last minutes: somebody is about to make a disk.
        """
        return _cleanup.eviction_order(self.facts(), now=self._remover.clock())

    def evict(self, order: Sequence[CleanupItem], needed: int, check: Callable[[], None]) -> list[str]:
        """Remove bases in this order until ``needed`` bytes are free; the image ids of those that went.

        As many go together as should be enough, so that the finders look once. ``check`` is called between.
        """
        outcome = _Outcome()
        left = list(reversed(order))
        size = _at_once()
        while left and outcome.freed < needed:
            check()
            going: list[CleanupItem] = []
            hoped = outcome.freed
            while left and hoped < needed and len(going) < size:
                going.append(left.pop())
                hoped += going[-1].allocated
            self._remove(going, 0.0, frozenset(), outcome, recent=_cleanup.RECENT)
        return outcome.removed

    def _mark(self, item: CleanupItem, plan: CleanupPlan, outcome: _Outcome) -> None:
        try:
            if item.verdict == "mark":  # with a use since, its idle time begins later
                in_use = item.image_id in plan.in_use
                base, _facts = self._judge_again(item.image_id, "mark", plan.max_idle, in_use=in_use)
            else:
                found = self._backend.find_base(item.image_id)
                if found is None:
                    raise BaseNotFoundError(image_id=item.image_id)
                base = found
            self._backend.mark_unused(base, self._remover.clock() if item.verdict == "mark" else None)
        except ImageCacheError as err:
            outcome.stays(item.image_id, err)
        else:
            outcome.marked.append(item.image_id)

    def _remove(
        self,
        items: Sequence[CleanupItem],
        max_idle: float,
        in_use: frozenset[str],
        outcome: _Outcome,
        *,
        recent: float = 0.0,
    ) -> None:
        """Two looks over a few bases: each is judged again and retired, then all are looked at once more.

        One that was used within the last ``recent`` seconds stays.
        """
        going: list[_Going] = []
        try:
            for item in items:
                try:
                    going.append(self._retire(item, max_idle, recent, in_use=item.image_id in in_use))
                except ImageCacheError as err:
                    outcome.stays(item.image_id, err)
            leaving = self._look_again(going, outcome)
        except BaseException:  # an interrupt, or a green thread's time-out: this process goes on, and holds them
            self._restore_all(going, outcome)
            raise
        finally:
            for each in going:
                each.lock.release()
        left = list(reversed(leaving))
        try:
            while left:
                self._purge(left.pop(), outcome)
        except BaseException:
            self._restore_all(left, outcome)
            raise

    def _purge(self, each: _Going, outcome: _Outcome) -> None:
        try:
            self._backend.purge_base(each.retired)
        except ImageCacheError as err:  # it is out of sight; a sweep frees the rest
            outcome.stays(each.base.image_id, err)
        else:
            outcome.removed.append(each.base.image_id)
            outcome.freed += each.allocated

    def _retire(self, item: CleanupItem, max_idle: float, recent: float, *, in_use: bool) -> _Going:
        lock = self._remover.attempt_lock(item.image_id)
        try:
            base, facts = self._judge_again(item.image_id, "remove", max_idle, recent, in_use=in_use)
            retired = self._backend.retire_base(base)
        except BaseException:
            lock.release()
            raise
        return _Going(base=base, allocated=facts.allocated, retired=retired, lock=lock)

    def _judge_again(
        self, image_id: str, verdict: str, max_idle: float, recent: float = 0.0, *, in_use: bool
    ) -> tuple[BaseImage, _cleanup.BaseFacts]:
        """The base and what is known of it, if the verdict is the same: the plan may be old, today's marks and users
        decide."""
        base = self._backend.find_base(image_id)
        # the finders had their first look for the plan, and have their second when all are retired
        facts = self._facts(Survey(base=base), ()) if base is not None else None
        if base is None or facts is None:
            raise BaseNotFoundError(image_id=image_id)
        now = self._remover.clock()
        again = _cleanup.judge(facts, now=now, max_idle=max_idle, in_use=in_use)
        if again.verdict != verdict:
            raise BaseBusyError(again.reason, image_id=image_id)
        if _cleanup.recently_used(facts, now, recent):
            raise BaseBusyError("it was used just now", image_id=image_id)
        return base, facts

    def _look_again(self, going: Sequence[_Going], outcome: _Outcome) -> list[_Going]:
        """Those that nobody came to use or depend on meanwhile; the others get their names back."""
        names = [name for each in going for name in (each.base, each.retired.base)]
        unknown: UsersUnknownError | None = None
        found: dict[str, list[DiskUser]] = {}
        try:
            found = _users.from_finders(self._remover.finders, names)
        except UsersUnknownError as err:
            unknown = err
        leaving = []
        for each in going:
            image_id = each.base.image_id
            try:
                if unknown is not None:
                    raise unknown
                self._remain_unused(each, found.get(image_id, ()))
            except ImageCacheError as err:
                outcome.stays(image_id, err)
                self._restore(each, outcome)
            else:
                leaving.append(each)
        return leaving

    def _remain_unused(self, each: _Going, found: Sequence[DiskUser]) -> None:
        """Come back if a retired base has no users, no pins, and was not used since it was judged."""
        base = each.retired.base
        if users := _users.count(self._backend.iter_users(base), found):
            raise BaseBusyError(f"{users} root disk(s) came to depend on it meanwhile", image_id=base.image_id)
        if pins := self._remover.root.pins(base.image_id, self.now()):
            owners = ", ".join(pin.owner for pin in pins)
            raise BaseBusyError(f"pinned meanwhile by {owners}", image_id=base.image_id)
        # who ensures a base notes its use and then looks whether it is still there
        if base.last_used != each.base.last_used:
            raise BaseBusyError("it was used just now", image_id=base.image_id)

    def _restore_all(self, going: Sequence[_Going], outcome: _Outcome) -> None:
        for each in going:
            self._restore(each, outcome)

    def _restore(self, each: _Going, outcome: _Outcome) -> None:
        try:
            self._backend.restore_base(each.retired)
        except ImageCacheError as err:  # recover finds it in the trash, with its users, and restores it
            outcome.stays(each.base.image_id, err)


def _at_once() -> int:
    """How many bases are retired together, so that the finders look once for all of them."""
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_now = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names, not paths
    free = _MOST * _DESCRIPTORS if soft == resource.RLIM_INFINITY else soft - open_now
    return min(max(free // _DESCRIPTORS, _FEWEST), _MOST)

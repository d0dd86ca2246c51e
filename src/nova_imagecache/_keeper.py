"""Keeps the cache within its limits: reservations that all processes of the host see, and eviction to make room.

A fetch writes what it may still take into its entry of staging, ``reserved``, before it takes it. Admission sums those
of all live fetches under one lock, held for as long as a few stats take, so that ten cold images together cannot
overfill. What a fetch has written already is in the storage's own figures and is not counted twice. What is not on this
host, the storage tells as one figure for all fetches; how much of it is one's own, each fetch says itself.
"""

from __future__ import annotations

import logging
import os
import queue
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from nova_imagecache import _cleanup, _entries, _extents, _fs, _space
from nova_imagecache.exceptions import BaseNotFoundError, ImageCacheError, NoSpaceError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from nova_imagecache._guard import GuardedBackend
    from nova_imagecache._layout import Root
    from nova_imagecache._locks import Locks
    from nova_imagecache._models import BaseRecord, Capacity, CleanupItem
    from nova_imagecache._passes import Passes

_NAME = "reserved"
_RECOUNTS = 32
_log = logging.getLogger(__name__)


class _Counted(NamedTuple):
    """What all bases take, and ``Root.bases_changed`` before they were counted."""

    changed: int | None
    bases: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Keeper:
    """What keeps one cache within ``policy``. ``evicted`` collects image ids until somebody tells the driver.

    ``may_evict`` False: no base goes to make room.
    """

    backend: GuardedBackend
    root: Root
    locks: Locks
    passes: Passes
    policy: _space.SpacePolicy
    may_evict: bool = True
    evicted: queue.SimpleQueue[str] = field(default_factory=queue.SimpleQueue)
    sizes: dict[str, tuple[BaseRecord, int]] = field(default_factory=dict)

    def reserve(
        self,
        image_id: str,
        entry: Path,
        needed: int,
        stage: str,
        check: Callable[[], None] = lambda: None,
        *,
        placed: int = 0,
    ) -> None:
        """Promise ``needed`` more bytes to the fetch whose entry of staging this is, making room where there is none.

        ``placed`` is what the fetch has written to storage that is not on this host. ``check`` is called while somebody
        is waited for and while room is made; what it raises ends the call.

        Raises:
            NoSpaceError: it cannot fit, whatever is evicted; with what stands in the way.
        """

        def attempt() -> NoSpaceError | None:
            return self._try(image_id, entry, needed, stage, check=check, placed=placed)

        refusal = attempt()
        if refusal is not None and _entries.sweep(self.root.staging)[0]:
            refusal = attempt()
        # trash counts for no max_bytes, but what dead fetches left elsewhere does
        recoverable = refusal is not None and (refusal.limit != "max_bytes" or not self.backend.properties.local)
        if recoverable and self._recover():
            refusal = attempt()
        # again and again, since another may take the room that we made
        while refusal is not None and self._evict_enough(needed - (refusal.free or 0), check):
            refusal = attempt()
        if refusal is not None:
            stuck = _cleanup.immovable(self.passes.facts(), now=self.passes.now())
            left_alone = _left_alone(self.backend.capacity(), image_id)
            raise NoSpaceError(
                needed=needed,
                free=refusal.free,
                pinned=stuck.pinned,
                in_use=stuck.in_use,
                recent=stuck.recent,
                left_alone=left_alone,
                limit=refusal.limit,
                image_id=image_id,
                stage=stage,
            ) from refusal

    def reserve_free(
        self,
        image_id: str,
        entry: Path,
        needed: int,
        stage: str,
        check: Callable[[], None] = lambda: None,
        *,
        placed: int = 0,
    ) -> bool:
        """Promise ``needed`` more bytes as ``reserve`` does, where they are free already; whether."""
        return self._try(image_id, entry, needed, stage, check=check, placed=placed) is None

    def release(self, entry: Path) -> None:
        """Take a fetch's promise back: all it will take is written."""
        _fs.unlink(entry / _NAME)

    def make_room(self, needed: int, check: Callable[[], None] = lambda: None) -> bool:
        """Sweep what dead processes left in staging and trash and evict idle bases until ``needed`` bytes are free, or
        none is left. Whether anything went at all.
        """
        swept, _alive = _entries.sweep(self.root.staging)
        recovered = self._recover()
        evicted = self.may_evict and self._evict(self.passes.evictable(), needed, check)
        return bool(swept or recovered or evicted)

    def _recover(self) -> bool:
        """Let the backend sweep what dead processes left, removals that died as well. Whether anything went."""
        try:
            return bool(self.backend.recover().removed)
        except ImageCacheError as err:  # the fetch is judged by what is free all the same
            _log.warning("left-overs cannot be swept: %s", err)
            return False

    def _evict_enough(self, needed: int, check: Callable[[], None]) -> bool:
        """Evict ``needed`` bytes, or nothing where that cannot be enough. Whether anything went."""
        if not self.may_evict:
            return False
        order = self.passes.evictable()
        return sum(item.allocated for item in order) >= needed and self._evict(order, needed, check)

    def _evict(self, order: Sequence[CleanupItem], needed: int, check: Callable[[], None]) -> bool:
        removed = self.passes.evict(order, needed, check)
        for image_id in removed:
            self.evicted.put(image_id)
        return bool(removed)

    def _try(
        self, image_id: str, entry: Path, needed: int, stage: str, *, check: Callable[[], None], placed: int
    ) -> NoSpaceError | None:
        try:
            self._reserve(image_id, entry, needed, stage, check=check, placed=placed)
        except NoSpaceError as err:
            if err.needed is None:  # not refused: the storage has no room for the reservation itself
                raise
            return err
        return None

    def _bases(self) -> int:
        """What all bases take. What a base takes never changes: each is measured once."""
        sizes: dict[str, tuple[BaseRecord, int]] = {}
        for base in self.backend.iter_bases():
            if not base.managed:
                continue
            record, size = self.sizes.get(base.image_id, (None, 0))
            if record is not base.record and record != base.record:
                try:
                    size = self.backend.usage(base).allocated
                except BaseNotFoundError:  # retired meanwhile
                    continue
                except ImageCacheError as err:  # at most that, and it stops no fetch
                    _log.warning("base %s counts as %d bytes: %s", base.image_id, base.record.size, err)
                    size = base.record.size
            sizes[base.image_id] = (base.record, size)
        self.sizes.clear()
        self.sizes.update(sizes)
        return sum(size for _record, size in sizes.values())

    def _reserve(
        self, image_id: str, entry: Path, needed: int, stage: str, *, check: Callable[[], None], placed: int
    ) -> None:
        # outside the lock, and again inside only where a base came or went meanwhile
        counted = _Counted(self.root.bases_changed(), self._bases() if self.policy.max_bytes is not None else 0)
        with self.locks.admission(check):
            for attempt in range(_RECOUNTS):
                names = _entries.names(self.root.staging)
                mine, others, written = self._promised(entry, names)
                capacity = self.backend.capacity()
                if not self.backend.properties.local:
                    # zeros that it wrote may take nothing
                    mine = written = min(placed, capacity.staging)
                taken = 0
                if self.policy.max_bytes is not None:
                    left = _left_alone(capacity, image_id)
                    taken = self._taken(counted) + left + max(written + others, capacity.staging)
                try:
                    _space.admit(
                        needed,
                        capacity=capacity,
                        promised=others,
                        taken=taken,
                        policy=self.policy,
                        image_id=image_id,
                        stage=stage,
                    )
                    break
                except NoSpaceError:
                    # what is published while it is counted is counted twice; nobody is admitted meanwhile, so that ends
                    published = (
                        set(names).difference(_entries.names(self.root.staging))
                        or self.backend.capacity().staging < capacity.staging
                    )
                    if not published or attempt == _RECOUNTS - 1:
                        raise
            path = entry / _NAME
            _fs.unlink(path)
            # not synced, which would wait for all that the fetch has written so far: a promise ends with its process
            fd = _fs.create(path, 0o600)
            try:
                _fs.write(fd, 0, str(mine + needed).encode())
            finally:
                os.close(fd)

    def _taken(self, counted: _Counted) -> int:
        """What all bases take: as they were counted, where none came or went since."""
        if counted.changed is not None and counted.changed == self.root.bases_changed():
            return counted.bases
        return self._bases()

    def _promised(self, own: Path, names: Sequence[str]) -> tuple[int, int, int]:
        """(what our own fetch has written, what others may still write, what all have written), in bytes; ``names``
        are staging's entries.
        """
        written: dict[str, int] = {}
        promised: dict[str, int] = {}
        for name in names:
            path = self.root.staging / name
            image_id = name.rpartition(".")[0]
            # what is not on this host takes nothing of the storage's space
            allocated = _extents.allocated_tree(path)[0] if self.backend.properties.local else 0
            written[image_id] = written.get(image_id, 0) + allocated
            if path != own and (reserved := _reservation(path)) is not None and _entries.alive(path):
                promised[image_id] = promised.get(image_id, 0) + reserved
        others = sum(max(amount - written.get(image_id, 0), 0) for image_id, amount in promised.items())
        return written.get(own.name.rpartition(".")[0], 0), others, sum(written.values())


def _left_alone(capacity: Capacity, image_id: str) -> int:
    """What stands in the place of bases and is none; but for this image's, which goes when its base is published."""
    return sum(size for name, size in capacity.left_alone.items() if name != image_id)


def _reservation(entry: Path) -> int | None:
    try:
        return int((entry / _NAME).read_bytes())
    except (OSError, ValueError):  # an entry that reserves nothing, or one that goes just now
        return None

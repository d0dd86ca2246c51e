"""Keeps the cache within its limits: reservations that all processes of the host see, and eviction to make room.

A fetch writes what it may still take into its entry of staging, ``reserved``, before it takes it. Admission sums those
of all live fetches under one lock, held for as long as a few stats take, so that ten cold images together cannot
overfill. What a fetch has written already is in the storage's own figures and is not counted twice.
"""

from __future__ import annotations

import queue
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nova_imagecache import _cleanup, _entries, _extents, _fs, _space
from nova_imagecache.exceptions import NoSpaceError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from nova_imagecache._guard import GuardedBackend
    from nova_imagecache._layout import Root
    from nova_imagecache._locks import Locks
    from nova_imagecache._models import CleanupItem
    from nova_imagecache._passes import Passes

_NAME = "reserved"


@dataclass(frozen=True, slots=True, kw_only=True)
class Keeper:
    """What keeps one cache within ``policy``. ``evicted`` collects image ids until somebody tells the driver."""

    backend: GuardedBackend
    root: Root
    locks: Locks
    passes: Passes
    policy: _space.SpacePolicy
    evicted: queue.SimpleQueue[str] = field(default_factory=queue.SimpleQueue)

    def reserve(self, image_id: str, entry: Path, needed: int, stage: str) -> None:
        """Promise ``needed`` more bytes to the fetch whose entry of staging this is, making room where there is none.

        Raises:
            NoSpaceError: it cannot fit, whatever is evicted; with what stands in the way.
        """
        refusal = self._try(image_id, entry, needed, stage)
        if refusal is not None:
            _entries.sweep(self.root.staging)
            # also where nothing was swept: what is published while it is counted is counted twice
            refusal = self._try(image_id, entry, needed, stage)
        # again and again, since another may take the room that we made
        while refusal is not None and self._evict_enough(needed - (refusal.free or 0)):
            refusal = self._try(image_id, entry, needed, stage)
        if refusal is not None:
            stuck = _cleanup.immovable(self.passes.facts(), now=self.passes.now())
            raise NoSpaceError(
                needed=needed,
                free=refusal.free,
                pinned=stuck.pinned,
                in_use=stuck.in_use,
                limit=refusal.limit,
                image_id=image_id,
                stage=stage,
            ) from refusal

    def release(self, entry: Path) -> None:
        """Take a fetch's promise back: all it will take is written."""
        _fs.unlink(entry / _NAME)

    def make_room(self, needed: int) -> bool:
        """Sweep what dead processes left in staging and evict idle bases until ``needed`` bytes are free, or none is
        left. Whether anything went at all.
        """
        swept, _alive = _entries.sweep(self.root.staging)
        evicted = self._evict(self.passes.evictable(), needed)
        return bool(swept or evicted)

    def _evict_enough(self, needed: int) -> bool:
        """Evict ``needed`` bytes, or nothing where that cannot be enough. Whether anything went."""
        order = self.passes.evictable()
        return sum(item.allocated for item in order) >= needed and self._evict(order, needed)

    def _evict(self, order: Sequence[CleanupItem], needed: int) -> bool:
        removed = self.passes.evict(order, needed)
        for image_id in removed:
            self.evicted.put(image_id)
        return bool(removed)

    def _try(self, image_id: str, entry: Path, needed: int, stage: str) -> NoSpaceError | None:
        try:
            self._reserve(image_id, entry, needed, stage)
        except NoSpaceError as err:
            if err.needed is None:  # not refused: the storage has no room for the reservation itself
                raise
            return err
        return None

    def _reserve(self, image_id: str, entry: Path, needed: int, stage: str) -> None:
        with self.locks.admission():
            mine, others, written = self._promised(entry)
            capacity = self.backend.capacity()
            taken = 0
            if self.policy.max_bytes is not None:
                bases = sum(self.backend.usage(base).allocated for base in self.backend.iter_bases() if base.managed)
                taken = bases + written + others
            _space.admit(
                needed,
                capacity=capacity,
                promised=others,
                taken=taken,
                policy=self.policy,
                image_id=image_id,
                stage=stage,
            )
            path = entry / _NAME
            _fs.unlink(path)
            _fs.write_file(path, str(mine + needed).encode(), 0o600)

    def _promised(self, own: Path) -> tuple[int, int, int]:
        """(what our own fetch has written, what others may still write, what all have written), in bytes."""
        written: dict[str, int] = {}
        promised: dict[str, int] = {}
        for name in _entries.names(self.root.staging):
            path = self.root.staging / name
            image_id = name.rpartition(".")[0]
            # what is not on this host takes nothing of the storage's space
            allocated = _extents.allocated_tree(path)[0] if self.backend.properties.local else 0
            written[image_id] = written.get(image_id, 0) + allocated
            if path != own and (reserved := _reservation(path)) is not None and _entries.alive(path):
                promised[image_id] = promised.get(image_id, 0) + reserved
        others = sum(max(amount - written.get(image_id, 0), 0) for image_id, amount in promised.items())
        return written.get(own.name.rpartition(".")[0], 0), others, sum(written.values())


def _reservation(entry: Path) -> int | None:
    try:
        return int((entry / _NAME).read_bytes())
    except (OSError, ValueError):  # an entry that reserves nothing, or one that goes just now
        return None

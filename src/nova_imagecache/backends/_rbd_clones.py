"""Clones of bases under staging names: the first half of making a root disk in Ceph."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING

from nova_imagecache import _records
from nova_imagecache.backends import BaseImage, BaseNotFoundError, RbdLocation, _rados, _rbd_look
from nova_imagecache.backends._rados_errors import BusyError, NotThereError, RefusedError
from nova_imagecache.backends._rbd_bases import RbdBases
from nova_imagecache.backends._rbd_names import DISK, FINAL, RECORD, SNAPSHOT

if TYPE_CHECKING:
    from nova_imagecache.backends._rados import Image


class RbdClones(RbdBases):
    """What makes clones, of bases that may go away meanwhile."""

    def _clone(self, base: BaseImage, staging: str, final: str, size: int) -> str:
        """A clone of the base under a staging name, ``size`` bytes long, with its record; its id.

        Raises:
            BaseNotFoundError: the clone is of another base than was given, or the base has its name no longer.
        """
        self._clone_snapshot(base, staging)
        record = _records.DiskRecord(
            image_id=base.image_id,
            format="raw",
            reference="clone",
            created_size=size,
            digest=base.digest,
            base_format=base.format,
            made_at=time.time(),
        )
        # opening costs more than all that is done here, so it is done at once
        with _rados.changing(self.store.io, name=staging) as image:
            # the clone is counted by now; whoever takes the base away looks the other way round
            self._still_there(base, image)
            if image.size() != size:
                _rados.resize(image, size)
            rbd_id = image.id()
        _rados.set_metadata(self.store.io, rbd_id, {DISK: _records.dump_disk(record).decode(), FINAL: final})
        self.touch_base(base)
        return rbd_id

    def _clone_snapshot(self, base: BaseImage, staging: str) -> None:
        source, parent = self._whereabouts(base)
        snapshot = base.location.snapshot if isinstance(base.location, RbdLocation) else None
        snapshot = snapshot or SNAPSHOT
        features = self.store.features()
        try:
            if base.managed and self.store.clones_need_protection():
                self._protect(parent, snapshot)
            try:
                _rados.clone(source, parent, snapshot, self.store.io, staging, features=features)
            except RefusedError:
                # the cluster asks for clones of format 1 since a moment ago, or it was unprotected by hand
                if not base.managed:
                    raise
                self.store.protected.clear()
                self._protect(parent, snapshot)
                _rados.clone(source, parent, snapshot, self.store.io, staging, features=features)
        except NotThereError as err:
            raise BaseNotFoundError("the base went away meanwhile", image_id=base.image_id, stage="clone") from err

    def _protect(self, parent: str, snapshot: str) -> None:
        """Protect a base's snapshot, if nobody else has: it was made when clones were of format 2.

        Before anybody makes a clone of format 1 of it, and one at a time: librbd may abort the process where several
        have an image open that one of them protects.
        """
        if (rbd_id := self.store.id_of(parent)) is None:
            raise NotThereError(f"{parent} is gone")
        if (rbd_id, snapshot) in self.store.protected:
            return
        with self.store.claimed(rbd_id, "protecting it"):
            with _rbd_look.opened_by_id(self.store.io, rbd_id) as image:
                done = _rbd_look.is_protected(image, snapshot)
            if not done:
                with _rados.changing(self.store.io, image_id=rbd_id) as image, suppress(BusyError):
                    _rados.protect(image, snapshot)
        self.store.protected.add((rbd_id, snapshot))

    def _still_there(self, base: BaseImage, clone: Image) -> None:
        """See that the clone's parent is the base that was given, and still has its name."""
        if not (self._has_record(base, clone) and self._is_clone_of(clone, base)):
            raise BaseNotFoundError("the base went away meanwhile", image_id=base.image_id, stage="clone")

    def _has_record(self, base: BaseImage, clone: Image) -> bool:
        """Whether the clone was made of a base with this record, not of another one of the same name."""
        if not base.managed:
            return (found := _rbd_look.parent(clone)) is not None and self.adopted.is_clone(base, found[1])
        # a clone begins with a copy of its parent's metadata
        text = _rbd_look.metadata(clone, RECORD)
        try:
            return text is not None and _records.load_base(text.encode()) == base.record
        except _records.RecordError:
            return False

    def _is_clone_of(self, image: Image, base: BaseImage) -> bool:
        """Whether the image is a clone of what has the base's name now."""
        source, name = self._whereabouts(base)
        found = _rbd_look.parent(image)
        pool = base.location.pool if isinstance(base.location, RbdLocation) else ""
        return found is not None and found[:2] == (pool, _rbd_look.named(source, name))

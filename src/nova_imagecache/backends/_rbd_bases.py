"""Bases in Ceph: the bases' half of the backend ``rbd``."""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from nova_imagecache import _records
from nova_imagecache.backends import (
    BackendError,
    BaseImage,
    BaseNotFoundError,
    BaseWriter,
    Capacity,
    DiskUsage,
    Extent,
    ImageInfo,
    RbdLocation,
    _rados,
    _rbd_look,
    _rbd_room,
)
from nova_imagecache.backends._rados_errors import (
    NotThereError,
)
from nova_imagecache.backends._rbd_adopted import TOUCH_INTERVAL
from nova_imagecache.backends._rbd_names import (
    BASE,
    DAMAGED,
    LAST_USED,
    RECORD,
    SNAPSHOT,
    SUMS,
    UNUSED_SINCE,
    base_name,
)
from nova_imagecache.backends._rbd_owner import is_unfinished
from nova_imagecache.backends._rbd_retired import RetirableBases, is_record, seconds
from nova_imagecache.backends._rbd_writer import RbdWriter
from nova_imagecache.exceptions import ImageRejectedError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from nova_imagecache.backends._rados import Image

_MIB = 2**20
_log = logging.getLogger(__name__)


class RbdBases(RetirableBases):
    """The bases' half."""

    # --- finding

    def find_base(self, image_id: str) -> BaseImage | None:
        base_name(image_id)
        return self.adopted.find(image_id) or self.find_own(image_id)

    def find_own(self, image_id: str) -> BaseImage | None:
        """The base that was brought in, not one that was adopted."""
        return self._read(image_id, base_name(image_id))

    def iter_bases(self) -> Iterator[BaseImage]:
        seen = set()
        for base in self.adopted.iter_bases():
            seen.add(base.image_id)
            yield base
        for name in self.store.names():
            image_id = name.removeprefix(BASE)
            if not name.startswith(BASE) or image_id in seen:
                continue
            try:
                own = self._read(image_id, name)
            except BackendError as err:
                if err.retryable:  # nobody answers: a list that ends here would be a lie
                    raise
                _log.warning("base %s is left out: %s", image_id, err)
                continue
            if own is not None:
                yield own

    def _read(self, image_id: str, name: str) -> BaseImage | None:
        # opening it costs five times as much
        rbd_id = _rbd_look.named(self.store.io, name)
        try:
            if rbd_id is None or not _rbd_look.has_snapshot(self.store.io, rbd_id, SNAPSHOT):
                return None
            values = _rbd_look.all_metadata(self.store.io, rbd_id)
        except NotThereError:
            return None
        if DAMAGED in values:  # its quarantine died half-way
            return None
        return self._base(image_id, values, self.store.location(name, SNAPSHOT))

    def _base(self, image_id: str, values: Mapping[str, str], location: RbdLocation) -> BaseImage | None:
        """The base that an image's metadata tell of."""
        try:
            record = _records.load_base(values.get(RECORD, "").encode())
        except _records.RecordError as err:
            _log.warning("base %s is left alone: its record cannot be read: %s", image_id, err)
            return None
        return BaseImage(
            image_id=image_id,
            location=location,
            record=record,
            last_used=seconds(values.get(LAST_USED)),
            unused_since=seconds(values.get(UNUSED_SINCE)),
            inspected=record.inspector,
        )

    # --- making

    def stage_base(self, image_id: str, format: str) -> BaseWriter:  # noqa: A002 - the contract's name
        base_name(image_id)
        if format not in self.properties.base_formats:
            raise BackendError(f"a base cannot be {format!r} on RBD", image_id=image_id, stage="staging")
        if self.options.when_not_clonable == "refuse":
            # whatever way led here: a source that copies between no stores, a digest that adoption could not meet
            reason = "it cannot be cloned where it lies, and when_not_clonable is refuse"
            raise ImageRejectedError(reason, image_id=image_id, stage="staging")
        return RbdWriter(self, image_id)

    def adopt_base(self, image: ImageInfo) -> BaseImage | None:
        base_name(image.image_id)
        return self.adopted.adopt(image)

    def wanted_store(self, image: ImageInfo) -> str | None:
        return self.adopted.wanted_store(image)

    # --- marks

    def touch_base(self, base: BaseImage) -> None:
        if not base.managed:
            self.adopted.touch(base)
            return
        rbd_id = _rbd_look.named(self.store.io, base_name(base.image_id))
        if rbd_id is None:
            return
        last_used, unused_since = (
            seconds(_rbd_look.metadata_of(self.store.io, rbd_id, key)) for key in (LAST_USED, UNUSED_SINCE)
        )
        # a write for each disk would make one object of all hosts' traffic
        if unused_since is None and time.time() - (last_used or 0.0) < TOUCH_INTERVAL:
            return
        with suppress(NotThereError):
            _rados.set_metadata(self.store.io, rbd_id, {LAST_USED: repr(time.time()), UNUSED_SINCE: None})

    def mark_unused(self, base: BaseImage, when: float | None) -> None:
        if not base.managed:
            return
        rbd_id = _rbd_look.named(self.store.io, base_name(base.image_id))
        if rbd_id is not None:
            with suppress(NotThereError):
                _rados.set_metadata(self.store.io, rbd_id, {UNUSED_SINCE: None if when is None else repr(when)})

    # --- bytes and figures

    def read_base(self, base: BaseImage) -> Iterator[Extent]:
        assert isinstance(base.location, RbdLocation)  # noqa: S101 - for mypy; _whereabouts refuses others
        snapshot = base.location.snapshot or SNAPSHOT
        try:
            ioctx, name = self._whereabouts(base)
            with _rbd_look.opened(ioctx, name, snapshot=snapshot) as image:
                self._refuse_another(base, image)
                for start, length in _rbd_look.data_extents(image, fixed=True):
                    end = min(start + length, base.record.size)
                    position = start
                    while position < end:
                        piece = min(_MIB - position % _MIB, end - position)
                        yield Extent(offset=position, data=_rbd_look.read(image, position, piece))
                        position += piece
                # what is removed reads as zeros; its snapshot goes before any of its data
                if not _rbd_look.has_snapshot(ioctx, image.id(), snapshot):
                    raise BaseNotFoundError("it went while it was read", image_id=base.image_id, stage="reading")
        except NotThereError as err:
            raise BaseNotFoundError(image_id=base.image_id, stage="reading") from err

    def _refuse_another(self, base: BaseImage, image: Image) -> None:
        if base.managed:
            same = is_record(_rbd_look.metadata(image, RECORD), base)
        else:
            same = self.adopted.is_clone(base, image.id())
        if not same:
            raise BaseNotFoundError("another base has its name by now", image_id=base.image_id, stage="reading")

    def read_sums(self, base: BaseImage) -> bytes | None:
        if not base.managed:
            return None
        rbd_id = self._id_of(base, "reading")
        sums = _rbd_look.read_object(self.store.io, SUMS + rbd_id)
        if sums is None:
            self._id_of(base, "reading", rbd_id)  # they go with the base
        return sums

    def usage(self, base: BaseImage) -> DiskUsage:
        if not base.managed:  # Glance's, and counted there
            return DiskUsage(virtual_size=base.virtual_size, allocated=0)
        try:
            with _rbd_look.opened(self.store.io, base_name(base.image_id), snapshot=SNAPSHOT) as image:
                return DiskUsage(virtual_size=base.virtual_size, allocated=_allocated(image, fixed=True))
        except NotThereError as err:
            raise BaseNotFoundError(image_id=base.image_id, stage="usage") from err

    def capacity(self) -> Capacity:
        room = _rbd_room.left(self.store.connection, self.options.pool)
        staging = trash = 0
        for name in _rbd_look.names(self.store.io):
            if is_unfinished(name):
                with suppress(NotThereError), _rbd_look.opened(self.store.io, name) as image:
                    staging += _allocated(image, fixed=False)
        coming = self.store.coming()  # counted as the bases that they are
        for entry in _rbd_look.trash(self.store.io):
            if (entry.name.startswith(BASE) or is_unfinished(entry.name)) and entry.image_id not in coming:
                with suppress(NotThereError), _rbd_look.opened_by_id(self.store.io, entry.image_id) as image:
                    trash += _allocated(image, fixed=False)
        return Capacity(
            total=room.stored + room.free, free=room.free, staging=staging, trash=trash, complete=room.counted
        )


def _allocated(image: Image, *, fixed: bool) -> int:
    """Bytes that the image takes, as far as it is no clone in the making: those have nothing of their own yet."""
    if not fixed and _rbd_look.parent(image) is not None:
        return 0
    return sum(length for _, length in _rbd_look.data_extents(image, fixed=fixed))

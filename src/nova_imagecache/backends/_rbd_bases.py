"""Bases in Ceph: the bases' half of the backend ``rbd``."""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from nova_imagecache import _records
from nova_imagecache.backends import (
    Backend,
    BackendError,
    BackendPaths,
    BaseImage,
    BaseNotFoundError,
    BaseWriter,
    Capacity,
    DiskUsage,
    DiskUser,
    Extent,
    ImageInfo,
    RbdLocation,
    Retired,
    UsersUnknownError,
    _rados,
    _rbd_look,
    _rbd_room,
    _rbd_store,
)
from nova_imagecache.backends._rados_errors import (
    BusyError,
    ExistsError,
    ForbiddenError,
    NotThereError,
    SnapshotsError,
)
from nova_imagecache.backends._rbd_adopted import TOUCH_INTERVAL, Adopted
from nova_imagecache.backends._rbd_options import RbdOptions
from nova_imagecache.backends._rbd_owner import is_unfinished
from nova_imagecache.backends._rbd_store import BASE, LAST_USED, RECORD, SNAPSHOT, SUMS, UNUSED_SINCE, Store, base_name
from nova_imagecache.backends._rbd_writer import RbdWriter
from nova_imagecache.exceptions import BaseInUseError, ImageRejectedError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from nova_imagecache.backends._rados import Image, Ioctx

_MIB = 2**20
TRASH = "trash."
"""What the name of a retired base's location begins with; its id follows."""

_log = logging.getLogger(__name__)


class RbdBases(Backend):
    """The bases' half."""

    busy_patience: ClassVar[float] = 35.0
    """Seconds for which something in use is tried again: longer than Ceph takes a dead client for a live one."""

    def __init__(self, options: Mapping[str, Any], paths: BackendPaths) -> None:
        self.options = RbdOptions.parse(options)
        self.paths = paths
        self.store = Store(self.options, self.busy_patience)
        self.adopted = Adopted(self.store, paths.root)

    def close(self) -> None:
        self.store.close()

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
            last_used=_seconds(values.get(LAST_USED)),
            unused_since=_seconds(values.get(UNUSED_SINCE)),
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
            _seconds(_rbd_look.metadata_of(self.store.io, rbd_id, key)) for key in (LAST_USED, UNUSED_SINCE)
        )
        # a write for each disk would make one object of all hosts' traffic
        if unused_since is None and time.time() - (last_used or 0.0) < TOUCH_INTERVAL:
            return
        with suppress(NotThereError), _rados.changing(self.store.io, name=base_name(base.image_id)) as image:
            _rados.set_metadata(image, LAST_USED, repr(time.time()))
            _rados.remove_metadata(image, UNUSED_SINCE)

    def mark_unused(self, base: BaseImage, when: float | None) -> None:
        if not base.managed:
            return
        with suppress(NotThereError), _rados.changing(self.store.io, name=base_name(base.image_id)) as image:
            if when is None:
                _rados.remove_metadata(image, UNUSED_SINCE)
            else:
                _rados.set_metadata(image, UNUSED_SINCE, repr(when))

    # --- users

    def iter_users(self, base: BaseImage) -> Iterator[DiskUser]:
        ioctx, name = self._whereabouts(base)
        try:
            if name.startswith(TRASH):
                with _rbd_look.opened_by_id(ioctx, name.removeprefix(TRASH)) as image:
                    found = _rbd_look.children(image)
            else:
                with _rbd_look.opened(ioctx, name) as image:
                    found = _rbd_look.children(image)
        except NotThereError as err:
            if name.startswith(TRASH):  # purged, which takes that there were none
                return
            raise UsersUnknownError("the base is gone or retired", image_id=base.image_id, stage="users") from err
        except ForbiddenError as err:
            detail = f"client.{self.options.user} may not see the clones in all pools: {err.detail}"
            raise UsersUnknownError(detail, image_id=base.image_id, stage="users") from err
        for child in found:
            yield self._user(base.image_id, child)

    def _user(self, image_id: str, child: _rbd_look.Child) -> DiskUser:
        detail = f"{child.pool}/{child.name}" + (" (in the trash)" if child.trash else "")
        ours = child.pool == self.options.pool and not child.trash
        names = _rbd_store.split_disk_name(child.name) if ours else None
        disk_id, name = names or (None, None)
        return DiskUser(image_id=image_id, known_by="clone", disk_id=disk_id, name=name, detail=detail)

    def _whereabouts(self, base: BaseImage) -> tuple[Ioctx, str]:
        if not isinstance(base.location, RbdLocation):
            raise BackendError("not a base of this backend", image_id=base.image_id)
        return self.store.connection.pool(base.location.pool), base.location.name

    # --- going

    def retire_base(self, base: BaseImage) -> Retired:
        if not base.managed:
            todo = "Delete the image in the image service instead"
            raise BackendError("the base is adopted, and Glance's to remove", image_id=base.image_id, todo=todo)
        name = base_name(base.image_id)
        rbd_id = self.store.id_of(name)
        if rbd_id is None:
            raise BaseNotFoundError(image_id=base.image_id, stage="retire")
        try:
            self.store.take_away(rbd_id, name)
        except NotThereError as err:
            raise BaseNotFoundError(image_id=base.image_id, stage="retire") from err
        return Retired(base=replace(base, location=self.store.location(TRASH + rbd_id, SNAPSHOT)), token=rbd_id)

    def restore_base(self, retired: Retired) -> None:
        # ExistsError: a new base has the name. NotThereError: a recover beside us restored or purged it
        with suppress(ExistsError, NotThereError):
            _rados.trash_restore(self.store.io, retired.token, base_name(retired.base.image_id))

    def purge_base(self, retired: Retired) -> None:
        self.store.patiently(lambda: self.purge(retired))

    def purge(self, retired: Retired) -> None:
        """As ``purge_base``, once.

        Raises:
            BusyError: somebody has it open, or a ``restore_base`` died half-way.
        """
        if _rbd_look.trash_entry(self.store.io, retired.token) is None:  # restored or purged by somebody else
            return
        # clones of format 2 do not stop Ceph from removing the snapshot
        if users := list(self.iter_users(retired.base)):
            raise BaseInUseError(users, image_id=retired.base.image_id, stage="purge")
        try:
            self.store.strip(retired.token)
            self.store.empty(retired.token, base_name(retired.base.image_id))
        except NotThereError:
            return
        except (BusyError, SnapshotsError) as err:
            # a clone came between the look and the removal; its maker finds the base gone and drops it
            users = list(self.iter_users(retired.base))
            if not users:
                raise
            raise BaseInUseError(users, image_id=retired.base.image_id, stage="purge") from err

    def quarantine_base(self, base: BaseImage) -> None:
        if not base.managed:
            self.adopted.forget(base.image_id)
            return
        name = base_name(base.image_id)
        with suppress(NotThereError), _rados.changing(self.store.io, name=name) as image:
            _rados.set_metadata(image, _rbd_store.DAMAGED, "yes")
        # with users it stays in the trash for them, and is not given its name back
        with suppress(BaseNotFoundError, BaseInUseError):
            self.purge_base(self.retire_base(base))

    # --- bytes and figures

    def read_base(self, base: BaseImage) -> Iterator[Extent]:
        assert isinstance(base.location, RbdLocation)  # noqa: S101 - for mypy; _whereabouts refuses others
        try:
            ioctx, name = self._whereabouts(base)
            with _rbd_look.opened(ioctx, name, snapshot=base.location.snapshot) as image:
                for start, length in _rbd_look.data_extents(image, fixed=True):
                    end = min(start + length, base.record.size)
                    position = start
                    while position < end:
                        piece = min(_MIB - position % _MIB, end - position)
                        yield Extent(offset=position, data=_rbd_look.read(image, position, piece))
                        position += piece
        except NotThereError as err:
            raise BaseNotFoundError(image_id=base.image_id, stage="reading") from err

    def read_sums(self, base: BaseImage) -> bytes | None:
        rbd_id = self.store.id_of(base_name(base.image_id)) if base.managed else None
        return None if rbd_id is None else _rbd_look.read_object(self.store.io, SUMS + rbd_id)

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


def _seconds(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None

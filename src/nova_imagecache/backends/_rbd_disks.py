"""Root disks in Ceph: clones ``<pool>/<disk-id>_<name>``, the disks' half of the backend ``rbd``."""

from __future__ import annotations

import logging
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from nova_imagecache import _records
from nova_imagecache.backends import (
    BackendError,
    BaseImage,
    DiskExistsError,
    DiskInUseError,
    DiskNotFoundError,
    DiskTooSmallError,
    RootDisk,
    _rados,
    _rbd_going,
    _rbd_look,
)
from nova_imagecache.backends._rados_errors import BusyError, ExistsError, NotThereError, RefusedError, SnapshotsError
from nova_imagecache.backends._rbd_clones import RbdClones
from nova_imagecache.backends._rbd_names import DISK, disk_name, split_disk_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nova_imagecache.backends._rados import Image

_log = logging.getLogger(__name__)


class RbdDisks(RbdClones):
    """The root disks' half."""

    # --- making

    def create_root_disk(self, base: BaseImage, disk_id: str, name: str, size: int) -> RootDisk:
        final = disk_name(disk_id, name)
        if _rbd_look.named(self.store.io, final) is not None:
            raise DiskExistsError(image_id=base.image_id, disk_id=disk_id, name=name)
        self._refuse_replaced(base.image_id, disk_id, name)
        with self.store.room(), self.store.staging(final) as staging:
            rbd_id = None
            try:
                rbd_id = self._clone(base, staging, final, size)
                self.store.publish(rbd_id, staging, final)
            except BaseException as err:
                published = not self.store.drop(rbd_id or self.store.id_of(staging), staging, final)
                if isinstance(err, ExistsError) and not published:
                    raise DiskExistsError(image_id=base.image_id, disk_id=disk_id, name=name) from err
                raise
        self._refuse_replaced(base.image_id, disk_id, name, rbd_id)
        return self._told(disk_id, name, size, base.image_id)

    def _refuse_replaced(self, image_id: str, disk_id: str, name: str, made: str | None = None) -> None:
        """A disk whose attaching has not come to its end has no name, and is there all the same.

        ``made``: what got the name meanwhile, and goes again for it.
        """
        final = disk_name(disk_id, name)
        found = _rbd_going.replaced(self.store.io, final)
        # the new one itself may be attached by now
        if found and made not in found:
            if made is not None:
                # a guest that is quicker keeps it: recover keeps both then, and says so
                with suppress(NotThereError, BusyError):
                    _rbd_going.take_out(self.store, made, final, _rbd_going.going())
                    _rados.trash_remove(self.store.io, made)
            raise DiskExistsError(
                "the disk exists: attaching it to another base has not ended, and it waits in the pool's trash",
                image_id=image_id,
                disk_id=disk_id,
                name=name,
                stage="clone",
                todo="Call recover, which gives it its name back once nobody has it open, and then again",
            )

    # --- looking

    def _told(self, disk_id: str, name: str, size: int, image_id: str, *, parent: bool = True) -> RootDisk:
        return RootDisk(
            disk_id=disk_id,
            name=name,
            location=self.store.location(disk_name(disk_id, name)),
            format="raw",
            virtual_size=size,
            image_id=image_id,
            reference="clone" if parent else "none",
        )

    def get_root_disk(self, disk_id: str, name: str) -> RootDisk | None:
        final = disk_name(disk_id, name)
        if _rbd_look.named(self.store.io, final) is None:
            return None
        try:
            with _rbd_look.opened(self.store.io, final) as image:
                record = self._record(image, disk_id, name)
                if record is None:
                    return None
                cloned = _rbd_look.parent(image) is not None
                return self._told(disk_id, name, image.size(), record.image_id, parent=cloned)
        except NotThereError:
            return None

    def _record(self, image: Image, disk_id: str, name: str) -> _records.DiskRecord | None:
        text = _rbd_look.metadata(image, DISK)
        if text is None:  # an image of somebody else's
            return None
        try:
            return _records.load_disk(text.encode())
        except _records.RecordError as err:
            _log.warning("disk %s/%s: its record cannot be read: %s", disk_id, name, err)
            return None

    def iter_root_disks(self) -> Iterator[RootDisk]:
        for image_name in self.store.names():
            if (names := split_disk_name(image_name)) is None:
                continue
            try:
                disk = self.get_root_disk(*names)
            except BackendError as err:
                if err.retryable:  # nobody answers: a list that ends here would be a lie
                    raise
                _log.warning("image %s is left out: %s", image_name, err)
                continue
            if disk is not None:
                yield disk

    def _existing(self, disk_id: str, name: str) -> RootDisk:
        disk = self.get_root_disk(disk_id, name)
        if disk is None:
            raise DiskNotFoundError(disk_id=disk_id, name=name)
        return disk

    # --- changing

    def resize_root_disk(self, disk_id: str, name: str, size: int) -> RootDisk:
        disk = self._existing(disk_id, name)
        # librbd goes by the size that it last heard of: of two that grow the disk, one opens it when the other is done
        with (
            self.store.room(),
            self._claimed(disk_id, name) as rbd_id,
            self._change(disk_id, name) as image,
        ):
            if image.id() != rbd_id:
                raise BusyError("another disk has its name by now")
            try:
                _rados.resize(image, size)
            except RefusedError as err:
                # somebody else has made it larger since it was looked at
                if (least := image.size()) > size:
                    raise DiskTooSmallError(size, least, disk_id=disk_id, name=name) from err
                raise
        return replace(disk, virtual_size=size)

    def flatten_root_disk(self, disk_id: str, name: str) -> RootDisk:
        disk = self._existing(disk_id, name)
        if disk.reference == "none":
            return disk
        with self.store.room(), self._change(disk_id, name) as image:
            try:
                _rados.flatten(image)
            except RefusedError:
                if _rbd_look.parent(image) is not None:
                    raise
        return replace(disk, reference="none")

    @contextmanager
    def _claimed(self, disk_id: str, name: str) -> Iterator[str]:
        """Claim a disk for a change; its RBD id."""
        with ExitStack() as claim:
            try:
                rbd_id = self.store.id_of(disk_name(disk_id, name)) or ""
                claim.enter_context(self.store.claimed(rbd_id, "growing the disk"))
            except NotThereError as err:
                raise DiskNotFoundError(disk_id=disk_id, name=name) from err
            except BusyError as err:
                raise DiskInUseError(err.detail, disk_id=disk_id, name=name, stage="resize") from err
            yield rbd_id

    def _change(self, disk_id: str, name: str) -> _Changing:
        return _Changing(self, disk_id, name)

    # --- going

    def remove_root_disk(self, disk_id: str, name: str) -> None:
        final, rbd_id, mark = disk_name(disk_id, name), "", _rbd_going.going()
        # first of all: without its successor recover would give it the name back
        self._remove_replaced(disk_id, name)
        try:
            rbd_id = self.store.patiently(lambda: self._unused(disk_id, name))
            _rbd_going.take_out(self.store, rbd_id, final, mark)
            try:
                # attaching may have put it there since; while the trash has the successor recover gives no name back
                self._remove_replaced(disk_id, name, rbd_id)
            except DiskInUseError:
                with suppress(ExistsError):
                    self._put_back(rbd_id, final, mark)
                raise
            with suppress(NotThereError):
                self.store.patiently(lambda: _rados.trash_remove(self.store.io, rbd_id))
        except NotThereError as err:  # it was not there, or somebody else removed it
            self._remove_replaced(disk_id, name, rbd_id or None)
            if rbd_id and self.store.id_of(final) is not None:
                detail = "another host has attached it, or made it anew, meanwhile"
                todo = "Look whose it is, and try again"
                raise DiskInUseError(detail, disk_id=disk_id, name=name, stage="remove", todo=todo) from err
        except (BusyError, SnapshotsError) as err:
            if rbd_id := rbd_id or self.store.id_of(final) or "":
                raise self._in_use(rbd_id, disk_id, name, mark) from err

    def _remove_replaced(self, disk_id: str, name: str, of: str | None = None) -> None:
        try:
            _rbd_going.remove_replaced(self.store, disk_name(disk_id, name), of)
        except (BusyError, SnapshotsError) as err:
            todo = "Remove its snapshots first" if isinstance(err, SnapshotsError) else None
            raise DiskInUseError(err.detail, disk_id=disk_id, name=name, stage="remove", todo=todo) from err

    def _unused(self, disk_id: str, name: str) -> str:
        """The id of a disk that can be removed."""
        with _rbd_look.opened(self.store.io, disk_name(disk_id, name)) as image:
            if _rbd_look.metadata(image, DISK) is None:
                detail = "an image of that name is there, but nothing says that it is a root disk of this cache"
                todo = "Remove the image by hand if it is not needed"
                raise DiskNotFoundError(detail, disk_id=disk_id, name=name, todo=todo)
            if found := _rbd_look.snapshots(image):
                raise SnapshotsError(f"it has the snapshots {', '.join(found)}")
            if watchers := _rbd_look.watchers(image):
                raise BusyError(f"it is open at {', '.join(watchers)}")
            return image.id()

    def _put_back(self, rbd_id: str, final: str, mark: _rbd_going.Going | None = None) -> None:
        with suppress(NotThereError):
            _rbd_going.put_back(self.store, rbd_id, final, mark)

    def _in_use(self, rbd_id: str, disk_id: str, name: str, mark: _rbd_going.Going) -> DiskInUseError:
        watchers: list[str] = []
        snapshots: list[str] = []
        with suppress(NotThereError), _rbd_look.opened_by_id(self.store.io, rbd_id) as image:
            watchers, snapshots = _rbd_look.watchers(image), _rbd_look.snapshots(image)
        with suppress(ExistsError):
            self._put_back(rbd_id, disk_name(disk_id, name), mark)
        reason = f"open at {', '.join(watchers)}" if watchers else f"snapshots: {', '.join(snapshots) or 'hidden ones'}"
        todo = None if watchers else "Remove its snapshots first"
        return DiskInUseError(
            f"the root disk is in use ({reason})", disk_id=disk_id, name=name, stage="remove", todo=todo
        )


class _Changing:
    """A root disk open for a change; what is in the way comes out as DiskNotFoundError or DiskInUseError."""

    def __init__(self, disks: RbdDisks, disk_id: str, name: str) -> None:
        self._disks = disks
        self._names = (disk_id, name)
        self._image: Image | None = None

    def __enter__(self) -> Image:
        disk_id, name = self._names
        try:
            self._image = _rados.open_for_writing(self._disks.store.io, name=disk_name(disk_id, name))
        except NotThereError as err:
            raise DiskNotFoundError(disk_id=disk_id, name=name) from err
        return self._image

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        disk_id, name = self._names
        if self._image is not None:
            _rados.close_image(self._image)
        if isinstance(error, BusyError):
            raise DiskInUseError(error.detail, disk_id=disk_id, name=name) from error

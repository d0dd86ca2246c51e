"""Ties a clone to another base of the same bytes: a new clone that gets what differs, in the old one's place."""

from __future__ import annotations

from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from nova_imagecache import _entries
from nova_imagecache.backends import (
    BaseImage,
    BaseNotFoundError,
    DiskExistsError,
    DiskInUseError,
    DiskNotFoundError,
    RootDisk,
    _rados,
    _rbd_going,
    _rbd_look,
)
from nova_imagecache.backends._rados_errors import BusyError, ExistsError, NotThereError, StuckError, error_of
from nova_imagecache.backends._rbd_disks import RbdDisks
from nova_imagecache.backends._rbd_names import disk_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nova_imagecache.backends._rados import Image

_PIECE = 4 * 2**20


class AttachableDisks(RbdDisks):
    """Root disks that can be tied to a base again."""

    def attach_root_disk(self, base: BaseImage, disk_id: str, name: str) -> RootDisk:
        disk, final = self._existing(disk_id, name), disk_name(disk_id, name)
        self._refuse_other_bytes(base, disk_id, name)
        now = self.find_base(base.image_id)
        if disk.reference == "none":
            return disk
        if now is None or now.record != base.record:
            raise BaseNotFoundError("the base went away meanwhile", image_id=base.image_id, stage="attach")
        try:
            with _rbd_look.opened(self.store.io, final) as image:
                rbd_id, tied = image.id(), self._is_clone_of(image, now)
        except NotThereError as err:
            raise DiskNotFoundError(disk_id=disk_id, name=name) from err
        if not tied:
            with self.store.room():
                self._tie(now, rbd_id, disk)
        self.touch_base(now)
        return self._existing(disk_id, name)

    def _refuse_other_bytes(self, base: BaseImage, disk_id: str, name: str) -> None:
        with _rbd_look.opened(self.store.io, disk_name(disk_id, name)) as image:
            record = self._record(image, disk_id, name)
        if record is None:
            raise DiskNotFoundError(disk_id=disk_id, name=name)
        if record.digest is not None and base.digest is not None and record.digest.algorithm == base.digest.algorithm:
            same = record.digest == base.digest
        else:
            same = record.image_id == base.image_id
        if not same:
            raise DiskExistsError(
                f"the disk was made of image {record.image_id} ({record.digest}), not of these bytes ({base.digest})",
                image_id=base.image_id,
                disk_id=disk_id,
                name=name,
                stage="attach",
            )

    def _tie(self, base: BaseImage, old: str, disk: RootDisk) -> None:
        """Put a clone of ``base`` with the disk's content in the disk's place; the old one goes last of all."""
        final = disk_name(disk.disk_id, disk.name)
        with self.store.staging(final) as staging:
            new = None
            try:
                with _rbd_look.opened_by_id(self.store.io, old) as source:
                    _refuse_used(source, disk)
                new = self._clone(base, staging, final, disk.virtual_size)
                self._swap(base, old, new, staging, disk)
            except StuckError:
                raise  # this process has the new one open: it is left to recover
            except BaseException:
                self.store.drop(new or self.store.id_of(staging), staging, final)
                raise
        try:
            with suppress(NotThereError):
                self.store.patiently(lambda: _rados.trash_remove(self.store.io, old))
        except BusyError as err:
            detail = "the root disk is attached, but somebody has open what it was before"
            todo = "Call recover later, which removes that"
            raise DiskInUseError(detail, disk_id=disk.disk_id, name=disk.name, stage="attach", todo=todo) from err

    def _swap(self, base: BaseImage, old: str, new: str, staging: str, disk: RootDisk) -> None:
        final, mark = disk_name(disk.disk_id, disk.name), _rbd_going.going(by=new, maker=staging)
        try:
            # open for writing all the time, so that others see that the old one waits for it
            target = _Target(_rados.open_for_writing(self.store.io, image_id=new), self.store.longest)
            with self.store.left.closing(target.image, target.has_ended):
                # before anything is read: without a name nobody opens it any more
                _rbd_going.take_out(self.store, old, final, mark)
                with _rbd_look.opened_by_id(self.store.io, old) as source:
                    _refuse_used(source, disk)
                    if (size := source.size()) != disk.virtual_size:  # another host has grown it
                        _rados.resize(target.image, size)
                    _copy_differences(source, target)
                    _refuse_used(source, disk)  # who had found the name just before it went
            self.store.publish(new, staging, final)
        except BaseException as err:
            # nobody but us was told that it worked: the disk is the old one again
            with suppress(ExistsError):
                self._put_back(old, final, mark)
            if isinstance(err, (BusyError, NotThereError)):
                raise DiskInUseError(err.detail, disk_id=disk.disk_id, name=disk.name, stage="attach") from err
            if isinstance(err, ExistsError):
                detail, todo = "another disk has its name by now", "Call recover, which tells what became of both"
                raise DiskExistsError(
                    detail, image_id=base.image_id, disk_id=disk.disk_id, name=disk.name, stage="attach", todo=todo
                ) from err
            raise


def _refuse_used(image: Image, disk: RootDisk) -> None:
    if watchers := _rbd_look.watchers(image):
        detail = f"the root disk is in use (open at {', '.join(watchers)})"
        raise DiskInUseError(detail, disk_id=disk.disk_id, name=disk.name, stage="attach")
    if snapshots := _rbd_look.snapshots(image):
        # the new clone would not have them
        detail, todo = f"the root disk is in use (snapshots: {', '.join(snapshots)})", "Remove its snapshots first"
        raise DiskInUseError(detail, disk_id=disk.disk_id, name=disk.name, stage="attach", todo=todo)


class _Target:
    """The new clone, written piece by piece."""

    def __init__(self, image: Image, seconds: float) -> None:
        self.image = image
        self._seconds = seconds
        self._codes: SimpleQueue[int] = SimpleQueue()
        self._awaited = 0

    def write(self, offset: int, data: bytes) -> None:
        _rados.write(self.image, offset, data, self._codes.put)
        self._awaited += 1
        _rados.flush(self.image, self._codes.put)
        self._awaited += 1
        if (code := min(self._next(), self._next())) < 0:
            raise error_of(-code, "copying a disk's own data failed")

    def _next(self) -> int:
        try:
            code = self._codes.get(timeout=self._seconds)
        except Empty:
            raise StuckError("writes of a disk's own data neither end nor fail") from None
        self._awaited -= 1
        return code

    def has_ended(self) -> bool:
        return self._codes.qsize() >= self._awaited


def _copy_differences(source: Image, target: _Target) -> None:
    """Write to ``target`` whatever ``source`` holds otherwise; both are of one size. Reads all data of both."""
    # what neither holds anything in is zeros in both; a discarded object of a clone is told by its parent's data
    extents = [*_rbd_look.data_extents(source, fixed=False), *_rbd_look.data_extents(target.image, fixed=False)]
    for offset, length in _pieces(extents):
        _entries.go_on()
        wanted = _rbd_look.read(source, offset, length)
        if wanted != _rbd_look.read(target.image, offset, length):
            target.write(offset, wanted)


def _pieces(extents: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    position = 0
    for start, length in sorted(extents):
        end = start + length
        position = max(position, start)
        while position < end:
            step = min(_PIECE - position % _PIECE, end - position)
            yield position, step
            position += step

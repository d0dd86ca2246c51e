"""Root disks on files: what the backends ``file`` and ``qcow2`` share (layout 1).

::

    <disks_dir>/<disk-id>/<name>          the disk
                          <name>.json     its record: image, digest, format, reference, created size
                          <name>.base     an overlay's reference: a hard link to the base
                          .<name>.<random>/   a disk in the making

A disk appears by link(2) of a finished file to its final name, so that of two makers one wins and nothing is ever
overwritten. The directory of a disk id is held while its disks are made, changed or removed: what stands in it without
its disk and without a holder is dead, but for what a finished path reference leads to: that disk was moved.
"""

from __future__ import annotations

import abc
import errno
import logging
import os
import time
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from nova_imagecache import _entries, _fs, _qcow2, _qemu, _records
from nova_imagecache.backends import (
    BackendError,
    BaseImage,
    BaseNotFoundError,
    DiskExistsError,
    DiskNotFoundError,
    FileLocation,
    RootDisk,
)
from nova_imagecache.backends._making import Making
from nova_imagecache.backends._references import finish
from nova_imagecache.backends._seen import is_foreign
from nova_imagecache.backends._ties import TiedDisks, sides
from nova_imagecache.exceptions import DiskInUseError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from nova_imagecache._models import Reference

_log = logging.getLogger(__name__)


class FileDisks(TiedDisks):
    """The root disks' half of a backend on files."""

    # --- what the two backends do differently

    making_is_short: ClassVar[bool]
    """Whether a disk is made in less time than anybody waits for it: then its file needs no name meanwhile."""

    @abc.abstractmethod
    def _wanted_reference(self) -> Reference:
        """What ``_refer`` nearly always comes to."""

    @abc.abstractmethod
    def _refer(self, base: BaseImage, disk_id: str, name: str, link: Path, made_at: float) -> Reference:
        """Write down what will tie the disk to the base, before anything depends on it: ``link``, or its path.

        ``made_at`` is the disk record's own, by which a path reference is told from that of another disk of this name.
        """

    @abc.abstractmethod
    def _disk_format(self, base: BaseImage) -> str:
        """The format of a disk made from ``base``."""

    @abc.abstractmethod
    def _make(self, base: BaseImage, making: Making, name: str, size: int, reference: Reference) -> int:
        """The descriptor of the disk's finished file; its blocks, mode and sync come afterwards."""

    # --- making

    def create_root_disk(self, base: BaseImage, disk_id: str, name: str, size: int) -> RootDisk:
        directory = self._directory(disk_id)
        with _entries.held(directory) as made:
            try:
                return self._create_held(base, disk_id, name, size, own_directory=made)
            except BaseException:
                # also where we made it, another may have been first to hold it
                if made and not _fs.rmdir(directory):
                    self._hand_on_directory(disk_id)
                raise

    def _create_held(self, base: BaseImage, disk_id: str, name: str, size: int, *, own_directory: bool) -> RootDisk:
        directory = self._directory(disk_id)
        # whoever made it may be dead, or not the first to hold it; a disk that is there has made its name durable
        entries = set(_entries.names(directory))
        new_name = not any(f"{entry}.json" in entries for entry in entries)
        if entries:
            if os.path.lexists(directory / name):
                raise DiskExistsError(image_id=base.image_id, disk_id=disk_id, name=name)
            self._clear_place(directory, disk_id, name)
        making = Making(directory, name, nameless=self.making_is_short)
        try:
            disk = self._create(base, disk_id, name, size, making, own_directory=own_directory, new_name=new_name)
            making.close()
        except BaseException:
            if not making.is_at(directory / name):
                self._forget(directory, disk_id, name)
            making.close()
            raise
        return disk

    def _create(
        self,
        base: BaseImage,
        disk_id: str,
        name: str,
        size: int,
        making: Making,
        *,
        own_directory: bool,
        new_name: bool,
    ) -> RootDisk:
        directory = self._directory(disk_id)
        record = _records.DiskRecord(
            image_id=base.image_id,
            format=self._disk_format(base),
            reference=self._wanted_reference(),
            created_size=size,
            digest=base.digest,
            base_format=base.format,
            made_at=time.time(),
            own_directory=own_directory,
        )
        written = making.create("record", 0o644)
        try:
            _fs.write(written, 0, _records.dump_disk(record))
            # first of all: from it, whoever cleans up after us knows where our references are
            making.publish(written, directory / f"{name}.json")
            reference = self._refer(base, disk_id, name, directory / f"{name}.base", record.made_at)
            if reference != record.reference:
                record = replace(record, reference=reference)
                self._rewrite(disk_id, name, record)
            self.touch_base(base)
            self._still_there(base)
            made = self._make(base, making, name, size, reference)
            try:
                self._finish(made, size)
                # what is being written already goes with the record's sync: one commit of a journal instead of two
                _fs.start_writeback(made, 0, size)
                _fs.fsync(written)
                _fs.fsync(made)
                if new_name:
                    _fs.fsync_dir(directory.parent)
                making.publish(made, directory / name)
            except FileExistsError:
                raise DiskExistsError(image_id=base.image_id, disk_id=disk_id, name=name) from None
            finally:
                os.close(made)
        finally:
            os.close(written)
        _fs.fsync_dir(directory)
        if record.reference == "path":
            finish(self.user_record(base.image_id, disk_id, name), record.made_at)
        return self._disk(disk_id, name, record, size)

    def _finish(self, fd: int, size: int) -> None:
        """Group, mode, and blocks as configured."""
        if self.gid is not None:
            _fs.chown(fd, self.gid)
            _fs.chmod(fd, 0o660)
        self._preallocate(fd, size)

    def _preallocate(self, fd: int, size: int) -> None:
        if self.options.preallocate != "space":
            return
        try:
            _fs.allocate(fd, size)
        except OSError as err:
            if err.errno == errno.EOPNOTSUPP:
                todo = 'Set preallocate = "none", or put the disks on a filesystem with fallocate'
                raise BackendError("the filesystem cannot reserve blocks", stage="preallocate", todo=todo) from err
            raise

    def _still_there(self, base: BaseImage) -> None:
        """After the reference is written, see that the base is still the one given. Its remover looks the other way."""
        now = self.find_base(base.image_id)
        if now is None or now.record != base.record:
            raise BaseNotFoundError("the base went away meanwhile", image_id=base.image_id, stage="reference")

    # --- looking

    def _disk(self, disk_id: str, name: str, record: _records.DiskRecord, virtual_size: int) -> RootDisk:
        return RootDisk(
            disk_id=disk_id,
            name=name,
            location=FileLocation(path=self._directory(disk_id) / name),
            format=record.format,
            virtual_size=virtual_size,
            image_id=record.image_id,
            reference=record.reference,
        )

    def get_root_disk(self, disk_id: str, name: str) -> RootDisk | None:
        directory = self._directory(disk_id)
        while (record := self._load(directory, name)) is not None:
            damaged = None
            try:
                size = _virtual_size(directory / name, record)
            except FileNotFoundError:
                return None
            except _qcow2.Qcow2Error as err:
                damaged = err
            if self._load(directory, name) != record:  # another disk has its name by now
                continue
            if damaged is not None:
                detail = f"the disk is no qcow2 file any more: {damaged}"
                raise BackendError(detail, disk_id=disk_id, name=name) from damaged
            return self._disk(disk_id, name, record, size)
        return None

    def iter_root_disks(self) -> Iterator[RootDisk]:
        for disk_id, name in self._recorded():
            try:
                disk = self.get_root_disk(disk_id, name)
            except (BackendError, OSError) as err:  # one damaged or unreadable disk hides no other
                _log.warning("disk %s/%s is left out: %s", disk_id, name, err)
                continue
            if disk is not None:
                yield disk

    def _recorded(self) -> Iterator[tuple[str, str]]:
        for disk_id in _entries.names(self.paths.disks_dir):
            try:
                entries = _entries.names(self._directory(disk_id))
            except OSError as err:  # one directory hides no other
                if not (isinstance(err, PermissionError) and is_foreign(self._directory(disk_id))):
                    _log.warning("disks in %s are left out: %s", disk_id, err)
                continue
            for entry in entries:
                if entry.endswith(".json") and not entry.startswith("."):
                    yield disk_id, entry.removesuffix(".json")

    # --- changing

    @contextmanager
    def _changing(self, disk_id: str, name: str) -> Iterator[tuple[RootDisk, _records.DiskRecord]]:
        directory = self._directory(disk_id)
        held = _entries.hold(directory, wait=True, follow=True)
        try:
            record = self._settled(disk_id, name) if held is not None else None
            disk = self.get_root_disk(disk_id, name) if held is not None else None
            if disk is None or record is None:
                raise DiskNotFoundError(disk_id=disk_id, name=name)
            try:
                yield disk, record
            except DiskInUseError as err:
                raise DiskInUseError(image_id=record.image_id, disk_id=disk_id, name=name, stage=err.stage) from err
        finally:
            if held is not None:
                held.release()

    def remove_root_disk(self, disk_id: str, name: str) -> None:
        directory = self._directory(disk_id)
        held = _entries.hold(directory, wait=True, follow=True)
        if held is None:
            _entries.refuse_other(directory)  # its storage may not be mounted
            self._drop_references_by_name(disk_id, name)
            return
        try:
            record = self._settled(disk_id, name)
            if record is None and (directory / name).exists():
                raise DiskNotFoundError(
                    "a file of that name is there, but no record that it is a root disk of this cache",
                    disk_id=disk_id,
                    name=name,
                    todo="Remove the file by hand if it is not needed",
                )
            self._refuse_readers(disk_id, name, record)
            for each in sides(record):
                self._begin_ending(each, disk_id, name)
            _fs.unlink(directory / name)
            self._forget(directory, disk_id, name)
            own = record is not None and record.own_directory
            if not (own and _fs.rmdir(directory)):
                _fs.fsync_dir(directory)
                if own:
                    self._hand_on_directory(disk_id)
        finally:
            held.release()
        if record is None:
            self._drop_references_by_name(disk_id, name)

    def _hand_on_directory(self, disk_id: str) -> None:
        """Let a directory that was made for a disk go with another that is still in it."""
        for entry in _entries.names(self._directory(disk_id)):
            name = entry.removesuffix(".json")
            record = self._load(self._directory(disk_id), name) if name != entry and name[:1] != "." else None
            if record is None:
                continue
            try:
                if not record.own_directory:
                    self._rewrite(disk_id, name, replace(record, own_directory=True))
            except OSError as err:  # the disk is removed all the same; an empty directory stays when the other goes
                _log.warning("directory %s does not go with disk %s: %s", disk_id, name, err)
            return

    def resize_root_disk(self, disk_id: str, name: str, size: int) -> RootDisk:
        with self._changing(disk_id, name) as (disk, record):
            path = self._directory(disk_id) / name
            if size != disk.virtual_size:
                _qemu.resize(path, disk.format, size)
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                self._preallocate(fd, size)
                _fs.fsync(fd)
            finally:
                os.close(fd)
            self._rewrite(disk_id, name, replace(record, created_size=size))
            return replace(disk, virtual_size=size)

    def _same_bytes(self, base: BaseImage, record: _records.DiskRecord, disk_id: str, name: str) -> None:
        """Refuse to tie a disk to other bytes than it was made of: digests decide, image ids where there are none."""
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


def _virtual_size(disk: Path, record: _records.DiskRecord) -> int:
    try:
        with disk.open("rb", buffering=0) as file:
            if record.format == "raw":
                return os.fstat(file.fileno()).st_size
            # written by qemu-img, not by the guest: the guest sees what is inside
            return _qcow2.parse_header(file.read(_qcow2.HEADER_BYTES)).virtual_size
    except PermissionError:
        # libvirt gave the disk to the guest's user while it runs: what we wrote down last
        return record.created_size

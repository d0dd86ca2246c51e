"""What ties root disks on files to their bases: link, path reference and record; who else reads through them; and when
they go."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from nova_imagecache import _chains, _entries, _fs, _qcow2, _records
from nova_imagecache.backends import BackendError, DiskExistsError
from nova_imagecache.backends._endings import EndingReferences
from nova_imagecache.backends._references import (
    finish,
    host_record,
    is_of,
    moment,
    of_moment,
    others,
    read,
    refers_to,
    rename,
    unfinished,
)
from nova_imagecache.backends._seen import reader_of

if TYPE_CHECKING:
    from pathlib import Path


ATTEMPTS = 10
"""Of work beside others who make and end references of the same image."""


class TiedDisks(EndingReferences):
    """The references' part of a backend on files."""

    def _rewrite(self, disk_id: str, name: str, record: _records.DiskRecord) -> None:
        """Put a new record in place of a disk's old one; the directory is held."""
        directory = self._directory(disk_id)
        # beside it: the root may be another filesystem
        making = directory / f".{name}.{_fs.random_suffix()}"
        _fs.mkdir(making, 0o711)
        try:
            _fs.write_file(making / "record", _records.dump_disk(record), 0o644)
            _fs.rename(making / "record", directory / f"{name}.json")
            _fs.fsync_dir(directory)
        finally:
            _fs.rmtree(making)

    # --- an attach, at its end or after its death

    def _settled(self, disk_id: str, name: str) -> _records.DiskRecord | None:
        """A disk's record, when what an attach that died has left is settled; the directory is held.

        Where the header cannot be read, as while the guest runs, nothing can be told: it stays as it is.
        """
        record = self._load(self._directory(disk_id), name)
        return record if record is None or record.attaching is None else self._settle_attach(disk_id, name, record)

    def _settle_attach(self, disk_id: str, name: str, record: _records.DiskRecord) -> _records.DiskRecord:
        """Make the record say what the disk's header does, and take away what ties the disk to the other of the two
        images. The directory is held."""
        now = self._as_it_reads(disk_id, name, record)
        if now is None:
            return record
        for image_id in dict.fromkeys(side.image_id for side in sides(record)):
            if now.reference != "path" or image_id != now.image_id:
                self._drop_path_reference(replace(record, image_id=image_id), disk_id, name)
                # before the record forgets that there was one
                for directory in (self.user_record(image_id, disk_id, name).parent, self._users):
                    with suppress(FileNotFoundError):  # none made yet, or the last other disk took it along
                        _fs.fsync_dir(directory)
        link = self._directory(disk_id) / f"{name}.base"
        if now.reference != "link" and reader_of(link) is None:
            _fs.unlink(link)
        if now != self._load(link.parent, name):
            self._rewrite(disk_id, name, now)
        return now

    def _as_it_reads(self, disk_id: str, name: str, record: _records.DiskRecord) -> _records.DiskRecord | None:
        """The record of a disk that is being attached, by what its header says; None: that cannot be told."""
        disk = self._directory(disk_id) / name
        link = disk.with_name(f"{name}.base")
        try:
            with disk.open("rb", buffering=0) as file:
                base_format = _qcow2.read_backing_format(file)
                file.seek(0)
                named = _qcow2.read_backing_name(file)
            backing = _chains.backing_file(disk)
        except (OSError, _qcow2.Qcow2Error):
            return None
        now = replace(record, attaching=None, base_format=base_format or record.base_format)
        if not named:
            return replace(now, reference="none")
        if backing is None:  # a name that is none
            return None
        here = [side.image_id for side in reversed(sides(record))]
        if backing.name == link.name and is_same(backing.parent, link.parent):
            found = next((each for each in here if is_same(link, self.base_path(each))), record.image_id)
            return replace(now, reference="link", image_id=found)
        real = os.path.realpath(backing)
        found_by_path = next((each for each in here if real == os.path.realpath(self.base_path(each))), None)
        if found_by_path is None:  # it came from elsewhere, and nothing was changed yet
            return replace(record, attaching=None)
        return replace(now, reference="path", image_id=found_by_path)

    # --- a copy

    def _told_apart(self, disk_id: str, name: str, record: _records.DiskRecord) -> _records.DiskRecord:
        """A disk's record with a moment that no other disk has; the directory is held.

        A copy, and what may be one, gets a moment and a reference of its own. The reference that there was is the other
        disk's.
        """
        if record.attaching is not None or not self._is_copy(record, disk_id, name):
            return record
        disk = self._directory(disk_id) / name
        apart = replace(record, made_at=time.time())
        written = self.user_record(record.image_id, disk_id, name)
        if record.reference == "path":
            self._refer_unfinished(written, host_record(disk_id, name, disk, apart.made_at), apart.made_at)
        self._rewrite(disk_id, name, apart)
        if record.reference == "path":
            finish(written, apart.made_at)
            for left in of_moment(written.parent, record.made_at):
                if refers_to(left) == disk:
                    self._end_reference(left, record.made_at, disk)
        return apart

    def _refer_unfinished(self, written: Path, data: bytes, own: float) -> None:
        """Write the path reference of a disk that gets its name, or its moment, next."""
        for _attempt in range(ATTEMPTS):
            try:
                _fs.make_dirs(written.parent, 0o755)
                self._clear_unfinished(written, own)
                _entries.replace_file(unfinished(written), data, 0o644, staging=self.staging)
            except FileNotFoundError:  # the last other user of this image left and took the directory along
                continue
            return
        raise BackendError("the path reference cannot be written", image_id=written.parent.name)

    # --- who else reads through them

    def _reader(self, disk_id: str, name: str, record: _records.DiskRecord | None) -> str | None:
        """The file that reads the base by what ties this disk to it: a snapshot that libvirt made of the disk."""
        link = self._directory(disk_id) / f"{name}.base"
        by_path = record is not None and self._path_reference(record, disk_id, name) is not None
        if not by_path and not os.path.lexists(link):
            return None
        return reader_of(link, self.base_path(record.image_id) if record is not None and by_path else None)

    def _path_reference(self, record: _records.DiskRecord, disk_id: str, name: str) -> Path | None:
        """Where the finished path reference of this very disk is written, under whatever name; None: there is none."""
        written, disk = self.user_record(record.image_id, disk_id, name), self._directory(disk_id) / name
        if is_of(written, record.made_at, disk):
            return written
        if record.reference != "path":
            return None
        # under another name an unfinished one is of a removal that was in doubt
        return next((one for one in others(written.parent, record.made_at, disk) if one != unfinished(written)), None)

    def _begin_ending(self, record: _records.DiskRecord, disk_id: str, name: str) -> None:
        """Call the path reference of a disk that is removed unfinished: whoever finds one after a death ends it."""
        for _attempt in range(ATTEMPTS):
            if (written := self._path_reference(record, disk_id, name)) is None:
                return
            known = read(written)
            if known is None or moment(known) != record.made_at:  # another disk of that name has set it aside
                continue
            if rename(written, known, unfinished(self.user_record(record.image_id, disk_id, name))):
                return
        raise BackendError("its path reference gets ever other names", image_id=record.image_id, disk_id=disk_id)

    def _refuse_readers(self, disk_id: str, name: str, record: _records.DiskRecord | None) -> None:
        """Refuse to take away what another file reads through."""
        if reader := self._reader(disk_id, name, record):
            raise DiskExistsError(
                f"{reader} reads the base through what ties this disk to it",
                disk_id=disk_id,
                name=name,
                todo=f"Flatten or remove {reader} first",
            )

    # --- going

    def _clear_place(self, directory: Path, disk_id: str, name: str) -> None:
        """Make way for a disk of a name that is free: of what an earlier one left, a path reference alone stays."""
        record = self._load(directory, name)
        self._refuse_readers(disk_id, name, record)
        if record is not None and self._path_reference(record, disk_id, name) is not None:
            _fs.unlink(directory / f"{name}.json")  # its disk was moved elsewhere, and only remove_root_disk ends it
        else:
            self._forget(directory, disk_id, name)

    def _forget(self, directory: Path, disk_id: str, name: str) -> None:
        """Take away what belongs to a disk that never came to be, or is removed: link, path reference, record."""
        record = self._load(directory, name)
        _fs.unlink(directory / f"{name}.base")
        for side in sides(record):
            self._drop_path_reference(side, disk_id, name)
        # last of all: without it nobody knows where the path reference is
        _fs.unlink(directory / f"{name}.json")


def sides(record: _records.DiskRecord | None) -> list[_records.DiskRecord]:
    """A disk's record, and while it is being attached the same with the other image."""
    if record is None:
        return []
    return [record] if record.attaching is None else [record, replace(record, image_id=record.attaching)]


def is_same(one: Path, other: Path) -> bool:
    """Whether two paths lead to the same file or directory; one that leads nowhere does not."""
    try:
        return one.samefile(other)
    except (FileNotFoundError, NotADirectoryError):
        return False

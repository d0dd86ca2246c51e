"""What ties root disks on files to their bases: link, path reference and record; who else reads through them; and when
they go."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from typing import TYPE_CHECKING

from nova_imagecache import _chains, _entries, _fs, _qcow2, _records
from nova_imagecache.backends import DiskExistsError
from nova_imagecache.backends._files import FileBases
from nova_imagecache.backends._references import asides, is_unfinished, made_at, others, unfinished

if TYPE_CHECKING:
    from pathlib import Path

_log = logging.getLogger(__name__)


class TiedDisks(FileBases):
    """The references' part of a backend on files."""

    def _directory(self, disk_id: str) -> Path:
        return self.paths.disks_dir / disk_id

    def _load(self, directory: Path, name: str) -> _records.DiskRecord | None:
        try:
            return _records.load_disk((directory / f"{name}.json").read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except _records.RecordError as err:
            _log.warning("disk %s/%s: its record cannot be read: %s", directory.name, name, err)
            return None

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
                if self._users.is_dir():
                    _fs.fsync_dir(self._users)
                if (users := self.user_record(image_id, disk_id, name).parent).is_dir():
                    _fs.fsync_dir(users)
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
        written = self.user_record(record.image_id, disk_id, name)
        if made_at(written) == record.made_at:
            return written
        if record.reference != "path":
            return None
        found = others(written.parent, record.made_at, self._directory(disk_id) / name)
        return next((one for one in found if not is_unfinished(one)), None)

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

    def _drop_path_reference(self, record: _records.DiskRecord, disk_id: str, name: str) -> None:
        """Take the path reference of this very disk away, under whatever name it was made; no other disk's."""
        written = self.user_record(record.image_id, disk_id, name)
        # as it is called now, or when its directory was another: then all are read
        places = [written, unfinished(written)]
        own = [path for path in places if made_at(path) in (record.made_at, None) and path.exists()]
        disk = self._directory(disk_id) / name
        for path in own or others(written.parent, record.made_at, disk):
            _fs.unlink(path)
            _fs.rmdir(path.parent)

    def _drop_references_by_name(self, disk_id: str, name: str) -> None:
        """Take the path reference of a disk away whose directory or record is gone: the caller says that the disk is.

        One of a disk that lies in another directory now stays. Those of earlier disks of this name go when there is
        none of a later one.
        """
        written = [self.user_record(image_id, disk_id, name) for image_id in _entries.names(self._users)]
        there = [path for path in written if path.exists()]
        there = there or [aside for path in written for aside in asides(path)]
        if not there:
            return
        # held as by whoever makes a disk of this name, who writes its reference under the same hold
        directory = self._directory(disk_id)
        with _entries.held(directory) as made:
            try:
                if self._load(directory, name) is None and not os.path.lexists(directory / name):
                    self._drop_unseen(there, name)
            finally:
                if made:
                    _fs.rmdir(directory)

    def _drop_unseen(self, references: list[Path], name: str) -> None:
        """Take those path references away whose disk lies in none of the directories of disks."""
        elsewhere = set()
        for disk_id in _entries.names(self.paths.disks_dir):
            try:
                record = self._load(self._directory(disk_id), name)
            except OSError as err:
                directory = self._directory(disk_id)
                if is_foreign(directory) and not os.access(directory, os.X_OK, effective_ids=True):
                    continue
                _log.warning("%s stays: it may be of a disk in %s, which cannot be read: %s", references, disk_id, err)
                return
            if record is not None:
                elsewhere.add(record.made_at)
        for path in references:
            if made_at(path) not in elsewhere:
                _fs.unlink(path)
                _fs.rmdir(path.parent)


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


def is_foreign(directory: Path | str) -> bool:
    """Whether a directory that we may not enter is another user's, as lost+found is: nothing of ours is in it."""
    try:
        return os.stat(directory).st_uid != os.geteuid()  # noqa: PTH116 - one call
    except FileNotFoundError:  # gone meanwhile
        return True


def reader_of(link: Path, base: Path | None = None) -> str | None:
    """The name of another file in the directory that names ``link``, or ``base``, as its backing file; None: none does.

    ``link`` is ``<name>.base`` of a disk; neither it nor the disk counts. Nor does a disk that has a path reference of
    its own.
    """
    real = None if base is None else os.path.realpath(base)
    for name in _entries.names(link.parent):
        path = link.parent / name
        if name in (link.name, link.name.removesuffix(".base")) or not path.is_file():
            continue
        try:
            backing = _chains.backing_file(path)
        except OSError:  # unreadable: it may be anything's reader
            return name
        if backing is None:
            continue
        if backing.name == link.name:
            return name
        if real is not None and os.path.realpath(backing) == real:
            record = _chains.record_of(path)
            if record is None or record.reference != "path":
                return name
    return None

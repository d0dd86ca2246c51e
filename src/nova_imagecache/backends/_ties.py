"""What ties root disks on files to their bases: link, path reference and record; who else reads through them; and when
they go."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from nova_imagecache import _chains, _entries, _fs, _records
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
        if record is not None:
            self._drop_path_reference(record, disk_id, name)
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


def is_foreign(directory: Path | str) -> bool:
    """Whether a directory that we may not enter is another user's, as lost+found is: nothing of ours is in it."""
    try:
        return os.stat(directory).st_uid != os.geteuid()  # noqa: PTH116 - one call
    except FileNotFoundError:  # gone meanwhile
        return True


def reader_of(link: Path, base: Path | None = None) -> str | None:
    """The name of another file in the directory that names ``link``, or ``base``, as its backing file; None: none does.

    ``link`` is ``<name>.base`` of a disk; neither it nor the disk counts. Nor does a disk that has a path reference of
    its own, or is raw, whatever header its guest has written. A file that cannot be read may be anything's reader, but
    for a root disk, which has its own reference, and for what is called as no disk is.
    """
    real = None if base is None else os.path.realpath(base)
    for name in _entries.names(link.parent):
        path = link.parent / name
        if name in (link.name, link.name.removesuffix(".base")) or not path.is_file():
            continue
        try:
            backing = _chains.backing_file(path)
        except OSError:
            if _chains.record_of(path) is None and not _chains.is_called(name, _chains.NOT_DISKS):
                return name
            continue
        if backing is None:
            continue
        by_path = real is not None and os.path.realpath(backing) == real
        if backing.name != link.name and not by_path:
            continue
        record = _chains.record_of(path)
        if record is not None and (record.format == "raw" or (by_path and record.reference == "path")):
            continue
        return name
    return None

"""How path references end: with the last disk that needs one. A copy of a disk has its original's moment, and one
reference may stand for both; in doubt it stays."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from nova_imagecache import _entries, _fs, _records
from nova_imagecache.backends._files import FileBases
from nova_imagecache.backends._references import (
    aside,
    asides,
    end,
    host_record,
    is_of,
    leads_to,
    made_at,
    moment,
    of_moment,
    others,
    read,
    refers_to,
    rename,
    unfinished,
)
from nova_imagecache.backends._seen import reader_of, seen

if TYPE_CHECKING:
    from pathlib import Path

_log = logging.getLogger(__name__)
_ATTEMPTS = 5
"""Of passing a reference on to a disk that may go meanwhile."""


class EndingReferences(FileBases):
    """The part of a backend on files that ends path references."""

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

    def _end_reference(self, written: Path, own: float | None, disk: Path | None) -> bool:
        """Take a path reference away that the disk at ``disk``, made at ``own``, needs no longer; whether it went.

        If another disk of that moment is seen that needs one and has none, it stays, and is that one's from now on if
        this one is known. In doubt it stays as it is.
        """
        for _attempt in range(_ATTEMPTS):
            known = read(written)
            if known is None or moment(known) != own:  # another's has its name by now
                return False
            try:
                heir = None if own is None else self._heir(written, own, disk)
            except OSError as err:
                _log.warning("%s stays, another disk may need it: %s", written, err)
                return False
            if own is None or heir is None:
                return end(written, known)
            if disk is None or refers_to(written) == heir or self._pass_on(written, known, own, heir):
                return False
        return False

    def _pass_on(self, written: Path, known: bytes, own: float, heir: Path) -> bool:
        """Make the reference the heir's; False: it went, or needs none by now."""
        disk_id, name = heir.parent.name, heir.name
        passed = self.user_record(written.parent.name, disk_id, name)
        held = _entries.hold(heir.parent, wait=False, follow=True)
        try:
            if held is not None:
                record = self._load(heir.parent, name)
                if record is None or record.made_at != own:
                    return False
            if held is None or os.path.lexists(passed):  # where another may be writing
                passed = aside(passed)
            # first: from its name alone, whoever ends the heir knows it
            if not rename(written, known, passed):
                return False
            _entries.replace_file(passed, host_record(disk_id, name, heir, own), 0o644, staging=self.staging)
        finally:
            if held is not None:
                held.release()
        _log.info("%s is %s now, of another disk of that moment", written, passed)
        return True

    def _heir(self, written: Path, own: float, disk: Path | None) -> Path | None:
        """A disk that needs the reference of another one made at ``own``.

        Raises:
            OSError: it may be where nothing can be seen.
        """
        image_id = written.parent.name
        for found, record in seen(self._places(written), own, disk or refers_to(written)):
            if image_id not in (record.image_id, record.attaching) or not self._reads_by_path(found, record, image_id):
                continue
            if not any(refers_to(one) == found for one in of_moment(written.parent, own) if one != written):
                return found
        return None

    def _reads_by_path(self, disk: Path, record: _records.DiskRecord, image_id: str) -> bool:
        if record.reference == "none":  # it stands alone; a snapshot beside it may not
            return reader_of(disk.with_name(f"{disk.name}.base"), self.base_path(image_id)) is not None
        return record.reference == "path" or record.attaching is not None

    def _places(self, written: Path) -> list[Path]:
        """Directories of disks in which the disk of a reference may be: ours, and where it was made."""
        there = refers_to(written)
        return [self.paths.disks_dir] if there is None else [self.paths.disks_dir, there.parent.parent]

    def _is_copy(self, record: _records.DiskRecord, disk_id: str, name: str) -> bool:
        """Whether another disk of the same moment is seen: which of the two is the copy, nothing tells."""
        written = self.user_record(record.image_id, disk_id, name)
        if made_at(written) != record.made_at:
            written = next(iter(of_moment(written.parent, record.made_at)), written)
        try:
            return any(True for _ in seen(self._places(written), record.made_at, self._directory(disk_id) / name))
        except OSError as err:
            _log.warning("disk %s/%s: whether it is a copy cannot be seen: %s", disk_id, name, err)
            return False

    def _drop_path_reference(self, record: _records.DiskRecord, disk_id: str, name: str) -> None:
        """Take the path reference of this very disk away, under whatever name it was made; no other disk's."""
        written = self.user_record(record.image_id, disk_id, name)
        disk = self._directory(disk_id) / name
        # as it is called now, or when its directory was another: then all are read
        here = [path for path in (written, unfinished(written)) if path.exists()]
        own = [path for path in here if made_at(path) is None or is_of(path, record.made_at, disk)]
        if not own and record.reference != "link":
            own = others(written.parent, record.made_at, disk)
        for path in own:
            self._end_reference(path, record.made_at, disk)

    def _clear_unfinished(self, written: Path, own: float) -> None:
        """Make way for the reference of a disk that is made at ``own`` and whose directory is held: who left the one
        that has its name is dead."""
        left = unfinished(written)
        if not left.exists() or (found := made_at(left)) == own:
            return
        self._end_reference(left, found, None)
        if (known := read(left)) is not None:
            rename(left, known, aside(written))

    def _drop_references_by_name(self, disk_id: str, name: str) -> None:
        """Take the path reference of a disk away whose directory or record is gone: the caller says that the disk is.

        One of a disk that lies in another directory now stays. Those of earlier disks of this name go when there is
        none of a later one.
        """
        written = [self.user_record(image_id, disk_id, name) for image_id in _entries.names(self._users)]
        # where two directories of disks share a root, it may be of the other's disk of that name
        there = [path for path in written if _is_of_nobody(path)]
        there = there or [one for path in written for one in asides(path) if _is_of_nobody(one)]
        if not there:
            return
        # held as by whoever makes a disk of this name, who writes its reference under the same hold
        directory = self._directory(disk_id)
        with _entries.held(directory) as made:
            try:
                if self._load(directory, name) is None and not os.path.lexists(directory / name):
                    for path in there:
                        self._end_reference(path, made_at(path), None)
            finally:
                if made:
                    _fs.rmdir(directory)


def _is_of_nobody(written: Path) -> bool:
    """Whether a path reference is there, and leads to no disk."""
    known = read(written)
    if known is None:
        return os.path.lexists(written)
    own = moment(known)
    return own is None or not leads_to(written, own)

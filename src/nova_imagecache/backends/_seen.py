"""Which disks are seen in directories of disks: those of one moment, and the files that read through another's ties."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

from nova_imagecache import _chains, _entries, _records

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_LARGEST = 1 << 16
"""Bytes of a record: one read, as there may be thousands."""
_LOOKS = 5
"""Times that a directory is listed in which others rename what we look for."""


def seen(places: Iterable[Path], own: float, disk: Path | None) -> Iterator[tuple[Path, _records.DiskRecord]]:
    """The disks made at ``own`` whose records lie in the directories of ``places``, but for the one at ``disk``.

    A copy has its original's record. Reads all records; one disk may come more than once.

    Raises:
        OSError: there may be one where nothing can be seen.
    """
    here = None if disk is None else (os.path.realpath(disk.parent), disk.name)
    for place in {os.path.realpath(place): place for place in places}.values():
        for directory, name in _recorded(place, disk.name if disk is not None else "disk"):
            record = _record(directory, name)
            if record is not None and record.made_at == own and (os.path.realpath(directory), name) != here:
                yield place / os.path.basename(directory) / name, record  # noqa: PTH119 - names as text


def _recorded(place: Path, name: str) -> Iterator[tuple[str, str]]:
    """(directory, name) of each disk's record. A directory that is renamed while we look is looked for again."""
    walked: set[tuple[str, int]] = set()
    for _look in range(_LOOKS):
        moved = False
        for disk_id, inode in _named(place):
            if (disk_id, inode) in walked:
                continue
            directory = f"{place}/{disk_id}"
            try:
                names = os.listdir(directory)  # noqa: PTH208 - names, not paths
            except NotADirectoryError:
                continue
            except FileNotFoundError:
                moved = moved or not os.path.lexists(directory)
                continue
            except PermissionError:
                if not is_foreign(directory):
                    raise
                # one that can be entered, and not listed
                names = [f"{name}.json"] if os.access(directory, os.X_OK, effective_ids=True) else []
            walked.add((disk_id, inode))
            yield from (
                (directory, each.removesuffix(".json"))
                for each in names
                if each.endswith(".json") and not each.startswith(".")
            )
        if not moved:
            return
    raise OSError(errno.EAGAIN, "directories in it are being renamed", str(place))


def _named(place: Path) -> list[tuple[str, int]]:
    """(name, inode) of what stands in a directory; nothing where it is not there."""
    try:
        with os.scandir(place) as entries:
            return sorted((entry.name, entry.inode()) for entry in entries)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _record(directory: str, name: str) -> _records.DiskRecord | None:
    """The record of a disk; None: it is not there, or of nothing that reads a base by its path.

    Raises:
        OSError: nothing tells.
    """
    path = f"{directory}/{name}"
    try:
        fd = os.open(f"{path}.json", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            return _records.load_disk(os.read(fd, _LARGEST))
        finally:
            os.close(fd)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except _records.RecordError as err:  # damaged, of a newer version, or no record of ours: what its disk says
        backing = _chains.backing_file(Path(path))
        if backing is not None and not backing.name.endswith(".base"):
            raise OSError(errno.EUCLEAN, f"its record cannot be read: {err}", f"{path}.json") from err
        return None


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

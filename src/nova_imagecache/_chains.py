"""Which bases a disk's backing chain passes through, read from headers: what the finders share."""

from __future__ import annotations

import errno
import json
import logging
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from nova_imagecache import _qcow2, _records
from nova_imagecache._models import FileLocation
from nova_imagecache.exceptions import UsersUnknownError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from nova_imagecache._models import BaseImage

_CHAIN = 64
"""Overlays on overlays before a chain counts as endless."""

_NOWHERE = {
    errno.ENOENT: "removed while we looked, or never there",
    errno.ENOTDIR: "a path through a file",
    errno.EISDIR: "a directory",
    errno.ENAMETOOLONG: "no name that a file can have",
    errno.ELOOP: "symbolic links in a circle",
    errno.EINVAL: "a header that QEMU refuses",
    errno.ENXIO: "a socket",
}
"""What a name may lead to that QEMU could not open either."""

_log = logging.getLogger(__name__)


class KnownBases:
    """The bases that are asked about, by every name a chain may have for them."""

    def __init__(self, bases: Sequence[BaseImage]) -> None:
        self.image_ids = frozenset(base.image_id for base in bases)
        self._inodes: dict[tuple[int, int], str] = {}
        self._paths: dict[str, str] = {}
        for base in bases:
            if not isinstance(base.location, FileLocation):
                continue
            self._paths[os.path.normpath(base.location.path)] = base.image_id
            try:
                found = base.location.path.stat()
            except FileNotFoundError:  # retired: its other place is in the list as well
                continue
            self._inodes[found.st_dev, found.st_ino] = base.image_id

    def at(self, path: Path) -> str | None:
        """The image whose base is at this path now, or was."""
        by_path = self._paths.get(os.path.normpath(path))
        try:
            found = path.stat()
        except (OSError, ValueError):  # not there, not to be seen, or no name that a file can have
            return by_path
        return self._inodes.get((found.st_dev, found.st_ino)) or by_path


def uses(path: Path, known: KnownBases) -> Iterator[tuple[str, bool]]:
    """The images whose bases a disk's file depends on, and whether that is certain; none where there is no such file.

    Raises:
        UsersUnknownError: the file, or one that it reads through, cannot be read, and nothing says what it uses.
    """
    try:
        yield from ((image_id, True) for image_id in bases_below(path, known))
    except OSError as err:
        unreadable = Path(err.filename or path)
        record = record_of(unreadable)
        if record is None:
            todo = f"Let the cache's user read {unreadable}, or remove it"
            raise UsersUnknownError(f"{unreadable} cannot be read: {err.strerror}", todo=todo) from err
        # libvirt gives a running guest's disk to the guest's user; what we wrote beside it stays ours
        _log.info("%s cannot be read (%s): its record says image %s", unreadable, err.strerror, record.image_id)
        if record.reference != "none" and record.image_id in known.image_ids:
            yield record.image_id, False


def bases_below(path: Path, known: KnownBases) -> Iterator[str]:
    """The images whose bases the file's backing chain passes through; none where there is no such file.

    A chain that leads to nothing ends there: a guest may have written any header on a raw disk.

    Raises:
        OSError: a file of the chain is there and cannot be read; ``filename`` says which.
    """
    record = record_of(path)
    if record is not None and record.format == "raw":  # whatever header its guest has written
        return
    seen = {os.path.normpath(path)}
    current = path
    for _step in range(_CHAIN):
        named = _named(current)
        if named is None:
            return
        current = current.parent / named
        if os.path.normpath(current) in seen:  # a chain that bites its tail opens nowhere
            return
        seen.add(os.path.normpath(current))
        if (image_id := known.at(current)) is not None:
            yield image_id
            return  # a base reads through nothing


def _named(path: Path) -> str | None:
    """The path that a file's header names as its backing file; None: it names none, or cannot have a header.

    Raises:
        OSError: the file is there and cannot be read.
    """
    try:
        # without waiting: a header may name a pipe
        with open(path, "rb", buffering=0, opener=_open) as file:
            if not _may_hold_disk(os.fstat(file.fileno()).st_mode):
                return None
            named = _qcow2.read_backing_name(file)
    except ValueError:  # a NUL in the name
        return None
    except OSError as err:
        if err.errno in _NOWHERE:
            return None
        raise OSError(err.errno, err.strerror, str(path)) from err
    return (_file_of(named) if named.startswith("json:") else named.removeprefix("file:")) or None


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


def _may_hold_disk(mode: int) -> bool:
    return stat.S_ISREG(mode) or stat.S_ISBLK(mode)


def _file_of(named: str) -> str | None:
    """The file in a name such as QEMU's block jobs write: ``json:{"driver": ..., "file": {"filename": ...}}``."""
    try:
        options = json.loads(named.removeprefix("json:"))
    except (ValueError, RecursionError):
        return None
    while isinstance(options, dict):
        for key in ("filename", "file.filename"):
            if isinstance(options.get(key), str):
                return str(options[key])
        options = options.get("file")
    return None


def record_of(path: Path) -> _records.DiskRecord | None:
    """The record that was written beside a root disk when it was made, None: there is none that can be read."""
    try:
        return _records.load_disk(path.with_name(f"{path.name}.json").read_bytes())
    except (OSError, _records.RecordError):
        return None

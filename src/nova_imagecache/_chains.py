"""Which bases a disk's backing chain passes through, read from headers: what the finders share."""

from __future__ import annotations

import errno
import fnmatch
import json
import logging
import os
import stat
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from nova_imagecache import _qcow2, _records
from nova_imagecache._models import FileLocation
from nova_imagecache.exceptions import UsersUnknownError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from nova_imagecache._models import BaseImage

OF_DOMAIN = " of domain "
"""Between a disk's path and its domain's name, in what a hypervisor's finder tells of a user."""
NOT_DISKS = ("console.log", "console.log.*", "disk.info", "libvirt.xml", "lost+found", "swtpm", "unrescue.xml")
"""Names, as shell patterns, that hypervisors, drivers and filesystems give to what is no disk."""
_SHORTEN = "Merge overlays of its chain: virsh blockcommit while the guest runs, qemu-img commit while it does not"
_CHAIN = 64
"""Overlays on overlays that are looked through: what lies below more of them is doubt."""
_HEAD = 4096
"""Bytes that hold the header, and nearly always the backing file's name: a pass over thousands of disks reads once."""
_MAGIC = b"QFI\xfb"
_FIRST_QCOW = _MAGIC + b"\0\0\0\1"
_QED = b"QED\0"
"""Of two formats that QEMU reads still, and nobody makes any more."""
_LONGEST_NAME = 1023
"""Bytes of a backing file's name, by the specification."""

_NOWHERE = {
    errno.ENOENT: "removed while we looked, or never there",
    errno.ENOTDIR: "a path through a file",
    errno.EISDIR: "a directory",
    errno.ENAMETOOLONG: "no name that a file can have",
    errno.ELOOP: "symbolic links in a circle",
    errno.EINVAL: "an offset that no file has",
    errno.ENXIO: "a socket",
    errno.ESPIPE: "a pipe",
}
"""What a name may lead to that QEMU could not open either."""

_log = logging.getLogger(__name__)


class KnownBases:
    """The bases that are asked about, by every name a chain may have for them.

    ``damaged`` collects the files whose headers QEMU would refuse: they use nothing, and somebody should hear of them.
    """

    def __init__(self, bases: Sequence[BaseImage]) -> None:
        self.image_ids = frozenset(base.image_id for base in bases)
        self.damaged: dict[str, str] = {}
        self._inodes: dict[tuple[int, int], str] = {}
        self._links: dict[Path | str, str] = {}
        self._paths: dict[str, str] = {}
        self._ends: dict[str, str] = {}  # of their paths, as another mount of the root has them too
        reals: dict[str, str] = {}  # of the directories above, where an operator may have put symbolic links
        for base in bases:
            if not isinstance(base.location, FileLocation):
                continue
            path = str(base.location.path)
            self._paths[os.path.normpath(path)] = base.image_id
            above = os.path.dirname(os.path.dirname(path))  # noqa: PTH120 - thousands in a pass
            if (real := reals.get(above)) is None:
                real = reals[above] = os.path.realpath(above)
            self._paths[f"{real}{path.removeprefix(above)}"] = base.image_id
            if base.image_id in (end := _end(path)):
                self._ends[end] = base.image_id
            try:
                found = os.stat(path)  # noqa: PTH116 - thousands in a pass
            except FileNotFoundError:  # retired: its other place is in the list as well
                continue
            self._inodes[found.st_dev, found.st_ino] = base.image_id
        self.numbers = frozenset(number for _device, number in self._inodes)

    def __bool__(self) -> bool:
        """Whether there is any that a file could read through."""
        return bool(self._paths)

    def at(self, path: Path | str) -> str | None:
        """The image whose base is at this path now, or was."""
        if (image_id := self._links.get(path)) is not None:
            return image_id
        try:
            found = os.stat(path)  # noqa: PTH116 - thousands in a pass
        except ValueError:  # no name that a file can have
            return None
        except OSError:  # not there, or not to be seen
            normal = os.path.normpath(path)
            named = self._paths.get(normal) or self._paths.get(os.path.realpath(path))
            return named or self._ends.get(_end(normal))
        return self._inodes.get((found.st_dev, found.st_ino)) or self._paths.get(os.path.normpath(path))

    def is_name(self, path: str) -> bool:
        """Whether this is a base's own path, and not a link to it elsewhere."""
        normal = os.path.normpath(path)
        return normal in self._paths or _end(normal) in self._ends or os.path.realpath(path) in self._paths

    def is_one(self, entry: os.DirEntry[str]) -> bool:
        """Whether this entry of a directory is one of the bases, by another name, without a look where it cannot be.

        ``at`` remembers the name.
        """
        if entry.inode() not in self.numbers:
            return False
        try:
            found = entry.stat(follow_symlinks=False)
        except OSError:
            return False
        image_id = self._inodes.get((found.st_dev, found.st_ino))
        if image_id is not None:
            self._links[entry.path] = image_id
        return image_id is not None


def _end(path: str) -> str:
    """A path's last two names."""
    return "/".join(path.rsplit("/", 2)[-2:])


def uses(path: Path | str, known: KnownBases) -> Iterator[tuple[str, bool]]:
    """The images whose bases a disk's file depends on, and whether that is certain; none where there is no such file.

    Raises:
        UsersUnknownError: the file, or one that it reads through, cannot be read, and nothing says what it uses.
    """
    if _is_device(path):
        return
    try:
        image_id = base_below(path, known)
    except OSError as err:
        yield from by_record(err, known)
    else:
        if image_id is not None:
            yield image_id, True


def by_record(unreadable: OSError, known: KnownBases) -> Iterator[tuple[str, bool]]:
    """What the record beside a file that cannot be read says that the file uses.

    Raises:
        UsersUnknownError: there is none.
    """
    path = str(unreadable.filename)
    record = record_of(path)
    if record is None:
        deep = unreadable.errno == errno.ELOOP
        todo = _SHORTEN if deep else f"Let the cache's user read {path}, or remove it"
        raise UsersUnknownError(f"{path} cannot be read: {unreadable.strerror}", todo=todo) from unreadable
    # libvirt gives a running guest's disk to the guest's user; what we wrote beside it stays ours
    _log.info("%s cannot be read (%s): its record says image %s", path, unreadable.strerror, record.image_id)
    if record.reference != "none" and record.image_id in known.image_ids:
        yield record.image_id, False


def reads_by_name(path: Path | str, known: KnownBases) -> bool:
    """Whether a disk's chain leads to a base by the base's own name, so that it would read whatever takes that name.

    A hard link keeps its bytes. Of a chain that cannot be read the record beside the disk tells; without one it does.
    """
    try:
        found = _follow(os.fspath(path), known)
    except OSError:
        record = record_of(path)
        return record is None or record.reference == "path"
    return found is not None and known.is_name(found[1])


def base_below(path: Path | str, known: KnownBases) -> str | None:
    """The image whose base the file's backing chain leads to; None: to none, or there is no such file.

    A chain that leads to nothing ends there: a guest may have written any header on a raw disk.

    Raises:
        OSError: a file of the chain is there and cannot be read, or lies too deep; ``filename`` says which.
    """
    top = os.fspath(path)
    try:
        found = _follow(top, known)
    except OSError:
        if _is_raw(top):
            return None
        raise
    if found is None:
        return None
    image_id, through = found
    # a raw disk has no link of its own beside it: the record need not be asked
    if through != f"{top}.base" and _is_raw(top):
        return None
    return image_id


def _follow(top: str, known: KnownBases) -> tuple[str, str] | None:
    """(the image, the name by which the chain has its base)."""
    seen: set[str] = set()
    current = top
    for _step in range(_CHAIN):
        named = _named(current, known)
        if named is None:
            return None
        below = named if named.startswith("/") else f"{os.path.dirname(current)}/{named}"  # noqa: PTH120 - as above
        if (image_id := known.at(below)) is not None:
            return image_id, below  # a base reads through nothing
        seen.add(os.path.normpath(current))
        if os.path.normpath(below) in seen or _is_device(below):  # a chain that bites its tail opens nowhere
            return None
        current = below
    raise OSError(errno.ELOOP, f"it lies below {_CHAIN} overlays, and nobody looks further", current)


def _is_device(path: Path | str) -> bool:
    """Whether it is neither a file nor a disk, and to open it might do things. A guest may write any name."""
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116 - names as text
    except (OSError, ValueError):  # whoever opens it says why not
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISBLK(mode))


def _is_raw(path: str) -> bool:
    """Whether it is a raw disk of ours, whatever header its guest has written."""
    record = record_of(path)
    return record is not None and record.format == "raw"


def is_called(path: str, patterns: Iterable[str]) -> bool:
    """Whether a file's or directory's name is one of these shell patterns."""
    name = path.rpartition("/")[2]
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def backing_file(path: Path) -> Path | None:
    """The file that an overlay's header names, absolute; None: it names none, or there is no overlay.

    Raises:
        OSError: the overlay is there and cannot be read.
    """
    named = _named(str(path), None)
    return None if named is None else path.absolute().parent / named


def _named(path: str, known: KnownBases | None) -> str | None:
    """The path that a file's header names as its backing file; None: it names none, or cannot have a header.

    Raises:
        OSError: the file is there and cannot be read.
    """
    try:
        # without waiting: a header may name a pipe
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            head = os.pread(fd, _HEAD, 0)
            if not head.startswith((_MAGIC, _QED)):
                return None
            named = _backing_name(fd, head)
        finally:
            os.close(fd)
    except _qcow2.Qcow2Error as err:
        if known is not None:
            known.damaged[path] = str(err)
        return None
    except ValueError:  # a NUL in the name
        return None
    except OSError as err:
        if err.errno in _NOWHERE:
            return None
        raise OSError(err.errno, err.strerror, path) from err
    return (_file_of(named) if named.startswith("json:") else named.removeprefix("file:")) or None


def _backing_name(fd: int, head: bytes) -> str:
    """The backing file's name as it stands in the header; empty where there is none.

    Raises:
        Qcow2Error: QEMU takes no such header.
    """
    if head.startswith(_QED):
        offset, length = struct.unpack_from("<II", head.ljust(64), 56)
        furthest = _HEAD
    elif head.startswith(_FIRST_QCOW):
        offset, length = struct.unpack_from(">QI", head.ljust(64), 8)
        furthest = _HEAD
    else:
        header = _qcow2.parse_header(head)
        offset, length, furthest = header.backing_offset, header.backing_length, header.cluster_size
    if not offset:
        return ""
    if length > _LONGEST_NAME or offset > furthest:
        raise _qcow2.Qcow2Error("the backing file's name is out of place")
    name = head[offset : offset + length] if offset + length <= _HEAD else os.pread(fd, length, offset)
    return name.decode("utf-8", "surrogateescape")


def _file_of(named: str) -> str | None:
    """The file in a name such as QEMU's block jobs write: ``json:{"driver": ..., "file": {"filename": ...}}``.

    Each name may also stand in one, with dots: ``{"file.filename": ...}``. With a ``backing`` of its own it is read
    instead of what the file's header names: then that one's file.
    """
    try:
        options = dict(_dotted("", json.loads(named.removeprefix("json:"))))
    except (ValueError, RecursionError):
        return None
    at = ""
    while True:
        found = options.get(f"{at}filename")
        if any(key.startswith(f"{at}backing.") for key in options):
            at += "backing."
        elif isinstance(found, str):
            return found
        elif any(key.startswith(f"{at}file.") for key in options):
            at += "file."
        else:
            return None


def _dotted(name: str, value: object) -> Iterator[tuple[str, object]]:
    """The options in one and below it, each by its whole name."""
    if not isinstance(value, dict):
        yield name, value
    else:
        for key, below in value.items():
            yield from _dotted(f"{name}.{key}" if name else key, below)


def record_of(path: Path | str) -> _records.DiskRecord | None:
    """The record that was written beside a root disk when it was made, None: there is none that can be read."""
    try:
        return _records.load_disk(Path(f"{path}.json").read_bytes())
    except (OSError, ValueError):
        return None

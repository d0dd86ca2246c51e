"""Looks at bases on files: their records, marks, users and sizes. Changes nothing.

A hit is bound by its stats, and a pass by those of ten thousand bases: names are joined as text.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from nova_imagecache import _entries, _extents, _records
from nova_imagecache.backends import BaseImage, BaseRecord, DiskUser, FileLocation, Survey, UsersUnknownError
from nova_imagecache.backends._unreadable import of_nothing_known

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_log = logging.getLogger(__name__)
_Found = TypeVar("_Found")

_LOOKS = 100
"""Times that an image's path references are listed until all of them stand still."""
_RECORD = 8192
"""Bytes that hold any record we write, so that one read is enough."""


class Looks:
    """At the published bases of one root."""

    def __init__(self, root: Path) -> None:
        self._bases = root / "bases"
        self._users = root / "users"
        self._parsed: dict[str, tuple[tuple[int, int], BaseRecord]] = {}
        self._left: dict[str, str] = {}

    def find(self, image_id: str) -> BaseImage | None:
        """As Backend.find_base."""
        directory = f"{self._bases}/{image_id}"
        try:
            described = os.stat(f"{directory}/base.json")  # noqa: PTH116 - names as text
            record = self._record(image_id, directory, described)
            size = os.stat(f"{directory}/disk").st_size  # noqa: PTH116 - names as text
            if record is not None and size != record.size:
                again = os.stat(f"{directory}/base.json")  # noqa: PTH116 - names as text
                if _key(again) != _key(described):  # another base has its name by now
                    return self.find(image_id)
        except (FileNotFoundError, NotADirectoryError):
            self._parsed.pop(image_id, None)
            return None
        return self._base(image_id, record, size, mark(f"{directory}/last-used"), mark(f"{directory}/unused-since"))

    def bases(self) -> Iterator[BaseImage]:
        """As Backend.iter_bases."""
        for image_id in self._names():
            if (base := self._one(image_id, self.find)) is not None:
                yield base

    def survey(self) -> Iterator[Survey]:
        """As Backend.survey."""
        referenced: frozenset[str] | None
        try:
            referenced = frozenset(os.listdir(self._users))  # noqa: PTH208 - names, not paths
        except FileNotFoundError:
            referenced = frozenset()
        except OSError:  # each base will say so
            referenced = None

        def look(image_id: str) -> Survey | None:
            try:
                return self._look(image_id, referenced=referenced is None or image_id in referenced)
            except OSError:  # who asks for the users or the usage of this base alone hears why
                return Survey(base=base) if (base := self.find(image_id)) is not None else None

        for image_id in self._names():
            if (survey := self._one(image_id, look)) is not None:
                yield survey

    def left_alone(self) -> dict[str, str]:
        """What stands in the place of bases and cannot be read as one, by its name, and why. Looks at all bases."""
        for _base in self.bases():
            pass
        return dict(self._left)

    def why_left(self, image_id: str) -> str | None:
        """Why what stands in the base's place cannot be read as one; None: it can, or nothing is there.

        Raises:
            OSError: it cannot be seen now.
        """
        directory = f"{self._bases}/{image_id}"
        if self.find(image_id) is not None or not os.path.lexists(directory):
            return None
        if missing := _missing(directory):
            self._leave(image_id, f"it has no {missing}")
        return self._left.get(image_id)

    def allocated_left(self) -> tuple[dict[str, int], bool]:
        """(allocated bytes of what the last look left alone, by its name; whether all of it could be seen)."""
        found, complete = {}, True
        for name in tuple(self._left):
            path = self._bases / name
            try:
                status = path.lstat()
            except FileNotFoundError:  # gone meanwhile
                continue
            except OSError:
                complete = False
                continue
            below, whole = _extents.allocated_tree(path) if stat.S_ISDIR(status.st_mode) else (0, True)
            found[name] = status.st_blocks * 512 + below
            complete = complete and whole
        return found, complete

    def _names(self) -> list[str]:
        names = _entries.names(self._bases)
        for gone in set(self._left).difference(names) if self._left else ():
            self._left.pop(gone, None)
        if len(self._parsed) > len(names):  # others removed them, and nobody asks for them any more
            for gone in set(self._parsed).difference(names):
                self._parsed.pop(gone, None)
        return names

    def _one(self, image_id: str, look: Callable[[str], _Found | None]) -> _Found | None:
        """What a look of a pass finds, None: no base, which stops no other."""
        try:
            found = look(image_id)
        except OSError as err:
            self._leave(image_id, f"it cannot be read: {err}")
            return None
        if found is None and image_id not in self._left and (missing := _missing(f"{self._bases}/{image_id}")):
            self._leave(image_id, f"it has no {missing}")
        return found

    def _leave(self, image_id: str, why: str) -> None:
        """Remember what stands in a base's place and is none; said once."""
        if self._left.get(image_id) != why:
            self._left[image_id] = why
            _log.warning(
                "base %s is left alone: %s. Ensure it again, or remove it; `nova-imagecache check` tells of all such",
                image_id,
                why,
            )

    def _look(self, image_id: str, *, referenced: bool) -> Survey | None:
        """As ``find``, and what one listing tells besides; ``referenced``: there may be path references."""
        directory = f"{self._bases}/{image_id}"
        found: dict[str, os.stat_result] = {}
        try:
            blocks = _stat_entries(directory, found)
            record = self._record(image_id, directory, found["base.json"])
            disk = found["disk"]
        except (FileNotFoundError, NotADirectoryError, KeyError):
            self._parsed.pop(image_id, None)
            return None
        if record is not None and disk.st_size != record.size:
            # cut off; or listed while another base took its place
            again = self.find(image_id)
            return None if again is None else Survey(base=again)
        used, unused = found.get("last-used"), found.get("unused-since")
        base = self._base(image_id, record, disk.st_size, used and used.st_mtime, unused and unused.st_mtime)
        if base is None:
            return None
        users = (DiskUser(image_id=image_id, known_by="link"),) * (disk.st_nlink - 1)
        if referenced:
            users = (*self._path_users(image_id), *users)
        return Survey(base=base, users=users, allocated=blocks * 512)

    def _record(self, image_id: str, directory: str, described: os.stat_result) -> BaseRecord | None:
        key = _key(described)
        parsed = self._parsed.get(image_id)
        if parsed is None or parsed[0] != key:
            try:
                parsed = (key, _records.load_base(_read_bytes(f"{directory}/base.json")))
            except _records.RecordError as err:
                self._leave(image_id, f"its record cannot be read: {err}")
                return None
            self._parsed[image_id] = parsed
        return parsed[1]

    def _base(
        self,
        image_id: str,
        record: BaseRecord | None,
        size: int,
        last_used: float | None,
        unused_since: float | None,
    ) -> BaseImage | None:
        if record is None:
            return None
        if size != record.size:
            # cut off, by a damaged filesystem or a careless hand
            self._leave(image_id, f"it has {size} bytes of {record.size}")
            return None
        self._left.pop(image_id, None)
        return BaseImage(
            image_id=image_id,
            location=FileLocation(path=self._bases.joinpath(image_id, "disk")),
            record=record,
            last_used=last_used,
            unused_since=unused_since,
            inspected=_inspected(f"{self._bases}/{image_id}", record),
        )

    def users(self, image_id: str, path: Path) -> Iterator[DiskUser]:
        """As Backend.iter_users, of the base whose bytes are at ``path`` now.

        Raises:
            UsersUnknownError: references cannot be read.
        """
        try:
            yield from self._path_users(image_id)
            links = _links(path)
        except OSError as err:
            todo = f"Let the cache's user read {self._users}, and see why it cannot"
            raise UsersUnknownError(f"references cannot be read: {err}", image_id=image_id, todo=todo) from err
        for _number in range(links):
            yield DiskUser(image_id=image_id, known_by="link")

    def _path_users(self, image_id: str) -> list[DiskUser]:
        directory = f"{self._users}/{image_id}"
        for _look in range(_LOOKS):
            try:
                names = sorted(os.listdir(directory))  # noqa: PTH208 - names, not paths
            except FileNotFoundError:
                return []
            try:
                return [_path_user(image_id, directory, name) for name in names]
            except FileNotFoundError:  # of a disk that was removed; or it has another name now
                continue
        raise OSError(errno.EAGAIN, "path references come and go all the time", directory)


def _key(record: os.stat_result) -> tuple[int, int]:
    """What stands for a published record's content, which never changes."""
    return record.st_ino, record.st_mtime_ns


def _path_user(image_id: str, directory: str, name: str) -> DiskUser:
    try:
        values = json.loads(_read_bytes(f"{directory}/{name}"))
        disk_id, disk_name, path = values["disk_id"], values["name"], str(values["path"])
    except (ValueError, TypeError, KeyError):
        # an unreadable record is still somebody's
        return DiskUser(image_id=image_id, known_by="path", detail=name, certain=False)
    # a path that is gone may have moved: doubt, which keeps the base; so did what was set aside
    return DiskUser(
        image_id=image_id,
        known_by="path",
        disk_id=disk_id,
        name=disk_name,
        detail=path,
        certain="~" not in name and os.path.exists(path),  # noqa: PTH110 - thousands in a pass
    )


def _missing(directory: str) -> str | None:
    """Which part a base lacks that has its name; None: none, or there is no such name (any more)."""
    if not os.path.lexists(directory):
        return None
    parts = ("base.json", "disk")
    missing = next((part for part in parts if not os.path.lexists(f"{directory}/{part}")), None)
    return missing if os.path.lexists(directory) else None


def _links(path: Path) -> int:
    try:
        return os.stat(path).st_nlink - 1  # noqa: PTH116 - one call
    except FileNotFoundError:
        return 0


def retired_base(image_id: str, directory: Path) -> BaseImage | None:
    """The base in a directory of the trash, None: it has no bytes. One that cannot be read was retired as well."""
    try:
        record = _records.load_base((directory / "base.json").read_bytes())
    except (OSError, _records.RecordError):
        there = os.path.lexists(directory / "disk")
        return of_nothing_known(image_id, directory) if there else None
    return BaseImage(image_id=image_id, location=FileLocation(path=directory / "disk"), record=record)


def allocated_in(directory: str) -> int:
    """The bytes that a base's directory takes, and all that is in it.

    Raises:
        FileNotFoundError: the base is not there, or was taken away while it was counted.
    """
    found: dict[str, os.stat_result] = {}
    blocks = _stat_entries(directory, found)
    if not {"base.json", "disk"} <= found.keys():
        raise FileNotFoundError(errno.ENOENT, "no base is there", directory)
    return blocks * 512


def mark(path: str | Path) -> float | None:
    """When a mark was set, POSIX seconds; None: there is none."""
    try:
        return os.stat(path).st_mtime  # noqa: PTH116 - a hit is stat-bound
    except FileNotFoundError:
        return None


def _stat_entries(directory: str, found: dict[str, os.stat_result]) -> int:
    """Put the status of each entry into ``found``; the blocks of 512 bytes of all, and of the directory."""
    blocks = os.stat(directory).st_blocks  # noqa: PTH116 - thousands in a pass
    with os.scandir(directory) as entries:
        for entry in entries:
            try:
                found[entry.name] = status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:  # a mark that was taken away meanwhile
                continue
            blocks += status.st_blocks
            if stat.S_ISDIR(status.st_mode):  # somebody's: a base has none
                below, whole = _extents.allocated_tree(Path(entry.path))
                if not whole:
                    raise PermissionError(errno.EACCES, "it cannot be counted", entry.path)
                blocks += below // 512
    return blocks


def _read_bytes(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # records are small, and a large buffer is mapped and unmapped each time
        data = piece = os.read(fd, _RECORD)
        while len(piece) == _RECORD:
            piece = os.read(fd, _RECORD)
            data += piece
        return data
    finally:
        os.close(fd)


def _inspected(directory: str, record: BaseRecord) -> int:
    if record.format == "raw":  # never parsed by anybody, so never looked at again
        return record.inspector
    try:
        return max(int(Path(directory, "inspected").read_text()), record.inspector)
    except (OSError, ValueError):  # no such mark yet, or a damaged one: look again
        return record.inspector

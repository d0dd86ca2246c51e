"""Bases on files: what the backends ``file`` and ``qcow2`` share (layout 1).

::

    <root>/bases/<image-id>/disk  base.json  disk.sums  last-used  unused-since  inspected
           staging/<image-id>.<random>/     quarantine/<image-id>.<random>/     trash/   as _trash says
           users/<image-id>/<disk-id>.<name>.json        path references

The directory ``bases/<image-id>`` exists exactly when the base is complete: publishing and retiring are renames of it.
A root disk's hard link to ``disk`` is a reference that the filesystem counts; its inode has one name in the cache.
"""

from __future__ import annotations

import errno
import grp
import logging
import os
import stat
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nova_imagecache import _entries, _extents, _fs
from nova_imagecache.backends import (
    Backend,
    BackendError,
    BackendPaths,
    BaseImage,
    BaseNotFoundError,
    BaseWriter,
    Capacity,
    ConfigError,
    DiskUsage,
    DiskUser,
    FileLocation,
    Retired,
    Survey,
    Unreadable,
    UsersUnknownError,
    _reown,
)
from nova_imagecache.backends._looks import Looks, allocated_in, mark
from nova_imagecache.backends._trash import Trash, move_away
from nova_imagecache.backends._unreadable import unreadable
from nova_imagecache.backends._writer import FileOptions, FileWriter
from nova_imagecache.exceptions import BaseInUseError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

_APART = frozenset({"bases", "staging", "trash", "quarantine"})
"""Directories of the root whose content has figures of its own."""

_AROUND = frozenset({"users", "pins", "locks", "refused", "revoked", "hosts", "adopted", "templates"})
_OF_MKFS = "lost+found"
"""Closed to all but the superuser, and empty."""

_log = logging.getLogger(__name__)


class FileBases(Backend):
    """The bases' half of a backend on files."""

    def __init__(self, options: Mapping[str, Any], paths: BackendPaths) -> None:
        self.options = FileOptions.parse(options)
        self.paths = paths
        self.staging = paths.root / "staging"
        self._bases = paths.root / "bases"
        self.trash = Trash(paths.root)
        self._quarantine = paths.root / "quarantine"
        self._users = paths.root / "users"
        self._looks = Looks(paths.root)
        self.gid: int | None = None
        if paths.group is not None:
            try:
                self.gid = grp.getgrnam(paths.group).gr_gid
            except KeyError:
                raise ConfigError([f"group: there is no group {paths.group!r} on this host"]) from None

    @property
    def directory_mode(self) -> int:
        """Of directories that hold bases: for the group, or for whoever knows an image id."""
        return 0o750 if self.gid is not None else 0o711

    @property
    def wanted_base_format(self) -> str | None:
        return "raw" if self.options.base_format == "raw" else None

    def open_up(self, path: Path, mode: int) -> None:
        """Give a finished file or directory its final group and mode."""
        if self.gid is not None:
            _fs.chown(path, self.gid)
        _fs.chmod(path, mode)

    # --- finding

    def base_path(self, image_id: str) -> Path:
        """Where the base's bytes are, while it is published."""
        return self._bases / image_id / "disk"

    def find_base(self, image_id: str) -> BaseImage | None:
        return self._looks.find(image_id)

    def iter_bases(self) -> Iterator[BaseImage]:
        return self._looks.bases()

    def survey(self) -> Iterator[Survey]:
        return self._looks.survey()

    def left_alone(self) -> dict[str, str]:
        """What stands in the place of bases and cannot be read as one, by its name, and why."""
        return self._looks.left_alone()

    def find_unreadable(self, image_id: str) -> Unreadable | None:
        reason = self._looks.why_left(image_id)
        try:
            return None if reason is None else unreadable(image_id, reason, self._bases / image_id)
        except FileNotFoundError:  # gone meanwhile
            return None

    # --- making

    def stage_base(self, image_id: str, format: str) -> BaseWriter:  # noqa: A002, ARG002 - the contract's name; files hold any
        return FileWriter(self, image_id)

    def publish(self, image_id: str, directory: Path) -> BaseImage:
        """Rename the finished directory to its final name, or leave it and return the base of whoever was first."""
        if not self._bases.is_dir():
            _fs.make_dirs(self._bases, self.directory_mode)
            self.open_up(self._bases, self.directory_mode)
        for _attempt in range(3):
            try:
                _fs.rename(directory, self._bases / image_id)
            except OSError as err:
                if err.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):  # the name is taken
                    raise
                if (winner := self.find_base(image_id)) is not None:
                    return winner
                # taken by something unreadable, or retired just now
                with suppress(FileNotFoundError):
                    move_away(self._bases / image_id, self._quarantine)
                continue
            _fs.fsync_dir(self._bases)
            if (base := self.find_base(image_id)) is not None:
                return base
        raise BackendError("the base cannot be published: something keeps taking its name", image_id=image_id)

    def touch_base(self, base: BaseImage) -> None:
        directory = self._bases / base.image_id
        with suppress(FileNotFoundError, PermissionError):  # retired meanwhile; or of another user: a lost touch
            _fs.unlink(directory / "unused-since")
            _fs.touch(directory / "last-used")

    def mark_unused(self, base: BaseImage, when: float | None) -> None:
        directory = self._bases / base.image_id
        with suppress(FileNotFoundError):  # retired meanwhile
            if when is None:
                _fs.unlink(directory / "unused-since")
            else:
                _fs.touch(directory / "unused-since", when)

    def mark_inspected(self, base: BaseImage, version: int) -> None:
        directory = self._bases / base.image_id
        with suppress(FileNotFoundError):  # retired meanwhile
            _entries.replace_file(directory / "inspected", str(version).encode(), 0o444, staging=self.staging)

    def read_sums(self, base: BaseImage) -> memoryview | None:
        try:
            return _extents.content(_path(base).parent / "disk.sums")
        except FileNotFoundError:
            return None

    # --- users

    def user_record(self, image_id: str, disk_id: str, name: str) -> Path:
        """Where the path reference of a root disk is written down."""
        # both parts may hold dots: those of the name (the shorter one, for the sake of the 255 bytes that a file's name
        # may have) are written otherwise, so that no two disks share a record
        return self._users / image_id / f"{disk_id}.{name.replace('.', '%2e')}.json"

    def iter_users(self, base: BaseImage) -> Iterator[DiskUser]:
        return self._looks.users(base.image_id, _path(base))

    # --- going

    def retire_base(self, base: BaseImage) -> Retired:
        try:
            token = self.trash.retire(base.image_id)
        except FileNotFoundError:
            raise BaseNotFoundError(image_id=base.image_id, stage="retire") from None
        # a use that was noted meanwhile is told: whoever noted it may have found the base still there
        retired = replace(
            base,
            location=FileLocation(path=self.trash.path / token / "disk"),
            last_used=mark(self.trash.path / token / "last-used"),
        )
        return Retired(base=retired, token=token)

    def restore_base(self, retired: Retired) -> None:
        self.trash.restore(retired.token)

    def purge_base(self, retired: Retired) -> None:
        self.trash.purge(retired.token)

    def quarantine_base(self, base: BaseImage) -> None:
        directory = self._bases / base.image_id
        with suppress(FileNotFoundError):  # gone already
            token = move_away(directory, self._quarantine)
            # the second look: who came to name it meanwhile would not open without it
            try:
                users = [user for user in self.iter_users(base) if user.known_by != "link"]
            except UsersUnknownError:
                _fs.rename(self._quarantine / token, directory)
                raise
            if users:
                _fs.rename(self._quarantine / token, directory)
                raise BaseInUseError(users, image_id=base.image_id, stage="quarantine")

    def reown_base(self, base: BaseImage, damage: Callable[[BaseImage], str | None]) -> bool:
        try:
            if _path(base).stat().st_uid == os.geteuid():
                return False
        except FileNotFoundError:
            raise BaseNotFoundError(image_id=base.image_id, stage="re-own") from None
        _reown.reown_base(self, base, damage)
        return True

    # --- figures

    def usage(self, base: BaseImage) -> DiskUsage:
        try:
            allocated = allocated_in(os.path.dirname(_path(base)))  # noqa: PTH120 - thousands in a pass
        except FileNotFoundError:
            raise BaseNotFoundError(image_id=base.image_id, stage="usage") from None
        return DiskUsage(virtual_size=base.virtual_size, allocated=allocated)

    def capacity(self) -> Capacity:
        figures = os.statvfs(self.paths.root)
        staging, whole = _extents.allocated_tree(self.staging)
        trash, also = _extents.allocated_tree(self.trash.path)
        quarantine, too = _extents.allocated_tree(self._quarantine)
        left_alone, seen = self._looks.allocated_left()
        overhead, around = self._overhead()
        return Capacity(
            total=figures.f_blocks * figures.f_frsize,
            free=figures.f_bavail * figures.f_frsize,
            staging=staging,
            trash=trash + quarantine,
            overhead=overhead,
            left_alone=left_alone,
            complete=whole and also and too and seen and around,
        )

    def _overhead(self) -> tuple[int, bool]:
        """(allocated bytes of the root but for what is in bases, staging, trash, quarantine and disks; whether all of
        them could be counted)."""
        root, complete = self.paths.root, True
        device, total = root.stat().st_dev, _extents.allocated(root)
        disks = self.paths.disks_dir.relative_to(root).parts[:1] if self.paths.disks_dir.is_relative_to(root) else ()
        try:
            names = os.listdir(root)  # noqa: PTH208 - names, not paths
        except OSError:
            names, complete = sorted(_AROUND | _APART), False
        for name in names:
            if name in disks:
                continue
            total += _extents.allocated(root / name)
            if name in _APART or (name not in _AROUND and not _is_own_directory(root / name, device)):
                continue
            below, whole = _extents.allocated_tree(root / name)
            total += below
            complete = complete and (whole or name == _OF_MKFS)
        return total, complete


def _is_own_directory(path: Path, device: int) -> bool:
    """Whether it is a directory, and no other filesystem's."""
    try:
        status = path.lstat()
    except OSError:  # gone meanwhile
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_dev == device


def _path(base: BaseImage) -> Path:
    if not isinstance(base.location, FileLocation):
        raise BackendError("not a base of this backend", image_id=base.image_id)
    return base.location.path

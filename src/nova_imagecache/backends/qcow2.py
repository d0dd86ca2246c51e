"""Backend ``qcow2``: a root disk is an overlay on its base, as qemu-img makes it, tied to it by a hard link."""

from __future__ import annotations

import errno
import logging
import os
from dataclasses import replace
from typing import TYPE_CHECKING

from nova_imagecache import _fs, _qcow2, _qemu
from nova_imagecache.backends import (
    BackendError,
    BackendPaths,
    BackendProperties,
    BaseImage,
    BaseNotFoundError,
    Fact,
    RootDisk,
)
from nova_imagecache.backends._checks import check_files
from nova_imagecache.backends._recovery import RecoverableDisks
from nova_imagecache.backends._references import (
    host_record,
    made_at,
    others,
    refers_to,
    write,
)
from nova_imagecache.backends._templates import Templates
from nova_imagecache.backends._ties import ATTEMPTS, is_same

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from typing import Any

    from nova_imagecache._models import Reference
    from nova_imagecache._records import DiskRecord
    from nova_imagecache.backends._making import Making

_log = logging.getLogger(__name__)

_NO_LINK = {
    errno.EPERM: "the base is not ours to link (libvirt may have changed its owner), or the filesystem has no links",
    errno.EMLINK: "the base has as many links as its filesystem allows",
    errno.EXDEV: "cache and disks are on different filesystems",
}
"""Why a link cannot be, where the base's path serves instead."""

_SHORTER = "Put the root at a shorter path, or cache and disks on one filesystem, so that disks are tied by links"


class Qcow2Backend(RecoverableDisks):
    """Overlays. A hard link ``<name>.base`` beside the disk is its backing file, so that the base's bytes live as long
    as the disk whatever happens to the cache, and the filesystem counts the users."""

    properties = BackendProperties(base_formats=("raw", "qcow2"), disk_kind="overlay", storage="files")

    def __init__(self, options: Mapping[str, Any], paths: BackendPaths) -> None:
        super().__init__(options, paths)
        self._said: set[int] = set()
        self._templates = Templates(paths.root)

    def check(self) -> list[Fact]:
        return check_files(self)

    # --- making

    making_is_short = True

    def _wanted_reference(self) -> Reference:
        return "path" if self.options.reference == "path" else "link"

    def _refer(self, base: BaseImage, disk_id: str, name: str, link: Path, made_at: float) -> Reference:
        if self._link(base, link):
            return "link"
        # the record of the disk before what only it explains
        self._sync(self._directory(disk_id) / f"{name}.json")
        _fs.fsync_dir(self._directory(disk_id))
        self._refer_by_path(base, disk_id, name, made_at)
        return "path"

    def _link(self, base: BaseImage, link: Path) -> bool:
        """Whether the base has this link now; False: its path must serve."""
        if self.options.reference == "path":
            return False
        try:
            _fs.link(self.base_path(base.image_id), link)
        except FileNotFoundError:
            raise BaseNotFoundError(image_id=base.image_id, stage="reference") from None
        except OSError as err:
            if err.errno not in _NO_LINK or self.options.reference == "link":
                raise
            self._say(err.errno, base.image_id)
            return False
        return True

    def _refer_by_path(self, base: BaseImage, disk_id: str, name: str, made_at: float) -> None:
        disk = self._directory(disk_id) / name
        written = self.user_record(base.image_id, disk_id, name)
        data = host_record(disk_id, name, disk, made_at)
        if not os.path.lexists(disk):
            self._refer_unfinished(written, data, made_at)
            return
        for _attempt in range(ATTEMPTS):
            try:
                _fs.make_dirs(written.parent, 0o755)
                write(written, data, made_at, staging=self.staging)
            except FileNotFoundError:  # the last other user of this image left and took the directory along
                continue
            for other in others(written.parent, made_at, disk):  # it was called otherwise: once is enough
                if other != written:
                    self._end_reference(other, made_at, disk)
            return
        raise BackendError("the path reference cannot be written", image_id=base.image_id, disk_id=disk_id)

    def _say(self, code: int, image_id: str) -> None:
        if code not in self._said:
            self._said.add(code)
            _log.warning("base %s: a path reference instead of a link: %s (said once)", image_id, _NO_LINK[code])

    def _backing(self, base: BaseImage, name: str, reference: Reference) -> str:
        # relative: a moved directory takes its link along. Absolute: the only name there is
        return f"{name}.base" if reference == "link" else str(self.base_path(base.image_id))

    def _disk_format(self, base: BaseImage) -> str:  # noqa: ARG002 - an overlay on whatever base
        return "qcow2"

    def _make(self, base: BaseImage, making: Making, name: str, size: int, reference: Reference) -> int:
        cluster_size = self._cluster_size(base)
        backing = self._backing(base, name, reference)
        template = self._templates.get(base.format, cluster_size, size)
        fd = making.create(name, 0o600)
        try:
            template.write(fd, backing)
        except BaseException as err:
            os.close(fd)
            if isinstance(err, _qcow2.Qcow2Error):
                raise BackendError(str(err), image_id=base.image_id, stage="overlay", todo=_SHORTER) from err
            raise
        return fd

    def _cluster_size(self, base: BaseImage) -> int | None:
        if base.format != "qcow2":
            return None
        try:
            with self.base_path(base.image_id).open("rb", buffering=0) as file:
                return _qcow2.parse_header(file.read(_qcow2.HEADER_BYTES)).cluster_size
        except FileNotFoundError:
            raise BaseNotFoundError(image_id=base.image_id, stage="overlay") from None

    # --- changing

    def flatten_root_disk(self, disk_id: str, name: str) -> RootDisk:
        with self._changing(disk_id, name) as (disk, record):
            directory = self._directory(disk_id)
            if record.reference != "none":
                _qemu.flatten(directory / name, disk.virtual_size)
                self._sync(directory / name)
                self._rewrite(disk_id, name, replace(record, reference="none"))
            # also where an earlier flatten died before it came to this
            if not self._reader(disk_id, name, record):
                _fs.unlink(directory / f"{name}.base")
                self._drop_path_reference(record, disk_id, name)
            return replace(disk, reference="none")

    def attach_root_disk(self, base: BaseImage, disk_id: str, name: str) -> RootDisk:
        with self._changing(disk_id, name) as (disk, found):
            self._same_bytes(base, found, disk_id, name)
            if found.reference == "none":  # it stands alone: nothing to tie
                return disk
            by_path = "path" in (found.reference, self.options.reference)
            record = self._told_apart(disk_id, name, found) if by_path else found
            if self._is_tied(base, disk_id, name, record):
                self._still_there(base)
                return disk
            return replace(disk, image_id=base.image_id, reference=self._attach(base, disk_id, name, record))

    def _is_tied(self, base: BaseImage, disk_id: str, name: str, record: DiskRecord) -> bool:
        """Whether a path reference, the record and the header of this disk all lead to this base already."""
        if (record.reference, record.image_id, record.base_format) != ("path", base.image_id, base.format):
            return False
        written, disk = self.user_record(base.image_id, disk_id, name), self._directory(disk_id) / name
        if made_at(written) != record.made_at or refers_to(written) != disk:
            return False
        try:
            named = _named(disk)
        except PermissionError:  # its guest runs, and has it as it was
            return True
        return named == (str(self.base_path(base.image_id)), base.format)

    def _attach(self, base: BaseImage, disk_id: str, name: str, record: DiskRecord) -> Reference:
        """Tie the disk to ``base`` in steps after each of which it reads as before or as attached, and its bytes have a
        name. A header changes file and format at once, a new link the file alone: so between bases of two formats the
        disk goes by way of the path.
        """
        directory = self._directory(disk_id)
        disk, link = directory / name, directory / f"{name}.base"
        anew = _named(disk)[1] != base.format
        shared = record.reference == "path" and self._reader(disk_id, name, record) is not None
        if shared and record.image_id != base.image_id:
            self._refuse_readers(disk_id, name, record)
        making = directory / f".{name}.{_fs.random_suffix()}"
        _fs.mkdir(making, 0o711)
        attaching = replace(record, attaching=base.image_id)
        try:
            # what a snapshot beside it reads through stays as it is
            linked = not shared and self._linked(base, link)
            by_link = not shared and (linked or self._link(base, making / link.name))
            by_path = anew or not by_link
            if anew and by_link and not linked:  # their headers name the format that the link has now
                self._refuse_readers(disk_id, name, record)
            if by_path or (record.reference, record.image_id) != ("link", base.image_id):
                # first of all: from it, whoever cleans up after us knows where our references are
                self._rewrite(disk_id, name, attaching)
            if by_path:
                self._refer_by_path(base, disk_id, name, record.made_at)
            self.touch_base(base)
            self._still_there(base)
            if by_path:
                self._name_backing(disk, str(self.base_path(base.image_id)), base.format)
            if by_link and not linked:
                _fs.rename(making / link.name, link)
                _fs.fsync_dir(directory)
            if by_link:
                self._name_backing(disk, link.name, base.format)
        finally:
            if self._settle_attach(disk_id, name, attaching).attaching is None:
                _fs.rmtree(making)
        return "link" if by_link else "path"

    def _name_backing(self, disk: Path, backing: str, backing_format: str) -> None:
        """The disk's header names this file, durably: one write of qemu-img, and what changes is in one page."""
        if _named(disk) != (backing, backing_format):
            _qemu.set_backing(disk, backing, backing_format)
            self._sync(disk)

    def _linked(self, base: BaseImage, link: Path) -> bool:
        return self.options.reference != "path" and is_same(link, self.base_path(base.image_id))

    def _sync(self, path: Path) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            _fs.fsync(fd)
        finally:
            os.close(fd)


def _named(disk: Path) -> tuple[str, str]:
    """The file that the disk's header names as its backing file, and that one's format."""
    with disk.open("rb", buffering=0) as file:
        name = _qcow2.read_backing_name(file)
        file.seek(0)
        return name, _qcow2.read_backing_format(file)

"""Backend ``file``: a root disk is an independent copy of its base, of shared blocks where the filesystem can."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from nova_imagecache import _entries, _fs, _qemu
from nova_imagecache.backends import (
    BackendProperties,
    BaseImage,
    BaseNotFoundError,
    Fact,
    RootDisk,
)
from nova_imagecache.backends._checks import check_files
from nova_imagecache.backends._recovery import RecoverableDisks

if TYPE_CHECKING:
    from pathlib import Path

    from nova_imagecache._models import Reference
    from nova_imagecache.backends._making import Making


class FileBackend(RecoverableDisks):
    """Copies. Bases have no users here: they stay by idle time, pins and the ids the driver hands in."""

    properties = BackendProperties(base_formats=("raw", "qcow2"), disk_kind="copy", storage="files")

    def check(self) -> list[Fact]:
        return check_files(self)

    making_is_short = False

    def _wanted_reference(self) -> Reference:
        return "none"

    def _refer(self, base: BaseImage, disk_id: str, name: str, link: Path, made_at: float) -> Reference:  # noqa: ARG002 - a copy needs no reference
        return "none"

    def _disk_format(self, base: BaseImage) -> str:
        return base.format

    def _make(self, base: BaseImage, making: Making, name: str, size: int, reference: Reference) -> int:  # noqa: ARG002 - the seam's shape
        try:
            # an open descriptor keeps the bytes, whatever becomes of the name while we copy
            source = os.open(self.base_path(base.image_id), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise BaseNotFoundError(image_id=base.image_id, stage="copy") from None
        try:
            self._still_there(base)
            copy = making.create(name, 0o600)
            try:
                _fs.copy_content(source, copy, check=_entries.go_on)
                if base.format == "raw":
                    _fs.truncate(copy, size)
                elif size != base.virtual_size:
                    _qemu.resize(making.path(name), base.format, size)
            except BaseException:
                os.close(copy)
                raise
        finally:
            os.close(source)
        return copy

    def flatten_root_disk(self, disk_id: str, name: str) -> RootDisk:
        with self._changing(disk_id, name) as (disk, _record):
            return disk

    def attach_root_disk(self, base: BaseImage, disk_id: str, name: str) -> RootDisk:
        with self._changing(disk_id, name) as (disk, record):
            self._same_bytes(base, record, disk_id, name)
            return disk

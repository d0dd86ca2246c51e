"""Root disks: made, changed and tied to their bases under their own locks, again when a base vanishes meanwhile."""

from __future__ import annotations

import logging
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from nova_imagecache import _args, _turns, _verify
from nova_imagecache._engine import ATTEMPTS
from nova_imagecache._guard import translated
from nova_imagecache.exceptions import (
    BackendError,
    BaseNotFoundError,
    DiskExistsError,
    DiskNotFoundError,
    DiskTooSmallError,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from typing import TypeVar

    from nova_imagecache._engine import Call, Engine
    from nova_imagecache._models import BaseImage, RootDisk
    from nova_imagecache._watch import Watch

    _T = TypeVar("_T")

_log = logging.getLogger(__name__)


class RootDisks:
    """The root disks of one cache."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._backend = engine.backend

    def create(self, image_id: str, disk_id: str, name: str, size: int | None, call: Call) -> RootDisk:
        """As ImageCache.create_root_disk."""
        _args.image_id(image_id)
        _check(disk_id, name)
        wanted = None if size is None else _args.size(size)
        with self._turn():
            disk, made = self._find_or_make(image_id, disk_id, name, wanted, call)
        if not made:
            return disk
        self._engine.emit("disk-created", image_id, disk_id, name, size=disk.virtual_size, reference=disk.reference)
        return disk

    def _turn(self) -> AbstractContextManager[None]:
        """Where a disk is quickly made, one thread at a time makes one; else they wait for the storage side by side."""
        kind = self._backend.properties
        return _turns.taken() if (kind.storage, kind.disk_kind) == ("files", "overlay") else nullcontext()

    def _find_or_make(
        self, image_id: str, disk_id: str, name: str, wanted: int | None, call: Call
    ) -> tuple[RootDisk, bool]:
        """The disk, and whether it was made now."""
        self._engine.root.prepare()
        existing = self._backend.get_root_disk(disk_id, name)
        if existing is not None:
            _same_disk(existing, image_id, wanted)
            if existing.reference != "path":
                return existing, False

        def make(base: BaseImage, watch: Watch) -> tuple[RootDisk, bool]:
            if wanted is not None and wanted < base.virtual_size:
                raise DiskTooSmallError(wanted, base.virtual_size, image_id=image_id, disk_id=disk_id, name=name)
            if existing is None:
                # without the lock: of two that make the same disk, publishing picks one; and a copy may take minutes
                with self._engine.patience(watch), suppress(DiskExistsError):
                    return self._create(base, disk_id, name, wanted), True
            with self._engine.disk_lock(disk_id, name, watch):
                return self._make(base, disk_id, name, wanted)

        return self._with_base(image_id, call, make, disk_size=wanted)

    def _with_base(
        self, image_id: str, call: Call, use: Callable[[BaseImage, Watch], _T], *, disk_size: int | None = None
    ) -> _T:
        """What ``use`` makes of the base; with a new one if it vanishes between the two steps."""
        with call.watch(image_id) as watch:
            for _attempt in range(ATTEMPTS):
                base = self._engine.ensure(image_id, call, watch, disk_size=disk_size)
                try:
                    return use(base, watch)
                except BaseNotFoundError as err:
                    _log.info("image %s: %s; trying again", image_id, err)
        raise BaseNotFoundError(f"the base vanished {ATTEMPTS} times while it was used", image_id=image_id)

    def _make(self, base: BaseImage, disk_id: str, name: str, wanted: int | None) -> tuple[RootDisk, bool]:
        """The disk, and whether it was made now."""
        existing = None
        with suppress(BackendError):  # what is there is no disk of ours: making one says so
            existing = self._backend.get_root_disk(disk_id, name)
        if existing is None:
            return self._create(base, disk_id, name, wanted), True
        _same_disk(existing, base.image_id, wanted)
        if existing.reference == "path":  # what stands at that path now may have come since: are these its bytes?
            return self._backend.attach_root_disk(base, disk_id, name), False
        return existing, False

    def _create(self, base: BaseImage, disk_id: str, name: str, wanted: int | None) -> RootDisk:
        size = base.virtual_size if wanted is None else wanted
        return self._backend.create_root_disk(base, disk_id, name, _args.size(size))

    def get(self, disk_id: str, name: str) -> RootDisk:
        """As ImageCache.get_root_disk."""
        _check(disk_id, name)
        self._engine.root.look()
        disk = self._backend.get_root_disk(disk_id, name)
        if disk is None:
            raise DiskNotFoundError(disk_id=disk_id, name=name)
        return disk

    def remove(self, disk_id: str, name: str) -> None:
        """As ImageCache.remove_root_disk."""
        _check(disk_id, name)
        with self._engine.disk_lock(disk_id, name):
            self._backend.remove_root_disk(disk_id, name)
        self._engine.emit("disk-removed", None, disk_id, name)

    def resize(self, disk_id: str, name: str, size: int) -> RootDisk:
        """As ImageCache.resize_root_disk."""
        _check(disk_id, name)
        wanted = _args.size(size)
        with self._engine.disk_lock(disk_id, name):
            disk = self.get(disk_id, name)
            if wanted < disk.virtual_size:
                raise DiskTooSmallError(wanted, disk.virtual_size, disk_id=disk_id, name=name)
            disk = self._backend.resize_root_disk(disk_id, name, wanted)
        self._engine.emit("disk-resized", disk.image_id, disk_id, name, size=disk.virtual_size)
        return disk

    def flatten(self, disk_id: str, name: str) -> RootDisk:
        """As ImageCache.flatten_root_disk."""
        _check(disk_id, name)
        with self._engine.disk_lock(disk_id, name):
            disk = self._backend.flatten_root_disk(disk_id, name)
        self._engine.emit("disk-flattened", disk.image_id, disk_id, name)
        return disk

    def attach(self, image_id: str, disk_id: str, name: str, call: Call) -> RootDisk:
        """As ImageCache.attach_root_disk."""
        _args.image_id(image_id)
        self.get(disk_id, name)

        def tie(base: BaseImage, watch: Watch) -> RootDisk:
            with self._engine.disk_lock(disk_id, name, watch):
                return self._backend.attach_root_disk(base, disk_id, name)

        disk = self._with_base(image_id, call, tie)
        self._engine.emit("disk-attached", image_id, disk_id, name, reference=disk.reference)
        return disk

    def copy_base(self, image_id: str, path: str | Path, call: Call) -> Path:
        """As ImageCache.copy_base."""
        _args.image_id(image_id)
        target = _args.target(path)

        def copy(base: BaseImage, watch: Watch) -> Path:
            with translated(lambda text: BackendError(text, image_id=image_id, stage="copy")):
                _verify.copy_out(self._backend, base, target, lambda: watch.check("copy"))
            return target

        return self._with_base(image_id, call, copy)


def _check(disk_id: str, name: str) -> None:
    _args.disk_id(disk_id)
    _args.disk_name(name)


def _same_disk(disk: RootDisk, image_id: str, wanted: int | None) -> None:
    """Refuse a disk that is there and is not the one asked for."""
    if disk.image_id != image_id or wanted not in (None, disk.virtual_size):
        raise DiskExistsError(
            f"the root disk exists, made of image {disk.image_id} with {disk.virtual_size} bytes",
            image_id=image_id,
            disk_id=disk.disk_id,
            name=disk.name,
        )

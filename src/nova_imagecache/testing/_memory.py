"""A whole backend in memory: the contract's smallest complete implementation, and the test double of a storage."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from nova_imagecache._models import BaseImage, RbdLocation, RecoveryReport, Retired, RootDisk
from nova_imagecache.exceptions import (
    DiskExistsError,
    DiskInUseError,
    DiskNotFoundError,
    DiskTooSmallError,
    NoSpaceError,
)
from nova_imagecache.testing._memory_bases import MemoryBases
from nova_imagecache.testing._memory_store import DISK_OVERHEAD, NAME, StoredDisk

if TYPE_CHECKING:
    from collections.abc import Iterator


class MemoryBackend(MemoryBases):
    """Bases and root disks in memory, sparse: a disk of any size costs what is written to it.

    It behaves like a pool of clones: ``disk_kind`` is "clone", disks have ``reference`` "clone" and count as users, and
    a base with users is not purged (``BaseInUseError``). There are no files: locations are ``RbdLocation`` in a pool
    "memory" that no hypervisor can open; each base's name is its own, so a stale ``BaseImage`` never means a newer one.

    Args:
        options: ``capacity``, the storage's total in bytes (default 1 TiB).
        paths: not used; may be None.
        storage: another backend's ``storage``, to stand for a second process over the same storage.
        clock: what ``last_used`` is taken from.

    For tests: ``contents``, ``disk_contents`` and ``write_disk`` look inside; ``held_open`` makes a disk busy;
    ``users_unknown = True`` makes ``iter_users`` raise; ``offer`` lets ``adopt_base`` find an image; ``abandon`` makes
    everything unfinished look like a dead process's, which ``recover`` then sweeps.
    """

    # --- root disks

    def create_root_disk(self, base: BaseImage, disk_id: str, name: str, size: int) -> RootDisk:
        """A clone of the base, grown to ``size``."""
        with self._lock:
            stored = self._named(base, "disk")
            if (disk_id, name) in self.storage.disks:
                raise DiskExistsError(image_id=base.image_id, disk_id=disk_id, name=name, stage="disk")
            self._need(DISK_OVERHEAD, disk_id, name)
            blocks = stored.blocks.copy()
            blocks.resize(size)
            disk = RootDisk(
                disk_id=disk_id,
                name=name,
                location=RbdLocation(pool=NAME, name=f"{disk_id}_{name}"),
                format="raw",
                virtual_size=size,
                image_id=base.image_id,
                reference="clone",
            )
            made = StoredDisk(disk=disk, blocks=blocks, base=stored, digest=stored.record.source_digest)
            self.storage.disks[disk_id, name] = made
            return disk

    def _need(self, needed: int, disk_id: str, name: str) -> None:
        free = max(0, self._total - self.storage.used)
        if needed > free:
            raise NoSpaceError(needed=needed, free=free, backend=NAME, disk_id=disk_id, name=name, stage="disk")

    def _disk(self, disk_id: str, name: str, stage: str) -> StoredDisk:
        stored = self.storage.disks.get((disk_id, name))
        if stored is None:
            raise DiskNotFoundError(disk_id=disk_id, name=name, stage=stage)
        if stored.held_open:
            raise DiskInUseError(disk_id=disk_id, name=name, stage=stage)
        return stored

    def get_root_disk(self, disk_id: str, name: str) -> RootDisk | None:
        """The disk, or None."""
        with self._lock:
            stored = self.storage.disks.get((disk_id, name))
            return stored.disk if stored else None

    def iter_root_disks(self) -> Iterator[RootDisk]:
        """Every disk, as of now."""
        with self._lock:
            return iter([stored.disk for stored in self.storage.disks.values()])

    def remove_root_disk(self, disk_id: str, name: str) -> None:
        """Remove the disk; one that is not there is no error."""
        with self._lock:
            if (disk_id, name) in self.storage.disks:
                self._disk(disk_id, name, "removing")
                del self.storage.disks[disk_id, name]

    def resize_root_disk(self, disk_id: str, name: str, size: int) -> RootDisk:
        """The disk, ``size`` bytes long."""
        with self._lock:
            stored = self._disk(disk_id, name, "resizing")
            if size < stored.disk.virtual_size:
                raise DiskTooSmallError(size, stored.disk.virtual_size, disk_id=disk_id, name=name, stage="resizing")
            stored.blocks.resize(size)
            stored.disk = replace(stored.disk, virtual_size=size)
            return stored.disk

    def flatten_root_disk(self, disk_id: str, name: str) -> RootDisk:
        """The disk, standing alone."""
        with self._lock:
            stored = self._disk(disk_id, name, "flattening")
            if stored.base is not None:
                self._need(stored.blocks.allocated - stored.blocks.owned, disk_id, name)
                stored.blocks.own_all()
                stored.base = None
                stored.disk = replace(stored.disk, reference="none")
            return stored.disk

    def attach_root_disk(self, base: BaseImage, disk_id: str, name: str) -> RootDisk:
        """The disk, tied to ``base``; one that stands alone is returned as it is."""
        with self._lock:
            stored = self._disk(disk_id, name, "attaching")
            target = self._named(base, "attaching")
            theirs = target.record.source_digest
            same = stored.digest == theirs if stored.digest and theirs else stored.disk.image_id == base.image_id
            if not same:
                raise DiskExistsError(
                    "the disk was made of another image", image_id=base.image_id, disk_id=disk_id, name=name
                )
            if stored.base is not None:
                stored.base = target
                stored.disk = replace(stored.disk, image_id=base.image_id)
            return stored.disk

    # --- after a crash

    def recover(self) -> RecoveryReport:
        """Sweep what ``abandon`` has marked: writers go, retired bases go or, with users, come back."""
        removed, restored = [], []
        with self._lock:
            alive = [writer.image_id for writer in self.storage.writers if not writer.abandoned]
            for writer in [writer for writer in self.storage.writers if writer.abandoned]:
                writer.discard()
                removed.append(f"staging/{writer.image_id}")
            for token, stored in list(self.storage.retired.items()):
                if not stored.abandoned:
                    continue
                stored.abandoned = False
                retired = Retired(base=stored.image(), token=token)
                if self._users(stored):
                    self.restore_base(retired)
                    restored.append(stored.record.image_id)
                else:
                    self.purge_base(retired)
                    removed.append(f"trash/{token}")
        return RecoveryReport(removed=tuple(removed), restored=tuple(restored), alive=tuple(alive))

    # --- for tests

    def abandon(self) -> None:
        """Make every open writer and retired base look like a dead process's."""
        with self._lock:
            for writer in self.storage.writers:
                writer.abandoned = True
            for base in self.storage.retired.values():
                base.abandoned = True

    def offer(self, image_id: str, data: bytes) -> None:
        """Lay a raw image where ``adopt_base`` finds it, as an image service over the same storage does."""
        with self._lock:
            self.storage.offers[image_id] = bytes(data)

    def contents(self, image_id: str) -> bytes:
        """All the bytes of a named base."""
        with self._lock:
            return self.storage.bases[image_id].blocks.contents()

    def disk_contents(self, disk_id: str, name: str = "disk") -> bytes:
        """All the bytes a guest would read from the disk."""
        with self._lock:
            return self.storage.disks[disk_id, name].blocks.contents()

    def write_disk(self, disk_id: str, name: str, offset: int, data: bytes) -> None:
        """Write to the disk as a guest does."""
        with self._lock:
            self.storage.disks[disk_id, name].blocks.write(offset, data)

    @contextmanager
    def held_open(self, disk_id: str, name: str = "disk") -> Iterator[None]:
        """While it lasts, a guest has the disk open: removing, resizing and flattening it is refused."""
        stored = self._disk(disk_id, name, "opening")
        stored.held_open = True
        try:
            yield
        finally:
            stored.held_open = False

"""The bases of ``MemoryBackend``."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from nova_imagecache._models import (
    BaseImage,
    BaseRecord,
    Capacity,
    DiskUsage,
    DiskUser,
    Extent,
    Fact,
    ImageInfo,
    RbdLocation,
    Retired,
)
from nova_imagecache.backends import Backend, BackendPaths, BackendProperties, BaseWriter
from nova_imagecache.exceptions import (
    BackendError,
    BaseInUseError,
    BaseNotFoundError,
    ConfigError,
    UsersUnknownError,
)
from nova_imagecache.testing._memory_store import (
    NAME,
    Blocks,
    MemoryStorage,
    MemoryWriter,
    StoredBase,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

DEFAULT_CAPACITY = 2**40


class MemoryBases(Backend):
    """What ``MemoryBackend`` does with bases; see there."""

    properties = BackendProperties(base_formats=("raw",), disk_kind="clone", storage=NAME)

    def __init__(
        self,
        options: Mapping[str, Any] | None = None,
        paths: BackendPaths | None = None,  # noqa: ARG002 - every backend is handed them
        *,
        storage: MemoryStorage | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        options = options or {}
        problems = [f"memory: unknown option {name!r}" for name in sorted(set(options) - {"capacity"})]
        total = options.get("capacity", DEFAULT_CAPACITY)
        if not isinstance(total, int) or isinstance(total, bool) or total <= 0:
            problems.append(f"memory: capacity must be bytes above 0, not {total!r}")
        if problems:
            raise ConfigError(problems)
        self.storage = storage if storage is not None else MemoryStorage()
        self.users_unknown = False
        self._lock = self.storage.lock
        self._total: int = total
        self._clock = clock

    def check(self) -> list[Fact]:
        """The one fact there is: the storage is memory."""
        return [Fact(name="storage", value="memory: gone when the process ends")]

    # --- bases

    def find_base(self, image_id: str) -> BaseImage | None:
        """The base, or None."""
        with self._lock:
            stored = self.storage.bases.get(image_id)
            return stored.image() if stored else None

    def iter_bases(self) -> Iterator[BaseImage]:
        """Every base, as of now."""
        with self._lock:
            return iter([stored.image() for stored in self.storage.bases.values()])

    def stage_base(self, image_id: str, format: str) -> BaseWriter:  # noqa: A002 - the contract's name
        """A writer for a new base."""
        if format not in self.properties.base_formats:
            raise BackendError(f"a base cannot be {format!r}", backend=NAME, image_id=image_id, stage="staging")
        writer = MemoryWriter(self.storage, image_id, format, self._total)
        with self._lock:
            self.storage.writers.append(writer)
        return writer

    def touch_base(self, base: BaseImage) -> None:
        """Set ``last_used`` and take ``unused_since`` away; a base that is gone is no error."""
        with self._lock:
            if stored := self.storage.named(base):
                stored.last_used, stored.unused_since = self._clock(), None

    def mark_unused(self, base: BaseImage, when: float | None) -> None:
        """Set ``unused_since``; a base that is gone is no error."""
        with self._lock:
            if stored := self.storage.named(base):
                stored.unused_since = when

    def mark_inspected(self, base: BaseImage, version: int) -> None:
        """Remember the inspector's version; a base that is gone is no error."""
        with self._lock:
            if stored := self.storage.named(base):
                stored.inspected = version

    def iter_users(self, base: BaseImage) -> Iterator[DiskUser]:
        """The disks cloned from this very base.

        Raises:
            UsersUnknownError: the test said so, or the base is neither named nor retired.
        """
        with self._lock:
            stored = self.storage.anywhere(base)
            if self.users_unknown or stored is None:
                raise UsersUnknownError("the storage cannot tell", image_id=base.image_id, stage="users")
            return iter(self._users(stored))

    def _users(self, stored: StoredBase) -> list[DiskUser]:
        return [
            DiskUser(image_id=user.disk.image_id, known_by="clone", disk_id=user.disk.disk_id, name=user.disk.name)
            for user in self.storage.users(stored)
        ]

    def _named(self, base: BaseImage, stage: str) -> StoredBase:
        stored = self.storage.named(base)
        if stored is None:
            raise BaseNotFoundError(image_id=base.image_id, stage=stage)
        return stored

    def retire_base(self, base: BaseImage) -> Retired:
        """Take the name away."""
        with self._lock:
            stored = self._named(base, "retiring")
            del self.storage.bases[base.image_id]
            token = f"{base.image_id}.{self.storage.next_serial()}"
            self.storage.retired[token] = stored
            return Retired(base=stored.image(), token=token)

    def restore_base(self, retired: Retired) -> None:
        """Give the name back, or keep the base beside the one that has taken the name.

        Raises:
            BaseNotFoundError: it was purged.
        """
        with self._lock:
            stored = self.storage.retired.get(retired.token)
            if stored is None:
                raise BaseNotFoundError(image_id=retired.base.image_id, stage="restoring")
            if retired.base.image_id not in self.storage.bases:
                self.storage.bases[retired.base.image_id] = self.storage.retired.pop(retired.token)

    def purge_base(self, retired: Retired) -> None:
        """Free the space; doing it again is no error.

        Raises:
            BaseInUseError: disks depend on it, as a pool of clones says too; the base stays retired.
        """
        with self._lock:
            stored = self.storage.retired.get(retired.token)
            if stored is not None and (users := self._users(stored)):
                raise BaseInUseError(users, image_id=retired.base.image_id, stage="purging")
            self.storage.retired.pop(retired.token, None)

    def read_base(self, base: BaseImage) -> Iterator[Extent]:
        """The base's extents, also of a retired one."""
        with self._lock:
            stored = self.storage.anywhere(base)
        if stored is None:
            raise BaseNotFoundError(image_id=base.image_id, stage="reading")
        return stored.blocks.extents()

    def read_sums(self, base: BaseImage) -> bytes | None:
        """What ``write_sums`` kept."""
        with self._lock:
            stored = self.storage.anywhere(base)
            return stored.sums if stored else None

    def usage(self, base: BaseImage) -> DiskUsage:
        """The base's sizes."""
        with self._lock:
            stored = self._named(base, "usage")
            return DiskUsage(virtual_size=stored.record.virtual_size, allocated=stored.blocks.allocated)

    def capacity(self) -> Capacity:
        """Total and free bytes, and what staging and trash take."""
        with self._lock:
            free = max(0, self._total - self.storage.used)
            return Capacity(total=self._total, free=free, staging=self.storage.staging, trash=self.storage.trash)

    def adopt_base(self, image: ImageInfo) -> BaseImage | None:
        """The image as an unmanaged base, where ``offer`` has laid it and it is raw; else None."""
        with self._lock:
            data = self.storage.offers.get(image.image_id)
            if data is None or image.disk_format != "raw":
                return None
            if image.image_id not in self.storage.bases:
                self.storage.bases[image.image_id] = self._adopted(image, data)
            return self.storage.bases[image.image_id].image()

    def _adopted(self, image: ImageInfo, data: bytes) -> StoredBase:
        blocks = Blocks()
        blocks.write(0, data)
        record = BaseRecord(
            image_id=image.image_id,
            format="raw",
            virtual_size=len(data),
            size=len(data),
            source_format=image.disk_format,
            source_size=len(data),
            source_digest=image.digest,
            evidence="none",
            made_by="stored",
            source=NAME,
            fetched_at=self._clock(),
        )
        location = RbdLocation(pool=NAME, name=f"offered.{image.image_id}", snapshot="snap")
        return StoredBase(location=location, record=record, blocks=blocks, managed=False)

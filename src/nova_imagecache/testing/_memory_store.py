"""What ``MemoryBackend`` keeps: sparse bytes, bases, root disks, and the writer of a base in the making."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nova_imagecache._models import BaseImage, BaseRecord, Digest, Extent, RbdLocation, RootDisk
from nova_imagecache.backends import BaseWriter
from nova_imagecache.exceptions import BackendError, NoSpaceError

if TYPE_CHECKING:
    from collections.abc import Iterator

NAME = "memory"
BLOCK = 4096
MIB = 2**20
DISK_OVERHEAD = BLOCK
"""What a root disk takes before a guest writes to it, as a clone's header does on a real storage."""


class Blocks:
    """A sparse run of bytes. A copy shares its blocks, so a clone of any size costs nothing until it is written."""

    __slots__ = ("_blocks", "_own", "size")

    def __init__(self, size: int = 0) -> None:
        self.size = size
        self._blocks: dict[int, bytes] = {}
        self._own: set[int] = set()

    @property
    def allocated(self) -> int:
        """Bytes of the blocks that have been written."""
        return len(self._blocks) * BLOCK

    def copy(self) -> Blocks:
        """The same bytes, independent from now on: blocks are replaced and never changed."""
        twin = Blocks(self.size)
        twin._blocks = dict(self._blocks)
        return twin

    @property
    def owned(self) -> int:
        """The part of ``allocated`` that is not shared with what this was copied from."""
        return len(self._own) * BLOCK

    def own_all(self) -> None:
        """Share nothing from now on."""
        self._own = set(self._blocks)

    def growth(self, offset: int, length: int) -> int:
        """Bytes that writing this range would allocate."""
        return sum(BLOCK for index in _range(offset, length) if index not in self._blocks)

    def write(self, offset: int, buffer: bytes | bytearray | memoryview) -> None:
        """Write ``buffer`` at ``offset``, growing where it must."""
        view = memoryview(buffer).cast("B")
        for index in _range(offset, len(view)):
            start = index * BLOCK
            low, high = max(offset, start), min(offset + len(view), start + BLOCK)
            piece = bytes(view[low - offset : high - offset])
            if len(piece) < BLOCK:
                old = self._blocks.get(index, bytes(BLOCK))
                piece = old[: low - start] + piece + old[high - start :]
            self._blocks[index] = piece
            self._own.add(index)
        self.size = max(self.size, offset + len(view))

    def resize(self, size: int) -> None:
        """Make it ``size`` bytes long; what is new reads as zeros."""
        if size < self.size:
            last, kept = divmod(size, BLOCK)
            self._blocks = {index: block for index, block in self._blocks.items() if index * BLOCK < size}
            if kept and last in self._blocks:
                self._blocks[last] = self._blocks[last][:kept] + bytes(BLOCK - kept)
            self._own &= self._blocks.keys()
        self.size = size

    def contents(self) -> bytes:
        """All the bytes, holes as zeros."""
        data = bytearray(self.size)
        for index, block in self._blocks.items():
            start = index * BLOCK
            data[start : min(start + BLOCK, self.size)] = block[: self.size - start]
        return bytes(data)

    def extents(self) -> Iterator[Extent]:
        """The written blocks in order, joined up to the next MiB boundary."""
        run: list[bytes] = []
        first = following = 0
        for index in sorted(self._blocks):
            offset = index * BLOCK
            if run and (offset != following or offset % MIB == 0):
                yield Extent(offset=first, data=b"".join(run))
                run = []
            first = offset if not run else first
            run.append(self._blocks[index][: self.size - offset])
            following = offset + BLOCK
        if run:
            yield Extent(offset=first, data=b"".join(run))


def _range(offset: int, length: int) -> range:
    return range(offset // BLOCK, -(-(offset + length) // BLOCK)) if length else range(0)


@dataclass(slots=True, kw_only=True, eq=False)
class StoredBase:
    """One base: named, retired or adopted. ``location`` is its own, also among bases of one image."""

    location: RbdLocation
    record: BaseRecord
    blocks: Blocks
    sums: bytes | None = None
    managed: bool = True
    last_used: float | None = None
    unused_since: float | None = None
    inspected: int = 0
    abandoned: bool = False

    def image(self) -> BaseImage:
        """The base as the contract's value."""
        return BaseImage(
            image_id=self.record.image_id,
            location=self.location,
            record=self.record,
            managed=self.managed,
            last_used=self.last_used,
            unused_since=self.unused_since,
            inspected=self.inspected,
        )


@dataclass(slots=True, kw_only=True, eq=False)
class StoredDisk:
    """One root disk, the base it depends on (None: it stands alone) and the digest of the image it was made of."""

    disk: RootDisk
    blocks: Blocks
    base: StoredBase | None
    digest: Digest | None
    held_open: bool = False


@dataclass(slots=True, eq=False)
class MemoryStorage:
    """What several ``MemoryBackend`` objects share when they stand for several processes over one storage."""

    lock: threading.RLock = field(default_factory=threading.RLock)
    bases: dict[str, StoredBase] = field(default_factory=dict)
    retired: dict[str, StoredBase] = field(default_factory=dict)
    disks: dict[tuple[str, str], StoredDisk] = field(default_factory=dict)
    writers: list[MemoryWriter] = field(default_factory=list)
    offers: dict[str, bytes] = field(default_factory=dict)
    serial: int = 0

    def next_serial(self) -> int:
        """A number that is given out once."""
        with self.lock:
            self.serial += 1
            return self.serial

    def named(self, base: BaseImage) -> StoredBase | None:
        """The base, if this very one still has its name."""
        stored = self.bases.get(base.image_id)
        return stored if stored is not None and stored.location == base.location else None

    def anywhere(self, base: BaseImage) -> StoredBase | None:
        """The base, named or retired."""
        return self.named(base) or next((b for b in self.retired.values() if b.location == base.location), None)

    def users(self, base: StoredBase) -> list[StoredDisk]:
        """The root disks that depend on this very base."""
        return [stored for stored in self.disks.values() if stored.base is base]

    @property
    def staging(self) -> int:
        """Bytes of what is being written."""
        return sum(writer.blocks.allocated for writer in self.writers)

    @property
    def trash(self) -> int:
        """Bytes of what is retired."""
        return sum(base.blocks.allocated for base in self.retired.values())

    @property
    def used(self) -> int:
        """Bytes of everything; a clone counts what it does not share with its base."""
        bases = sum(base.blocks.allocated for base in self.bases.values() if base.managed)
        disks = sum(DISK_OVERHEAD + disk.blocks.owned for disk in self.disks.values())
        return bases + disks + self.staging + self.trash


class MemoryWriter(BaseWriter):
    """A base in the making, in memory."""

    path = None

    def __init__(self, storage: MemoryStorage, image_id: str, base_format: str, total: int) -> None:
        self.image_id = image_id
        self.format = base_format
        self.blocks = Blocks()
        self.abandoned = False
        self._storage = storage
        self._sums: bytes | None = None
        self._total = total

    def _check_open(self, stage: str) -> None:
        if self not in self._storage.writers:
            raise BackendError("the writer is closed", backend=NAME, image_id=self.image_id, stage=stage)

    def set_size(self, size: int) -> None:
        """Make the base ``size`` bytes long."""
        with self._storage.lock:
            self._check_open("staging")
            self.blocks.resize(size)

    def write_at(self, offset: int, buffer: bytes | bytearray | memoryview) -> None:
        """Write ``buffer`` at ``offset``.

        Raises:
            NoSpaceError: the storage's ``capacity`` would be exceeded; nothing is written.
        """
        with self._storage.lock:
            self._check_open("staging")
            needed = self.blocks.growth(offset, memoryview(buffer).nbytes)
            free = self._total - self._storage.used
            if needed > free:
                raise NoSpaceError(
                    needed=needed, free=max(free, 0), backend=NAME, image_id=self.image_id, stage="staging"
                )
            self.blocks.write(offset, buffer)

    def write_sums(self, sums: bytes | memoryview) -> None:
        """Keep the checksums of the base's MiBs."""
        with self._storage.lock:
            self._sums = bytes(sums)

    def sync(self) -> None:
        """Nothing: memory is all the storage there is."""

    def publish(self, record: BaseRecord) -> BaseImage:
        """The published base, or the one that was first."""
        with self._storage.lock:
            self._check_open("publishing")
            if (record.image_id, record.format) != (self.image_id, self.format):
                raise BackendError(
                    f"the record is of image {record.image_id} in format {record.format}, "
                    f"staged was {self.image_id} in format {self.format}",
                    backend=NAME,
                    image_id=self.image_id,
                    stage="publishing",
                )
            self.discard()
            if self.image_id not in self._storage.bases:
                name = f"base.{self.image_id}.{self._storage.next_serial()}"
                location = RbdLocation(pool=NAME, name=name, snapshot="base")
                self._storage.bases[self.image_id] = StoredBase(
                    location=location, record=record, blocks=self.blocks, sums=self._sums
                )
            return self._storage.bases[self.image_id].image()

    def discard(self) -> None:
        """Forget what was written."""
        with self._storage.lock:
            if self in self._storage.writers:
                self._storage.writers.remove(self)

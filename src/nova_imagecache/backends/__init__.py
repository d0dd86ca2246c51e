"""The contract of a backend: one kind of storage for bases and root disks. All an author of one needs is on this page.

Three stories. *A base is made*: ``stage_base`` gives a writer nobody else can see; the core writes through it, then
``publish`` makes the base visible in one atomic step, or finds that somebody was first and returns theirs. *A disk is
made*: ``create_root_disk`` first writes down what ties the disk to its base, then looks whether the base is still
there, then makes the disk and publishes it in one step. *A base goes*: the core asks ``iter_users``; ``retire_base``
takes the name away; the core asks ``iter_users`` again and either ``restore_base`` or ``purge_base`` follows. Since
both sides write before they look, one of them always sees the other, and no lock is needed for safety.

A backend takes no locks, makes no retries, reads no configuration file, and decides nothing about policy: the core has
checked ids, names and sizes, holds the locks that save work, and converts formats. A backend is called from many
threads at once. It raises the errors named here; anything else it raises reaches the caller as ``BackendError`` that
names it. After a crash at any moment, ``recover`` leaves no half-made thing behind.

Two things an author need not write anew: ``dump_record`` turns a base's record into bytes, ``load_record`` bytes and
``read_record`` a file into a record; ``new_entry`` makes a directory that this process holds until it ends, however it
ends, and ``hold`` tells ``recover`` which of them nobody holds any more.

Entry-point group: ``nova_imagecache.backends``. Test with ``nova_imagecache.testing.BackendContract``.
"""

from __future__ import annotations

import abc
import logging
import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from nova_imagecache import _fs
from nova_imagecache._entries import Held, hold, new_entry
from nova_imagecache._models import (
    BaseImage,
    BaseRecord,
    BlockLocation,
    Capacity,
    Digest,
    DiskUsage,
    DiskUser,
    Extent,
    Fact,
    FileLocation,
    ImageInfo,
    RbdLocation,
    RecoveryReport,
    Retired,
    RootDisk,
)
from nova_imagecache._records import RecordError, load_base
from nova_imagecache._records import dump_base as dump_record
from nova_imagecache.exceptions import (
    BackendError,
    BackendUnavailableError,
    BaseNotFoundError,
    ConfigError,
    DiskExistsError,
    DiskInUseError,
    DiskNotFoundError,
    DiskTooSmallError,
    NoSpaceError,
    UsersUnknownError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

__all__ = [
    "Backend",
    "BackendError",
    "BackendPaths",
    "BackendProperties",
    "BackendUnavailableError",
    "BaseImage",
    "BaseNotFoundError",
    "BaseRecord",
    "BaseWriter",
    "BlockLocation",
    "Capacity",
    "Claim",
    "ConfigError",
    "Digest",
    "DiskExistsError",
    "DiskInUseError",
    "DiskNotFoundError",
    "DiskTooSmallError",
    "DiskUsage",
    "DiskUser",
    "Extent",
    "Fact",
    "FileLocation",
    "Held",
    "ImageInfo",
    "NoSpaceError",
    "RbdLocation",
    "RecoveryReport",
    "Retired",
    "RootDisk",
    "Survey",
    "Unreadable",
    "UsersUnknownError",
    "dump_record",
    "hold",
    "load_record",
    "new_entry",
    "read_record",
]

_log = logging.getLogger(__name__)


def load_record(data: bytes, place: str) -> BaseRecord | None:
    """The record in bytes that ``dump_record`` made; None: it cannot be read, which is logged.

    ``place`` is where the bytes were, for the log: a path, a key, an object's name.
    """
    try:
        return load_base(data)
    except RecordError as err:
        _log.warning("%s is left alone: the record cannot be read: %s", place, err)
        return None


def read_record(path: Path) -> BaseRecord | None:
    """The record in a file that ``dump_record`` made; None: it is not there, or cannot be read, which is logged."""
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return load_record(data, str(path))


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendProperties:
    """Facts about a kind of storage, not settings.

    Attributes:
        base_formats: formats a base may have here, the preferred one first ("raw", "qcow2").
        disk_kind: what ``create_root_disk`` makes: "copy", "overlay" or "clone".
        storage: what the root's ``cache.json`` says is kept under it; a root is never opened by another kind.
        local: the bases take space on this host.
        shared: other hosts see the same bases.
    """

    base_formats: tuple[str, ...]
    disk_kind: Literal["copy", "overlay", "clone"]
    storage: str
    local: bool = True
    shared: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendPaths:
    """Where a backend may keep files: ``root``, and one directory per disk id in ``disks_dir``.

    In ``root`` the core keeps ``CACHEDIR.TAG``, ``cache.json``, ``pins``, ``locks`` and ``staging``; by default
    ``disks_dir`` is ``disks`` in it. All other names are the backend's. ``staging`` is for both, so long as each entry
    is made with ``new_entry(root / "staging", ...)`` and held while it is in use: ``ImageCache.recover`` removes every
    entry that nobody holds, after the backend's own ``recover``. What shall outlive its maker stands elsewhere. The
    core makes its own names on first use; a backend alone, as in its tests, makes what it needs.

    ``group`` (a group name): bases are readable by it and by nobody else; None: by everyone who knows the image id.
    ``qemu_user``: the user that must be able to read a base; ``check`` says when it cannot.
    """

    root: Path
    disks_dir: Path
    group: str | None = None
    qemu_user: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """A base, and what one look at it tells besides: its ``users`` as ``iter_users`` has them, its ``allocated`` bytes.

    None: not told, or it cannot be told. The core asks for it.
    """

    base: BaseImage
    users: tuple[DiskUser, ...] | None = None
    allocated: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Unreadable:
    """What stands in a base's place and cannot be read as one: ``reason`` says why.

    ``base`` is for ``iter_users``, ``retire_base`` and the finders, its location where the bytes are, or would be; of
    its record nothing but the image is true. None: nobody can say who uses it, so that it cannot be retired.
    """

    reason: str
    base: BaseImage | None


class Claim:
    """The right to bring one image in, or to have it copied. This one is of storage that one host has to itself."""

    def release(self) -> None:
        """Give the right back. May be called more than once."""


class BaseWriter(abc.ABC):
    """A base in the making: invisible to everybody else until ``publish``, gone after ``discard`` or a crash."""

    path: Path | None = None
    """A local file or block device that may be written directly instead of through ``write_at``, else None."""

    def set_size(self, size: int) -> None:
        """The base is ``size`` bytes long; what is not written reads as zeros. May be called again to grow it.

        The default sets the size of ``path``.
        """
        with self._opened() as fd:
            _fs.truncate(fd, size)

    def write_at(self, offset: int, buffer: bytes | bytearray | memoryview) -> None:
        """Write ``buffer`` at ``offset``. Thread-safe for disjoint ranges. Grows the base where it must.

        The default writes to ``path``.
        """
        with self._opened() as fd:
            _fs.write(fd, offset, buffer)

    def read_at(self, offset: int, length: int) -> bytes | None:
        """``length`` bytes at ``offset`` as they were written; None: this writer cannot read, and the base has no
        checksums. Asked for the MiBs whose parts came out of order, by several threads at once. The default reads
        ``path``.
        """
        if self.path is None:
            return None
        with self.path.open("rb", buffering=0) as file:
            return os.pread(file.fileno(), length, offset).ljust(length, b"\0")

    def write_sums(self, sums: bytes | memoryview) -> None:
        """Keep the checksums of the base's MiBs, so that it can be verified later. The default keeps none."""
        del sums

    def sync(self) -> None:
        """Everything written is on stable storage when this returns. The default syncs ``path``."""
        with self._opened() as fd:
            _fs.fsync(fd)

    @contextmanager
    def _opened(self) -> Iterator[int]:
        if self.path is None:
            raise NotImplementedError("a writer without a path has its own set_size, write_at and sync")
        with self.path.open("r+b", buffering=0) as file:
            yield file.fileno()

    @abc.abstractmethod
    def publish(self, record: BaseRecord) -> BaseImage:
        """Make the base visible in one atomic, durable step and return it; or, if somebody was first, discard this one
        and return theirs. Calls ``sync`` itself where that is needed."""

    @abc.abstractmethod
    def discard(self) -> None:
        """Leave nothing behind. May be called at any time, more than once, and after ``publish`` (then it does
        nothing)."""


class Backend(abc.ABC):
    """One kind of storage for bases and root disks."""

    api_version: ClassVar[int] = 1
    properties: ClassVar[BackendProperties]

    @abc.abstractmethod
    def __init__(self, options: Mapping[str, Any], paths: BackendPaths) -> None:
        """Parse ``options`` and do no I/O.

        Raises:
            ConfigError: with all problems of the options at once.
        """

    @property
    def wanted_base_format(self) -> str | None:
        """The format new bases shall have; None: as the image comes, where ``base_formats`` has it."""
        return self.properties.base_formats[0]

    @abc.abstractmethod
    def check(self) -> list[Fact]:
        """Facts and problems of the surroundings: tools, pool, filesystem, links, who can read a base."""

    def close(self) -> None:  # noqa: B027 - nothing to give back is the rule, not the exception
        """Give connections back. The backend is not used afterwards."""

    # --- bases

    @abc.abstractmethod
    def find_base(self, image_id: str) -> BaseImage | None:
        """The base, or None. Cheap: no child process and, on files, no network."""

    @abc.abstractmethod
    def iter_bases(self) -> Iterator[BaseImage]:
        """Every base, in any order. One that cannot be read is left out and logged."""

    def survey(self) -> Iterator[Survey]:
        """What a pass over every base asks: for storage that tells in one look what ``iter_bases``, ``iter_users`` and
        ``usage`` tell in three. The default tells of the bases alone."""
        for base in self.iter_bases():
            yield Survey(base=base)

    def find_unreadable(self, image_id: str) -> Unreadable | None:
        """What stands in the place of a base that ``find_base`` does not find, None: nothing. The default.

        Once it has neither users nor pins, as the core asks for any base, it is retired and purged like one.
        """
        del image_id
        return None

    @abc.abstractmethod
    def stage_base(self, image_id: str, format: str) -> BaseWriter:  # noqa: A002 - the word that "base format" has everywhere
        """A writer for a new base: invisible, exclusive to this caller, reading as zeros."""

    @abc.abstractmethod
    def touch_base(self, base: BaseImage) -> None:
        """Set the base's ``last_used`` to now and take its ``unused_since`` away. Losing one touch is harmless."""

    @abc.abstractmethod
    def mark_unused(self, base: BaseImage, when: float | None) -> None:
        """Set ``unused_since`` to POSIX seconds ``when``; None takes the mark away. A base that is gone is no error."""

    def mark_inspected(self, base: BaseImage, version: int) -> None:
        """Remember that inspector ``version`` found the base safe. The default remembers nothing."""
        del base, version

    @abc.abstractmethod
    def iter_users(self, base: BaseImage) -> Iterator[DiskUser]:
        """The root disks that depend on the base, as this storage counts them; also for a base that is retired.

        Raises:
            UsersUnknownError: the storage cannot tell. Never an empty answer instead.
        """

    @abc.abstractmethod
    def retire_base(self, base: BaseImage) -> Retired:
        """Take the name away in one atomic, durable step: the base is not found any more, its bytes are still there.

        ``last_used`` of the retired base is read after that, where it can be: a use that was noted meanwhile brings the
        base back.

        Raises:
            BaseNotFoundError: it is gone already.
        """

    @abc.abstractmethod
    def restore_base(self, retired: Retired) -> None:
        """Give the name back. If a new base took the name meanwhile, both stay: the retired one for its users."""

    @abc.abstractmethod
    def purge_base(self, retired: Retired) -> None:
        """Free the space. Disks that hold on to the bytes by themselves (hard links) keep them."""

    def quarantine_base(self, base: BaseImage) -> None:
        """Take a damaged base out of use. The default retires and purges it.

        Raises:
            BaseInUseError: a disk came to read it by its name meanwhile; it is in its place.
        """
        self.purge_base(self.retire_base(base))

    def reown_base(self, base: BaseImage, damage: Callable[[BaseImage], str | None]) -> bool:
        """Make a base that another user came to own this user's again; whether that was needed. The default: never.

        ``damage`` says what is wrong with a copy before it takes the base's place; the caller holds the base's lock.

        Raises:
            BaseCorruptError: the bytes are not what was published; the base is untouched.
        """
        del base, damage
        return False

    def read_base(self, base: BaseImage) -> Iterator[Extent]:
        """The base's bytes as extents of at most 1 MiB, none crossing a MiB boundary, in order; holes left out.

        The default reads ``FileLocation`` and ``BlockLocation``.
        """
        from nova_imagecache import _extents

        if not isinstance(base.location, FileLocation | BlockLocation):
            raise BackendError("this backend cannot read a base", image_id=base.image_id, stage="reading")
        return _extents.read_extents(base.location.path)

    def read_sums(self, base: BaseImage) -> bytes | memoryview | None:
        """What ``write_sums`` kept, None: nothing."""
        del base
        return None

    @abc.abstractmethod
    def usage(self, base: BaseImage) -> DiskUsage:
        """The base's sizes.

        Raises:
            BaseNotFoundError: it is gone.
        """

    @abc.abstractmethod
    def capacity(self) -> Capacity:
        """Total and free bytes of the storage, and what staging and trash take."""

    def adopt_base(self, image: ImageInfo) -> BaseImage | None:
        """The image as a base where it already lies, copying nothing; None: it must be brought in. The default."""
        del image
        return None

    def wanted_store(self, image: ImageInfo) -> str | None:
        """The image service's store that the image must be in for ``adopt_base`` to take it; None: no store would help.

        Asked after ``adopt_base`` said None; the core then asks the source for a copy, and adopts again. The default.
        """
        del image
        return None

    def claim_import(self, image_id: str) -> Claim | None:
        """The right to bring the image in, or to have its service copy it, for all hosts that share this storage; None:
        another host is at it.

        It saves work: whoever loses a race drops what it made. The default claims nothing, since the core's own lock is
        enough on one host.
        """
        del image_id
        return Claim()

    # --- root disks

    @abc.abstractmethod
    def create_root_disk(self, base: BaseImage, disk_id: str, name: str, size: int) -> RootDisk:
        """Make the disk, ``size`` bytes (a multiple of 512, at least the base's virtual size), in one atomic step.

        Raises:
            BaseNotFoundError: the base vanished meanwhile; nothing is left behind.
            DiskExistsError: a disk of that id and name exists, or was published first; it is untouched.
            NoSpaceError: nothing is left behind.
        """

    @abc.abstractmethod
    def get_root_disk(self, disk_id: str, name: str) -> RootDisk | None:
        """The disk as it is now, or None."""

    @abc.abstractmethod
    def iter_root_disks(self) -> Iterator[RootDisk]:
        """Every root disk this backend made and can still see."""

    @abc.abstractmethod
    def remove_root_disk(self, disk_id: str, name: str) -> None:
        """Remove the disk and its reference. A disk that is not there is no error.

        Raises:
            DiskInUseError: the storage refuses while somebody has it open.
        """

    @abc.abstractmethod
    def resize_root_disk(self, disk_id: str, name: str, size: int) -> RootDisk:
        """Grow the disk to ``size`` bytes, a multiple of 512 and not below its virtual size.

        Raises:
            DiskTooSmallError: somebody else (on another host) has grown it beyond that meanwhile.
            DiskNotFoundError, DiskInUseError, NoSpaceError.
        """

    @abc.abstractmethod
    def flatten_root_disk(self, disk_id: str, name: str) -> RootDisk:
        """Make the disk stand alone; its ``reference`` is "none" afterwards. A disk without a base is returned as is.

        Raises:
            DiskNotFoundError, DiskInUseError, NoSpaceError.
        """

    @abc.abstractmethod
    def attach_root_disk(self, base: BaseImage, disk_id: str, name: str) -> RootDisk:
        """Tie a disk that arrived from elsewhere, or lost its base, to ``base`` again.

        Raises:
            DiskNotFoundError: there is no disk, or no record that says of which image it is.
            DiskExistsError: the disk was made of other bytes than ``base`` holds.
            DiskInUseError: the disk must be made anew for that, and somebody has it open or made snapshots of it.
            BaseNotFoundError: the base vanished meanwhile.
        """

    # --- after a crash

    @abc.abstractmethod
    def recover(self) -> RecoveryReport:
        """Sweep what dead processes left: staging, trash, half-made disks. What a live process works on stays."""

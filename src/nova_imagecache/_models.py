"""The values that cross the seams of the library: frozen, slotted, named.

Units, everywhere: sizes are bytes; points in time are POSIX seconds (float); "virtual" sizes are what a guest sees,
"allocated" sizes are the blocks that the storage gives to it.
"""

from __future__ import annotations

import string
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nova_imagecache.exceptions import ImageCacheError, InvalidRequestError

DIGEST_ALGORITHMS = {
    "sha512": 128,
    "sha384": 96,
    "sha256": 64,
    "sha224": 56,
    "sha1": 40,
    "md5": 32,
    "blake2b": 128,
    "sha3_512": 128,
    "sha3_256": 64,
}
"""Algorithms that an image service may name in os_hash_algo, plus md5 of the old ``checksum``; and their hex digits."""

Reference = Literal["link", "path", "clone", "none"]
"""What ties a root disk to its base."""

Evidence = Literal["expected", "os_hash", "checksum", "unverified", "none"]
"""How we know that a base holds the image's bytes: the caller's ``expect``, the image's ``os_hash_value``, its md5
``checksum``, nothing known (allowed by configuration), nothing looked at (adopted)."""


SECTOR = 512
"""Guests see disks in sectors of this many bytes."""


def round_up(size: int) -> int:
    """``size`` in whole sectors, as a guest sees it."""
    return -(-size // SECTOR) * SECTOR


@dataclass(frozen=True, slots=True)
class Digest:
    """A digest by algorithm name and lower-case hexadecimal value.

    Raises:
        InvalidRequestError: an algorithm that image services do not use, or a value of another length.
    """

    algorithm: str
    value: str

    def __post_init__(self) -> None:
        if not isinstance(self.algorithm, str) or self.algorithm not in DIGEST_ALGORITHMS:
            raise InvalidRequestError(f"digest algorithm {self.algorithm!r} is none of {', '.join(DIGEST_ALGORITHMS)}")
        object.__setattr__(self, "value", str(self.value).lower())
        length = DIGEST_ALGORITHMS[self.algorithm]
        if len(self.value) != length or self.value.strip(string.hexdigits):
            raise InvalidRequestError(f"a {self.algorithm} digest has {length} hexadecimal digits: {self.value!r}")

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.value}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageInfo:
    """What a source says of an image before any byte of it is read.

    ``size`` and ``min_disk`` are bytes (``size`` None: not announced); ``locations`` are URLs where a backend might
    adopt the image; ``digest_evidence`` says which property the digest came from.
    """

    image_id: str
    disk_format: str
    status: str = "active"
    size: int | None = None
    min_disk: int = 0
    digest: Digest | None = None
    digest_evidence: Evidence = "unverified"
    locations: tuple[str, ...] = ()
    stores: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a fetch is: ``done`` of ``total`` bytes in ``stage`` ("wait", "fetch", "convert", "publish").

    ``total`` is None where the source announces no size. While waiting for another process's fetch, ``done`` is what
    that process has reported.
    """

    image_id: str
    stage: str
    done: int
    total: int | None


# --- where things are ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class FileLocation:
    """A file by absolute path."""

    path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockLocation:
    """A block device by absolute path."""

    path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class RbdLocation:
    """An RBD image and what a hypervisor needs to open it. ``hosts`` are (address, port) of the monitors."""

    pool: str
    name: str
    snapshot: str | None = None
    hosts: tuple[tuple[str, int], ...] = ()
    user: str | None = None
    secret_uuid: str | None = None


Location = FileLocation | BlockLocation | RbdLocation


# --- bases -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseRecord:
    """What was written down about a base when it was published; it never changes afterwards.

    Attributes:
        image_id: the image.
        format: of the base's bytes, "raw" or "qcow2".
        virtual_size: bytes that a guest sees.
        size: length in bytes of the base's file or device.
        source_format: the image service's disk_format.
        source_size: bytes that were served.
        source_digest: of the bytes as served, None where nothing was known.
        evidence: how we know the digest.
        made_by: "stored" (the bytes are the source's), "qemu-img convert", or a decoder's name.
        source: name of the source.
        fetched_at: POSIX seconds.
        inspector: INSPECTOR_VERSION that judged the image.
        version: of the record itself.
    """

    image_id: str
    format: str
    virtual_size: int
    size: int
    source_format: str
    source_size: int
    source_digest: Digest | None
    evidence: Evidence
    made_by: str
    source: str
    fetched_at: float
    inspector: int = 0
    version: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseImage:
    """A base image that is there, whole.

    ``managed`` is False for adopted bases, which are never removed. ``last_used`` and ``unused_since`` are the marks
    (POSIX seconds, None: no such mark). ``inspected`` is the newest inspector version that found it safe.
    """

    image_id: str
    location: Location
    record: BaseRecord
    managed: bool = True
    last_used: float | None = None
    unused_since: float | None = None
    inspected: int = 0

    @property
    def format(self) -> str:
        """The base's own format, "raw" or "qcow2"."""
        return self.record.format

    @property
    def virtual_size(self) -> int:
        """Bytes that a guest sees."""
        return self.record.virtual_size

    @property
    def digest(self) -> Digest | None:
        """The digest of the image as its source served it."""
        return self.record.source_digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Retired:
    """A base whose name has been taken away: ``restore_base`` gives it back, ``purge_base`` frees its space.

    ``token`` is the backend's own name for it.
    """

    base: BaseImage
    token: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """A run of bytes of a base at ``offset``. What no extent covers reads as zeros."""

    offset: int
    data: bytes


# --- root disks and users --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class RootDisk:
    """The writable disk of one instance.

    The driver boots from ``location`` and must state ``format``: it is recorded when the disk is made, since a guest
    may have written any header since (CVE-2014-0134, CVE-2026-24708).
    """

    disk_id: str
    name: str
    location: Location
    format: str
    virtual_size: int
    image_id: str
    reference: Reference


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskUser:
    """A root disk that depends on a base.

    ``disk_id`` is None where the storage counts a user without knowing its name (a hard link somewhere).
    ``known_by`` is "link", "path", "clone", or the finder that saw it. ``certain`` is False for a user that was
    recorded but cannot be seen now; it keeps the base all the same.
    """

    image_id: str
    known_by: str
    disk_id: str | None = None
    name: str | None = None
    detail: str = ""
    certain: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskUsage:
    """Sizes of one base: guest-visible and allocated bytes."""

    virtual_size: int
    allocated: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """The storage's ``total`` and ``free`` bytes, and what this backend's unpublished and retired things take.

    ``overhead`` is what stands around the bases: directories, records of users, pins, locks. ``left_alone`` has the
    bytes of what stands in the place of bases and cannot be read as one, by its name there, as the last look at bases
    found it.
    """

    total: int
    free: int
    staging: int = 0
    trash: int = 0
    overhead: int = 0
    left_alone: dict[str, int] = field(default_factory=dict)
    complete: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheUsage:
    """What the cache takes, in allocated bytes, each inode once.

    ``allocated`` = ``bases`` + ``staging`` + ``trash`` + ``overhead``: on files, what ``du`` says of the root without
    the root disks. ``reclaimable`` is the part of ``bases`` that has neither users
    nor pins. ``own_filesystem``: the cache is on another filesystem than the root disks. ``complete`` is False where
    something could not be counted; then every figure is a lower bound.
    """

    base_count: int
    bases: int
    staging: int
    trash: int
    reclaimable: int
    total: int
    free: int
    own_filesystem: bool
    local: bool
    complete: bool
    overhead: int = 0

    @property
    def allocated(self) -> int:
        """Everything the cache holds, in bytes."""
        return self.bases + self.staging + self.trash + self.overhead


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """An owner's word that a base must stay, until POSIX seconds ``until`` (None: for good)."""

    image_id: str
    owner: str
    until: float | None = None


# --- reports ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanupItem:
    """One base's ``verdict`` ("keep", "mark", "unmark", "remove") and its reason.

    ``allocated`` is bytes, ``idle`` seconds (None: not idle, or not marked yet), ``users`` None where nobody can say.
    """

    image_id: str
    verdict: Literal["keep", "mark", "unmark", "remove"]
    reason: str
    allocated: int = 0
    idle: float | None = None
    users: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanupPlan:
    """What a cleanup would do, and why, for every base.

    ``in_use`` are the image ids that the caller said are in use, ``max_idle`` seconds; both are looked at again when
    the plan is carried out.
    """

    items: tuple[CleanupItem, ...]
    max_idle: float
    in_use: frozenset[str] = frozenset()

    @property
    def freeable(self) -> int:
        """Bytes that carrying the plan out would free."""
        return sum(item.allocated for item in self.items if item.verdict == "remove")


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanupReport:
    """What a cleanup did: image ids by outcome; ``kept`` and ``failed`` map an image id to the reason.

    ``swept`` names the left-overs of dead processes that went as well.
    """

    removed: tuple[str, ...] = ()
    marked: tuple[str, ...] = ()
    kept: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    freed: int = 0
    swept: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """One thing ``check()`` found out. ``problem`` says what is wrong and what to do, None: nothing."""

    name: str
    value: str
    problem: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """The facts about the cache's surroundings."""

    facts: tuple[Fact, ...]

    @property
    def problems(self) -> tuple[Fact, ...]:
        """The facts that are problems."""
        return tuple(fact for fact in self.facts if fact.problem is not None)

    @property
    def ok(self) -> bool:
        """Whether there is no problem."""
        return not self.problems


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryReport:
    """What ``recover()`` swept: names of dead entries removed, entries left because they live, and failures."""

    removed: tuple[str, ...] = ()
    restored: tuple[str, ...] = ()
    alive: tuple[str, ...] = ()
    failed: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class EnsureResult:
    """One image's outcome in ``ensure_bases``: ``base``, or the ``error`` that stopped this image alone."""

    image_id: str
    base: BaseImage | None = None
    error: ImageCacheError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that changed: ``kind`` is "published", "used", "disk-created", "disk-removed", "removed" ...

    ``details`` holds plain values only (numbers, strings), never secrets.
    """

    kind: str
    time: float
    image_id: str | None = None
    disk_id: str | None = None
    name: str | None = None
    details: dict[str, Any] = field(default_factory=dict)

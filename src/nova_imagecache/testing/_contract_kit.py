"""What the parts of ``BackendContract`` share: hooks for what differs, samples, and words for a broken promise."""

from __future__ import annotations

import abc
import functools
import hashlib
import random
import subprocess
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import pytest

from nova_imagecache._models import BaseImage, BaseRecord, BlockLocation, Digest, FileLocation, RootDisk
from nova_imagecache.backends import Backend, BackendPaths, BaseWriter
from nova_imagecache.exceptions import ImageCacheError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

MIB = 2**20
GUEST_SIZE = 3 * MIB
DISK_SIZE = GUEST_SIZE + MIB

LONG_ID = "Z" + "aB0._-" * 21
"""127 characters, all kinds that an id may have."""

LONG_NAME = "d" + "isk.0-" * 5 + "x"
"""32 characters, all kinds that a name may have."""

REFERENCES = {"copy": ("none",), "overlay": ("link", "path"), "clone": ("clone",)}
"""What may tie a disk to its base, by ``disk_kind``."""

_E = TypeVar("_E", bound=BaseException)
_T = TypeVar("_T")


def promise(kept: object, words: str) -> None:
    """AssertionError in ``words`` unless the promise was kept."""
    if not kept:
        raise AssertionError(f"broken promise: {words}")


def same(actual: object, expected: object, words: str) -> None:
    """AssertionError in ``words``, with what differs, unless both are equal."""
    if actual != expected:
        raise AssertionError(f"broken promise: {words}: {_difference(actual, expected)}")


def refused(error: type[_E], call: Callable[[], object], words: str) -> _E:
    """The ``error`` that the call raised; AssertionError in ``words`` if it raised none or another of our errors."""
    try:
        answer = call()
    except error as err:
        return err
    except ImageCacheError as err:
        raise AssertionError(f"broken promise: {words}: expected {error.__name__}, got {err!r}") from err
    raise AssertionError(f"broken promise: {words}: expected {error.__name__}, got the answer {answer!r}")


def _difference(actual: object, expected: object) -> str:
    if not (isinstance(actual, bytes) and isinstance(expected, bytes)):
        return f"expected {expected!r}, got {actual!r}"
    if len(actual) != len(expected):
        return f"expected {len(expected)} bytes, got {len(actual)}"
    first = next(i for i, (a, b) in enumerate(zip(actual, expected, strict=True)) if a != b)
    return f"bytes differ from offset {first} on: expected {expected[first : first + 8]!r}, got {actual[first:][:8]!r}"


def in_threads(calls: Sequence[Callable[[], _T]]) -> list[_T | ImageCacheError]:
    """What the calls answered, or our errors they raised; all started at the same moment, in threads of their own."""
    barrier = threading.Barrier(len(calls))

    def run(call: Callable[[], _T]) -> _T | ImageCacheError:
        barrier.wait(30)
        try:
            return call()
        except ImageCacheError as err:
            return err

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Bytes for one base: as ``stored``, and as a ``guest`` sees them. Data, holes, and data across a MiB boundary."""

    format: str
    stored: bytes
    guest: bytes


@functools.cache
def make_sample(base_format: str, seed: str) -> Sample:
    """The sample of that seed; two seeds give other bytes everywhere."""
    words = random.Random(seed)  # noqa: S311 - the same bytes in every run
    guest = bytearray(GUEST_SIZE)
    for start, end in ((0, 65536), (MIB - 8192, MIB + 8192), (GUEST_SIZE - 1536, GUEST_SIZE)):
        guest[start:end] = words.randbytes(end - start)
    stored = bytes(guest) if base_format == "raw" else _convert(bytes(guest), "raw", base_format)
    return Sample(format=base_format, stored=stored, guest=bytes(guest))


def _convert(data: bytes, before: str, after: str) -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        source, target = Path(directory, "source"), Path(directory, "target")
        source.write_bytes(data)
        _qemu("qemu-img", "convert", "-f", before, "-O", after, str(source), str(target))
        return target.read_bytes()


def _qemu(*argv: str) -> None:
    subprocess.run(argv, check=True, capture_output=True, timeout=60)


class ContractKit(abc.ABC):
    """The hooks. ``make_backend`` must be given; the others fit disks that are files, raw or any format of qemu-img."""

    base_format: ClassVar[str | None] = None
    """The format of bases to test with; None: the backend's ``wanted_base_format``."""

    forks: ClassVar[bool] = True
    """A forked child can make its own backend over the same paths. False leaves out the tests that kill processes."""

    threads: ClassVar[int] = 8
    """How many threads contend in the tests of races."""

    @abc.abstractmethod
    def make_backend(self, paths: BackendPaths) -> Backend:
        """A backend over ``paths``. A second one over the same paths stands for another process on that storage."""

    def make_paths(self, directory: Path) -> BackendPaths:
        """Empty storage in an empty directory; called more than once in some tests."""
        for path in (directory / "root", directory / "disks"):
            path.mkdir(parents=True)
        return BackendPaths(root=directory / "root", disks_dir=directory / "disks")

    def read_disk(self, backend: Backend, disk: RootDisk) -> bytes:  # noqa: ARG002 - for those without files
        """All the bytes that a guest would read from the disk."""
        path = self._disk_path(disk)
        if disk.format == "raw":
            return path.read_bytes()
        with tempfile.TemporaryDirectory() as directory:
            target = Path(directory, "raw")
            _qemu("qemu-img", "convert", "-f", disk.format, "-O", "raw", str(path), str(target))
            return target.read_bytes()

    def write_disk(
        self,
        backend: Backend,  # noqa: ARG002 - for those without files
        disk: RootDisk,
        offset: int,
        data: bytes,
    ) -> None:
        """Write to the disk as a guest does; offset and length are multiples of 512."""
        path = self._disk_path(disk)
        with tempfile.NamedTemporaryFile() as pattern:
            pattern.write(data)
            pattern.flush()
            command = f"write -s {pattern.name} {offset} {len(data)}"
            _qemu("qemu-io", "-f", disk.format, "-c", command, str(path))

    def litter(self, paths: BackendPaths, disk_id: str) -> list[str]:
        """Names that a root disk which is not there has left behind, apart from an empty directory of its own."""
        directory = paths.disks_dir / disk_id
        return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))

    def _disk_path(self, disk: RootDisk) -> Path:
        if isinstance(disk.location, FileLocation | BlockLocation):
            return disk.location.path
        raise NotImplementedError("the contract cannot read such a location: override read_disk and write_disk")

    # --- fixtures

    @pytest.fixture
    def paths(self, tmp_path: Path) -> BackendPaths:
        """Empty storage."""
        return self.make_paths(tmp_path / "storage")

    @pytest.fixture
    def backend(self, paths: BackendPaths) -> Iterator[Backend]:
        """The backend under test, over empty storage."""
        backend = self.make_backend(paths)
        yield backend
        backend.close()

    # --- what the tests are written in

    def sample(self, backend: Backend, seed: str = "one") -> Sample:
        """Bytes in the format under test."""
        wanted = self.base_format or backend.wanted_base_format or backend.properties.base_formats[0]
        return make_sample(wanted, seed)

    def record(self, image_id: str, sample: Sample, **changes: Any) -> BaseRecord:
        """A record that is true of the sample, but for ``changes``."""
        record = BaseRecord(
            image_id=image_id,
            format=sample.format,
            virtual_size=len(sample.guest),
            size=len(sample.stored),
            source_format=sample.format,
            source_size=len(sample.stored),
            source_digest=Digest("sha256", hashlib.sha256(sample.stored).hexdigest()),
            evidence="os_hash",
            made_by="stored",
            source="contract",
            fetched_at=1_700_000_000.25,
        )
        return replace(record, **changes)

    def stage(self, backend: Backend, image_id: str, sample: Sample) -> BaseWriter:
        """A writer that holds the sample's bytes."""
        writer = backend.stage_base(image_id, sample.format)
        writer.set_size(len(sample.stored))
        for start in range(0, len(sample.stored), MIB):
            piece = sample.stored[start : start + MIB]
            if piece.strip(b"\0"):
                writer.write_at(start, piece)
        return writer

    def publish(self, backend: Backend, image_id: str, seed: str = "one", **changes: Any) -> BaseImage:
        """A published base."""
        sample = self.sample(backend, seed)
        return self.stage(backend, image_id, sample).publish(self.record(image_id, sample, **changes))

    def base_bytes(self, backend: Backend, base: BaseImage) -> bytes:
        """The base's bytes, by ``read_base``."""
        data = bytearray(base.record.size)
        for extent in backend.read_base(base):
            data[extent.offset : extent.offset + len(extent.data)] = extent.data
        return bytes(data)

    def create(
        self, backend: Backend, base: BaseImage, disk_id: str = "vm", name: str = "disk", size: int = DISK_SIZE
    ) -> RootDisk:
        """A root disk."""
        return backend.create_root_disk(base, disk_id, name, size)

    def check_disk(self, backend: Backend, disk: RootDisk, sample: Sample, words: str) -> None:
        """The disk reads as the sample and then zeros up to its size."""
        promise(disk.virtual_size >= len(sample.guest), f"{words}: it is only {disk.virtual_size} bytes long")
        try:
            content = self.read_disk(backend, disk)
        except subprocess.CalledProcessError as err:
            raise AssertionError(f"broken promise: {words}: it cannot be read: {err.stderr!r}") from err
        same(content, sample.guest + bytes(disk.virtual_size - len(sample.guest)), words)

    def check_users(self, backend: Backend, base: BaseImage, count: int, words: str) -> None:
        """The base has ``count`` users; none, whatever the count, where disks are copies."""
        users = list(backend.iter_users(base))
        same(len(users), 0 if backend.properties.disk_kind == "copy" else count, f"{words} (users: {users})")

    def check_no_disk(self, backend: Backend, paths: BackendPaths, disk_id: str, name: str, words: str) -> None:
        """Nothing of the disk is there."""
        same(backend.get_root_disk(disk_id, name), None, f"{words}: get_root_disk")
        promise(
            (disk_id, name) not in [(disk.disk_id, disk.name) for disk in backend.iter_root_disks()],
            f"{words}: iter_root_disks still lists it",
        )
        same(self.litter(paths, disk_id), [], f"{words}: files are left in its directory")

"""What the parts of ``BackendContract`` share: hooks for what differs, samples, and what the tests are written in."""

from __future__ import annotations

import abc
import os
import subprocess
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import pytest

from nova_imagecache._models import BaseImage, BaseRecord, BlockLocation, FileLocation, RootDisk
from nova_imagecache.backends import Backend, BackendPaths, BaseWriter
from nova_imagecache.exceptions import ImageCacheError
from nova_imagecache.testing._promises import promise, refused, same
from nova_imagecache.testing._samples import (
    DISK_SIZE,
    GUEST_SIZE,
    MIB,
    Sample,
    make_sample,
    record_of,
    run_qemu,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = [
    "DISK_SIZE",
    "GUEST_SIZE",
    "LONG_ID",
    "LONG_NAME",
    "MIB",
    "REFERENCES",
    "ContractKit",
    "Sample",
    "in_threads",
    "promise",
    "refused",
    "same",
]

LONG_ID = "Z" + "aB0._-" * 21
"""127 characters, all kinds that an id may have."""

LONG_NAME = "d" + "isk.0-" * 5 + "x"
"""32 characters, all kinds that a name may have."""

REFERENCES = {"copy": ("none",), "overlay": ("link", "path"), "clone": ("clone",)}
"""What may tie a disk to its base, by ``disk_kind``."""

_T = TypeVar("_T")


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


@contextmanager
def opened_by_qemu(path: Path, disk_format: str) -> Iterator[None]:
    """While the block runs, qemu has the disk open for writing."""
    argv = ["qemu-io", "-f", disk_format, str(path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as guest:
        assert guest.stdout is not None  # noqa: S101  # for the type checker
        said = b""
        while not said.endswith(b"qemu-io> "):  # it asks when it has opened the disk
            letter = guest.stdout.read(1)
            promise(letter, f"a root disk can be opened by qemu: {said!r}")
            said += letter
        try:
            yield
        finally:
            guest.terminate()


class ContractKit(abc.ABC):
    """The hooks. ``make_backend`` must be given; the others fit disks that are files, raw or any format of qemu-img."""

    base_format: ClassVar[str | None] = None
    """The format of bases to test with; None: the backend's ``wanted_base_format``."""

    forks: ClassVar[bool] = True
    """A forked child can make its own backend over the same paths. False leaves out the tests that kill processes."""

    threads: ClassVar[int] = 8
    """How many threads contend in the tests of races."""

    large_size: ClassVar[int] = 5 * 2**30 + 512
    """Bytes of the largest disk that is made. Nothing is written to it: set less where it is allocated all the same."""

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
            run_qemu("qemu-img", "convert", "-f", disk.format, "-O", "raw", str(path), str(target))
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
            run_qemu("qemu-io", "-f", disk.format, "-c", command, str(path))

    def litter(self, paths: BackendPaths, disk_id: str) -> list[str]:
        """Names that a root disk which is not there has left behind, apart from an empty directory of its own."""
        directory = paths.disks_dir / disk_id
        return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))

    def kept(self, paths: BackendPaths) -> dict[str, int]:
        """What the storage holds, by name, and the bytes that each takes. The default: all files below ``paths``."""
        found: dict[tuple[int, int], tuple[str, int]] = {}
        for top in (paths.root, paths.disks_dir):
            for directory, _, names in os.walk(top):
                for path in (Path(directory, name) for name in names):
                    status = path.lstat()
                    label = str(path.relative_to(top.parent))
                    found[status.st_dev, status.st_ino] = (label, status.st_blocks * 512)
        return dict(found.values())

    # --- hooks that may be left out: their tests are skipped, and say so

    def filled(self, backend: Backend, paths: BackendPaths) -> AbstractContextManager[None] | None:  # noqa: ARG002  # overridden
        """Storage without room for another 64 KiB while the block runs; None: it cannot be filled here.

        ``fill_directory`` does it for a small filesystem, on which ``make_paths`` then puts the storage.
        """
        return None

    def hidden_users(self, backend: Backend, paths: BackendPaths) -> AbstractContextManager[None] | None:  # noqa: ARG002  # overridden
        """Storage that cannot count users while the block runs; None: it always can."""
        return None

    def held_open(self, backend: Backend, disk: RootDisk) -> AbstractContextManager[None] | None:  # noqa: ARG002  # overridden
        """A guest that has the disk open for writing while the block runs; None: nobody can have it open.

        Where the disk is a file or a block device: qemu, with the locks that it takes.
        """
        if isinstance(disk.location, FileLocation | BlockLocation):
            return opened_by_qemu(disk.location.path, disk.format)
        return None

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
        return replace(record_of(image_id, sample, "contract"), **changes)

    def stage(self, backend: Backend, image_id: str, sample: Sample) -> BaseWriter:
        """A writer that holds the sample's bytes."""
        writer = backend.stage_base(image_id, sample.format)
        self.write(writer, sample)
        return writer

    def write(self, writer: BaseWriter, sample: Sample) -> None:
        """Write the sample's bytes, holes left out."""
        writer.set_size(len(sample.stored))
        for start in range(0, len(sample.stored), MIB):
            piece = sample.stored[start : start + MIB]
            if piece.strip(b"\0"):
                writer.write_at(start, piece)

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

    def remove_by_two_looks(self, backend: Backend) -> None:
        """Remove the base of "img" as the core does at its second look: retire, look, then purge or restore."""
        found = backend.find_base("img")
        if found is None:
            raise AssertionError("broken promise: a published base is found")
        retired = backend.retire_base(found)
        if list(backend.iter_users(retired.base)):
            backend.restore_base(retired)
        else:
            backend.purge_base(retired)

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

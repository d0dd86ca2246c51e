"""The part of ``BackendContract`` about a base in the making."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from nova_imagecache._models import BlockLocation, FileLocation
from nova_imagecache.backends import Backend, BackendPaths, BaseWriter
from nova_imagecache.testing._contract_kit import (
    MIB,
    ContractKit,
    Sample,
    in_threads,
    promise,
    same,
)
from nova_imagecache.testing._promises import CONTRACT_VERSION, chapter

if TYPE_CHECKING:
    from pathlib import Path


@chapter(
    "staging",
    "backends.BackendProperties",
    "backends.Backend.stage_base",
    "backends.BaseWriter",
    "backends.Backend.read_base",
)
class StagingContract(ContractKit):
    """A base in the making."""

    def _writer(self, backend: Backend, size: int) -> tuple[BaseWriter, Sample]:
        """A writer for any bytes at all, and what its record is made from."""
        formats = backend.properties.base_formats
        sample = Sample(format="raw" if "raw" in formats else formats[0], stored=bytes(size), guest=bytes(size))
        return backend.stage_base("img", sample.format), sample

    def test_facts(self, backend: Backend) -> None:
        """The properties hold what the core understands."""
        facts = backend.properties
        same(backend.api_version, CONTRACT_VERSION, "api_version is that of the contract")
        promise(facts.base_formats, "base_formats names at least one format")
        promise(set(facts.base_formats) <= {"raw", "qcow2"}, "base_formats are known to the core: raw, qcow2")
        promise(facts.disk_kind in ("copy", "overlay", "clone"), "disk_kind is copy, overlay or clone")
        promise(facts.storage, "storage says what is kept under the root")
        wanted = backend.wanted_base_format
        promise(wanted is None or wanted in facts.base_formats, "wanted_base_format is one of base_formats, or None")

    def test_constructor_does_no_io(self, paths: BackendPaths) -> None:
        """Making a backend leaves its surroundings as they are."""
        before = _listing(paths)
        self.make_backend(paths).close()
        same(_listing(paths), before, "the constructor does no I/O")

    def test_empty_storage(self, backend: Backend) -> None:
        """Empty storage holds nothing, and says so without an error."""
        same(backend.find_base("img"), None, "find_base of an unknown image is None")
        same(list(backend.iter_bases()), [], "iter_bases of empty storage is empty")
        same(backend.get_root_disk("vm", "disk"), None, "get_root_disk of an unknown disk is None")
        same(list(backend.iter_root_disks()), [], "iter_root_disks of empty storage is empty")

    def test_check_names_facts(self, backend: Backend) -> None:
        """``check`` answers with named facts."""
        for fact in backend.check():
            promise(fact.name, "every fact of check() has a name")

    def test_staged_base_is_invisible(self, backend: Backend, paths: BackendPaths) -> None:
        """Nobody sees a base before it is published."""
        other = self.make_backend(paths)
        sample = self.sample(backend)
        writer = self.stage(backend, "img", sample)
        writer.sync()
        for observer in (backend, other):
            same(observer.find_base("img"), None, "a staged base is not found before publish")
            same(list(observer.iter_bases()), [], "a staged base is not listed before publish")
        writer.publish(self.record("img", sample))
        for observer in (backend, other):
            promise(observer.find_base("img"), "a base is found by everybody once publish has returned")
        other.close()

    def test_content_is_what_was_written(self, backend: Backend) -> None:
        """A published base holds the bytes, and says where."""
        base = self.publish(backend, "img")
        same(self.base_bytes(backend, base), self.sample(backend).stored, "a base holds the bytes that were written")
        if isinstance(base.location, FileLocation | BlockLocation):
            promise(base.location.path.is_absolute(), "a location's path is absolute")
            same(base.location.path.read_bytes(), self.sample(backend).stored, "a base's location holds its bytes")

    def test_unwritten_reads_as_zeros(self, backend: Backend) -> None:
        """What is not written reads as zeros, in whatever order the rest was."""
        writer, sample = self._writer(backend, 3 * MIB)
        writer.set_size(3 * MIB)
        writer.write_at(2 * MIB + 512, b"second" + bytes(506))
        writer.write_at(4096, b"first")
        expected = bytearray(3 * MIB)
        expected[2 * MIB + 512 : 2 * MIB + 518], expected[4096:4101] = b"second", b"first"
        base = writer.publish(self.record("img", sample))
        same(self.base_bytes(backend, base), bytes(expected), "unwritten bytes of a base read as zeros")

    def test_writer_grows(self, backend: Backend) -> None:
        """``write_at`` grows the base where it must, and ``set_size`` may be called again to grow it."""
        writer, sample = self._writer(backend, MIB + 8192)
        writer.set_size(4096)
        writer.write_at(MIB, b"x" * 4096)
        writer.set_size(MIB + 8192)
        base = writer.publish(self.record("img", sample))
        expected = bytes(MIB) + b"x" * 4096 + bytes(4096)
        same(self.base_bytes(backend, base), expected, "a writer grows by write_at and by set_size")

    def test_write_takes_any_buffer(self, backend: Backend) -> None:
        """``write_at`` takes bytes, bytearray and memoryview, and does not keep them."""
        writer, sample = self._writer(backend, 12288)
        buffer = bytearray(b"b" * 4096)
        writer.write_at(0, b"a" * 4096)
        writer.write_at(4096, buffer)
        writer.write_at(8192, memoryview(b"--" + b"c" * 4096)[2:])
        buffer[:] = b"!" * 4096
        base = writer.publish(self.record("img", sample))
        expected = b"a" * 4096 + b"b" * 4096 + b"c" * 4096
        same(self.base_bytes(backend, base), expected, "write_at takes any buffer and is done with it on return")

    def test_threads_write_disjoint_ranges(self, backend: Backend) -> None:
        """Several threads write one base at once."""
        pieces = [bytes([1 + index]) * 65536 for index in range(32)]
        writer, sample = self._writer(backend, 32 * 65536)

        def write(first: int) -> None:
            for index in range(first, 32, 4):
                writer.write_at(index * 65536, pieces[index])

        in_threads([partial(write, first) for first in range(4)])
        base = writer.publish(self.record("img", sample))
        same(self.base_bytes(backend, base), b"".join(pieces), "write_at is thread-safe for disjoint ranges")

    def test_path_may_be_written_directly(self, backend: Backend) -> None:
        """What is written to ``path`` is the base's content."""
        sample = self.sample(backend)
        writer = backend.stage_base("img", sample.format)
        if writer.path is None:
            writer.discard()
            return
        writer.set_size(len(sample.stored))
        with writer.path.open("r+b") as file:
            file.write(sample.stored)
        base = writer.publish(self.record("img", sample))
        same(self.base_bytes(backend, base), sample.stored, "what was written to the writer's path is the base")

    def test_written_bytes_can_be_read(self, backend: Backend) -> None:
        """``read_at`` gives what was written, and zeros elsewhere; or always None, where a writer cannot read."""
        writer, _ = self._writer(backend, 2 * MIB)
        writer.set_size(2 * MIB)
        writer.write_at(MIB - 1024, b"x" * 2048)
        answers = in_threads([partial(writer.read_at, MIB, 2048), partial(writer.read_at, MIB - 512, 512)] * 4)
        expected = [b"x" * 1024 + bytes(1024), b"x" * 512] * 4
        promise(answers in (expected, [None] * len(expected)), "read_at gives what was written, or always None")
        writer.discard()

    def test_writers_are_exclusive(self, backend: Backend) -> None:
        """Two writers for one image know nothing of each other."""
        one, two = self.sample(backend, "one"), self.sample(backend, "two")
        first, second = self.stage(backend, "img", one), self.stage(backend, "img", two)
        first.discard()
        base = second.publish(self.record("img", two))
        same(self.base_bytes(backend, base), two.stored, "a writer is not touched by another one of the same image")

    def test_discard_leaves_nothing(self, backend: Backend) -> None:
        """``discard`` may be called again and again, and takes no space after it."""
        before = backend.capacity()
        writer = self.stage(backend, "img", self.sample(backend))
        writer.sync()
        writer.discard()
        writer.discard()
        same(backend.find_base("img"), None, "a discarded base is not found")
        same(backend.capacity().staging, before.staging, "discard leaves nothing in staging")
        base = self.publish(backend, "img", "two")
        same(self.base_bytes(backend, base), self.sample(backend, "two").stored, "an image can be staged again")

    def test_discard_after_publish_does_nothing(self, backend: Backend) -> None:
        """A base that was published outlives its writer's ``discard``."""
        sample = self.sample(backend)
        writer = self.stage(backend, "img", sample)
        base = writer.publish(self.record("img", sample))
        writer.discard()
        promise(backend.find_base("img"), "discard after publish does nothing")
        same(self.base_bytes(backend, base), sample.stored, "discard after publish leaves the bytes alone")

    def test_sums_are_kept_or_not(self, backend: Backend) -> None:
        """``read_sums`` gives what ``write_sums`` was given, or None, never anything else."""
        sample = self.sample(backend)
        writer = self.stage(backend, "img", sample)
        writer.write_sums(bytes(range(48)))
        base = writer.publish(self.record("img", sample))
        promise(backend.read_sums(base) in (None, bytes(range(48))), "read_sums gives what write_sums kept")
        plain = self.publish(backend, "plain")
        same(backend.read_sums(plain), None, "read_sums is None where none were written")

    def test_extents_keep_their_shape(self, backend: Backend) -> None:
        """``read_base`` gives extents in order, 1 MiB at most, none across a MiB boundary or beyond the end."""
        base, end = self.publish(backend, "img"), 0
        for extent in backend.read_base(base):
            promise(extent.data, "an extent is never empty")
            promise(extent.offset >= end, "extents come in order and do not overlap")
            end = extent.offset + len(extent.data)
            promise(extent.offset // MIB == (end - 1) // MIB, "no extent crosses a MiB boundary")
        promise(end <= base.record.size, "no extent reaches beyond the base's size")


def _listing(paths: BackendPaths) -> list[Path]:
    return sorted((*paths.root.rglob("*"), *paths.disks_dir.rglob("*")))

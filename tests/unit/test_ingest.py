"""From a source to a base: whole, verified, sparse, in bounded memory; or refused with nothing published."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from harness import qcow2
from harness.images import bomb
from nova_imagecache import _exec, _fs, _qcow2, _sums
from nova_imagecache._admission import Request, admit_metadata, base_format
from nova_imagecache._guard_source import GuardedSource
from nova_imagecache._ingest import Ingest
from nova_imagecache._inspect import INSPECTOR_VERSION
from nova_imagecache._models import BaseRecord, Digest, ImageInfo, round_up
from nova_imagecache._packed import SurpriseError
from nova_imagecache._placing import Placer, Qcow2Placer, Spool
from nova_imagecache._stream import PIECE
from nova_imagecache._watch import Watch
from nova_imagecache.backends import BackendPaths, BaseWriter
from nova_imagecache.backends._writer import FileWriter
from nova_imagecache.backends.file import FileBackend
from nova_imagecache.exceptions import (
    CancelledError,
    CommandError,
    DeadlineError,
    DiskTooSmallError,
    ImageCorruptError,
    ImageNotActiveError,
    ImageRejectedError,
    NoSpaceError,
    SourceUnavailableError,
)
from nova_imagecache.testing import FakeImage, FakeSource, FaultPlan
from unit import images
from unit.images import KIB, MIB, SIZE

OBJECT = 4 * MIB

RAW = images.guest_data()


def nothing(_needed: int, _stage: str, _placed: int) -> None:
    """Room for everything."""


def asked(
    *,
    wanted: str = "raw",
    disk_size: int | None = None,
    max_virtual_size: int | None = None,
    expect: Digest | None = None,
    allow_unverified: bool = False,
    admit: Callable[[int, str, int], None] = nothing,
) -> Request:
    def admit_free(needed: int, stage: str, placed: int) -> bool:
        try:
            admit(needed, stage, placed)
        except NoSpaceError:
            return False
        return True

    return Request(
        base_format=wanted,
        disk_size=disk_size,
        max_virtual_size=max_virtual_size,
        expect=expect,
        allow_unverified=allow_unverified,
        admit=admit,
        admit_free=admit_free,
    )


class Bench:
    """One image from a FakeSource into a writer of the file backend."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.scratch = path / "scratch"
        self.scratch.mkdir()
        self.backend = FileBackend({}, BackendPaths(root=path / "cache", disks_dir=path / "disks"))
        self.told: list[tuple[str, int, int | None]] = []
        self.source = FakeSource()
        self.writer: BaseWriter | None = None
        self.watch = Watch("img")

    @property
    def staged(self) -> Path:
        assert self.writer is not None
        assert self.writer.path is not None
        return self.writer.path

    def run(self, image: bytes | FakeImage, request: Request | None = None, *, path: bool = True) -> BaseRecord:
        """Admit and ingest it; the writer takes a ``path`` or only ``write_at``."""
        request = request or asked()
        self.source.add("img", image)
        info = self.source.get("img")
        admit_metadata(info, request)
        return self.ingest(info, GuardedSource(self.source), request, path=path)

    def ingest(self, info: ImageInfo, source: GuardedSource, request: Request, *, path: bool = True) -> BaseRecord:
        self.discard()
        self.writer = self.backend.stage_base("img", request.base_format)
        writer = self.writer if path else WithoutPath(self.writer)
        return Ingest(info, source, request, self.watch, self.tell).run(writer, self.scratch, 1234.5)

    def tell(self, stage: str, done: int, total: int | None, /) -> None:
        self.told.append((stage, done, total))

    def discard(self) -> None:
        if self.writer is not None:
            self.writer.discard()


class WithoutPath(BaseWriter):
    """A storage that takes bytes only through write_at, as RBD does."""

    def __init__(self, inner: BaseWriter) -> None:
        self.inner = inner
        self.offsets: list[int] = []

    def set_size(self, size: int) -> None:
        self.inner.set_size(size)

    def write_at(self, offset: int, buffer: bytes | bytearray | memoryview) -> None:
        assert offset // OBJECT == (offset + len(buffer) - 1) // OBJECT
        self.inner.write_at(offset, buffer)

    def read_at(self, offset: int, length: int) -> bytes | None:
        return self.inner.read_at(offset, length)

    def write_sums(self, sums: bytes | memoryview) -> None:
        self.inner.write_sums(sums)

    def sync(self) -> None:
        self.inner.sync()

    def publish(self, record: BaseRecord) -> object:  # type: ignore[override]  # never called here
        raise NotImplementedError

    def discard(self) -> None:
        self.inner.discard()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.discard()


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


# --- what comes in ---------------------------------------------------------------------------------------------------


def test_raw_bytes_are_stored_as_they_are(bench: Bench) -> None:
    """With the record that says all about them."""
    record = bench.run(RAW)
    assert bench.staged.read_bytes() == RAW
    assert record == BaseRecord(
        image_id="img",
        format="raw",
        virtual_size=SIZE,
        size=SIZE,
        source_format="raw",
        source_size=SIZE,
        source_digest=Digest("sha512", hashlib.sha512(RAW).hexdigest()),
        evidence="os_hash",
        made_by="stored",
        source="fake",
        fetched_at=1234.5,
        inspector=INSPECTOR_VERSION,
    )


@pytest.mark.parametrize("chunk", [1, 777, 4096, 65536, MIB - 1, MIB, 64 * MIB])
def test_chunks_may_be_tiny_or_huge(bench: Bench, chunk: int) -> None:
    """The same bytes and the same holes."""
    data = RAW if chunk > 1 else RAW[: 70 * KIB]
    bench.source.chunk_size = chunk
    bench.run(data)
    assert bench.staged.read_bytes() == data
    assert allocated(bench.staged) < 400 * KIB


def test_zeros_become_holes(bench: Bench) -> None:
    """What a guest never wrote takes no space, also at the end."""
    data = b"\xeb\x3c" + bytes(9 * MIB) + b"x" + bytes(5 * MIB)
    bench.run(data)
    assert bench.staged.read_bytes() == data
    assert allocated(bench.staged) <= 16 * KIB


def test_an_image_of_zeros_is_one_hole(bench: Bench) -> None:
    """Of its full length."""
    bench.run(bytes(5 * MIB + 512))
    assert bench.staged.stat().st_size == 5 * MIB + 512
    assert allocated(bench.staged) == 0


@pytest.mark.parametrize("extra", [1, 100, 511])
def test_a_raw_image_that_ends_in_half_a_sector_is_rounded_up_for_the_guest(bench: Bench, extra: int) -> None:
    """Its own bytes stay what was verified."""
    record = bench.run(RAW + b"x" * extra)
    assert (record.virtual_size, record.size) == (SIZE + 512, SIZE + extra)
    assert bench.staged.stat().st_size == SIZE + extra
    assert round_up(SIZE + extra) == SIZE + 512
    assert round_up(SIZE) == SIZE


@pytest.mark.parametrize("path", [True, False], ids=["path", "write_at"])
@pytest.mark.parametrize(
    "kind", sorted(kind for kind, (name, _) in images.MAKERS.items() if name not in images.RAW_DECLARED)
)
def test_other_formats_are_converted_to_raw(bench: Bench, kind: str, path: bool) -> None:
    """For storages with a path and for those with none; the scratch is given back."""
    declared, maker = images.MAKERS[kind]
    data = maker(bench.path)
    record = bench.run(FakeImage(data=data, disk_format=declared), path=path)
    assert bench.staged.read_bytes() == RAW
    assert (record.format, record.virtual_size, record.size) == ("raw", SIZE, SIZE)
    assert (record.source_format, record.source_size) == (declared, len(data))
    assert record.made_by == ("qcow2 decoder" if declared == "qcow2" else "qemu-img convert")
    assert allocated(bench.staged) < MIB
    assert list(bench.scratch.glob("[ds]*")) == []


def test_a_converted_base_has_its_sums(bench: Bench) -> None:
    """Its bytes are not the source's, so the source's digest does not prove them."""
    bench.run(FakeImage(data=images.converted(bench.path, "qcow2"), disk_format="qcow2"))
    sums = (bench.staged.parent / "disk.sums").read_bytes()
    assert len(sums) == 8 * SIZE // MIB


def test_a_native_qcow2_is_kept_as_it_came(bench: Bench) -> None:
    """Byte for byte, with the virtual size of its header."""
    data = images.converted(bench.path, "qcow2", "-c")
    record = bench.run(FakeImage(data=data, disk_format="qcow2"), asked(wanted="qcow2"))
    assert bench.staged.read_bytes() == data
    assert (record.format, record.virtual_size, record.size) == ("qcow2", SIZE, len(data))
    assert record.made_by == "stored"


@pytest.mark.parametrize("declared", ["iso", "ami", "aki", "ari"])
def test_isos_and_amis_are_raw_bytes(bench: Bench, declared: str) -> None:
    """Whatever they hold."""
    data = images.iso() if declared == "iso" else RAW
    record = bench.run(FakeImage(data=data, disk_format=declared))
    assert bench.staged.read_bytes() == data
    assert (record.format, record.source_format, record.made_by) == ("raw", declared, "stored")


@pytest.mark.parametrize(
    ("declared", "wanted", "possible", "expected"),
    [
        ("raw", "raw", ("raw", "qcow2"), "raw"),
        ("qcow2", "raw", ("raw", "qcow2"), "raw"),
        ("qcow2", None, ("raw", "qcow2"), "qcow2"),
        ("qcow2", None, ("raw",), "raw"),
        ("vmdk", None, ("raw", "qcow2"), "raw"),
        ("iso", None, ("raw", "qcow2"), "raw"),
        ("ami", None, ("qcow2", "raw"), "raw"),
    ],
)
def test_the_bases_format_is_the_wanted_or_the_images_own(
    declared: str, wanted: str | None, possible: tuple[str, ...], expected: str
) -> None:
    """Where the storage can hold it; else raw."""
    assert base_format(declared, wanted, possible) == expected


# --- one pass, and what cannot be done in one -----------------------------------------------------------------------


def sums_of(data: bytes) -> bytes:
    return b"".join(_sums.of_piece(data[at : at + MIB]) for at in range(0, len(data), MIB))


@pytest.mark.parametrize("options", [(), ("-c",), ("-c", "-o", "compression_type=zstd"), ("-o", "compat=0.10")])
def test_a_qcow2_image_is_unpacked_in_one_pass(bench: Bench, options: tuple[str, ...]) -> None:
    """No qemu-img, no copy of the download: what is written is the base, and the little that no table has named yet."""
    data = images.converted(bench.path, "qcow2", *options, size=32 * MIB)
    with FaultPlan() as plan:
        record = bench.run(FakeImage(data=data, disk_format="qcow2"))
    assert record.made_by == "qcow2 decoder"
    assert "exec.run" not in {step.name for step in plan.trace}
    expected = images.guest_data(32 * MIB)
    assert bench.staged.read_bytes() == expected
    assert (bench.staged.parent / "disk.sums").read_bytes() == sums_of(expected)
    assert bench.source.opens == 1


def test_a_table_at_the_end_changes_nothing(bench: Bench) -> None:
    """A guest's disk that was grown: its first table moved behind all data, which is kept and placed late."""
    path = bench.path / "grown"
    images.qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", path, str(8 * MIB))
    writes = [x for n in range(7) for x in ("-c", f"write -P {n + 1} {(n * 5 % 7) * MIB + n * 4096} 700k")]
    subprocess.run(["qemu-io", "-t", "unsafe", "-f", "qcow2", *writes, str(path)], check=True, capture_output=True)
    images.qemu_img("resize", "-q", "-f", "qcow2", path, str(48 * MIB))
    images.qemu_img("convert", "-f", "qcow2", "-O", "raw", path, bench.path / "raw")
    expected = (bench.path / "raw").read_bytes()
    record = bench.run(FakeImage(data=path.read_bytes(), disk_format="qcow2"))
    assert (record.made_by, record.virtual_size) == ("qcow2 decoder", 48 * MIB)
    assert bench.staged.read_bytes() == expected
    assert (bench.staged.parent / "disk.sums").read_bytes() == sums_of(expected)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Where bases are read back."""
    found: list[int] = []
    true_read = FileWriter.read_at

    def read_at(self: FileWriter, offset: int, length: int) -> bytes:
        found.append(offset)
        return true_read(self, offset, length)

    monkeypatch.setattr(FileWriter, "read_at", read_at)
    return found


@pytest.mark.parametrize("kinds", [("plain",), ("packed",), ("packed", "plain", "hole")], ids="-".join)
def test_clusters_in_any_order_are_summed_right(bench: Bench, kinds: tuple[str, ...], read: list[int]) -> None:
    """What came in another order than the guest's is read back for its checksums."""
    made = qcow2.make(qcow2.Layout(cluster_bits=16, kinds=kinds * (24 * 16 // len(kinds)), seed=7, tail=512))
    record = bench.run(FakeImage(data=made.file, disk_format="qcow2"))
    assert record.made_by == "qcow2 decoder"
    assert bench.staged.read_bytes() == made.guest
    assert (bench.staged.parent / "disk.sums").read_bytes() == sums_of(made.guest)
    assert len(read) == len(set(read)) > 6


def test_clusters_that_were_packed_side_by_side_are_not_read_back(bench: Bench, read: list[int]) -> None:
    """qemu-img packs many at once and writes what is ready first: a MiB's clusters lie near each other."""
    kinds = ("packed", "packed", "packed", "hole")
    made = qcow2.make(qcow2.Layout(cluster_bits=16, kinds=kinds * (24 * 4), seed=7, near=30))
    assert bench.run(FakeImage(data=made.file, disk_format="qcow2")).made_by == "qcow2 decoder"
    assert bench.staged.read_bytes() == made.guest
    assert (bench.staged.parent / "disk.sums").read_bytes() == sums_of(made.guest)
    assert read == []


def test_few_compressed_clusters_far_from_each_other(bench: Bench) -> None:
    """They wait for neighbours in the pieces that they came in, while the rest of the file takes the same ring."""
    kinds = ("packed", *("zero-allocated",) * 31)
    made = qcow2.make(qcow2.Layout(cluster_bits=16, kinds=kinds * 24, seed=3, near=1))
    assert len(made.file) > 20 * PIECE
    assert bench.run(FakeImage(data=made.file, disk_format="qcow2")).made_by == "qcow2 decoder"
    assert bench.staged.read_bytes() == made.guest


def test_a_long_plain_run_right_behind_compressed_clusters(bench: Bench) -> None:
    """Placed with them, though it is longer than what is unpacked at a time."""
    # the first run fills a piece with the tables before it; the rest comes with the next one
    kinds = ("plain",) * 252 + ("packed",) * 120 + ("plain",) * 170
    made = qcow2.make(qcow2.Layout(cluster_bits=13, kinds=kinds))
    assert bench.run(FakeImage(data=made.file, disk_format="qcow2")).made_by == "qcow2 decoder"
    assert bench.staged.read_bytes() == made.guest
    assert (bench.staged.parent / "disk.sums").read_bytes() == sums_of(made.guest)


@pytest.mark.parametrize("path", [True, False], ids=["path", "write_at"])
def test_what_the_header_tells_is_converted_by_qemu_img_at_once(bench: Bench, path: bool) -> None:
    """Or what is not told at all: fetched once, and the record says why the long way was gone."""
    data = images.converted(bench.path, "qcow2")
    record = bench.run(FakeImage(data=data, disk_format="qcow2", size=None), path=path)
    assert record.made_by == "qemu-img convert: a length that is not announced"
    assert bench.staged.read_bytes() == RAW
    assert bench.source.opens == 1


@pytest.mark.parametrize("path", [True, False], ids=["path", "write_at"])
def test_a_surprise_in_the_middle_costs_a_second_fetch(bench: Bench, path: bool) -> None:
    """Two guest clusters that share one of the file: QEMU reads them, the decoder cannot prove what they mean."""
    made = qcow2.make(qcow2.Layout(cluster_bits=16, kinds=("plain",) * 100))
    file = bytearray(made.file)
    l2 = made.tables[2][0]
    file[l2 + 8 * 99 : l2 + 8 * 100] = file[l2 + 8 * 3 : l2 + 8 * 4]
    record = bench.run(FakeImage(data=bytes(file), disk_format="qcow2"), path=path)
    assert record.made_by == "qemu-img convert: a data cluster where something else lies"
    expected = made.guest[: 99 * 65536] + made.guest[3 * 65536 : 4 * 65536]
    assert bench.staged.read_bytes() == expected
    assert (bench.staged.parent / "disk.sums").read_bytes() == sums_of(expected)
    assert bench.source.opens == 2


@pytest.mark.slow
def test_the_second_fetch_is_judged_by_its_own_bytes(bench: Bench) -> None:
    """From a source that pauses just when the first fetch is left, whose reader wakes in the middle of the second."""
    made = qcow2.make(qcow2.Layout(cluster_bits=16, kinds=("plain",) * 24 * 16))
    file = bytearray(made.file)
    l2 = made.tables[2][0]
    file[l2 + 8 : l2 + 16] = file[l2 : l2 + 8]  # refused in the first piece
    woken, second = threading.Event(), threading.Event()

    class Pausing(FakeSource):
        @contextmanager
        def open(self, image: ImageInfo, offset: int = 0) -> Iterator[Iterator[bytes]]:
            with super().open(image, offset) as chunks:
                yield first(chunks) if self.opens == 1 else later(chunks)

    def first(chunks: Iterator[bytes]) -> Iterator[bytes]:
        for number, chunk in enumerate(chunks):
            if number == 6:
                second.wait(10)
            yield chunk
            if number == 6:
                woken.set()

    def later(chunks: Iterator[bytes]) -> Iterator[bytes]:
        second.set()
        woken.wait(1)
        yield from chunks

    bench.source = Pausing(chunk_size=MIB)
    record = bench.run(FakeImage(data=bytes(file), disk_format="qcow2"))
    assert record.made_by == "qemu-img convert: a data cluster where something else lies"
    assert bench.source.opens == 2


def test_a_damaged_compressed_cluster_is_a_rejected_image(bench: Bench) -> None:
    """The decoder is surprised, qemu-img is asked, and its verdict is the error."""
    made = qcow2.make(qcow2.Layout(cluster_bits=16, kinds=("packed",) * 40))
    file = bytearray(made.file)
    first = max(at for at, _length in made.tables) + 65536
    file[first:] = b"\xff" * (len(file) - first)
    with pytest.raises(ImageRejectedError, match="qemu-img cannot convert it"):
        bench.run(FakeImage(data=bytes(file), disk_format="qcow2"))
    assert bench.source.opens == 2


def test_a_damaged_compressed_cluster_lets_its_piece_go(bench: Bench) -> None:
    """The ring goes round until the image is given up, though its clusters were never placed."""
    made = qcow2.make(qcow2.Layout(cluster_bits=16, kinds=("packed",) * 4))
    data = max(at for at, _length in made.tables) + 65536
    file = memoryview(made.file[:data].ljust(len(made.file), b"\xff"))
    held: list[int] = []

    def hold() -> Callable[[], None]:
        held.append(1)
        return held.clear

    header = _qcow2.parse_header(file[: _qcow2.HEADER_BYTES])
    writer = bench.backend.stage_base("damaged", "raw")
    with (
        Spool(bench.path / "spool") as spool,
        Qcow2Placer(
            header,
            len(file),
            Placer(writer, header.virtual_size),
            spool,
            hold=hold,
            admit=lambda _needed: None,
            admit_free=lambda _needed: True,
            check=lambda: None,
        ) as decoding,
    ):
        decoding.feed(file)
        assert held == [1]
        with pytest.raises(SurpriseError, match="damaged"):
            decoding.finish()
    assert held == []
    writer.discard()


def test_without_the_fast_libraries_the_standard_one_unpacks(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deflate by zlib where isal is not; where zstandard is not, qemu-img, and the record says so."""
    monkeypatch.setitem(sys.modules, "isal", None)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    data = images.converted(bench.path, "qcow2", "-c")
    assert bench.run(FakeImage(data=data, disk_format="qcow2")).made_by == "qcow2 decoder"
    assert bench.staged.read_bytes() == RAW
    data = images.converted(bench.path, "qcow2", "-c", "-o", "compression_type=zstd")
    record = bench.run(FakeImage(data=data, disk_format="qcow2"))
    assert record.made_by == "qemu-img convert: zstd, and the package zstandard is not installed"
    assert bench.staged.read_bytes() == RAW


# --- digests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["sha512", "sha256", "md5", "sha1", "blake2b", "sha3_256"])
def test_the_announced_digest_is_what_is_compared(bench: Bench, algorithm: str) -> None:
    """Whatever the image service uses."""
    digest = Digest(algorithm, hashlib.new(algorithm, RAW, usedforsecurity=False).hexdigest())
    assert bench.run(FakeImage(data=RAW, digest=digest)).source_digest == digest
    wrong = Digest(algorithm, hashlib.new(algorithm, b"other", usedforsecurity=False).hexdigest())
    with pytest.raises(ImageCorruptError) as caught:
        bench.run(FakeImage(data=RAW, digest=wrong))
    assert (caught.value.expected, caught.value.actual) == (wrong, digest)
    assert caught.value.image_id == "img"


def test_what_the_caller_expects_is_compared_as_well(bench: Bench) -> None:
    """Both must hold, in algorithms that may differ; the caller's is the evidence."""
    right = Digest("sha256", hashlib.sha256(RAW).hexdigest())
    record = bench.run(RAW, asked(expect=right))
    assert (record.source_digest, record.evidence) == (right, "expected")
    wrong = Digest("sha256", hashlib.sha256(b"other").hexdigest())
    with pytest.raises(ImageCorruptError):
        bench.run(RAW, asked(expect=wrong))
    with pytest.raises(ImageCorruptError):
        bench.run(FakeImage(data=RAW, digest=wrong), asked(expect=right))


def test_an_image_without_a_digest_needs_leave(bench: Bench) -> None:
    """It is refused before a byte; allowed, its digest is written down as what it is: unverified."""
    image = FakeImage(data=RAW, digest=None)
    with pytest.raises(ImageRejectedError, match="allow_unverified") as caught:
        bench.run(image)
    assert "allow_unverified" in str(caught.value.todo)
    assert bench.source.opens == 0
    record = bench.run(image, asked(allow_unverified=True))
    assert record.evidence == "unverified"
    assert record.source_digest == Digest("sha512", hashlib.sha512(RAW).hexdigest())


def test_an_expected_digest_is_enough(bench: Bench) -> None:
    """The caller vouches where the service does not."""
    expect = Digest("sha256", hashlib.sha256(RAW).hexdigest())
    assert bench.run(FakeImage(data=RAW, digest=None), asked(expect=expect)).evidence == "expected"


# --- lengths ---------------------------------------------------------------------------------------------------------


def test_an_image_longer_than_announced_is_stopped_at_once(bench: Bench) -> None:
    """An endless stream fills no disk."""
    bench.source.chunk_size = 64 * KIB
    image = FakeImage(data=RAW + bytes(64 * MIB), size=len(RAW))
    with pytest.raises(ImageCorruptError, match=f"expected {len(RAW)} bytes"):
        bench.run(image)
    # what was read ahead is bounded
    assert bench.source.bytes_served < len(RAW) + 12 * MIB
    assert bench.staged.stat().st_size <= len(RAW)


@pytest.mark.parametrize("missing", [1, 512, MIB, SIZE - 1])
def test_an_image_shorter_than_announced_is_damaged(bench: Bench, missing: int) -> None:
    """Whatever its digest says."""
    data = RAW[: SIZE - missing]
    digest = Digest("sha512", hashlib.sha512(data).hexdigest())
    with pytest.raises(ImageCorruptError) as caught:
        bench.run(FakeImage(data=data, size=SIZE, digest=digest))
    assert caught.value.expected == f"{SIZE} bytes"
    assert caught.value.actual == f"{len(data)} bytes"


def test_an_image_of_unannounced_size_is_taken(bench: Bench) -> None:
    """Its digest says when it is whole."""
    record = bench.run(FakeImage(data=RAW, size=None))
    assert record.size == SIZE
    assert {total for stage, _, total in bench.told if stage == "fetch"} == {None}


@pytest.mark.parametrize("size", [0, None, SIZE])
def test_an_image_without_data_is_none(bench: Bench, size: int | None) -> None:
    """Announced as empty, or empty when it came."""
    digest = Digest("sha512", hashlib.sha512(b"").hexdigest())
    with pytest.raises(ImageRejectedError, match="no data"):
        bench.run(FakeImage(data=b"", size=size, digest=digest))


@pytest.mark.parametrize("status", ["queued", "saving", "deactivated", "killed", "deleted"])
def test_an_image_that_is_not_active_is_not_asked_for(bench: Bench, status: str) -> None:
    """Its metadata is enough."""
    with pytest.raises(ImageNotActiveError) as caught:
        bench.run(FakeImage(data=RAW, status=status))
    assert caught.value.status == status
    assert bench.source.opens == 0


# --- sizes -----------------------------------------------------------------------------------------------------------


def test_a_disk_too_small_is_told_from_the_metadata(bench: Bench) -> None:
    """min_disk, and the length of raw bytes: before a byte is asked for."""
    with pytest.raises(DiskTooSmallError) as caught:
        bench.run(FakeImage(data=RAW, min_disk=10 * MIB), asked(disk_size=9 * MIB))
    assert (caught.value.size, caught.value.virtual_size) == (9 * MIB, 10 * MIB)
    with pytest.raises(DiskTooSmallError) as caught:
        bench.run(RAW + b"x", asked(disk_size=SIZE))
    assert (caught.value.size, caught.value.virtual_size) == (SIZE, SIZE + 512)
    assert bench.source.opens == 0
    bench.run(RAW, asked(disk_size=SIZE))


@pytest.mark.parametrize("qemu_format", ["qcow2", "vmdk", "vdi"])
@pytest.mark.parametrize("limit", ["disk", "cap"])
def test_a_bomb_is_told_from_its_header(bench: Bench, qemu_format: str, limit: str) -> None:
    """A small file that unpacks to more than the disk or the cap is neither read whole nor unpacked."""
    data = images.created(bench.path, qemu_format, size=1 << 40).ljust(
        200 * MIB if qemu_format == "qcow2" else 0, b"\1"
    )
    request = asked(disk_size=10 * MIB) if limit == "disk" else asked(max_virtual_size=10 * MIB)
    error = DiskTooSmallError if limit == "disk" else ImageRejectedError
    with pytest.raises(error, match=str(1 << 40)):
        bench.run(FakeImage(data=data, disk_format=qemu_format), request)
    assert bench.source.bytes_served < 20 * MIB
    assert sum(allocated(path) for path in bench.path.rglob("*") if path.is_file()) < 10 * MIB


def test_a_footer_does_not_get_a_larger_disk_past_the_limits(bench: Bench) -> None:
    """A streamed VMDK whose footer has another capacity than its header (QEMU believes the footer)."""
    data = images.streamed_vmdk(bench.path)
    data = images.patched(data, -1024 + 12, (1 << 31).to_bytes(8, "little"))
    with pytest.raises(ImageRejectedError, match="footer"):
        bench.run(FakeImage(data=data, disk_format="vmdk"), asked(disk_size=SIZE))


def test_a_raw_stream_of_unknown_length_stops_at_the_limit(bench: Bench) -> None:
    """Nothing announced, nothing believed."""
    image = FakeImage(data=RAW * 20, size=None)
    for request in (asked(disk_size=SIZE), asked(max_virtual_size=SIZE)):
        with pytest.raises((DiskTooSmallError, ImageRejectedError)):
            bench.run(image, request)
        assert bench.staged.stat().st_size <= SIZE + MIB


@pytest.mark.parametrize("kind", ["qcow2", "vmdk"])
def test_room_is_asked_for_before_the_fetch_and_before_the_conversion(bench: Bench, kind: str) -> None:
    """First what is announced, then what it unpacks to."""
    asks: list[tuple[int, str]] = []
    data = bomb(8 * MIB) if kind == "qcow2" else images.converted(bench.path, kind)
    bench.run(
        FakeImage(data=data, disk_format=kind), asked(admit=lambda needed, stage, _placed: asks.append((needed, stage)))
    )
    assert asks[0] == (len(data), "admission")
    assert [stage for _, stage in asks] == ["admission", "conversion"]
    if kind == "qcow2":
        assert 8 * MIB <= asks[1][0] <= 8 * MIB + len(data)
    else:
        assert 128 * KIB <= asks[1][0] < MIB


def test_an_image_that_unpacks_to_less_than_its_length_asks_once(bench: Bench) -> None:
    """What was promised for the fetch is enough for the base."""
    asks: list[int] = []
    data = images.converted(bench.path, "qcow2")
    bench.run(
        FakeImage(data=data, disk_format="qcow2"), asked(admit=lambda needed, _stage, _placed: asks.append(needed))
    )
    assert asks == [len(data)]


class Room:
    """A storage with so many bytes for one fetch, which is asked as the cache's is."""

    def __init__(self, bench: Bench, size: int) -> None:
        self.bench = bench
        self.size = size
        self.asks = 0
        self.promised = 0

    def admit(self, needed: int, stage: str, _placed: int = 0) -> None:
        self.asks += 1
        standing = self.standing()
        if standing + needed > self.size:
            raise NoSpaceError(needed=needed, free=self.size - standing, stage=stage)
        self.promised = standing + needed

    def standing(self) -> int:
        return sum(allocated(path) for path in self.bench.path.rglob("*") if path.is_file())


def test_room_is_not_asked_for_cluster_by_cluster(bench: Bench) -> None:
    """Though what is planned grows with each: in long steps, also where it just fits."""
    made = qcow2.make(qcow2.Layout(cluster_bits=9, kinds=("packed",) * 12000, seed=3))
    guest, kept = qcow2.decode(made.file)
    for size in (200 * MIB, len(guest) + kept + MIB // 2):
        bench.discard()
        room = Room(bench, size)
        assert bench.run(FakeImage(data=made.file, disk_format="qcow2"), asked(admit=room.admit)).made_by
        assert bench.staged.read_bytes() == made.guest
        assert room.asks < 60


def test_what_is_kept_for_later_is_promised_as_well(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables that come last: the bytes stand in the spool and, later, in the base."""
    cluster, count = 64 * KIB, 20 * 16
    made = qcow2.make(qcow2.Layout(cluster_bits=16, kinds=("plain",) * count))
    l2 = made.tables[2][0]
    table, rest = made.file[l2 : l2 + cluster], made.file[l2 + cluster :]
    entries = [int.from_bytes(table[at : at + 8]) for at in range(0, 8 * count, 8)]
    moved = b"".join((entry - cluster).to_bytes(8) for entry in entries)
    last = l2 + len(rest)
    file = made.file[:l2] + rest + moved.ljust(cluster, b"\0")
    file = images.patched(file, made.tables[1][0], (last | 1 << 63).to_bytes(8))
    room = Room(bench, len(file) + MIB)
    with pytest.raises(NoSpaceError):
        bench.run(FakeImage(data=file, disk_format="qcow2"), asked(admit=room.admit))
    room = Room(bench, 2 * len(file) + MIB)
    peak = 0
    true_write = _fs.write

    def write(fd: int, offset: int, buffer: bytes | bytearray | memoryview) -> None:
        nonlocal peak
        true_write(fd, offset, buffer)
        peak = max(peak, room.standing() - room.promised)

    monkeypatch.setattr(_fs, "write", write)
    bench.run(FakeImage(data=file, disk_format="qcow2"), asked(admit=room.admit))
    assert bench.staged.read_bytes() == made.guest
    assert peak <= 64 * KIB


@pytest.mark.parametrize("kind", ["qcow2", "vmdk"])
def test_no_room_for_the_conversion_ends_before_it(bench: Bench, kind: str) -> None:
    """Nothing is unpacked that does not fit."""

    def admit(needed: int, stage: str, _placed: int) -> None:
        if stage == "conversion":
            raise NoSpaceError(needed=needed, free=0, stage=stage)

    data = bomb(64 * MIB) if kind == "qcow2" else images.converted(bench.path, kind)
    with pytest.raises(NoSpaceError):
        bench.run(FakeImage(data=data, disk_format=kind), asked(admit=admit))
    assert allocated(bench.staged) == 0


# --- refusals, faults and ends ---------------------------------------------------------------------------------------


def test_an_unsafe_image_is_not_read_to_its_end(bench: Bench) -> None:
    """Refused by its first megabyte; qemu-img never runs."""
    data = images.created(bench.path, "qcow2", "-u", "-b", "/etc/passwd", "-F", "raw").ljust(100 * MIB, b"\1")
    with FaultPlan() as plan, pytest.raises(ImageRejectedError, match="backing"):
        bench.run(FakeImage(data=data, disk_format="qcow2"))
    assert bench.source.bytes_served < 12 * MIB
    assert "exec.run" not in {step.name for step in plan.trace}


def test_a_wrong_label_is_refused_before_qemu_img_runs(bench: Bench) -> None:
    """Raw that is a qcow2 is never taken for either."""
    with FaultPlan() as plan, pytest.raises(ImageRejectedError, match="claims to be raw and is qcow2"):
        bench.run(FakeImage(data=images.converted(bench.path, "qcow2")))
    assert "exec.run" not in {step.name for step in plan.trace}


def test_what_qemu_img_cannot_convert_is_a_rejected_image(bench: Bench) -> None:
    """With qemu-img's own words; a header may be fine and the rest not."""
    data = images.converted(bench.path, "qcow2")
    data = images.patched(data, 40, b"\x7f" * 8)  # offset of the first table, beyond all bounds
    with pytest.raises(ImageRejectedError, match="qemu-img cannot convert it") as caught:
        bench.run(FakeImage(data=data, disk_format="qcow2"))
    assert caught.value.image_id == "img"


@pytest.mark.parametrize(
    ("code", "words", "verdict"),
    [
        (1, "qemu-img: Could not open: Image is corrupt\n", True),
        (1, "warning: a library\nqemu-img: Image is corrupt\n", True),
        (1, "prlimit: failed to set the AS resource limit: Operation not permitted\n", False),
        (127, "qemu-img: error while loading shared libraries: libx.so\n", False),
        (-9, "", False),
        (-signal.SIGXCPU, "", True),
        (-signal.SIGXFSZ, "", True),
        (None, "no end after 600 s", False),
    ],
)
def test_only_qemu_img_itself_says_something_of_the_image(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, code: int | None, words: str, verdict: bool
) -> None:
    """What starts it may fail as well, and that is the host's fault."""

    def run(argv: list[str], **_how: object) -> str:
        raise CommandError(argv, code, words)

    data = images.converted(bench.path, "vmdk")
    monkeypatch.setattr(_exec, "run", run)
    with pytest.raises(ImageRejectedError if verdict else CommandError):
        bench.run(FakeImage(data=data, disk_format="vmdk"))


def test_measuring_ends_with_a_cancel(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small file can take qemu-img minutes to measure."""
    cancel = threading.Event()
    bench.watch = Watch("img", cancel=cancel)
    true_run = _exec.run

    def run(argv: list[str], *, checkpoint: Callable[[], None], **how: Any) -> str:
        cancel.set()
        return true_run(["sleep", "60"], checkpoint=checkpoint, **how)

    data = images.converted(bench.path, "vmdk")
    monkeypatch.setattr(_exec, "run", run)
    with pytest.raises(CancelledError):
        bench.run(FakeImage(data=data, disk_format="vmdk"))


def test_reading_back_for_checksums_ends_with_a_cancel(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the next MiB."""
    cancel = threading.Event()
    bench.watch = Watch("img", cancel=cancel)
    read: list[int] = []
    true_read = FileWriter.read_at

    def read_at(self: FileWriter, offset: int, length: int) -> bytes:
        read.append(offset)
        cancel.set()
        return true_read(self, offset, length)

    monkeypatch.setattr(FileWriter, "read_at", read_at)
    made = qcow2.make(qcow2.Layout(cluster_bits=16, kinds=("plain",) * (24 * 16), seed=7))
    with pytest.raises(CancelledError):
        bench.run(FakeImage(data=made.file, disk_format="qcow2"))
    assert len(read) <= 4


@pytest.mark.parametrize("size", ["17T", "8P"])
def test_a_virtual_size_that_cannot_be_stored_refuses_the_image(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, size: str
) -> None:
    """More than a file can have, or more checksums than memory: true for all who ask for it."""
    path = bench.path / "huge"
    images.qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", path, size)

    def set_size(_writer: FileWriter, size: int) -> None:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    def no_memory(_size: int) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(FileWriter, "set_size", set_size)
    if size == "8P":
        monkeypatch.setattr(_sums, "Running", no_memory)
    with pytest.raises(ImageRejectedError, match="its virtual size of"):
        bench.run(FakeImage(data=path.read_bytes(), disk_format="qcow2"))


def test_a_lack_of_memory_is_not_laid_at_a_small_images_door(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the host's."""

    def no_memory(_size: int) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(_sums, "Running", no_memory)
    with pytest.raises(OSError, match="memory"):
        bench.run(FakeImage(data=images.converted(bench.path, "qcow2"), disk_format="qcow2"))


def test_a_full_disk_is_not_laid_at_the_images_door(bench: Bench) -> None:
    """An OSError stays one here, for the guard to name."""
    with FaultPlan().fail("fs.write"), pytest.raises(OSError, match="fault"):
        bench.run(RAW)


def test_a_stream_that_breaks_is_the_sources_error(bench: Bench) -> None:
    """After the retries that it makes by itself."""
    with pytest.raises(SourceUnavailableError):
        bench.run(FakeImage(data=RAW, break_after=MIB + 5))


@pytest.mark.slow
@pytest.mark.parametrize("stall_after", [0, MIB, SIZE])
def test_deadline_and_cancel_end_a_stream_that_stalls(bench: Bench, stall_after: int) -> None:
    """No byte comes, and the call ends all the same."""
    stall = threading.Event()
    image = FakeImage(data=RAW, stall=stall, stall_after=stall_after)
    try:
        bench.watch = Watch("img", deadline=0.2)
        with pytest.raises(DeadlineError):
            bench.run(image)
        cancel = threading.Event()
        bench.watch = Watch("img", cancel=cancel)
        threading.Timer(0.1, cancel.set).start()
        with pytest.raises(CancelledError):
            bench.run(image)
    finally:
        stall.set()


def test_progress_grows_to_the_end(bench: Bench) -> None:
    """In bytes of what was announced, then of what it unpacks to where qemu-img does that."""
    data = images.converted(bench.path, "vmdk")
    bench.run(FakeImage(data=data, disk_format="vmdk"))
    fetched = [done for stage, done, _ in bench.told if stage == "fetch"]
    assert fetched == sorted(fetched)
    assert fetched[-1] == len(data)
    stage, done, total = bench.told[-1]
    assert (stage, done) == ("convert", total)
    assert 128 * KIB <= done <= SIZE


class Generated:
    """A source that makes its bytes as they are read: as many as one likes, none kept."""

    name = "generated"

    def __init__(self, mebibytes: int) -> None:
        self.mebibytes = mebibytes
        self.piece = random.Random(3).randbytes(KIB) * KIB

    def get(self, image_id: str) -> ImageInfo:
        return ImageInfo(image_id=image_id, disk_format="raw", size=self.mebibytes * MIB)

    @contextmanager
    def open(self, _image: ImageInfo, _offset: int = 0) -> Iterator[Iterator[bytes]]:
        yield (bytes(memoryview(self.piece)) for _ in range(self.mebibytes))


def test_memory_is_bounded(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 200 MiB no more than the read-ahead is held at a time, also where the disk is slower than the source."""
    monkeypatch.setattr(_fs, "write", lambda _fd, _offset, _buffer: None)
    source = Generated(200)
    tracemalloc.start()
    try:
        bench.ingest(source.get("img"), GuardedSource(source), asked(allow_unverified=True))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 30 * MIB

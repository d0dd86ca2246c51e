"""Bytes and records that contracts and benchmarks work with."""

from __future__ import annotations

import functools
import hashlib
import random
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from nova_imagecache.backends import BaseRecord, Digest

MIB = 2**20
BLOCK = 4096
GUEST_SIZE = 3 * MIB
DISK_SIZE = GUEST_SIZE + MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Bytes for one base: as ``stored``, and as a ``guest`` sees them. Data, holes, and data across a MiB boundary."""

    format: str
    stored: bytes
    guest: bytes

    @property
    def data(self) -> int:
        """Bytes that it takes on storage where no hole is written: those of its blocks that are not all zeros."""
        blocks = (self.stored[start : start + BLOCK] for start in range(0, len(self.stored), BLOCK))
        return sum(BLOCK for block in blocks if block.strip(b"\0"))


@functools.cache
def make_sample(base_format: str, seed: str) -> Sample:
    """The sample of that seed; two seeds give other bytes everywhere."""
    words = random.Random(seed)  # noqa: S311 - the same bytes in every run
    guest = bytearray(GUEST_SIZE)
    for start, end in ((0, 65536), (MIB - 8192, MIB + 8192), (GUEST_SIZE - 1536, GUEST_SIZE)):
        guest[start:end] = words.randbytes(end - start)
    return stored_as(base_format, bytes(guest))


def stored_as(base_format: str, guest: bytes) -> Sample:
    """What a guest sees, stored in that format."""
    stored = guest if base_format == "raw" else _convert(guest, "raw", base_format)
    return Sample(format=base_format, stored=stored, guest=guest)


def record_of(image_id: str, sample: Sample, source: str) -> BaseRecord:
    """A record that is true of the sample."""
    return BaseRecord(
        image_id=image_id,
        format=sample.format,
        virtual_size=len(sample.guest),
        size=len(sample.stored),
        source_format=sample.format,
        source_size=len(sample.stored),
        source_digest=Digest("sha256", hashlib.sha256(sample.stored).hexdigest()),
        evidence="os_hash",
        made_by="stored",
        source=source,
        fetched_at=1_700_000_000.25,
    )


def run_qemu(*argv: str) -> None:
    """Run one of qemu's tools.

    Raises:
        CalledProcessError: it failed.
    """
    subprocess.run(argv, check=True, capture_output=True, timeout=60)


def _convert(data: bytes, before: str, after: str) -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        source, target = Path(directory, "source"), Path(directory, "target")
        source.write_bytes(data)
        run_qemu("qemu-img", "convert", "-f", before, "-O", after, str(source), str(target))
        return target.read_bytes()

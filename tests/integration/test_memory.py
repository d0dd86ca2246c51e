"""How much memory a fetch or a verification takes: the same for an image of any size."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest

from harness.images import qemu_img
from nova_imagecache import BackendPaths, CacheConfig, DirectorySource, ImageCache
from nova_imagecache.backends.file import FileBackend
from nova_imagecache.exceptions import BaseCorruptError
from services.content import Content
from services.flaky import FlakyGlance

MIB, GIB, TIB = 2**20, 2**30, 2**40
SIZE = 10 * GIB
DATA_EVERY = 32
LIMIT = 100 * MIB


class MostlyZeros:
    """``size`` bytes: of every 32 MiB one is data."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._data = bytes(range(1, 256)) * (MIB // 255 + 1)
        self._zeros = bytes(MIB)

    def read(self, offset: int, length: int) -> bytes:
        number, start = divmod(offset, MIB)
        block = self._zeros if number % DATA_EVERY else self._data
        return block[start : min(MIB, start + length, start + self.size - offset)]


class Qcow2:
    """A qcow2 image of ``size`` bytes that holds every kind of cluster, with its tables before everything else.

    Of 32 clusters of the guest one is plain, eight are compressed and the others nowhere. Most are zeros all the same:
    of 32 plain ones, and of 256 compressed ones, one is data.
    """

    cluster = 64 * 2**10
    slot = 512
    plain_data = bytes(range(1, 256)) * 257 + b"\1"
    packed_data = b"packed!!" * (cluster // 8)

    def __init__(self, virtual_size: int) -> None:
        clusters = virtual_size // self.cluster
        tables = -(-clusters * 8 // self.cluster)
        # header, a cluster for references that nobody reads here, L1 table, L2 tables
        packed_at = (3 + tables) * self.cluster
        plain_at = packed_at + -(-clusters // 4 * self.slot // self.cluster) * self.cluster
        head = bytearray(packed_at)
        struct.pack_into(
            ">4sIQIIQIIQQIIQQQQII",
            *(head, 0, b"QFI\xfb", 3, 0, 0, 16, virtual_size, 0, tables, 2 * self.cluster, self.cluster, 1),
            *(0, 0, 0, 0, 0, 4, 104),
        )
        for table in range(tables):
            struct.pack_into(">Q", head, 2 * self.cluster + 8 * table, 1 << 63 | (3 + table) * self.cluster)
        for number in range(clusters):
            group, kind = divmod(number, 32)
            entry = 0
            if kind == 0:
                entry = 1 << 63 | plain_at + group * self.cluster
            elif kind <= 8:
                entry = 1 << 62 | packed_at + (8 * group + kind - 1) * self.slot
            struct.pack_into(">Q", head, 3 * self.cluster + 8 * number, entry)
        plain = self.plain_data + bytes(31 * self.cluster)
        packed = _packed(self.packed_data) + 255 * _packed(bytes(self.cluster))
        self.size = plain_at + clusters // 32 * self.cluster
        self.data = clusters // 32 // 32 + clusters // 4 // 256
        """Clusters that are data."""
        self._parts = ((0, bytes(head)), (packed_at, packed), (plain_at, plain), (self.size, b""))

    def read(self, offset: int, length: int) -> bytes:
        (start, block), (end, _) = next(
            pair for pair in zip(self._parts, self._parts[1:], strict=False) if offset < pair[1][0]
        )
        at = (offset - start) % len(block)
        return block[at : at + min(length, end - offset)]


def _packed(data: bytes) -> bytes:
    """A compressed cluster in its slot."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -12)
    packed = packer.compress(data) + packer.flush()
    assert len(packed) <= Qcow2.slot
    return packed.ljust(Qcow2.slot, b"\0")


def _fetched(tmp_path: Path, content: Content, **properties: str) -> dict[str, Any]:
    """What a process says that fetched this image; it did not grow beyond the limit."""
    with FlakyGlance() as glance:
        glance.add("large", content, **properties)
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        command = [sys.executable, "-m", "harness.fetcher", str(tmp_path / "root"), glance.url, "large"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    assert answer["size"] == SIZE
    grown = (answer["peak"] - answer["start"]) * 1024
    assert grown < LIMIT, f"it grew by {grown / MIB:.0f} MiB"
    return answer


@pytest.mark.slow
@pytest.mark.services
@pytest.mark.timeout(300)
def test_memory_of_a_ten_gib_fetch(tmp_path: Path) -> None:
    """A process that fetches 10 GiB stays below 100 MiB above what it took when it began."""
    answer = _fetched(tmp_path, MostlyZeros(SIZE))
    assert answer["usage"] < SIZE // DATA_EVERY * 2, "zeros take no space"


@pytest.mark.slow
@pytest.mark.services
@pytest.mark.timeout(300)
def test_memory_of_a_ten_gib_qcow2(tmp_path: Path) -> None:
    """Nor does it take more to decode an image on its way, with all its tables in front."""
    content = Qcow2(SIZE)
    answer = _fetched(tmp_path, content, disk_format="qcow2")
    assert answer["made_by"] == "qcow2 decoder"
    data = content.data * content.cluster
    assert data <= answer["usage"] < data * 2, "zeros take no space"
    with (tmp_path / "root" / "bases" / "large" / "disk").open("rb") as file:
        clusters = [file.read(content.cluster) for _ in range(3)]
    assert clusters == [content.plain_data, content.packed_data, bytes(content.cluster)]


def _memory(figure: str) -> int:
    """Bytes, as the kernel tells of this process."""
    found = re.search(rf"^{figure}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def test_memory_of_verifying_a_large_base(tmp_path: Path) -> None:
    """4 TiB that hold next to nothing have 32 MiB of checksums, which are not read; damage is found all the same."""
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", str(tmp_path / "large.img"), str(4 * TIB))
    (tmp_path / "large.json").write_text('{"disk_format": "qcow2"}')
    root = tmp_path / "root"
    root.mkdir()
    backend = FileBackend({}, BackendPaths(root=root, disks_dir=root / "disks"))
    config = CacheConfig(root=root, allow_unverified=True, max_virtual_size=8 * TIB)
    with ImageCache(config, source=DirectorySource(tmp_path), backend=backend) as cache:
        disk = backend.base_path(cache.ensure_base("large").image_id)
        assert disk.with_name("disk.sums").stat().st_size == 32 * MIB
        Path("/proc/self/clear_refs").write_text("5")  # the highest point is counted from here on
        start = _memory("VmRSS")
        cache.verify_base("large")
        assert _memory("VmHWM") - start < 8 * MIB
        disk.chmod(0o644)
        with disk.open("r+b") as file:
            os.pwrite(file.fileno(), b"x", 3 * TIB)
        with pytest.raises(BaseCorruptError, match=f"differ at MiB {3 * TIB // MIB}"):
            cache.verify_base("large")

"""Small images with known bytes, in the formats that the tests need."""

from __future__ import annotations

import functools
import hashlib
import struct
import subprocess
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from nova_imagecache import Digest
from nova_imagecache.testing import FakeImage

MIB = 2**20
_CLUSTER = 65536


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """An image: the bytes a guest sees, and the bytes the image service serves."""

    guest: bytes
    served: bytes
    disk_format: str

    @property
    def digest(self) -> Digest:
        """Of the bytes as served."""
        return Digest("sha512", hashlib.sha512(self.served).hexdigest())

    @property
    def fake(self) -> FakeImage:
        """For a FakeSource."""
        return FakeImage(data=self.served, disk_format=self.disk_format)


def guest_bytes(seed: str, size: int = 2 * MIB) -> bytes:
    """Bytes that no other seed gives, with holes: an eighth of each MiB is data."""
    data = bytearray(size)
    for number, offset in enumerate(range(0, size, MIB)):
        piece = hashlib.shake_256(f"{seed} {number}".encode()).digest(min(MIB // 8, size - offset))
        data[offset : offset + len(piece)] = piece
    return bytes(data)


@functools.cache
def raw(seed: str, size: int = 2 * MIB) -> Sample:
    """A raw image."""
    guest = guest_bytes(seed, size)
    return Sample(guest=guest, served=guest, disk_format="raw")


@functools.cache
def qcow2(seed: str, size: int = 2 * MIB, cluster_size: int = _CLUSTER) -> Sample:
    """The same guest bytes in a qcow2 image, made by qemu-img."""
    return _converted(seed, size, "qcow2", "-o", f"cluster_size={cluster_size}")


@functools.cache
def vdi(seed: str, size: int = 2 * MIB) -> Sample:
    """The same guest bytes in an image that the cache has converted by qemu-img."""
    return _converted(seed, size, "vdi")


def _converted(seed: str, size: int, disk_format: str, *options: str) -> Sample:
    guest = guest_bytes(seed, size)
    with tempfile.TemporaryDirectory() as directory:
        source, target = Path(directory, "raw"), Path(directory, "image")
        source.write_bytes(guest)
        qemu_img("convert", "-q", "-f", "raw", "-O", disk_format, *options, str(source), str(target))
        return Sample(guest=guest, served=target.read_bytes(), disk_format=disk_format)


@functools.cache
def bomb(virtual_size: int) -> bytes:
    """A qcow2 image of about ``virtual_size`` / 500 bytes, every cluster of which is compressed and unpacks to data.

    As ``qemu-img convert -c`` makes of a disk full of one letter, in no time.
    """
    clusters = virtual_size // _CLUSTER
    packer = zlib.compressobj(9, zlib.DEFLATED, -12)
    packed = packer.compress(b"a" * _CLUSTER) + packer.flush()
    l1_entries = -(-clusters // (_CLUSTER // 8))
    l1_at, l2_at = 3 * _CLUSTER, 4 * _CLUSTER
    data_at = l2_at + l1_entries * _CLUSTER
    size = -(-(data_at + clusters * len(packed)) // _CLUSTER) * _CLUSTER
    image = bytearray(size)
    counts = [int(host * _CLUSTER < data_at) for host in range(size // _CLUSTER)]
    struct.pack_into(
        ">4sIQIIQIIQQIIQQQQII",
        *(image, 0, b"QFI\xfb", 3, 0, 0, 16, clusters * _CLUSTER, 0, l1_entries, l1_at, _CLUSTER, 1, 0, 0),
        *(0, 0, 0, 4, 104),
    )
    for entry in range(l1_entries):
        struct.pack_into(">Q", image, l1_at + 8 * entry, 1 << 63 | l2_at + entry * _CLUSTER)
    for cluster in range(clusters):
        at = data_at + cluster * len(packed)
        image[at : at + len(packed)] = packed
        sectors = (at % 512 + len(packed) - 1) // 512
        # the offset takes 62 - (cluster_bits - 8) bits of the descriptor, the sector count those above
        struct.pack_into(">Q", image, l2_at + 8 * cluster, 1 << 62 | sectors << 54 | at)
        for host in range(at // _CLUSTER, (at // 512 + sectors) * 512 // _CLUSTER + 1):
            counts[host] += 1
    # one block of refcounts of 16 bits, behind a table of one entry
    struct.pack_into(">Q", image, _CLUSTER, 2 * _CLUSTER)
    struct.pack_into(f">{len(counts)}H", image, 2 * _CLUSTER, *counts)
    return bytes(image)


def qemu_img(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run qemu-img; AssertionError with its words if it fails."""
    done = subprocess.run(["qemu-img", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"qemu-img {' '.join(arguments)}: {done.returncode}: {done.stdout}{done.stderr}"
    return done

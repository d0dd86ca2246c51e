"""Images of every format, made by qemu-img or, where it makes none such, by hand."""

from __future__ import annotations

import json
import random
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

KIB = 1 << 10
MIB = 1 << 20
SIZE = 4 * MIB
"""Virtual size of the images."""

SECRET = ("--object", "secret,id=key,data=passphrase")


def qemu_img(*arguments: str | Path) -> str:
    """What qemu-img wrote to stdout."""
    argv = ["qemu-img", *(str(argument) for argument in arguments)]
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


def info(path: Path, qemu_format: str) -> dict[str, object]:
    """What qemu-img says of an image."""
    found: dict[str, object] = json.loads(qemu_img("info", "-f", qemu_format, "--output=json", path))
    return found


def guest_data(size: int = SIZE) -> bytes:
    """A disk as a guest fills it: a boot sector that is no partition table, data, holes, data."""
    data = bytearray(size)
    data[:4] = b"\xeb\x3c\x90\x00"
    noise = random.Random(size).randbytes(64 * KIB)
    data[MIB : MIB + len(noise)] = noise
    data[size - len(noise) :] = noise
    return bytes(data)


def partition_table(kind: int, first: int = 2048, count: int = 4096) -> bytes:
    """The last 66 bytes of a master boot record with one partition."""
    start = (0, 2, 0) if kind == 0xEE else (1, 1, 0)
    entry = struct.pack("<B3BB3BII", 0, *start, kind, 254, 255, 255, first, count)
    return entry + bytes(48) + b"\x55\xaa"


def with_table(data: bytes, kind: int, first: int = 2048) -> bytes:
    """The image with a partition table in its first sector."""
    return data[:446] + partition_table(kind, first) + data[512:]


def volume_descriptor(blocks: int = SIZE // 2048) -> bytes:
    """An ISO 9660 primary volume descriptor (ECMA-119, 8.4), as far as it matters here."""
    found = bytearray(2048)
    found[:7] = b"\x01CD001\x01"
    struct.pack_into("<I", found, 80, blocks)
    struct.pack_into(">I", found, 84, blocks)
    struct.pack_into("<H", found, 128, 2048)
    struct.pack_into(">H", found, 130, 2048)
    return bytes(found)


def with_descriptor(data: bytes) -> bytes:
    """The image with a volume descriptor where ISO 9660 has it."""
    return data[: 32 * KIB] + volume_descriptor() + data[34 * KIB :]


def patched(data: bytes, offset: int, new: bytes) -> bytes:
    """The bytes with ``new`` at ``offset`` (from the end if it is negative)."""
    at = offset % len(data)
    return data[:at] + new + data[at + len(new) :]


def converted(directory: Path, qemu_format: str, *options: str, size: int = SIZE) -> bytes:
    """``guest_data`` in another format."""
    source, target = directory / "converted.source", directory / "converted.target"
    source.write_bytes(guest_data(size))
    qemu_img("convert", "-f", "raw", "-O", qemu_format, *options, source, target)
    data = target.read_bytes()
    source.unlink()
    target.unlink()
    return data


def created(directory: Path, qemu_format: str, *options: str | Path, size: int = SIZE) -> bytes:
    """An empty image, with its options."""
    target = directory / "created"
    qemu_img("create", "-q", "-f", qemu_format, *options, target, str(size))
    data = target.read_bytes()
    target.unlink()
    return data


def encrypted(directory: Path, qemu_format: str, options: str) -> bytes:
    """An empty image that qemu-img encrypts; it gives up now and then ("Unable to get accurate CPU usage")."""
    for _attempt in range(20):
        try:
            return created(directory, qemu_format, *SECRET, "-o", options)
        except subprocess.CalledProcessError as err:
            if "accurate CPU usage" not in err.stderr:
                raise
    raise TimeoutError("qemu-img never got accurate CPU usage")


def streamed_vmdk(directory: Path, size: int = SIZE, padding: int = 0) -> bytes:
    """A streamOptimized VMDK as VMware writes it: its header leaves the grain directory to a footer at the end."""
    data = converted(directory, "vmdk", "-o", "subformat=streamOptimized", size=size)
    data += bytes(-len(data) % 512 + padding)
    marker = struct.pack("<QII496s", 1, 0, 3, b"")
    return patched(data, 56, b"\xff" * 8) + marker + data[:512] + bytes(512)


def iso() -> bytes:
    """An ISO 9660 image."""
    return with_descriptor(bytes(32 * KIB) + guest_data()[32 * KIB :])


def kernel() -> bytes:
    """An x86 Linux kernel's first sectors (the kernel's Documentation/arch/x86/boot.rst), and noise for the rest.

    Its boot_flag is the signature of a partition table, and what lies before it is code and the setup header.
    """
    data = bytearray(guest_data())
    data[:512] = b"MZ".ljust(0x1B8, b"\0") + b"\xff" * 0x39 + b"\x27\x01\x00\x20\x82\x0d\0\0\0\xff\xff\0\0\x55\xaa"
    data[0x200:0x208] = b"\xeb\x6aHdrS\x0f\x02"
    return bytes(data)


MAKERS: dict[str, tuple[str, Callable[[Path], bytes]]] = {
    "raw": ("raw", lambda _: guest_data()),
    "raw with MBR": ("raw", lambda _: with_table(guest_data(), 0x83)),
    "raw with GPT": ("raw", lambda _: with_table(guest_data(), 0xEE, 1)),
    "qcow2 v3": ("qcow2", lambda d: converted(d, "qcow2")),
    "qcow2 v2": ("qcow2", lambda d: converted(d, "qcow2", "-o", "compat=0.10")),
    "qcow2 compressed": ("qcow2", lambda d: converted(d, "qcow2", "-c")),
    "qcow2 zstd": ("qcow2", lambda d: converted(d, "qcow2", "-c", "-o", "compression_type=zstd")),
    "vmdk streamOptimized": ("vmdk", lambda d: converted(d, "vmdk", "-o", "subformat=streamOptimized")),
    "vmdk with footer": ("vmdk", streamed_vmdk),
    "vmdk monolithicSparse": ("vmdk", lambda d: converted(d, "vmdk", "-o", "subformat=monolithicSparse")),
    "vhd dynamic": ("vhd", lambda d: converted(d, "vpc", "-o", "subformat=dynamic,force_size=on")),
    "vhdx": ("vhdx", lambda d: converted(d, "vhdx")),
    "vdi": ("vdi", lambda d: converted(d, "vdi")),
    "iso": ("iso", lambda _: iso()),
    "iso hybrid": ("iso", lambda _: with_table(iso(), 0x17, 64)),
    "ami": ("ami", lambda _: guest_data()),
    "aki": ("aki", lambda _: b"\x1f\x8b\x08" + guest_data()[3:]),
    "aki for x86": ("aki", lambda _: kernel()),
    "ari": ("ari", lambda _: guest_data()),
}
"""By name: the format it is declared as, and what makes it in a directory for scratch files."""

RAW_DECLARED = frozenset({"raw", "iso", "ami", "aki", "ari"})

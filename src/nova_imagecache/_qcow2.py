"""Reads qcow2 headers, from bytes or from an open file. QEMU's docs/interop/qcow2.txt specifies the format."""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from io import FileIO
    from typing import BinaryIO

HEADER_BYTES = 112
_MAGIC = b"QFI\xfb"
_FIXED = struct.Struct(">4sIQIIQI")


class Qcow2Error(ValueError):
    """The bytes are no qcow2 header that this parser takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Qcow2Header:
    """What a qcow2 file says of itself. ``virtual_size`` and ``cluster_size`` in bytes."""

    version: int
    virtual_size: int
    cluster_size: int
    backing_offset: int
    backing_length: int
    encrypted: bool
    incompatible: int


def read_backing_name(file: BinaryIO | FileIO) -> str:
    """The backing file's name as it stands in the header; empty where there is none, or where this is no qcow2.

    Raises:
        OSError: EINVAL where the name lies where QEMU takes none; as reading does.
    """
    try:
        header = parse_header(file.read(HEADER_BYTES))
    except Qcow2Error:
        return ""
    if not header.backing_offset:
        return ""
    # the specification allows 1023 bytes in the first cluster
    if header.backing_length > 1023 or header.backing_offset > header.cluster_size:
        raise OSError(errno.EINVAL, "a qcow2 header whose backing file name is out of place")
    file.seek(header.backing_offset)
    return (file.read(header.backing_length) or b"").decode("utf-8", "surrogateescape")


def parse_header(data: bytes | bytearray | memoryview) -> Qcow2Header:
    """The header at the start of ``data`` (at least ``HEADER_BYTES`` of a version 3 file, 72 of a version 2 file).

    Raises:
        Qcow2Error: no qcow2, a version other than 2 and 3, or values outside the specification.
    """
    if len(data) < 72 or bytes(data[:4]) != _MAGIC:
        raise Qcow2Error("no qcow2 header")
    _magic, version, backing_offset, backing_length, cluster_bits, size, crypt = _FIXED.unpack_from(data)
    if version not in (2, 3):
        raise Qcow2Error(f"qcow2 version {version}")
    if not 9 <= cluster_bits <= 21:
        raise Qcow2Error(f"cluster_bits {cluster_bits}")
    incompatible = 0
    if version == 3:
        if len(data) < 104:
            raise Qcow2Error("short qcow2 header")
        (incompatible,) = struct.unpack_from(">Q", data, 72)
    return Qcow2Header(
        version=version,
        virtual_size=size,
        cluster_size=1 << cluster_bits,
        backing_offset=backing_offset,
        backing_length=backing_length,
        encrypted=crypt != 0,
        incompatible=incompatible,
    )

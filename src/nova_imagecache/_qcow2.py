"""Reads qcow2 headers, from bytes or from an open file. QEMU's docs/interop/qcow2.txt specifies the format."""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from io import FileIO
    from typing import BinaryIO

HEADER_BYTES = 112
_MAGIC = b"QFI\xfb"
_FIXED = struct.Struct(">4sIQIIQIIQ")
_ADDED = struct.Struct(">Q20xI")
"""Of version 3, at 72: the incompatible features, and the header's length."""
_REFCOUNTS = struct.Struct(">QI")
"""Where the table of reference counts is, and its clusters, at 48."""
_ENTRY = struct.Struct(">Q")
_V2_BYTES = 72
_V3_BYTES = 104
_BACKING_FORMAT = 0xE2792ACA
"""The header extension that holds the backing file's format."""
_EXTENSIONS = 4096
"""Bytes in which an overlay's header extensions lie."""
_LONGEST_NAME = 1023
"""Bytes of a backing file's name, by the specification."""

DIRTY = 1 << 0
CORRUPT = 1 << 1
COMPRESSION = 1 << 3
"""Incompatible features: reference counts may be wrong; data may be; compressed clusters are not zlib's."""

_COMPRESSIONS: dict[int, Literal["zlib", "zstd"]] = {0: "zlib", 1: "zstd"}


_MOST_REFCOUNT_BITS = 6
"""As a power of two: 64 bits."""


class Qcow2Error(ValueError):
    """The bytes are no qcow2 header that this parser takes."""


class Qcow2Header(NamedTuple):
    """What a qcow2 file says of itself. Sizes and offsets in bytes. A pass reads thousands: it is a tuple.

    ``incompatible`` are the feature bits that a reader must know; ``compression`` is that of compressed clusters, None:
    one that is not known here. The L1 table has ``l1_entries`` entries at ``l1_offset``.
    """

    version: int
    virtual_size: int
    cluster_size: int
    backing_offset: int
    backing_length: int
    encrypted: bool
    incompatible: int
    compression: Literal["zlib", "zstd"] | None
    l1_entries: int
    l1_offset: int


def refusal(header: bytes) -> str | None:
    """Why QEMU opens no image that begins like this, though ``parse_header`` takes it; None: it may.

    The rules of ``qcow2_do_open`` in its block/qcow2.c, as far as the fixed part of the header tells.

    Raises:
        Qcow2Error: as ``parse_header``.
    """
    parsed = parse_header(header)
    (table_clusters,) = struct.unpack_from(">I", header, 56)
    if table_clusters == 0:
        return "a qcow2 without a table of reference counts"
    if parsed.version == 2:
        return None
    refcount_order, length = struct.unpack_from(">II", header, 96)
    if refcount_order > _MOST_REFCOUNT_BITS:
        return f"a qcow2 with refcount_order {refcount_order}"
    if not _V3_BYTES <= length <= parsed.cluster_size:
        return f"a qcow2 header of {length} bytes"
    kind = header[_V3_BYTES] if length > _V3_BYTES else 0
    if (kind != 0) != bool(parsed.incompatible & COMPRESSION):
        return f"a qcow2 with compression type {kind}, and incompatible features that say otherwise"
    return None


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
    if header.backing_length > _LONGEST_NAME or header.backing_offset > header.cluster_size:
        raise OSError(errno.EINVAL, "a qcow2 header whose backing file name is out of place")
    file.seek(header.backing_offset)
    return (file.read(header.backing_length) or b"").decode("utf-8", "surrogateescape")


def read_backing_format(file: BinaryIO | FileIO) -> str:
    """The backing file's format as the header states it; empty where it states none.

    Raises:
        Qcow2Error: this is no qcow2.
    """
    head = file.read(_EXTENSIONS)
    header = parse_header(head)
    at = _V2_BYTES if header.version == 2 else _ADDED.unpack_from(head, _V2_BYTES)[1]
    while at + 8 <= min(len(head), header.backing_offset or header.cluster_size):
        kind, length = struct.unpack_from(">II", head, at)
        if kind == _BACKING_FORMAT:
            return head[at + 8 : at + 8 + length].decode("ascii", "replace")
        if not kind:
            break
        at += 8 + (length + 7) // 8 * 8
    return ""


def with_backing_name(head: bytes, name: str) -> bytes:
    """A header with another backing file's name; ``head`` is the first cluster of an overlay as qemu-img made it, up to
    its last byte that is not zero: the name stands last in it.

    Raises:
        Qcow2Error: the name does not fit.
    """
    header = parse_header(head)
    written = name.encode("utf-8", "surrogateescape")
    if not 0 < len(written) <= _LONGEST_NAME or header.backing_offset + len(written) > header.cluster_size:
        raise Qcow2Error(f"a backing file name of {len(written)} bytes does not fit")
    changed = bytearray(head[: header.backing_offset].ljust(header.backing_offset, b"\0") + written)
    struct.pack_into(">I", changed, 16, len(written))
    return bytes(changed)


def parse_header(data: bytes | bytearray | memoryview) -> Qcow2Header:
    """The header at the start of ``data`` (at least ``HEADER_BYTES`` of a version 3 file, 72 of a version 2 file).

    Raises:
        Qcow2Error: no qcow2, a version other than 2 and 3, or values outside the specification.
    """
    if len(data) < _V2_BYTES:
        raise Qcow2Error("no qcow2 header")
    magic, version, backing_offset, backing_length, cluster_bits, size, crypt, l1_entries, l1_offset = (
        _FIXED.unpack_from(data)
    )
    if magic != _MAGIC:
        raise Qcow2Error("no qcow2 header")
    if version not in (2, 3):
        raise Qcow2Error(f"qcow2 version {version}")
    if not 9 <= cluster_bits <= 21:
        raise Qcow2Error(f"cluster_bits {cluster_bits}")
    incompatible = compression = 0
    if version == 3:
        if len(data) < _V3_BYTES:
            raise Qcow2Error("short qcow2 header")
        incompatible, length = _ADDED.unpack_from(data, _V2_BYTES)
        if length > _V3_BYTES and len(data) > _V3_BYTES:
            compression = data[_V3_BYTES]
    return Qcow2Header(
        version=version,
        virtual_size=size,
        cluster_size=1 << cluster_bits,
        backing_offset=backing_offset,
        backing_length=backing_length,
        encrypted=crypt != 0,
        incompatible=incompatible,
        compression=_COMPRESSIONS.get(compression),
        l1_entries=l1_entries,
        l1_offset=l1_offset,
    )


def holds_tables(data: bytes) -> bool:
    """Whether a whole qcow2 file has its L1 table and its reference counts within its length: it was not cut off."""
    header = parse_header(data)
    table, clusters = _REFCOUNTS.unpack_from(data, 48)
    if max(header.l1_offset + header.l1_entries * _ENTRY.size, table + clusters * header.cluster_size) > len(data):
        return False
    blocks = [at for (at,) in _ENTRY.iter_unpack(data[table : table + clusters * header.cluster_size]) if at]
    return bool(blocks) and max(blocks) + header.cluster_size <= len(data)

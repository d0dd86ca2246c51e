"""Unpacks compressed clusters of qcow2 files. The only importer of isal and zstandard, each when first used.

Both unpack outside of Python's lock; isal takes little more than half of zlib's time and is what deflate streams are
given to where it is installed. A stream never unpacks to more than the cluster it stands for.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any, Literal, cast

if TYPE_CHECKING:
    from collections.abc import Callable

    Buffer = bytes | bytearray | memoryview

_WINDOW = -15
"""Deflate without a header. QEMU writes with a window of 4 KiB; the largest reads all."""

_ZSTD_WINDOW = 8 << 20
"""What a zstd frame may ask for, in bytes of memory: the format's recommended least."""


class PackedError(ValueError):
    """The bytes do not unpack to one cluster."""


def unpacker(compression: Literal["zlib", "zstd"], cluster_size: int) -> Callable[[Buffer], bytes]:
    """A function that unpacks one cluster, by one thread at a time; what follows the packed bytes is ignored.

    Raises:
        PackedError: by this call, the compression needs a library that is not installed; by the function, its argument
            does not unpack to a whole cluster.
    """
    return _zstd(cluster_size) if compression == "zstd" else _deflate(cluster_size)


def _deflate(cluster_size: int) -> Callable[[Buffer], bytes]:
    errors: tuple[type[Exception], ...] = (zlib.error,)
    begin: Callable[[int], Any] = zlib.decompressobj
    try:
        from isal import isal_zlib
    except ImportError:  # no wheel for every architecture
        pass
    else:
        # its type information takes the class for an instance
        errors, begin = (cast("type[Exception]", isal_zlib.error), zlib.error), isal_zlib.decompressobj

    def unpack(packed: Buffer) -> bytes:
        try:
            data: bytes = begin(_WINDOW).decompress(packed, cluster_size)
        except errors as err:
            raise PackedError(f"a compressed cluster is damaged: {err}") from err
        return _whole(data, cluster_size)

    return unpack


def _zstd(cluster_size: int) -> Callable[[Buffer], bytes]:
    try:
        import zstandard
    except ImportError:
        raise PackedError("zstd, and the package zstandard is not installed") from None

    frames = zstandard.ZstdDecompressor(max_window_size=max(_ZSTD_WINDOW, cluster_size))

    def unpack(packed: Buffer) -> bytes:
        try:
            data: bytes = frames.stream_reader(packed, read_across_frames=False).read(cluster_size)
        except zstandard.ZstdError as err:
            raise PackedError(f"a compressed cluster is damaged: {err}") from err
        return _whole(data, cluster_size)

    return unpack


def _whole(data: bytes, cluster_size: int) -> bytes:
    if len(data) != cluster_size:
        raise PackedError(f"a compressed cluster unpacks to {len(data)} bytes instead of {cluster_size}")
    return data

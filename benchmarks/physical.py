"""What the machine can do: each term alone, in a process of its own. ``python -m benchmarks.physical TASK``.

* download: Glance to memory, nothing done with it.
* hash: sha512 of what Glance serves, one core; reading it is not counted.
* decode: inflating every compressed cluster, one core, with the fastest decoder that is installed; reading not counted.
* write: the base's data to a new file with its holes, early write-back, one sync; reading them is not counted.
"""

from __future__ import annotations

import ctypes
import hashlib
import http.client
import os
import time
import urllib.parse
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from benchmarks import layouts, meter

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.meter import Figures

_PIECE = 4 * 2**20
_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h


class Stopwatch:
    """Adds up the time of many blocks."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._start = 0.0

    def __enter__(self) -> Self:
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._start


def download(task: Figures) -> Figures:
    """Seconds of a whole download into one buffer."""
    url = urllib.parse.urlsplit(task["url"])
    watch = Stopwatch()
    connection = http.client.HTTPConnection(url.netloc)
    connection.connect()
    buffer = memoryview(bytearray(_PIECE))
    done = 0
    with watch:
        connection.request("GET", url.path, headers={"X-Auth-Token": task["token"]})
        answer = connection.getresponse()
        while count := answer.readinto(buffer):
            done += count
    connection.close()
    if done != task["size"]:
        raise SystemExit(f"HTTP {answer.status}: {done} bytes of {task['size']}")
    return {"seconds": watch.seconds}


def hash_alone(task: Figures) -> Figures:
    """Seconds of sha512 over the file."""
    watch = Stopwatch()
    digest = hashlib.sha512()
    buffer = memoryview(bytearray(_PIECE))
    with Path(task["file"]).open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            with watch:
                digest.update(buffer[:count])
    if digest.hexdigest() != task["sha512"]:
        raise SystemExit("another digest: the image was changed")
    return {"seconds": watch.seconds}


def write(task: Figures) -> Figures:
    """Seconds of writing the data of the raw file ``raw`` to the new file ``target``, sync included."""
    early = ctypes.CDLL(None, use_errno=True).sync_file_range
    watch = Stopwatch()
    buffer = memoryview(bytearray(_PIECE))
    source = os.open(task["raw"], os.O_RDONLY)
    with watch:
        target = os.open(task["target"], os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        os.ftruncate(target, os.fstat(source).st_size)
    written = 0
    for start, end in layouts.extents(source):
        for offset in range(start, end, _PIECE):
            count = os.preadv(source, [buffer[: min(_PIECE, end - offset)]], offset)
            with watch:
                os.pwrite(target, buffer[:count], offset)
                early(target, ctypes.c_int64(offset), ctypes.c_int64(count), _SYNC_FILE_RANGE_WRITE)
            written += count
    with watch:
        os.fsync(target)
        os.close(target)
    os.close(source)
    return {"seconds": watch.seconds, "written": written}


# --- decode ----------------------------------------------------------------------------------------------------------


def decode(task: Figures) -> Figures:
    """Seconds of unpacking all compressed clusters, one after the other, and by what."""
    path = Path(task["file"])
    clusters = layouts.compressed_clusters(path)
    name, unpack = decoder(zstd=clusters.zstd)
    watch = Stopwatch()
    out = 0
    with path.open("rb", buffering=0) as file:
        for offset, length in clusters.places:
            packed = os.pread(file.fileno(), length, offset)
            with watch:
                out += len(unpack(packed, clusters.cluster_size))
    if out != len(clusters.places) * clusters.cluster_size:
        raise SystemExit(f"{out} bytes of {len(clusters.places)} clusters")
    return {"seconds": watch.seconds, "decoder": name if clusters.places else None, "unpacked": out}


def decoder(*, zstd: bool) -> tuple[str, Callable[[bytes, int], bytes]]:
    """The fastest one that is installed, with its name."""
    if zstd:
        import zstandard

        context = zstandard.ZstdDecompressor()
        # what lies behind the frame, up to the end of the sector, is of the next cluster
        return "zstandard", lambda packed, size: context.decompress(packed, max_output_size=size)
    window = -12  # what qcow2 allows
    try:
        from isal import isal_zlib
    except ImportError:
        return "zlib", lambda packed, size: zlib.decompress(packed, window, size)
    inflate: Any = isal_zlib.decompress
    return "isal", lambda packed, size: inflate(packed, window, size)


_TERMS = {"download": download, "hash": hash_alone, "decode": decode, "write": write}


def main() -> None:
    """Measure one term."""
    task = meter.task()
    meter.ready()
    meter.answer(_TERMS[task["term"]](task))


if __name__ == "__main__":
    main()

"""The images that are measured with: the same bytes on every machine, made once and kept.

Data lie in runs of very different lengths, in parts of the disk that are dense, thin or empty, as a file system leaves
them: nearly half of them text-like, a third binary-like, a fifth random. The rest of a disk is zeros.
"""

from __future__ import annotations

import hashlib
import json
import random
import struct
import subprocess
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import layouts
from benchmarks.scale import MIB, Scale

KIB = 1024
_VERSION = 1
_NAMES = uuid.UUID("d3a6d2ac-0f68-4c07-9c02-5b1d0b2c7a10")
_GROUP = 32 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """An image: ``file`` is what Glance serves, ``raw`` what a guest sees; ``data`` are the bytes that are not zeros,
    in blocks of 4 KiB."""

    name: str
    image_id: str
    disk_format: str
    file: str
    raw: str
    size: int
    virtual_size: int
    data: int
    sha512: str

    @property
    def compressed(self) -> bool:
        """Whether its clusters are."""
        return bool(self.disk_format == "qcow2" and layouts.compressed_clusters(Path(self.file)).places)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    disk: str
    disk_format: str
    convert: tuple[str, ...] = ()


_KINDS = {
    "raw": _Kind(disk="disk", disk_format="raw"),
    "qcow2": _Kind(disk="disk", disk_format="qcow2"),
    "qcow2-zlib": _Kind(disk="disk", disk_format="qcow2", convert=("-c",)),
    "qcow2-zstd": _Kind(disk="disk", disk_format="qcow2", convert=("-c", "-o", "compression_type=zstd")),
    "small": _Kind(disk="small", disk_format="qcow2"),
    "sparse": _Kind(disk="sparse", disk_format="raw"),
    # brought in before anything is measured, so that clients and their connections are there
    "tiny": _Kind(disk="tiny", disk_format="qcow2"),
}
COLD = ("raw", "qcow2", "qcow2-zlib", "qcow2-zstd", "small", "sparse")


def image(name: str, scale: Scale, directory: Path) -> Image:
    """The image of this name, made if it is not there yet."""
    directory.mkdir(parents=True, exist_ok=True)
    note = directory / f"{name}.json"
    if note.exists():
        made = json.loads(note.read_text(encoding="utf-8"))
        if made.pop("version") == _VERSION:
            # names alone are kept: the directory may move
            return Image(**{**made, "file": str(directory / made["file"]), "raw": str(directory / made["raw"])})
    kind = _KINDS[name]
    raw = _disk(kind.disk, scale, directory)
    file = raw
    if kind.disk_format != "raw":
        file = directory / f"{name}.qcow2"
        file.unlink(missing_ok=True)
        argv = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", *kind.convert, str(raw), str(file)]
        subprocess.run(argv, check=True)
    found = Image(
        name=name,
        image_id=str(uuid.uuid5(_NAMES, f"{_VERSION} {scale.name} {name}")),
        disk_format=kind.disk_format,
        file=str(file),
        raw=str(raw),
        size=file.stat().st_size,
        virtual_size=raw.stat().st_size,
        data=raw.stat().st_blocks * 512,
        sha512=_sha512(file),
    )
    kept = {"version": _VERSION, **asdict(found), "file": file.name, "raw": raw.name}
    note.write_text(json.dumps(kept, indent=1), encoding="utf-8")
    return found


def _disk(name: str, scale: Scale, directory: Path) -> Path:
    path = directory / f"{name}.raw"
    if not path.exists():
        virtual, data = {"disk": scale.disk, "small": scale.small, "sparse": scale.sparse, "tiny": (1, 1)}[name]
        part = directory / f"{name}.part"
        write_disk(part, virtual * MIB, data * MIB, seed=name)
        part.rename(path)
    return path


def write_disk(path: Path, size: int, data: int, *, seed: str) -> None:
    """A raw disk of about ``data`` bytes that are not zeros, as a sparse file with a partition table."""
    rng = random.Random(seed)  # noqa: S311 - the same bytes everywhere
    blobs = _Blobs(rng)
    with path.open("wb") as file:
        file.truncate(size)
        file.write(_boot_sector(blobs, size))
        groups = range(0, size, _GROUP)
        weights = [rng.random() ** 1.5 + 0.01 for _ in groups]
        for start, weight in zip(groups, weights, strict=True):
            end = min(start + _GROUP, size)
            want = min(int(data * weight / sum(weights)), (end - start) * 15 // 16) & ~4095
            begin = start + 64 * KIB if start == 0 else start
            gap = max(4096, (end - begin - want) // max(1, want // (256 * KIB)) // 2)
            position = begin
            while want > 0 and position < end:
                length = int(min(max(4096, rng.lognormvariate(11.5, 1.6)), 8 * MIB)) // 4096 * 4096
                length = min(length, want, end - position)
                file.seek(position)
                file.write(blobs.take(length))
                want -= length
                position += length + int(rng.expovariate(1 / gap)) // 4096 * 4096


class _Blobs:
    """Bytes like those of files, cut from pools."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        words = ["".join(rng.choices("etaoinshrdlucmfwyp", k=rng.randint(2, 11))) for _ in range(6000)]
        self._text = " ".join(rng.choices(words, k=900_000)).encode()[: 5 * MIB]
        records = [rng.randbytes(8) for _ in range(512)]
        self._binary = b"".join(rng.choice(records) + rng.randbytes(5) + b"\0\0\0" for _ in range(320_000))

    def take(self, length: int) -> bytes:
        """``length`` bytes of one kind."""
        kind = self._rng.random()
        if kind < 0.20:
            return self._rng.randbytes(length)
        pool = self._text if kind < 0.65 else self._binary
        found = bytearray()
        while len(found) < length:
            start = self._rng.randrange(0, len(pool) - 64 * KIB)
            found += pool[start : start + self._rng.randint(16 * KIB, 64 * KIB)]
        return bytes(found[:length])


def _boot_sector(blobs: _Blobs, size: int) -> bytes:
    """A master boot record with one partition: Glance and Nova take nothing for raw that looks like something else."""
    first = 128
    entry = struct.pack("<B3BB3BII", 0x80, 0, 33, 3, 0x83, 0xFE, 0xFF, 0xFF, first, size // 512 - first)
    return blobs.take(446) + entry + bytes(48) + b"\x55\xaa"


def _sha512(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha512").hexdigest()

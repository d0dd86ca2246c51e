"""From a source to a base, whole and verified: read, inspect, hash, write, and convert where the format asks for it."""

from __future__ import annotations

import hashlib
import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from nova_imagecache import _extents, _fs, _qemu, _sums
from nova_imagecache._ahead import MIB, ReadAhead
from nova_imagecache._inspect import INSPECTOR_VERSION, RAW_FORMATS, StreamInspector
from nova_imagecache._models import BaseRecord, Digest, Evidence, ImageInfo, round_up
from nova_imagecache.exceptions import (
    CommandError,
    DiskTooSmallError,
    ImageCorruptError,
    ImageNotActiveError,
    ImageRejectedError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from nova_imagecache._guard import GuardedSource
    from nova_imagecache._watch import Watch
    from nova_imagecache.backends import BaseWriter

_OWN_DIGEST = "sha512"
_STEP = 64 * MIB
"""How far an image of unknown size may grow between two looks at the space that is left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is asked of one fetch.

    ``base_format`` is what the base shall be; ``disk_size`` the size of the disk it is fetched for (None: any);
    ``expect`` the digest the caller knows; ``admit(bytes, stage)`` raises NoSpaceError when so much does not fit.
    """

    base_format: str
    disk_size: int | None
    max_virtual_size: int | None
    expect: Digest | None
    allow_unverified: bool
    admit: Callable[[int, str], None]


class Tell(Protocol):
    """Called with (stage, bytes done, bytes in all or None)."""

    def __call__(self, stage: str, done: int, total: int | None, /) -> None: ...


def base_format(disk_format: str, wanted: str | None, possible: Iterable[str]) -> str:
    """The format that a base of an image has: the wanted one; with None the image's own, where bases may have it."""
    own = "raw" if disk_format in RAW_FORMATS else disk_format
    if wanted is not None:
        return wanted
    return own if own in possible else "raw"


def admit_metadata(image: ImageInfo, request: Request) -> None:
    """Refuse from what the source says, before a byte is asked for.

    Raises:
        ImageNotActiveError, ImageRejectedError, DiskTooSmallError, NoSpaceError.
    """
    if image.status != "active":
        raise ImageNotActiveError(image.status, image_id=image.image_id)
    StreamInspector(image.disk_format, image_id=image.image_id)
    if image.size == 0:
        raise ImageRejectedError("it has no data", image_id=image.image_id, stage="metadata")
    if image.digest is None and request.expect is None and not request.allow_unverified:
        reason = "no digest of it is known, and allow_unverified is off"
        raise ImageRejectedError(reason, image_id=image.image_id, stage="metadata")
    if request.disk_size is not None and image.min_disk > request.disk_size:
        raise DiskTooSmallError(request.disk_size, image.min_disk, image_id=image.image_id)
    if image.disk_format in RAW_FORMATS and image.size is not None:
        judge_size(round_up(image.size), image.image_id, request)
    request.admit(image.size or 0, "admission")


def judge_size(virtual_size: int, image_id: str, request: Request) -> None:
    """Refuse a virtual size that the cap or the disk does not allow.

    Raises:
        ImageRejectedError: above ``max_virtual_size``.
        DiskTooSmallError: above the disk's size; this caller's error alone.
    """
    if request.max_virtual_size is not None and virtual_size > request.max_virtual_size:
        reason = f"its virtual size {virtual_size} is above max_virtual_size {request.max_virtual_size}"
        raise ImageRejectedError(reason, image_id=image_id)
    if request.disk_size is not None and virtual_size > request.disk_size:
        raise DiskTooSmallError(request.disk_size, virtual_size, image_id=image_id)


class Ingest:
    """One image on its way into one writer."""

    def __init__(self, image: ImageInfo, source: GuardedSource, request: Request, watch: Watch, tell: Tell) -> None:
        self.image = self._image = image
        self._source = source
        self._request = request
        self._watch = watch
        self._tell = tell
        self._inspector = StreamInspector(image.disk_format, image_id=image.image_id)
        # where nothing is known, the bytes as they came are written down all the same
        wanted = {d.algorithm for d in (image.digest, request.expect) if d is not None} or {_OWN_DIGEST}
        self._hashes = {algorithm: hashlib.new(algorithm, usedforsecurity=False) for algorithm in wanted}

    def run(self, writer: BaseWriter, scratch: Path, now: float) -> BaseRecord:
        """The record of the base whose bytes are in ``writer`` now, not synced yet. ``scratch`` is an empty directory.

        Raises:
            ImageRejectedError, ImageCorruptError, DiskTooSmallError, NoSpaceError, SourceError, BackendError,
            CancelledError, DeadlineError.
        """
        direct = self._inspector.disk_format == self._request.base_format
        if direct:
            size = self._store(writer.write_at)
            writer.set_size(size)
            virtual_size, made_by, length = self._inspector.virtual_size or round_up(size), "stored", size
        else:
            download = scratch / "download"
            fd = _fs.create(download, 0o600)
            try:
                size = self._store(lambda offset, data: _fs.write(fd, offset, data))
                _fs.truncate(fd, size)
                virtual_size = self._convert(download, scratch / "converted", writer)
            finally:
                os.close(fd)
            made_by, length = "qemu-img convert", virtual_size
        digest, evidence = self._evidence()
        return BaseRecord(
            image_id=self._image.image_id,
            format=self._request.base_format,
            virtual_size=virtual_size,
            size=length,
            source_format=self._image.disk_format,
            source_size=size,
            source_digest=digest,
            evidence=evidence,
            made_by=made_by,
            source=self._source.name,
            fetched_at=now,
            inspector=INSPECTOR_VERSION,
        )

    # --- reading

    def _store(self, write_at: Callable[[int, memoryview], None]) -> int:
        """Read, judge, hash and write the whole stream; its length."""
        announced = self._image.size
        total = 0
        judged = False
        with ReadAhead(self._source, self._image, lambda: self._watch.check("fetch")) as chunks:
            for piece in _pieces(chunks):
                self._inspector.feed(piece)
                if not judged and self._inspector.virtual_size is not None:
                    judge_size(self._inspector.virtual_size, self._image.image_id, self._request)
                    judged = True
                if announced is not None and total + len(piece) > announced:
                    raise ImageCorruptError(
                        f"{announced} bytes", f"at least {total + len(piece)}", image_id=self._image.image_id
                    )
                for hasher in self._hashes.values():
                    hasher.update(piece)
                for offset, run in _extents.nonzero_runs(piece):
                    write_at(total + offset, run)
                total += len(piece)
                if announced is None:
                    self._judge_unannounced(total)
                self._tell("fetch", total, announced)
        self._verify(total)
        return total

    def _judge_unannounced(self, total: int) -> None:
        """Of an image whose size nobody said, look again as it grows."""
        if self._inspector.disk_format == "raw":
            judge_size(round_up(total), self._image.image_id, self._request)
        if total % _STEP == 0:
            self._request.admit(_STEP, "fetch")

    def _verify(self, total: int) -> None:
        image_id = self._image.image_id
        if total == 0:
            raise ImageRejectedError("it has no data", image_id=image_id, stage="verification")
        if self._image.size is not None and total != self._image.size:
            raise ImageCorruptError(f"{self._image.size} bytes", f"{total} bytes", image_id=image_id)
        for wanted in (self._request.expect, self._image.digest):
            if wanted is not None:
                actual = Digest(wanted.algorithm, self._hashes[wanted.algorithm].hexdigest())
                if actual != wanted:
                    raise ImageCorruptError(wanted, actual, image_id=image_id)
        self._inspector.finish()
        if self._inspector.virtual_size is not None:
            judge_size(self._inspector.virtual_size, image_id, self._request)

    def _evidence(self) -> tuple[Digest, Evidence]:
        if self._request.expect is not None:
            return self._request.expect, "expected"
        if self._image.digest is not None:
            return self._image.digest, self._image.digest_evidence
        return Digest(_OWN_DIGEST, self._hashes[_OWN_DIGEST].hexdigest()), "unverified"

    # --- converting

    def _convert(self, download: Path, converted: Path, writer: BaseWriter) -> int:
        """Unpack the download into the writer as raw bytes; the virtual size."""
        image_id = self._image.image_id
        announced = self._inspector.virtual_size or 0
        target = writer.path or converted
        try:
            # what it unpacks to is known before it is unpacked; QEMU counts a little metadata in
            data = min(_qemu.measure(download, self._image.disk_format), announced)
            self._request.admit(data, "conversion")
            _qemu.convert(
                download,
                self._image.disk_format,
                target,
                virtual_size=announced,
                checkpoint=lambda: self._converting(target, data),
            )
        except CommandError as err:
            if not _is_verdict(err):
                raise
            raise ImageRejectedError(f"qemu-img cannot convert it: {err.stderr.strip()}", image_id=image_id) from err
        _fs.unlink(download)
        # the header of some formats (VHD) is rounded otherwise than what QEMU makes of it: the bytes decide
        virtual_size = target.stat().st_size
        judge_size(virtual_size, image_id, self._request)
        writer.set_size(virtual_size)
        if writer.path is None:
            for extent in _extents.read_extents(converted):
                self._watch.check("convert")
                for offset, run in _extents.nonzero_runs(extent.data):
                    writer.write_at(extent.offset + offset, run)
        writer.write_sums(_sums.of_extents(_extents.read_extents(target), virtual_size))
        self._tell("convert", data, data)
        return virtual_size

    def _converting(self, target: Path, data: int) -> None:
        self._watch.check("convert")
        with suppress(FileNotFoundError):  # qemu-img has not made it yet
            self._tell("convert", min(target.stat().st_blocks * 512, data), data)


def _is_verdict(err: CommandError) -> bool:
    """Whether qemu-img's end says something of the image: its own words, or a limit that the image drove it over."""
    return err.returncode is not None and (err.returncode > 0 or -err.returncode in {signal.SIGXCPU, signal.SIGXFSZ})


def _pieces(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The stream in pieces of one MiB (the last may be shorter), so that zero blocks are aligned."""
    pending = bytearray()
    for chunk in chunks:
        if not pending and len(chunk) == MIB:
            yield chunk
            continue
        pending += chunk
        while len(pending) >= MIB:
            yield bytes(pending[:MIB])
            del pending[:MIB]
    if pending:
        yield bytes(pending)

"""From a source to a base, whole and verified: read, inspect, hash, write, and convert where the format asks for it."""

from __future__ import annotations

import errno
import logging
import os
import signal
from contextlib import contextmanager, suppress
from itertools import chain
from typing import TYPE_CHECKING, Protocol

from nova_imagecache import _extents, _fs, _qcow2, _qemu, _sums
from nova_imagecache._admission import judge_size
from nova_imagecache._inspect import INSPECTOR_VERSION, StreamInspector
from nova_imagecache._models import BaseRecord, Digest, Evidence, ImageInfo, round_up
from nova_imagecache._packed import SurpriseError
from nova_imagecache._placing import Placer, Qcow2Placer, Spool, write_runs
from nova_imagecache._stream import MIB, Stream
from nova_imagecache.exceptions import BackendError, CommandError, ImageCorruptError, ImageRejectedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from nova_imagecache._admission import Request
    from nova_imagecache._guard_source import GuardedSource
    from nova_imagecache._models import Extent
    from nova_imagecache._watch import Watch
    from nova_imagecache.backends import BaseWriter

_OWN_DIGEST = "sha512"
_DECODED = "qcow2 decoder"
_CONVERTED = "qemu-img convert"
_STEP = 64 * MIB
"""How far an image of unknown size may grow between two looks at the space that is left."""

_ABSURD = 1 << 47
"""A virtual size (128 TiB) from which on a lack of memory for its checksums is the image's fault."""

_log = logging.getLogger(__name__)


class Tell(Protocol):
    """Called with (stage, bytes done, bytes in all or None)."""

    def __call__(self, stage: str, done: int, total: int | None, /) -> None: ...


class _Pass:
    """What one reading of the source has shown. The thread that reads writes to it, also after it was left behind: each
    reading has its own.
    """

    def __init__(self, image: ImageInfo, request: Request, tell: Tell) -> None:
        self.inspector = StreamInspector(image.disk_format, image_id=image.image_id)
        self.total = 0
        self._image = image
        self._request = request
        self._tell = tell
        self._judged = False
        self._told = 0

    def look(self, part: memoryview) -> None:
        """Judge the bytes as they come; in the reading thread, so that a bad image is refused at once."""
        image_id = self._image.image_id
        self.inspector.feed(part)
        self.total += len(part)
        announced = self._image.size
        if announced is not None and self.total > announced:
            raise ImageCorruptError(f"{announced} bytes", f"at least {self.total}", image_id=image_id)
        if not self._judged and self.inspector.virtual_size is not None:
            judge_size(self.inspector.virtual_size, image_id, self._request)
            self._judged = True
        if announced is None and self.inspector.disk_format == "raw":
            judge_size(round_up(self.total), image_id, self._request)
        if self.total - self._told >= MIB:
            self._told = self.total
            self._tell("fetch", self.total, announced)


class Ingest:
    """One image on its way into one writer."""

    def __init__(self, image: ImageInfo, source: GuardedSource, request: Request, watch: Watch, tell: Tell) -> None:
        self.image = self._image = image
        self._source = source
        self._request = request
        self._watch = watch
        self._tell = tell
        # where nothing is known, the bytes as they came are written down all the same
        self._algorithms = {d.algorithm for d in (image.digest, request.expect) if d is not None} or {_OWN_DIGEST}
        self._pass = _Pass(image, request, tell)

    def run(self, writer: BaseWriter, scratch: Path, now: float) -> BaseRecord:
        """The record of the base whose bytes are in ``writer`` now, not synced yet. ``scratch`` is an empty directory.

        Raises:
            ImageRejectedError, ImageCorruptError, DiskTooSmallError, NoSpaceError, SourceError, BackendError,
            CancelledError, DeadlineError.
        """
        if self._pass.inspector.disk_format == self._request.base_format:
            self._store(writer)
            length = self._pass.total
            writer.set_size(length)
            virtual_size, made_by = self._pass.inspector.virtual_size or round_up(length), "stored"
        else:
            made_by = self._make_raw(writer, scratch)
            virtual_size = length = self._size
        digest, evidence = self._evidence()
        return BaseRecord(
            image_id=self._image.image_id,
            format=self._request.base_format,
            virtual_size=virtual_size,
            size=length,
            source_format=self._image.disk_format,
            source_size=self._pass.total,
            source_digest=digest,
            evidence=evidence,
            made_by=made_by,
            source=self._source.name,
            fetched_at=now,
            inspector=INSPECTOR_VERSION,
        )

    # --- reading

    def _stream(self) -> Stream:
        return Stream(
            self._source,
            self._image,
            algorithms=self._algorithms,
            look=self._pass.look,
            check=lambda: self._watch.check("fetch"),
        )

    def _store(self, writer: BaseWriter) -> None:
        """Write the whole stream as it comes, holes for zeros."""
        with self._stream() as stream:
            if self._image.size is not None:  # beside the first read; storage may take time to grow
                with self._storable(self._image.size):
                    writer.set_size(self._image.size)
            self._write_pieces(stream, writer.write_at)
            self._verify(stream)

    def _write_pieces(self, pieces: Iterable[memoryview], write_at: Callable[[int, memoryview], None]) -> None:
        position = asked = 0
        for piece in pieces:
            write_runs(write_at, position, piece)
            position += len(piece)
            if self._image.size is None and position - asked >= _STEP:
                # of an image whose size nobody said, look again as it grows
                asked = position
                self._request.admit(_STEP, "fetch", position)

    def _verify(self, stream: Stream) -> None:
        image_id = self._image.image_id
        if self._pass.total == 0:
            raise ImageRejectedError("it has no data", image_id=image_id, stage="verification")
        if self._image.size is not None and self._pass.total != self._image.size:
            raise ImageCorruptError(f"{self._image.size} bytes", f"{self._pass.total} bytes", image_id=image_id)
        self._digests = {algorithm: stream.digest(algorithm) for algorithm in self._algorithms}
        for wanted in (self._request.expect, self._image.digest):
            if wanted is not None:
                actual = Digest(wanted.algorithm, self._digests[wanted.algorithm])
                if actual != wanted:
                    raise ImageCorruptError(wanted, actual, image_id=image_id)
        self._pass.inspector.finish()
        if self._pass.inspector.virtual_size is not None:
            judge_size(self._pass.inspector.virtual_size, image_id, self._request)
        self._tell("fetch", self._pass.total, self._image.size)

    def _evidence(self) -> tuple[Digest, Evidence]:
        if self._request.expect is not None:
            return self._request.expect, "expected"
        if self._image.digest is not None:
            return self._image.digest, self._image.digest_evidence
        return Digest(_OWN_DIGEST, self._digests[_OWN_DIGEST]), "unverified"

    # --- other formats become raw

    def _make_raw(self, writer: BaseWriter, scratch: Path) -> str:
        """Unpack the image into the writer as raw bytes; by which way, and why not by the short one."""
        if self._pass.inspector.disk_format != "qcow2":
            with self._stream() as stream:
                self._download_and_convert(stream, stream, scratch, writer)
            return _CONVERTED
        try:
            with self._stream() as stream:
                return self._decode_or_convert(stream, scratch, writer)
        except SurpriseError as err:
            _log.warning("image %s: fetching it again for qemu-img, since it has %s", self._image.image_id, err)
            refusal = str(err)
        writer.sync()  # no write of the first try may come after what follows
        writer.set_size(0)
        self._pass = _Pass(self._image, self._request, self._tell)
        with self._stream() as stream:
            self._download_and_convert(stream, stream, scratch, writer)
        return f"{_CONVERTED}: {refusal}"

    def _decode_or_convert(self, stream: Stream, scratch: Path, writer: BaseWriter) -> str:
        """Go the one-pass way; or the long one, where the header tells that this one cannot be gone. Which, and why.

        Raises:
            SurpriseError: it turned out in the middle.
        """
        pieces = iter(stream)
        first = next(pieces, memoryview(b""))
        with Spool(scratch / "spool") as spool:
            try:
                header = _qcow2.parse_header(first[: _qcow2.HEADER_BYTES])
                judge_size(header.virtual_size, self._image.image_id, self._request)
                with self._storable(header.virtual_size):
                    placer = Placer(writer, header.virtual_size)
                decoding = Qcow2Placer(
                    header,
                    self._image.size,
                    placer,
                    spool,
                    hold=stream.hold,
                    admit=lambda needed: self._request.admit(needed, "conversion", placer.placed),
                    admit_free=lambda needed: self._request.admit_free(needed, "conversion", placer.placed),
                    check=lambda: self._watch.check("fetch"),
                )
            except (SurpriseError, _qcow2.Qcow2Error) as err:
                self._download_and_convert(stream, chain([first], pieces), scratch, writer)
                return f"{_CONVERTED}: {err}"
            self._size = header.virtual_size
            with self._storable(self._size), decoding:
                writer.set_size(self._size)
                for piece in chain([first], pieces):
                    decoding.feed(piece)
                decoding.finish()
        sums = placer.sums(check=lambda: self._watch.check("checksums"))
        if sums is not None:
            writer.write_sums(sums)
        self._verify(stream)  # last: the rest is done beside the hash
        return _DECODED

    def _download_and_convert(
        self, stream: Stream, pieces: Iterable[memoryview], scratch: Path, writer: BaseWriter
    ) -> None:
        download = scratch / "download"
        fd = _fs.create(download, 0o600)
        try:
            self._write_pieces(pieces, lambda offset, data: _fs.write(fd, offset, data))
            self._verify(stream)
            _fs.truncate(fd, self._pass.total)
        finally:
            os.close(fd)
        self._size = self._convert(download, scratch / "converted", writer)

    def _convert(self, download: Path, converted: Path, writer: BaseWriter) -> int:
        """Unpack the download into the writer as raw bytes; the virtual size."""
        image_id = self._image.image_id
        announced = self._pass.inspector.virtual_size or 0
        target = writer.path or converted
        try:
            # what it unpacks to is known before it is unpacked; QEMU counts a little metadata in
            data = min(self._measure(download), announced)
            self._request.admit(data, "conversion", 0)
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
        with self._storable(virtual_size):
            writer.set_size(virtual_size)
        if writer.path is None:
            for extent in self._checked(_extents.read_extents(converted)):
                for offset, run in _extents.nonzero_runs(extent.data):
                    writer.write_at(extent.offset + offset, run)
        with self._storable(virtual_size):
            sums = _sums.of_extents(self._checked(_extents.read_extents(target)), virtual_size)
        writer.write_sums(sums)
        self._tell("convert", data, data)
        return virtual_size

    @contextmanager
    def _storable(self, virtual_size: int) -> Iterator[None]:
        """Refuse an image whose virtual size, empty or not, is more than a file or its checksums can have here."""
        try:
            yield
        except (OSError, BackendError) as err:
            # a backend's error comes with the system's as its cause
            cause = err if isinstance(err, OSError) else err.__cause__
            number = cause.errno if isinstance(cause, OSError) else None
            if number != errno.EFBIG and (number != errno.ENOMEM or virtual_size < _ABSURD):
                raise
            reason = f"its virtual size of {virtual_size} bytes is more than can be stored here ({os.strerror(number)})"
            raise ImageRejectedError(reason, image_id=self._image.image_id) from err

    def _measure(self, download: Path) -> int:
        return _qemu.measure(download, self._image.disk_format, checkpoint=lambda: self._watch.check("measure"))

    def _checked(self, extents: Iterable[Extent]) -> Iterator[Extent]:
        for extent in extents:
            self._watch.check("convert")
            yield extent

    def _converting(self, target: Path, data: int) -> None:
        self._watch.check("convert")
        with suppress(FileNotFoundError):  # qemu-img has not made it yet
            self._tell("convert", min(target.stat().st_blocks * 512, data), data)


def _is_verdict(err: CommandError) -> bool:
    """Whether qemu-img's end says something of the image: its own words, or a limit that the image drove it over.

    Its code is 1. What starts it ends with others, the loader with 127 and words that look like qemu-img's.
    """
    if err.returncode == 1:
        return any(line.startswith("qemu-img: ") for line in err.stderr.splitlines())
    return err.returncode is not None and -err.returncode in {signal.SIGXCPU, signal.SIGXFSZ}

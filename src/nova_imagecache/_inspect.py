"""Is this image safe, and is it what it claims to be? Judged on the live stream, before qemu-img sees a byte.

The parsers are oslo.utils' format inspectors, the ones Nova, Glance, Cinder and Ironic use. On top of them stand a few
checks of our own, for what QEMU reads differently from them. Rules and their history:

- what is declared must be what is found, and only one format may be found (CVE-2024-40767, polyglots);
- no qcow2 backing file (CVE-2013-1922 family), data file (CVE-2024-32498), encryption, unknown feature bits;
- a VMDK names one sparse extent, itself (CVE-2022-47951);
- iso and the ami family are raw bytes, whatever they hold, and never given to a parser of another format;
- the ami family need not be a sane partitioned disk: a kernel for x86 ends its first sector as a partition table does.
"""

from __future__ import annotations

import logging
import re
import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING

from nova_imagecache import _qcow2
from nova_imagecache.exceptions import ImageRejectedError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from oslo_utils.imageutils import format_inspector

INSPECTOR_VERSION = 2
"""Raised whenever a rule is added: native bases that an older version judged are then looked at again."""

DECIDED_BY = 1 << 20
"""By this many bytes every format but those of ``_LATE`` has shown itself."""

_LATE = {"vhdx": 4 << 20, "vmdk": None}
"""Formats that may need more: VHDX's metadata lies at up to 4 MiB; a streamed VMDK ends in a footer."""

_AMI_FAMILY = ("ami", "aki", "ari")

_FOUND: dict[str, tuple[frozenset[str], ...]] = {
    "raw": (frozenset({"raw"}), frozenset({"gpt"})),
    "iso": (frozenset({"iso"}), frozenset({"iso", "gpt"})),
    **{kind: (frozenset({kind}),) for kind in ("qcow2", "vmdk", "vhd", "vhdx", "vdi")},
    **{kind: tuple(frozenset({x}) for x in ("raw", "gpt", "iso")) for kind in _AMI_FAMILY},
}
"""Per declared format, the sets of formats that may be found."""

_BLOCK = 64 << 10
"""The parsers get bytes in blocks of this size: what some of them conclude depends on where a chunk ends."""

RAW_FORMATS = frozenset({"raw", "iso", *_AMI_FAMILY})
"""Declared formats whose bytes are the disk's bytes."""

_VMDK_EXTENT = re.compile(r'(?:rw|rdonly|noaccess) \d+ sparse "[^/\\:"]*"')

_VHD_BY_SIZE = frozenset({b"win ", b"qem2", b"d2v ", b"CTXS", b"tap\0", b"wa\0\0"})
"""Makers of VHDs whose size is the one that is written, and not their geometry's."""

_VHD_MOST_SECTORS = 65535 * 16 * 255

_log = logging.getLogger(__name__)


class _Feed:
    """What InspectWrapper reads from: the chunk that was fed last."""

    def __init__(self) -> None:
        self.chunk = b""

    def read(self, _size: int = -1) -> bytes:
        return self.chunk


class StreamInspector:
    """Judges one image while its bytes pass.

    Feed it every chunk until ``done``; then call ``finish`` when the stream has ended. ``virtual_size`` is known from
    the moment ``decided`` is True, for formats whose header says it.
    """

    def __init__(self, declared: str, *, image_id: str | None = None) -> None:
        from oslo_utils.imageutils import format_inspector

        if declared not in _FOUND:
            reason = f"disk format {declared!r} is not supported (supported: {', '.join(sorted(_FOUND))})"
            raise ImageRejectedError(reason, image_id=image_id, stage="metadata")
        self.declared = declared
        self.decided = False
        self.done = False
        self.virtual_size: int | None = None
        self._image_id = image_id
        self._feed = _Feed()
        self._pending = bytearray()
        self._seen = 0
        # a wrapper told which format to expect stops at the first sign of another
        expected = declared if declared in format_inspector.ALL_FORMATS and declared != "raw" else None
        self._wrapper = format_inspector.InspectWrapper(self._feed, expected_format=expected)  # type: ignore[arg-type]  # it only reads
        for inspector in self._wrapper._inspectors:  # noqa: SLF001 - there is no other way to them
            if isinstance(inspector, format_inspector.VMDKInspector):
                # never set where text turns into binary, and asked for all the same
                inspector.vmdktype = "formatnotfound"

    @property
    def disk_format(self) -> str:
        """The format whose bytes these are: "raw" for everything that is the disk itself."""
        return "raw" if self.declared in RAW_FORMATS else self.declared

    def feed(self, chunk: bytes | memoryview) -> None:
        """Look at the next bytes of the stream.

        Raises:
            ImageRejectedError: as soon as the bytes that decide are there.
        """
        if self.done:
            return
        self._pending += chunk
        while not self.done and len(self._pending) >= _BLOCK:
            block = bytes(self._pending[:_BLOCK])
            del self._pending[:_BLOCK]
            self._look(block)

    def finish(self) -> None:
        """The stream has ended.

        Raises:
            ImageRejectedError: the image is refused.
        """
        if not self.done and self._pending:
            self._look(bytes(self._pending))
        if not self.done:
            with self._damage_refused():
                self._wrapper.close()
                self._judge(ended=True)

    def _look(self, block: bytes) -> None:
        self._feed.chunk = block
        self._seen += len(block)
        with self._damage_refused():
            self._wrapper.read(len(block))
            self._judge(ended=False)

    @contextmanager
    def _damage_refused(self) -> Iterator[None]:
        """Refuse the image where a parser stumbles over it, whatever it is asked for."""
        from oslo_utils.imageutils import format_inspector

        try:
            yield
        except (format_inspector.ImageFormatError, ValueError, ArithmeticError, LookupError, struct.error) as err:
            raise self._refuse(f"it is not the {self.declared} image it claims to be ({err})") from err

    def _refuse(self, reason: str) -> ImageRejectedError:
        return ImageRejectedError(reason, image_id=self._image_id)

    def _judge(self, *, ended: bool) -> None:
        found = self._wrapper.formats
        if found is None:
            self._judge_undecided()
            return
        names = frozenset(str(inspector) for inspector in found)
        if names not in _FOUND[self.declared]:
            what = " and ".join(sorted(names)) + (" at once" if len(names) > 1 else "")
            raise self._refuse(f"it claims to be {self.declared} and is {what}")
        for inspector in found:
            # a kernel's boot flag lies where a partition table has its signature (the kernel's boot.rst), on code
            if str(inspector) != "gpt" or self.declared not in _AMI_FAMILY:
                self._check_safety(inspector)
            self._check_more(inspector)
            if self.disk_format != "raw":
                self.virtual_size = self._sane_size(_virtual_size(inspector))
        self.decided = self.done = True
        _log.debug("image %s: found %s after %d bytes%s", self._image_id, names, self._seen, " (end)" if ended else "")

    def _judge_undecided(self) -> None:
        """Formats that need more than the first MiB: learn the virtual size early, and refuse endless searches."""
        if self._seen < DECIDED_BY:
            return
        limit = _LATE.get(self.declared, DECIDED_BY)
        if limit is not None and self._seen >= limit:
            raise self._refuse(f"no {self.declared} header within the first {limit >> 20} MiB")
        if self.declared == "vmdk" and not self.decided:
            for inspector in self._wrapper._inspectors:  # noqa: SLF001 - `formats` answers only at the footer
                if str(inspector) == "vmdk" and inspector.format_match and inspector.virtual_size:
                    self._check_more(inspector)
                    self.virtual_size = self._sane_size(inspector.virtual_size)
                    self.decided = True

    def _sane_size(self, size: int) -> int:
        # QEMU's own limit is 2**63 - 1; a header that says 0 is unusable
        if not 0 < size < 1 << 63:
            raise self._refuse(f"its header says a virtual size of {size} bytes")
        return size

    def _check_safety(self, inspector: format_inspector.FileInspector) -> None:
        from oslo_utils.imageutils import format_inspector

        try:
            inspector.safety_check()
        except format_inspector.SafetyCheckFailed as err:
            reasons = "; ".join(f"{name}: {failure}" for name, failure in err.failures.items())
            raise self._refuse(f"unsafe {inspector}: {reasons}") from err
        except (format_inspector.ImageFormatError, ValueError, struct.error) as err:
            raise self._refuse(f"damaged {inspector}: {err}") from err

    def _check_more(self, inspector: format_inspector.FileInspector) -> None:
        from oslo_utils.imageutils import format_inspector

        reason = None
        if isinstance(inspector, format_inspector.QcowInspector):
            reason = _qcow2_problem(bytes(inspector.region("header").data))
        elif isinstance(inspector, format_inspector.VMDKInspector):
            reason = _vmdk_problem(inspector)
        elif isinstance(inspector, format_inspector.VHDInspector):
            # 3: dynamic. A differencing disk (4) reads from another file
            (kind,) = struct.unpack(">I", inspector.region("header").data[60:64])
            reason = None if kind == 3 else f"VHD type {kind}, where only dynamic disks (3) stand alone"
        if reason is not None:
            raise self._refuse(reason)


def _virtual_size(inspector: format_inspector.FileInspector) -> int:
    """What QEMU takes for the size of the disk."""
    from oslo_utils.imageutils import format_inspector

    if isinstance(inspector, format_inspector.VHDInspector):
        return _vhd_size(bytes(inspector.region("header").data))
    return inspector.virtual_size


def _vhd_size(footer: bytes) -> int:
    """The current size, which is another than the original one after the disk was resized; of makers that count in
    cylinders, heads and sectors their product, unless it is the largest there is (QEMU's block/vpc.c)."""
    current, cylinders, heads, sectors = struct.unpack_from(">QHBB", footer, 48)
    geometry = cylinders * heads * sectors
    if footer[28:32] in _VHD_BY_SIZE or geometry == _VHD_MOST_SECTORS:
        return int(current) // 512 * 512
    return int(geometry) * 512


def _qcow2_problem(header: bytes) -> str | None:
    try:
        parsed = _qcow2.parse_header(header)
        reason = _qcow2.refusal(header)
    except _qcow2.Qcow2Error as err:
        return str(err)
    if reason is not None:
        return reason
    if parsed.encrypted:
        return "an encrypted qcow2: nobody here has its key"
    if parsed.incompatible & _qcow2.CORRUPT:
        return "a qcow2 that is marked corrupt: repair it with qemu-img check -r all"
    return None


def _vmdk_problem(inspector: format_inspector.VMDKInspector) -> str | None:
    """QEMU searches ``createType`` case-sensitively, takes protocol names for extents, and opens what the descriptor
    names where the header says capacity 0: so exactly one type, one sparse extent with a plain name, a capacity."""
    text = inspector.desc_text or ""
    extents = [line.strip() for line in text.split("\n") if re.match(r"\s*(rw|rdonly|noaccess)\b", line)]
    if text.count("createtype") != 1:
        return "a VMDK descriptor with more than one createType, or none"
    if len(extents) != 1 or not _VMDK_EXTENT.fullmatch(extents[0]):
        return "a VMDK whose extents are not one sparse extent in the file itself"
    if not inspector.has_region("header") or inspector.virtual_size == 0:
        return "a VMDK without a sparse header, or with capacity 0"
    if inspector.has_region("footer"):
        # QEMU takes the footer's word for capacity and grain size; it may differ in where the grain directory lies
        header, footer = inspector.region("header").data, inspector.region("footer").data[512:1024]
        if inspector.region("footer").complete and header[:48] != footer[:48]:
            return "a VMDK whose footer differs from its header"
    return None


def inspect_file(path: Path, disk_format: str, *, image_id: str | None = None) -> None:
    """Judge a file that is already here, as far as its deciding bytes; used for native bases of older inspectors.

    Raises:
        ImageRejectedError: today's rules refuse it.
    """
    inspector = StreamInspector(disk_format, image_id=image_id)
    with path.open("rb") as file:
        while not inspector.done and (chunk := file.read(64 * 1024)):
            inspector.feed(chunk)
    inspector.finish()

"""qemu-img, with the format of every file stated in every call (a guessed format is CVE-2013-7130's family).

All paths are absolute, so that none can be taken for an option or a protocol name.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from nova_imagecache import _exec
from nova_imagecache.exceptions import CommandError, DiskInUseError, ImageCacheError, NoSpaceError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TOOL = "qemu-img"

_QUICK = 60.0
_MEMORY = 4 << 30
"""Address space. Debian's qemu-img maps about 1 GiB of libraries when its rbd driver is installed."""

_PATIENCE = 2.0
"""Seconds that may pass for each of processor time: an image that is too much work meets that limit first, which says
something of the image; storage that hangs does not.
"""

_SLACK = 64 << 20
_SLOWEST = 4 << 20
"""Bytes a second below which a conversion is taken to hang: a tenth of what one core inflates."""

FORMATS = {"raw": "raw", "qcow2": "qcow2", "vmdk": "vmdk", "vhd": "vpc", "vhdx": "vhdx", "vdi": "vdi"}
"""The image service's format names, and qemu's."""


def measure(path: Path, image_format: str, *, checkpoint: Callable[[], None] | None = None) -> int:
    """The bytes of data that an image unpacks to (zeros and holes not counted; a few MiB of metadata are).

    Raises:
        CommandError: as ``convert``.
    """
    argv = ["measure", "--output=json", "-f", FORMATS[image_format], "-O", "qcow2", str(path)]
    seconds = 300
    limits = _limits(cpu=seconds)
    out = _run(argv, stage="measure", timeout=seconds * _PATIENCE, limits=limits, checkpoint=checkpoint)
    answer = json.loads(out)
    return int(answer["required"])


def convert(
    source: Path, image_format: str, target: Path, *, virtual_size: int, checkpoint: Callable[[], None] | None = None
) -> None:
    """Write the image as raw bytes to ``target``, holes kept. The target is not synced.

    Raises:
        NoSpaceError: the target's filesystem is full.
        CommandError: qemu-img refuses the image, needs more than its limits, or takes too long.
    """
    seconds = 300 + virtual_size // _SLOWEST
    # -W: clusters arrive in the source's order, the target is a sparse file that does not care
    argv = ["convert", "-W", "-t", "writeback", "-f", FORMATS[image_format], "-O", "raw", str(source), str(target)]
    limits = _limits(cpu=seconds, file_size=virtual_size + _SLACK)
    _run(argv, stage="convert", timeout=seconds * _PATIENCE, limits=limits, checkpoint=checkpoint)


def create_overlay(path: Path, *, backing: str, backing_format: str, cluster_size: int | None, size: int) -> None:
    """A qcow2 overlay of ``size`` bytes whose header names ``backing``, as given: relative to the overlay, or absolute.

    The backing file is not opened (-u): its format and size are known, and a relative name need not resolve yet.
    """
    options = [] if cluster_size is None else ["-o", f"cluster_size={cluster_size}"]
    argv = ["create", "-q", "-u", "-f", "qcow2", *options, "-F", backing_format, "-b", backing, str(path), str(size)]
    _run(argv, stage="overlay")


def resize(path: Path, disk_format: str, size: int) -> None:
    """Grow a disk to ``size`` bytes.

    Raises:
        DiskInUseError: somebody has it open.
    """
    _run(["resize", "-q", "-f", disk_format, str(path), str(size)], stage="resize", limits=_limits(cpu=60))


def set_backing(path: Path, backing: str, backing_format: str) -> None:
    """Write another backing file's name into an overlay's header; the content is taken to be the same."""
    argv = ["rebase", "-q", "-u", "-f", "qcow2", "-F", backing_format, "-b", backing, str(path)]
    _run(argv, stage="attach", limits=_limits(cpu=60))


def flatten(path: Path, virtual_size: int) -> None:
    """Copy what an overlay takes from its backing files into it, and drop them from its header. Safe to interrupt:
    the header changes last.

    Raises:
        DiskInUseError: somebody has it open.
        NoSpaceError: the filesystem is full; the overlay still works.
    """
    seconds = 300 + virtual_size // _SLOWEST
    limits = _limits(cpu=seconds, file_size=2 * virtual_size + _SLACK)
    _run(["rebase", "-q", "-f", "qcow2", "-b", "", str(path)], stage="flatten", timeout=seconds, limits=limits)


def version() -> str:
    """What ``qemu-img --version`` says in its first line."""
    return _run(["--version"], stage="check").partition("\n")[0]


def _limits(*, cpu: int, file_size: int | None = None) -> _exec.Limits:
    return _exec.Limits(cpu=cpu, memory=_MEMORY, file_size=file_size)


def _run(
    arguments: list[str],
    *,
    stage: str,
    timeout: float = _QUICK,
    limits: _exec.Limits | None = None,
    checkpoint: Callable[[], None] | None = None,
) -> str:
    limits = limits or _limits(cpu=60)
    try:
        return _exec.run([TOOL, *arguments], timeout=timeout, limits=limits, stage=stage, checkpoint=checkpoint)
    except CommandError as err:
        raise _meaning(err, stage) from err


def _meaning(err: CommandError, stage: str) -> ImageCacheError:
    if "No space left on device" in err.stderr or "Disk quota exceeded" in err.stderr:
        return NoSpaceError(stage=stage)
    if "Failed to get " in err.stderr and " lock" in err.stderr:
        return DiskInUseError("the root disk is open in another process", stage=stage)
    return err

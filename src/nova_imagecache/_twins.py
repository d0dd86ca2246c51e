"""An image whose bytes the cache holds already, under another id: copied from there instead of fetched."""

from __future__ import annotations

import errno
import logging
import os
from dataclasses import replace
from typing import TYPE_CHECKING

from nova_imagecache import _extents, _fs, _verify
from nova_imagecache._admission import judge_size
from nova_imagecache._models import FileLocation
from nova_imagecache.exceptions import (
    BaseCorruptError,
    CancelledError,
    DeadlineError,
    ImageCacheError,
    NoSpaceError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from nova_imagecache._admission import Request
    from nova_imagecache._guard import GuardedBackend
    from nova_imagecache._models import BaseImage, BaseRecord, Digest, Extent, ImageInfo
    from nova_imagecache.backends import BaseWriter

_log = logging.getLogger(__name__)

_WEAK = frozenset({"md5", "sha1"})
"""Two images can be made to share these: they tell damage, not identity."""


def copied(
    backend: GuardedBackend,
    image: ImageInfo,
    request: Request,
    writer: BaseWriter,
    now: float,
    *,
    check: Callable[[], None] = lambda: None,
) -> BaseRecord | None:
    """The record of a base whose bytes are in ``writer`` now, copied from a twin; None: there is none that is whole.

    Blocks are shared where the filesystem can. The copy is read and proved as ``verify_base`` would, since the twin may
    have been damaged since it was published; ``check`` is called meanwhile. One that others can change is no twin.

    Raises:
        ImageRejectedError, DiskTooSmallError, NoSpaceError: as of an image that is fetched.
    """
    wanted = request.expect or image.digest
    twin = None if wanted is None else _find(backend, image, wanted, request.base_format)
    if wanted is None or twin is None:
        return None
    judge_size(twin.virtual_size, image.image_id, request)
    try:
        request.admit(backend.usage(twin).allocated, "copying a twin", 0)
        _copy(backend, twin, writer, check)
    except (NoSpaceError, CancelledError, DeadlineError):
        raise
    except (OSError, ImageCacheError) as err:  # removed meanwhile, or not to be read: fetch
        if isinstance(err, OSError) and err.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        level = logging.WARNING if isinstance(err, BaseCorruptError) else logging.INFO
        _log.log(level, "image %s: its twin %s cannot be copied: %s", image.image_id, twin.image_id, err)
        writer.set_size(0)
        return None
    _log.info("image %s: copied from its twin %s", image.image_id, twin.image_id)
    return replace(
        twin.record,
        image_id=image.image_id,
        source=f"base {twin.image_id}",
        source_digest=wanted,
        evidence="expected" if request.expect is not None else image.digest_evidence,
        fetched_at=now,
    )


def _find(backend: GuardedBackend, image: ImageInfo, wanted: Digest, base_format: str) -> BaseImage | None:
    if wanted.algorithm in _WEAK:
        return None
    for base in backend.iter_bases():
        record = base.record
        same = record.source_digest == wanted and record.source_format == image.disk_format
        if same and base.image_id != image.image_id and record.format == base_format and base.managed:
            if _verify.is_ours(base):
                return base
            _log.info("image %s: base %s has the same bytes, but is another user's", image.image_id, base.image_id)
    return None


def _copy(backend: GuardedBackend, twin: BaseImage, writer: BaseWriter, check: Callable[[], None]) -> None:
    # before its bytes: where they can still be opened afterwards, these were there as well
    sums = backend.read_sums(twin)
    if isinstance(twin.location, FileLocation) and writer.path is not None:
        _copy_file(twin.location.path, writer.path, check)
        writer.set_size(twin.record.size)
        extents = _extents.read_extents(writer.path)
    else:
        writer.set_size(twin.record.size)
        extents = _written(backend.read_base(twin), writer)
    if (problem := _verify.damage_of(extents, twin.record, lambda: sums, check)) is not None:
        todo = f"Verify base {twin.image_id}; this image is fetched"
        raise BaseCorruptError(f"the copy is damaged: {problem}", image_id=twin.image_id, stage="twin", todo=todo)
    if sums is not None:
        writer.write_sums(sums)


def _copy_file(path: Path, target_path: Path, check: Callable[[], None]) -> None:
    # open descriptors keep the bytes, whatever becomes of the twin's name
    source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        target = os.open(target_path, os.O_RDWR | os.O_CLOEXEC)
        try:
            _fs.copy_content(source, target, check=check)
        finally:
            os.close(target)
    finally:
        os.close(source)


def _written(extents: Iterator[Extent], writer: BaseWriter) -> Iterator[Extent]:
    for extent in extents:
        writer.write_at(extent.offset, extent.data)
        yield extent

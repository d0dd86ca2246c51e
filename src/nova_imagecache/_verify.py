"""Whether a base still holds the bytes it was published with, and a plain copy of them."""

from __future__ import annotations

import hashlib
import os
import tempfile
from typing import TYPE_CHECKING

from nova_imagecache import _fs, _sums
from nova_imagecache._models import BlockLocation, FileLocation
from nova_imagecache.exceptions import BaseNotFoundError, DiskExistsError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from nova_imagecache._guard import GuardedBackend
    from nova_imagecache._models import BaseImage


def damage(backend: GuardedBackend, base: BaseImage, checkpoint: Callable[[], None]) -> str | None:
    """What is wrong with the base's bytes, None: nothing. Reads all of them."""
    record = base.record
    if record.made_by == "stored":
        return _compare_digest(backend, base, checkpoint)
    sums = backend.read_sums(base)
    if sums is None:
        return "its checksums (disk.sums) are gone, so nothing proves its bytes"
    if len(sums) != _sums.WIDTH * -(-record.size // _sums.MIB):
        return "its checksums (disk.sums) are of another length than the base"
    actual = bytearray(_sums.of_extents((), record.size))
    for extent in backend.read_base(base):
        checkpoint()
        if extent.offset + len(extent.data) > record.size:
            return f"it is longer than the {record.size} bytes that were published"
        index = extent.offset // _sums.MIB
        actual[index * _sums.WIDTH : (index + 1) * _sums.WIDTH] = _sums.of_piece(extent.data)
    for index in range(len(sums) // _sums.WIDTH):
        place = slice(index * _sums.WIDTH, (index + 1) * _sums.WIDTH)
        if actual[place] != sums[place]:
            return f"its bytes differ at MiB {index}"
    return None


def _compare_digest(backend: GuardedBackend, base: BaseImage, checkpoint: Callable[[], None]) -> str | None:
    record = base.record
    if record.source_digest is None:
        return None
    hasher = hashlib.new(record.source_digest.algorithm, usedforsecurity=False)
    zeros = bytes(_sums.MIB)
    position = 0
    for extent in backend.read_base(base):
        checkpoint()
        while position < extent.offset:
            step = min(_sums.MIB, extent.offset - position)
            hasher.update(zeros[:step])
            position += step
        hasher.update(extent.data)
        position += len(extent.data)
    if position > record.size:
        return f"it is longer than the {record.size} bytes that were published"
    while position < record.size:
        step = min(_sums.MIB, record.size - position)
        hasher.update(zeros[:step])
        position += step
    if hasher.hexdigest() != record.source_digest.value:
        return f"its bytes have another {record.source_digest.algorithm} digest than the image"
    return None


def copy_out(backend: GuardedBackend, base: BaseImage, path: Path) -> None:
    """A plain file ``path`` with the base's bytes, as long as the image as it was served where it was stored as is.

    Raises:
        DiskExistsError: there is a file of that name.
        BaseNotFoundError: the base went away before it could be opened.
    """
    if not isinstance(base.location, FileLocation | BlockLocation):
        _copy_extents(backend, base, path)
        return
    try:
        # an open descriptor keeps the bytes, whatever becomes of the name
        source = os.open(base.location.path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise BaseNotFoundError(image_id=base.image_id, stage="copy") from None
    try:
        if backend.find_base(base.image_id) is None:
            raise BaseNotFoundError(image_id=base.image_id, stage="copy")
        _fs.publish_copy(source, path, base.record.size)
    except FileExistsError:
        raise DiskExistsError(f"{path} exists already", image_id=base.image_id, stage="copy") from None
    finally:
        os.close(source)


def _copy_extents(backend: GuardedBackend, base: BaseImage, path: Path) -> None:
    """The same from storage that is no file here."""
    with tempfile.TemporaryFile(dir=path.parent) as whole:
        for extent in backend.read_base(base):
            os.pwrite(whole.fileno(), extent.data, extent.offset)
        os.ftruncate(whole.fileno(), base.record.size)
        try:
            _fs.publish_copy(whole.fileno(), path, base.record.size)
        except FileExistsError:
            raise DiskExistsError(f"{path} exists already", image_id=base.image_id, stage="copy") from None

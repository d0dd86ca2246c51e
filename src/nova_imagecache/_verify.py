"""Whether a base still holds the bytes it was published with, and a plain copy of them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from nova_imagecache import _fs, _sums
from nova_imagecache._models import BlockLocation, FileLocation
from nova_imagecache.exceptions import BackendError, BaseNotFoundError, DiskExistsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from nova_imagecache._guard import GuardedBackend
    from nova_imagecache._models import BaseImage, BaseRecord, Digest, Extent

_STEP = 8192 * _sums.WIDTH
"""How many sums are compared at a time."""


def damage(backend: GuardedBackend, base: BaseImage, checkpoint: Callable[[], None]) -> str | None:
    """What is wrong with the base's bytes, None: nothing. Reads all of them.

    Raises:
        BackendError: nothing could tell: they are not the source's, and the backend keeps no checksums.
    """
    if base.record.made_by != "stored" and not backend.keeps_sums:
        raise BackendError(
            f"its bytes cannot be verified: backend {backend.name} keeps no checksums",
            image_id=base.image_id,
            stage="verify",
            todo="Remove the base and bring the image in again if in doubt",
        )
    return damage_of(backend.read_base(base), base.record, lambda: backend.read_sums(base), checkpoint)


def damage_of(
    extents: Iterable[Extent],
    record: BaseRecord,
    read_sums: Callable[[], bytes | memoryview | None],
    checkpoint: Callable[[], None],
) -> str | None:
    """What is wrong with these bytes, as those of the base that the record is of; None: nothing.

    The digest proves bytes that are the source's, the sums any others.
    """
    if record.made_by == "stored":
        return _compare_digest(extents, record, record.source_digest, checkpoint)
    sums = read_sums()
    if sums is None:
        return "its checksums are gone, so nothing proves its bytes"
    if len(sums) != _sums.WIDTH * -(-record.size // _sums.MIB):
        return "its checksums are of another length than the base"
    return _compare_sums(extents, record, sums, checkpoint)


def _compare_sums(
    extents: Iterable[Extent], record: BaseRecord, sums: bytes | memoryview, checkpoint: Callable[[], None]
) -> str | None:
    actual = _sums.of_extents((), record.size)
    for extent in extents:
        checkpoint()
        if extent.offset + len(extent.data) > record.size:
            return f"it is longer than the {record.size} bytes that were published"
        index = extent.offset // _sums.MIB
        actual[index * _sums.WIDTH : (index + 1) * _sums.WIDTH] = _sums.of_piece(extent.data)
    for start in range(0, len(sums), _STEP):
        if bytes(actual[start : start + _STEP]) != sums[start : start + _STEP]:
            places = range(start, start + _STEP, _sums.WIDTH)
            wrong = next(at for at in places if actual[at : at + _sums.WIDTH] != sums[at : at + _sums.WIDTH])
            return f"its bytes differ at MiB {wrong // _sums.WIDTH}"
    return None


def _compare_digest(
    extents: Iterable[Extent], record: BaseRecord, digest: Digest | None, checkpoint: Callable[[], None]
) -> str | None:
    if digest is None:
        return None
    import hashlib

    hasher = hashlib.new(digest.algorithm, usedforsecurity=False)
    zeros = bytes(_sums.MIB)
    position = 0
    for extent in extents:
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
    if hasher.hexdigest() != digest.value:
        return f"its bytes have another {digest.algorithm} digest than the image"
    return None


def file_of(base: BaseImage) -> os.stat_result | None:
    """The file that holds the base's bytes, for ``is_file``; None: it is no file, or gone."""
    if not isinstance(base.location, FileLocation):
        return None
    try:
        return os.stat(base.location.path)  # noqa: PTH116 - one call
    except FileNotFoundError:
        return None


def is_file(base: BaseImage, file: os.stat_result | None) -> bool:
    """Whether this file still holds the base's bytes. Storage that is no file has one base of a record."""
    now = file_of(base)
    return now is file if now is None or file is None else os.path.samestat(now, file)


def is_ours(base: BaseImage) -> bool:
    """Whether nobody else can change the base's bytes: who owns a file can, whatever its mode. One that is gone is."""
    if not isinstance(base.location, FileLocation):
        return True
    try:
        return os.stat(base.location.path).st_uid == os.geteuid()  # noqa: PTH116 - one call
    except FileNotFoundError:
        return True


def copy_out(backend: GuardedBackend, base: BaseImage, path: Path, check: Callable[[], None]) -> None:
    """A plain file ``path`` with the base's bytes, as long as the image as it was served where it was stored as is.

    ``check`` is called again and again; what it raises ends the copy, and there is no file.

    Raises:
        DiskExistsError: there is a file of that name.
        BaseNotFoundError: the base went away before it could be opened.
    """
    if not isinstance(base.location, FileLocation | BlockLocation):
        _copy_extents(backend, base, path, check)
        return
    try:
        # an open descriptor keeps the bytes, whatever becomes of the name
        source = os.open(base.location.path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise BaseNotFoundError(image_id=base.image_id, stage="copy") from None
    try:
        now = backend.find_base(base.image_id)
        if now is None or now.record != base.record:  # what was opened may be another's bytes
            raise BaseNotFoundError(image_id=base.image_id, stage="copy")
        _fs.publish_copy(source, path, base.record.size, check=check)
    except FileExistsError:
        raise DiskExistsError(f"{path} exists already", image_id=base.image_id, stage="copy") from None
    finally:
        os.close(source)


def _copy_extents(backend: GuardedBackend, base: BaseImage, path: Path, check: Callable[[], None]) -> None:
    """The same from storage that is no file here."""
    import tempfile

    with tempfile.TemporaryFile(dir=path.parent) as whole:
        for extent in backend.read_base(base):
            check()
            os.pwrite(whole.fileno(), extent.data, extent.offset)
        os.ftruncate(whole.fileno(), base.record.size)
        try:
            _fs.publish_copy(whole.fileno(), path, base.record.size, check=check)
        except FileExistsError:
            raise DiskExistsError(f"{path} exists already", image_id=base.image_id, stage="copy") from None

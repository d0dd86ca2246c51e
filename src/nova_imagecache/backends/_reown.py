"""A base whose file libvirt gave to the guests' user, made this user's own again: then disks can link it again."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from nova_imagecache import _entries, _fs
from nova_imagecache.backends import BaseImage, BaseNotFoundError, FileLocation
from nova_imagecache.exceptions import BaseCorruptError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from nova_imagecache.backends._files import FileBases


def reown_base(backend: FileBases, base: BaseImage, damage: Callable[[BaseImage], str | None]) -> BaseImage:
    """The base, with a copy of its file in the file's place: this user's, from one moment to the next.

    Disks that are linked to the old file keep it whole, and running guests go on with it; they are users no longer. Who
    owns a file can change it, so ``damage`` judges the copy, which nobody else can reach, before it takes the place.
    The caller holds the base's lock. Needs room for a copy, where the filesystem cannot share blocks. A crash leaves
    the old file, and an entry in staging that ``recover`` sweeps.

    Raises:
        BaseNotFoundError: it is gone.
        BaseCorruptError: its bytes are not what was published; it is untouched.
    """
    path = backend.base_path(base.image_id)
    _fs.make_dirs(backend.staging, 0o700)
    with _entries.entry(backend.staging, base.image_id, 0o700) as making:
        try:
            _copy(backend, base, making / "disk")
            with suppress(FileNotFoundError):  # there are sums only where the bytes are not the source's
                _fs.link(path.with_name("disk.sums"), making / "disk.sums")
            if (problem := damage(replace(base, location=FileLocation(path=making / "disk")))) is not None:
                raise BaseCorruptError(f"the base is damaged: {problem}", image_id=base.image_id, stage="re-own")
            _fs.rename(making / "disk", path)
        except FileNotFoundError:
            raise BaseNotFoundError(image_id=base.image_id, stage="re-own") from None
        _fs.fsync_dir(path.parent)
    return replace(base, location=FileLocation(path=path))


def _copy(backend: FileBases, base: BaseImage, target: Path) -> None:
    source = os.open(backend.base_path(base.image_id), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fd = _fs.create(target, 0o600)
        try:
            _fs.copy_content(source, fd)
            backend.open_up(target, 0o440 if backend.gid is not None else 0o444)
            _fs.fsync(fd)
        finally:
            os.close(fd)
    finally:
        os.close(source)

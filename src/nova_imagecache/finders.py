"""Finders: what knows users of bases besides the storage. Hand them to ``ImageCache(..., user_finders=[...])``.

A finder that cannot tell raises UsersUnknownError, and every base it was asked about is kept.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from nova_imagecache._chains import KnownBases, uses
from nova_imagecache._models import DiskUser
from nova_imagecache.exceptions import UsersUnknownError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from nova_imagecache._models import BaseImage

_DEPTH = 4
"""Levels of directories below a given one: an instance's, and what lies in it."""


class ImagesInUse:
    """The image ids that a driver says are in use: the only way to keep the bases of copies (backend ``file``).

    ``image_ids`` is called once for every look; what it raises keeps every base.
    """

    name = "driver"

    def __init__(self, image_ids: Callable[[], Iterable[str]]) -> None:
        self._image_ids = image_ids

    def find(self, bases: Sequence[BaseImage]) -> Iterator[DiskUser]:
        """A user without a name for each base whose image is in use."""
        used = frozenset(self._image_ids())
        for image_id in dict.fromkeys(base.image_id for base in bases):
            if image_id in used:
                yield DiskUser(image_id=image_id, known_by=self.name)


class DiskDirectories:
    """Every file below some directories, whatever its name, with its whole backing chain, read from headers.

    Bases are known by device and inode, since a hypervisor names them by other links and block jobs make names
    absolute, and by their path, since one that is just being removed has no inode there. A file costs one open and
    one or two reads; no child process runs.

    A file that vanishes meanwhile uses nothing. One that cannot be read keeps the base that its record names; without
    a record it may use any, and every base is kept.
    """

    name = "disk directories"

    def __init__(self, directories: Iterable[Path]) -> None:
        self._directories = tuple(directories)

    def find(self, bases: Sequence[BaseImage]) -> Iterator[DiskUser]:
        """The users of these bases among the files.

        Raises:
            UsersUnknownError: a directory or file cannot be read, and nothing says what it uses.
        """
        known = KnownBases(bases)
        for directory in self._directories:
            for path in _files(directory, _DEPTH):
                for image_id, certain in uses(path, known):
                    yield DiskUser(
                        image_id=image_id,
                        known_by=self.name,
                        disk_id=path.parent.name,
                        name=path.name,
                        detail=str(path),
                        certain=certain,
                    )


def _files(directory: Path, depth: int) -> Iterator[Path]:
    """Every regular file below the directory but our records and references, which are looked at through their disks.

    Symbolic links are not followed.
    """
    try:
        with os.scandir(directory) as entries:
            found = list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as err:
        todo = "Let the cache's user list it"
        raise UsersUnknownError(f"{directory} cannot be listed: {err.strerror}", todo=todo) from err
    for entry in found:
        try:
            mode = entry.stat(follow_symlinks=False).st_mode
        except FileNotFoundError:
            continue
        if stat.S_ISDIR(mode) and depth > 1:
            yield from _files(Path(entry.path), depth - 1)
        elif stat.S_ISREG(mode) and not entry.name.endswith((".json", ".base")):
            yield Path(entry.path)

"""Files in the making: without a name where that can be, else in a hidden directory beside where they go."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from nova_imagecache import _fs

if TYPE_CHECKING:
    from pathlib import Path


class Making:
    """New files that nobody sees until they get a name in ``directory``, all at once for each.

    ``nameless``: until then they have none at all (O_TMPFILE), so that a death leaves nothing and nothing is to be
    removed. Where the filesystem has no such files, or somebody who waits shall see them grow, they stand in
    ``.<name>.<random>/``, which recover sweeps.
    """

    def __init__(self, directory: Path, name: str, *, nameless: bool) -> None:
        self._directory = directory
        self._hidden = directory / f".{name}.{_fs.random_suffix()}"
        self._nameless = nameless
        self._begun = False
        self._named: dict[int, Path] = {}
        self._made: set[tuple[int, int]] = set()

    def create(self, name: str, mode: int) -> int:
        """A descriptor of an empty file that the caller closes; ``name`` is what its hidden name would be."""
        if (fd := self._without_name(mode)) is None:
            if not self._begun:
                self._begun = True
                _fs.mkdir(self._hidden, 0o711)
            fd = _fs.create(self._hidden / name, mode)
            self._named[fd] = self._hidden / name
        status = os.fstat(fd)
        self._made.add((status.st_dev, status.st_ino))
        return fd

    def _without_name(self, mode: int) -> int | None:
        fd = _fs.create_nameless(self._directory, mode) if self._nameless else None
        self._nameless = fd is not None
        return fd

    def path(self, name: str) -> Path:
        """The hidden name of a file, for a child process; only where files have one."""
        return self._hidden / name

    def publish(self, fd: int, final: Path) -> None:
        """Give a finished file its name, not synced; FileExistsError if it is taken."""
        if (hidden := self._named.get(fd)) is not None:
            _fs.link(hidden, final)
        else:
            _fs.give_name(fd, final)

    def is_at(self, final: Path) -> bool:
        """Whether one of these files has that name, and not one that somebody else put there; in doubt it has."""
        try:
            status = final.lstat()
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return (status.st_dev, status.st_ino) in self._made

    def close(self) -> None:
        """Remove the hidden directory, if there is one."""
        if self._begun:
            _fs.rmtree(self._hidden)

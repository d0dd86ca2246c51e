"""Files in the making: without a name where that can be, else in a hidden directory beside where they go."""

from __future__ import annotations

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

    def create(self, name: str, mode: int) -> int:
        """A descriptor of an empty file that the caller closes; ``name`` is what its hidden name would be."""
        if self._nameless:
            if (fd := _fs.create_nameless(self._directory, mode)) is not None:
                return fd
            self._nameless = False
        if not self._begun:
            self._begun = True
            _fs.mkdir(self._hidden, 0o711)
        fd = _fs.create(self._hidden / name, mode)
        self._named[fd] = self._hidden / name
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

    def close(self) -> None:
        """Remove the hidden directory, if there is one."""
        if self._begun:
            _fs.rmtree(self._hidden)

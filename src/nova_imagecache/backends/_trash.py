"""The trash of bases on files: what is retired, until it is given back or purged.

::

    <root>/trash/<image-id>.<random>/     retired: recover gives it its name back
                .<image-id>.<random>/     being purged: recover finishes it

Whoever retires a base holds its directory until it is back or gone, so that a recover beside it leaves it alone. The
trash itself is held while a base is renamed into it, and by a recover from its look at a name to the rename: between
the two nobody takes away the base that has the name.
"""

from __future__ import annotations

import errno
import logging
import os
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from nova_imagecache import _entries, _fs
from nova_imagecache.backends._looks import retired_base

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_log = logging.getLogger(__name__)


class Trash:
    """The trash of one root."""

    def __init__(self, root: Path) -> None:
        self.path = root / "trash"
        self._bases = root / "bases"
        self._held: dict[str, _entries.Held] = {}

    def retire(self, image_id: str) -> str:
        """Take a base's name away; the token, by which it is called from now on.

        Raises:
            FileNotFoundError: it has no such name.
        """
        directory = self._bases / image_id
        # until it is restored or purged: a recover beside us knows no finders' users
        held = _entries.hold(directory, wait=False, follow=True)
        try:
            with self._unchanged():
                token = move_away(directory, self.path)
        except BaseException:
            if held is not None:
                held.release()
            raise
        # its maker may have held it still, just now
        held = held or _entries.hold(self.path / token, wait=False, follow=True)
        if held is not None:
            self._held[token] = held
        return token

    def restore(self, token: str) -> None:
        """Give the name back, unless another base has it, or a recover beside us restored or purged it."""
        try:
            if self._give_back(token):
                _fs.fsync_dir(self._bases)
                _fs.fsync_dir(self.path)
            elif (self.path / token).exists():
                _log.warning(
                    "base %s stays in the trash: another one has its name, and disks without a link of their own read "
                    "that one now",
                    token,
                )
        finally:
            self._let_go(token)

    def purge(self, token: str) -> None:
        """Free the space."""
        try:
            self._purge(token)
        finally:
            self._let_go(token)

    def sweep(self) -> tuple[list[str], list[str], list[str], dict[str, str]]:
        """Finish the removals that died half-way: (purged, restored, alive, failed with the reason), by entry name.

        What was only retired comes back, its marks with it: whether it has users and pins, a pass finds out with both
        looks. One that cannot be removed stops no other; one that a live process removes stays.
        """
        purged: list[str] = []
        restored: list[str] = []
        alive, failed = [], {}
        for token in _entries.names(self.path):
            held = None
            try:
                held = _entries.hold(self.path / token, wait=False, follow=True)
                back = None if held is None else self._settle(token, held)
                if back is None:
                    if (self.path / token).is_dir():
                        alive.append(token)
                    continue
                if not back:
                    self._purge(token.removeprefix("."))
            except OSError as err:
                failed[token] = str(err)
            else:
                (restored if back else purged).append(token)
            finally:
                if held is not None:
                    held.release()
        return purged, restored, alive, failed

    def _settle(self, token: str, held: _entries.Held) -> bool | None:
        """Give a base that a dead process had retired its name back; whether it has it, None: it waits for another."""
        image_id = _image_of(token)
        if not image_id or token.startswith(".") or retired_base(image_id, self.path / token) is None:
            return False  # it is nobody's, was being purged, or has no bytes
        with self._unchanged():
            if self._is_another_going(token):
                return None
            # where a base of that name is there again, disks of this one hold its bytes by their own links
            if not self._give_back(token):
                return False
            held.release()  # before anybody can retire it again, and hold it then
        _fs.fsync_dir(self._bases)
        _fs.fsync_dir(self.path)
        return True

    def _is_another_going(self, token: str) -> bool:
        """Whether another base of that name is on its way out and may come back: the name is that one's."""
        image_id = _image_of(token)
        if os.path.lexists(self._bases / image_id):
            return False
        others = (name for name in _entries.names(self.path) if _image_of(name) == image_id)
        return any(name != token and _entries.alive(self.path / name) for name in others)

    def _give_back(self, token: str) -> bool:
        """Rename a base back; False: another one has its name, or it is gone."""
        try:
            _fs.rename(self.path / token, self._bases / _image_of(token))
        except OSError as err:
            if err.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                raise
            return False
        return True

    def _purge(self, token: str) -> None:
        # out of the reach of restore first: whoever restores it beside us gets a whole base or none
        dead = self.path / f".{token}"
        with suppress(FileNotFoundError):
            _fs.rename(self.path / token, dead)
        if dead.is_symlink():  # to where an operator moved the base: other roots may have it as well
            _log.warning("base %s: its symbolic link is removed; remove %s by hand", token, os.path.realpath(dead))
            _fs.unlink(dead)
        else:
            _fs.rmtree(dead)

    @contextmanager
    def _unchanged(self) -> Iterator[None]:
        """Hold the trash while the block runs: no base is retired meanwhile."""
        _fs.make_dirs(self.path, 0o700)
        with _entries.held(self.path):
            yield

    def _let_go(self, token: str) -> None:
        if (held := self._held.pop(token, None)) is not None:
            held.release()


def _image_of(token: str) -> str:
    """The image id in the name of an entry."""
    return token.rpartition(".")[0]


def move_away(directory: Path, where: Path) -> str:
    """Move a base's directory to the trash or the quarantine, durably; its name there.

    Raises:
        FileNotFoundError: it is not there.
    """
    _fs.make_dirs(where, 0o700)
    token = f"{directory.name}.{_fs.random_suffix()}"
    _fs.rename(directory, where / token)
    try:
        _fs.fsync_dir(directory.parent)
        _fs.fsync_dir(where)
    except OSError:
        # the caller hears that it failed, so it must not have happened
        _fs.rename(where / token, directory)
        raise
    return token

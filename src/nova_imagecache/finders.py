"""Finders: what knows users of bases besides the storage. Hand them to ``ImageCache(..., user_finders=[...])``; the
configuration's ``libvirt_uri`` and ``disk_dirs`` are such finders, too.

A finder that cannot tell raises UsersUnknownError, and every base it was asked about is kept.
"""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from nova_imagecache import _chains
from nova_imagecache._chains import KnownBases, base_below, by_record
from nova_imagecache._models import DiskUser
from nova_imagecache.exceptions import UsersUnknownError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from nova_imagecache._models import BaseImage

NOT_DISKS = _chains.NOT_DISKS
"""Names, as shell patterns, that hypervisors, drivers and filesystems give to what is no disk."""

_log = logging.getLogger(__name__)
_LET_READ = "Correct its name, or let the cache's user read it; what is no disk is named in not_disks, in Python"
_LOOKS = 10
"""Times that a directory is listed again in which others make or rename some."""


class ImagesInUse:
    """The image ids that a driver says are in use: the only way to keep the bases of copies (backend ``file``).

    ``image_ids`` is called once for every look; what it raises keeps every base.
    """

    name = "driver"

    def __init__(self, image_ids: Callable[[], Iterable[str]]) -> None:
        self._image_ids = image_ids

    def __str__(self) -> str:
        return "image ids in use"

    def find(self, bases: Sequence[BaseImage]) -> Iterator[DiskUser]:
        """A user without a name for each base whose image is in use.

        Raises:
            UsersUnknownError: ``image_ids`` gave a single text instead of ids.
        """
        told = self._image_ids()
        if isinstance(told, str | bytes):  # whose letters would pass for ids
            raise UsersUnknownError(f"image_ids gave {told!r:.80}, which is no list of image ids")
        used = frozenset(told)
        for image_id in dict.fromkeys(base.image_id for base in bases):
            if image_id in used:
                yield DiskUser(image_id=image_id, known_by=self.name)


class DiskDirectories:
    """Every file below some directories, whatever its name, with its whole backing chain, read from headers.

    Bases are known by device and inode, since a hypervisor names them by other links and block jobs make names
    absolute, and by their path, since one that is just being removed has no inode there. A file costs one open and
    one or two reads; no child process runs. Symbolic links are not followed.

    A file that vanishes meanwhile uses nothing. So does one with a header that QEMU refuses; it is logged, once. One
    that cannot be read keeps the base that its record names. Without a record, ``chains`` is asked: the layers of each
    disk that a hypervisor has open now, the top first (``LibvirtDomains.chains``). A file that is not among them may
    use any base, and every base is kept; but for what is called as in ``not_disks``, which is passed over when it
    cannot be read. A directory that is renamed meanwhile is looked for again; where that does not end, every base is
    kept.
    """

    name = "disk directories"

    def __init__(
        self,
        directories: Iterable[Path],
        *,
        not_disks: Iterable[str] = NOT_DISKS,
        chains: Callable[[], Iterable[Sequence[Path]]] | None = None,
    ) -> None:
        self._directories = tuple(directories)
        self._not_disks = tuple(not_disks)
        self._chains = chains
        self._told: set[str] = set()

    def __str__(self) -> str:
        return ", ".join(map(str, self._directories))

    def find(self, bases: Sequence[BaseImage]) -> Iterator[DiskUser]:
        """The users of these bases among the files.

        Raises:
            UsersUnknownError: a directory is not there; or it or a file cannot be read, and nothing says what it uses.
        """
        known = KnownBases(bases)
        if bases and not known:  # on storage that no file reads through
            return
        look = _Look(known, self._not_disks, self._chains)
        for directory in self._directories:
            for path in look.files(os.fspath(directory)):
                for image_id, certain in look.uses(path):
                    where, _slash, name = path.rpartition("/")
                    yield DiskUser(
                        image_id=image_id,
                        known_by=self.name,
                        disk_id=where.rpartition("/")[2],
                        name=name,
                        detail=path,
                        certain=certain,
                    )
        self._tell(known.damaged)
        look.raise_doubts()

    def _tell(self, damaged: dict[str, str]) -> None:
        for path, reason in damaged.items():
            if path not in self._told:
                _log.warning("%s has a damaged header and uses no base: %s (said once)", path, reason)
        self._told = set(damaged)


class _Look:
    """One look over all files: what is known, and what could not be told."""

    def __init__(
        self,
        known: KnownBases,
        not_disks: Sequence[str],
        chains: Callable[[], Iterable[Sequence[Path]]] | None,
    ) -> None:
        self._known = known
        self._not_disks = not_disks
        self._chains = chains
        self._layers: dict[str, Sequence[Path]] | None = None
        self._doubts: list[str] = []
        self._todo: str | None = _LET_READ  # of the first doubt

    def files(self, top: str) -> Iterator[str]:
        """Every regular file below the directory but the bases themselves, which read through nothing.

        A directory that is renamed before its turn comes is missed: what has directories in it is listed again when
        those are walked, until none is new.
        """
        walked: set[tuple[str, int]] = set()
        waiting = [(top, 0, 0)]
        while waiting:
            directory, inode, look = waiting.pop()
            try:
                found = self._listed(directory)
            except (FileNotFoundError, NotADirectoryError) as err:  # removed while we looked; or never there
                if directory == top:
                    self._doubts.append(f"{top} cannot be listed: {err.strerror}")
                continue
            walked.add((directory, inode))
            below, files = [], []
            for entry in found:
                # mostly without asking for more than the listing tells
                if entry.is_dir(follow_symlinks=False):
                    if (entry.path, entry.inode()) not in walked:
                        below.append((entry.path, entry.inode(), 0))
                elif look == 0 and entry.is_file(follow_symlinks=False) and not self._known.is_one(entry):
                    files.append(entry.path)
            if below and look == _LOOKS:
                self._doubts.append(f"directories in {directory} are being renamed")
            elif below:
                waiting += [(directory, inode, look + 1), *below]
            yield from files  # last, so that the links beside them are known

    def _listed(self, directory: str) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(directory) as entries:
                # as they lie on the device, the first one last: it is popped first
                return sorted(entries, key=os.DirEntry.inode, reverse=True)
        except (FileNotFoundError, NotADirectoryError):
            raise
        except OSError as err:
            if not self._is_no_disk(directory):
                self._doubts.append(f"{directory} cannot be listed: {err.strerror}")
            return []

    def uses(self, path: str) -> Iterator[tuple[str, bool]]:
        """The images whose bases the file depends on, and whether that is certain."""
        try:
            image_id = base_below(path, self._known)
        except OSError as err:
            yield from self._unreadable(path, err)
            return
        if image_id is not None:
            yield image_id, True

    def _unreadable(self, path: str, err: OSError) -> Iterator[tuple[str, bool]]:
        unreadable = str(err.filename)
        if unreadable == path and self._is_no_disk(path):
            return
        try:
            yield from by_record(err, self._known)
        except UsersUnknownError as doubt:
            layers = self._opened(unreadable)
            if layers is None:
                if not self._doubts and err.errno == errno.ELOOP:
                    self._todo = doubt.todo
                self._doubts.append(doubt.detail)
                return
            for layer in layers:
                if (image_id := self._known.at(layer)) is not None:
                    yield image_id, True
                    return

    def _opened(self, path: str) -> Sequence[Path] | None:
        """The layers of the file and below it, by whoever has it open now; None: nobody says."""
        if self._layers is None:
            self._layers = {}
            for chain in self._chains() if self._chains is not None else ():
                for number, layer in enumerate(chain):
                    self._layers.setdefault(os.fspath(layer), chain[number:])
        return self._layers.get(path)

    def _is_no_disk(self, path: str) -> bool:
        return _chains.is_called(path, self._not_disks)

    def raise_doubts(self) -> None:
        """Come back if everything could be told.

        Raises:
            UsersUnknownError: with the first doubt, and how many more there are.
        """
        if self._doubts:
            more = f" (and {len(self._doubts) - 1} more)" if len(self._doubts) > 1 else ""
            raise UsersUnknownError(f"{self._doubts[0]}{more}", todo=self._todo, stage="users")

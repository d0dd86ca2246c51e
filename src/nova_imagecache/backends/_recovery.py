"""What dead processes left on files, and how it is told from what live ones work on."""

from __future__ import annotations

import os
import re
import stat
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from nova_imagecache import _entries, _fs, _qcow2, _records
from nova_imagecache.backends import RecoveryReport
from nova_imagecache.backends._disks import FileDisks
from nova_imagecache.backends._references import finish, finished, is_unfinished, leads_to, made_at, refers_to
from nova_imagecache.backends._seen import is_foreign
from nova_imagecache.backends._ties import sides

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class RecoverableDisks(FileDisks):
    """The last third of a backend on files: ``recover``."""

    def recover(self) -> RecoveryReport:
        stuck: dict[str, str] = {}
        removed, alive = _entries.sweep(self.staging, stuck)
        failed = {f"staging/{name}": reason for name, reason in stuck.items()}
        purged, restored, going, stuck = self.trash.sweep()
        failed |= {f"trash/{name}": reason for name, reason in stuck.items()}
        removed = [f"staging/{name}" for name in removed] + [f"trash/{name}" for name in purged]
        alive = [f"staging/{name}" for name in alive] + [f"trash/{name}" for name in going]
        for disk_id in _entries.names(self.paths.disks_dir):
            try:
                if _may_hold_litter(f"{self.paths.disks_dir}/{disk_id}"):
                    removed += self._sweep_directory(disk_id, alive)
            except OSError as err:  # one directory that cannot be read stops no other
                failed[f"disks/{disk_id}"] = str(err)
        removed += self._sweep_references(failed)
        return RecoveryReport(removed=tuple(removed), restored=tuple(restored), alive=tuple(alive), failed=failed)

    def _sweep_directory(self, disk_id: str, alive: list[str]) -> list[str]:
        """What was removed of a disk id's directory; one that a live process works in is told to ``alive``."""
        directory = self._directory(disk_id)
        held = _entries.hold(directory, wait=False, follow=True)
        if held is not None:
            try:
                return [f"disks/{disk_id}/{name}" for name in self._sweep_disk(disk_id)]
            finally:
                held.release()
        if directory.is_dir():
            alive.append(f"disks/{disk_id}")
        elif disk_id.startswith(".check.") and _is_random(disk_id):  # of a check() that died
            _fs.unlink(directory)
            return [f"disks/{disk_id}"]
        return []

    def _sweep_references(self, failed: dict[str, str]) -> list[str]:
        """Finish the references of disks whose maker died when they had their names, or end those of disks that are not
        there; take away what an attach that died left: a path reference under a name that its disk has not now.

        Those that cannot be read or removed stop no others; ``failed`` is told.
        """
        gone: list[str] = []
        users = self.paths.root / "users"
        for image_id in _entries.names(users):
            try:
                ended = [*self._end_unfinished(users / image_id, failed), *self._end_superseded(users / image_id)]
                gone += [f"users/{image_id}/{path.name}" for path in ended]
            except OSError as err:
                failed[f"users/{image_id}"] = str(err)
        return gone

    def _end_unfinished(self, users: Path, failed: dict[str, str]) -> Iterator[Path]:
        """Give an image's unfinished references their names whose disks have theirs; end the others, whose makers or
        removers are dead: those are told. One that cannot be looked at stops no other."""
        for path in map(users.joinpath, _entries.names(users)):
            try:
                ended = is_unfinished(path) and self._ends(path)
            except OSError as err:
                failed[f"users/{users.name}/{path.name}"] = str(err)
            else:
                if ended:
                    yield path

    def _ends(self, path: Path) -> bool:
        """Finish an unfinished reference, or end it; whether it is ended."""
        disk, own = refers_to(path), made_at(path)
        if disk is None or own is None:
            return False
        with self._held_place(disk.parent) as held:
            if held and leads_to(path, own):
                finish(finished(path), own)
            elif held and made_at(path) == own:
                record = self._load(disk.parent, disk.name)  # of a disk that is gone: its directory's sweep kept it
                return (record is None or record.made_at != own) and self._end_reference(path, own, None)
        return False

    @contextmanager
    def _held_place(self, directory: Path) -> Iterator[bool]:
        """Hold a directory of disks while the block runs; one of ours that is not there as well, so that nobody makes
        it meanwhile. Whether it is held: nobody is waited for."""
        made = directory.parent == self.paths.disks_dir and directory.parent.is_dir() and not os.path.lexists(directory)
        if made:
            with suppress(FileExistsError):
                _fs.mkdir(directory, 0o755)
        held = _entries.hold(directory, wait=False, follow=True)
        try:
            yield held is not None
        finally:
            if held is not None:
                if made:
                    _fs.rmdir(directory)
                held.release()

    def _end_superseded(self, users: Path) -> Iterator[Path]:
        for own, path in _superseded(users):
            if self._end_reference(path, own, None):
                yield path

    def _sweep_disk(self, disk_id: str) -> list[str]:
        """Remove what dead makers left in a disk id's directory; the directory is held."""
        directory = self._directory(disk_id)
        names = set(_entries.names(directory))
        gone = []
        own = _is_directory_own(directory, names)
        # what is hidden goes last: by it we know that there is something to settle
        for name in sorted(names, key=lambda name: (name.startswith("."), name)):
            if name.startswith(".") and _is_making(directory / name):
                if self._is_attaching(directory, name[1:].rpartition(".")[0]):
                    continue
                _fs.rmtree(directory / name)
            elif name.endswith(".base") and name.removesuffix(".base") not in names:
                if not self._sweep_link(directory, disk_id, name.removesuffix(".base")):
                    continue
            elif name.endswith(".json") and name.removesuffix(".json") not in names:
                stem = name.removesuffix(".json")
                record = self._load(directory, stem)
                if record is None or self._is_needed(disk_id, stem, record):
                    continue  # not a record of ours, or needed
                self._forget(directory, disk_id, stem)
            elif name.endswith(".json"):
                gone += self._settle(directory, disk_id, name.removesuffix(".json"))
                continue
            else:
                continue
            gone.append(name)
        if gone and own and not _fs.rmdir(directory):
            self._hand_on_directory(disk_id)
        return gone

    def _sweep_link(self, directory: Path, disk_id: str, name: str) -> bool:
        """Remove a link without its disk; whether it was one, and nobody's."""
        record, link = self._load(directory, name), directory / f"{name}.base"
        if self._is_needed(disk_id, name, record) or (record is None and not _may_be_link(link)):
            return False
        if record is None:
            _fs.unlink(link)
        else:
            self._forget(directory, disk_id, name)
        return True

    def _is_attaching(self, directory: Path, name: str) -> bool:
        """Whether an attach that died could not be settled: the guest may run."""
        record = self._load(directory, name)
        return record is not None and record.attaching is not None and os.path.lexists(directory / name)

    def _is_needed(self, disk_id: str, name: str, record: _records.DiskRecord | None) -> bool:
        """Whether what is left of a disk is a snapshot's, or that of one which was moved, and the caller's to end."""
        written = (self._path_reference(side, disk_id, name) for side in sides(record))
        moved = any(each is not None and not is_unfinished(each) for each in written)
        return moved or self._reader(disk_id, name, record) is not None

    def _settle(self, directory: Path, disk_id: str, name: str) -> list[str]:
        """Settle an attach that died; take away the reference of a disk that stands alone by now: a flatten that died,
        a blockPull of libvirt."""
        record = self._settled(disk_id, name)
        if record is None or record.format != "qcow2":
            return []
        link = directory / f"{name}.base"
        # not where the guest's user owns it now, or its header is damaged: nothing can be told
        if not _stands_alone(str(directory / name)) or self._reader(disk_id, name, record):
            return []
        if record.reference != "none":
            self._rewrite(disk_id, name, replace(record, reference="none"))
        self._drop_path_reference(record, disk_id, name)
        if not os.path.lexists(link):
            return []
        _fs.unlink(link)
        return [link.name]


def _superseded(users: Path) -> Iterator[tuple[float, Path]]:
    """An image's path references to disks that another of its references leads to, and when those were made."""
    written: dict[float, list[Path]] = {}
    names = _entries.names(users)
    for name in names if len(names) > 1 else ():
        if (own := made_at(users / name)) is not None:
            written.setdefault(own, []).append(users / name)
    for own, paths in written.items():
        # what was set aside sorts behind
        there = {refers_to(path): path for path in reversed(paths) if leads_to(path, own)}
        yield from ((own, path) for path in paths if there and path not in there.values())


def _may_hold_litter(directory: str) -> bool:
    """Whether a directory of disks needs a closer look. It is not held: nearly always nothing is to be done.

    Raises:
        OSError: it is ours and cannot be listed.
    """
    try:
        names = set(os.listdir(directory))  # noqa: PTH208 - names, not paths
    except NotADirectoryError:
        return True
    except FileNotFoundError:
        return False
    except PermissionError:
        if not is_foreign(directory):
            raise
        return False
    return any(_may_be_dead(name, names, directory) for name in names)


def _may_be_dead(name: str, names: set[str], directory: str) -> bool:
    stem, _dot, suffix = name.rpartition(".")
    if not stem or suffix not in ("base", "json"):
        return name.startswith(".")
    return stem not in names or (suffix == "json" and _stands_alone(f"{directory}/{stem}"))


def _stands_alone(path: str) -> bool:
    """Whether a file is an overlay no longer: qcow2 with a whole header that names no backing file."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            return not _qcow2.parse_header(os.pread(fd, _qcow2.HEADER_BYTES, 0)).backing_offset
        finally:
            os.close(fd)
    except (OSError, _qcow2.Qcow2Error):
        return False


def _is_making(path: Path) -> bool:
    """Whether a hidden directory is one that a disk is made in: by its name, and by what is in it."""
    name = path.name[1:].rpartition(".")[0]
    if not name or not _is_random(path.name) or path.is_symlink() or not path.is_dir():
        return False
    return {"record", name, f"{name}.base"}.issuperset(_entries.names(path))


def _is_directory_own(directory: Path, names: set[str]) -> bool:
    """Whether the directory was made for a disk that is not in it, by what is left of its record; else it was not."""
    for name in names:
        hidden = name.startswith(".")
        stem = name[1:].rpartition(".")[0] if hidden else name.removesuffix(".json")
        if stem not in names:
            with suppress(OSError, _records.RecordError):
                record = (directory / name / "record" if hidden else directory / name).read_bytes()
                if _records.load_disk(record).own_directory:
                    return True
    return False


def _is_random(name: str) -> bool:
    return re.fullmatch("[0-9a-f]{16}", name.rpartition(".")[2]) is not None


def _may_be_link(path: Path) -> bool:
    """Whether a file that no record explains may be a link to a base: nobody may write to those."""
    mode = path.lstat().st_mode
    return stat.S_ISREG(mode) and not mode & 0o222

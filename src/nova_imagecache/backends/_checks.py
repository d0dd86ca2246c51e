"""What ``check()`` looks at for the file backends: tools, filesystems, links, and who can read a base."""

from __future__ import annotations

import os
import pwd
import shutil
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nova_imagecache import _entries, _fs, _qemu
from nova_imagecache.backends import Fact
from nova_imagecache.exceptions import ImageCacheError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from nova_imagecache.backends._disks import FileDisks

_NAMED = 10


def check_files(backend: FileDisks) -> list[Fact]:
    """Facts and problems around a backend on files."""
    return [*_tools(), *_filesystems(backend), *_owners(backend)]


def _tools() -> Iterator[Fact]:
    try:
        yield Fact(name="qemu-img", value=_qemu.version())
    except ImageCacheError as err:
        yield Fact(name="qemu-img", value="missing", problem=str(err))
    for tool in ("prlimit", "setpriv"):
        found = shutil.which(tool)
        problem = None if found else f"{tool} is missing; install util-linux"
        yield Fact(name=tool, value=found or "missing", problem=problem)


def _filesystems(backend: FileDisks) -> Iterator[Fact]:
    root, disks = backend.paths.root, backend.paths.disks_dir
    # who looks may be the superuser, whose directories nobody else could use
    disks = next(path for path in (disks, *disks.parents) if path.is_dir())
    _fs.make_dirs(backend.staging, 0o700)
    probe = disks / f".check.{_fs.random_suffix()}"
    with _entries.entry(backend.staging, "check", 0o700) as scratch:
        _fs.write_file(scratch / "a", b"x" * 4096, 0o600)
        source, target = os.open(scratch / "a", os.O_RDONLY), _fs.create(scratch / "b", 0o600)
        try:
            shares = _fs.clone_file(source, target)
        finally:
            os.close(source)
            os.close(target)
        yield Fact(name="reflink", value="yes" if shares else "no")
        try:
            _fs.link(scratch / "a", probe)
        except OSError as err:
            needed = backend.options.reference == "link"
            problem = f"{disks} takes no links from {root}: {err.strerror}; put them on one filesystem"
            yield Fact(name="links", value=f"no ({err.strerror})", problem=problem if needed else None)
        else:
            yield Fact(name="links", value="yes")
        finally:
            _fs.unlink(probe)
    own = root.stat().st_dev != disks.stat().st_dev
    yield Fact(name="own filesystem", value="yes" if own else "no")


def _owners(backend: FileDisks) -> Iterator[Fact]:
    if left := backend.left_alone():
        first = "; ".join(f"{name}: {reason}" for name, reason in sorted(left.items())[:_NAMED])
        more = f"; and {len(left) - _NAMED} more" if len(left) > _NAMED else ""
        bases = backend.base_path("x").parent.parent
        todo = f"in {bases}; the next ensure replaces one, and `nova-imagecache remove` removes one that nobody uses"
        yield Fact(name="bases that cannot be read", value=str(len(left)), problem=f"{first}{more}; {todo}")
    # the superuser looks for the one whose root it is
    ours = os.geteuid() or backend.paths.root.stat().st_uid
    foreign = [b.image_id for b in backend.iter_bases() if not _owned(backend.base_path(b.image_id), ours)]
    yield Fact(
        name="bases of another owner",
        value=str(len(foreign)),
        problem=f"{foreign[0]} and {len(foreign) - 1} more are not ours: new disks cannot link them; "
        "`nova-imagecache verify --repair` takes them back"
        if foreign
        else None,
    )
    user = backend.paths.qemu_user
    if user is None:
        return
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        yield Fact(name="qemu_user", value=user, problem=f"there is no user {user!r} on this host")
        return
    reader = _Reader(entry.pw_uid, frozenset(os.getgrouplist(user, entry.pw_gid)))
    barrier = _barrier(backend, reader)
    problem = None
    if barrier is not None:
        problem = f"{user} cannot read bases: {barrier} stops it; open it to that user or its group"
    yield Fact(name="qemu_user", value=user, problem=problem)


def _owned(path: Path, uid: int) -> bool:
    try:
        return path.stat().st_uid == uid
    except FileNotFoundError:  # removed meanwhile
        return True


@dataclass(frozen=True, slots=True)
class _Reader:
    """A user by its id and groups, and what the permission bits let it do. Access lists are not looked at."""

    uid: int
    groups: frozenset[int]

    def may(self, path: Path) -> bool:
        """Whether the bits of this file or directory let it read or enter; what is gone meanwhile stops nobody."""
        if self.uid == 0:
            return True
        try:
            found = path.stat()
        except FileNotFoundError:
            return True
        except OSError:
            return False
        shift = 6 if found.st_uid == self.uid else 3 if found.st_gid in self.groups else 0
        wanted = stat.S_IXOTH if stat.S_ISDIR(found.st_mode) else stat.S_IROTH
        return bool(found.st_mode & (wanted << shift))


def _barrier(backend: FileDisks, reader: _Reader) -> str | None:
    """The first thing that stops this user on its way to a base or a disk, None: nothing does.

    An empty cache is judged by the directories that its bases will lie in.
    """
    bases = backend.base_path("x").parent.parent
    around = [*reversed(bases.parents), bases, *reversed(backend.paths.disks_dir.parents), backend.paths.disks_dir]
    for part in around:
        if not reader.may(part):
            return str(part)
    if backend.gid is not None and reader.uid not in (0, os.geteuid()) and backend.gid not in reader.groups:
        return f"group {backend.paths.group}, which it is not in,"
    for base in backend.iter_bases():
        path = backend.base_path(base.image_id)
        for part in (path.parent, path):
            if not reader.may(part):
                return str(part)
    return None

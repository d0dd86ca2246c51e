"""What ``check()`` looks at for the file backends: tools, filesystems, links, and who can read a base."""

from __future__ import annotations

import os
import pwd
import shutil
import stat
from typing import TYPE_CHECKING

from nova_imagecache import _entries, _fs, _qemu
from nova_imagecache.backends import Fact
from nova_imagecache.exceptions import ImageCacheError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from nova_imagecache.backends._disks import FileDisks


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
    _fs.make_dirs(disks, 0o755)
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
    foreign = [b.image_id for b in backend.iter_bases() if not _ours(backend.base_path(b.image_id))]
    yield Fact(
        name="bases of another owner",
        value=str(len(foreign)),
        problem=f"{foreign[0]} and {len(foreign) - 1} more are not ours: new disks cannot link them"
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
    groups = set(os.getgrouplist(user, entry.pw_gid))
    for base in backend.iter_bases():
        barrier = _barrier(backend.base_path(base.image_id), entry.pw_uid, groups)
        if barrier is not None:
            problem = f"{user} cannot read bases: {barrier} stops it; open it to that user or its group"
            yield Fact(name="qemu_user", value=user, problem=problem)
            return
    yield Fact(name="qemu_user", value=user)


def _ours(path: Path) -> bool:
    try:
        return path.stat().st_uid == os.geteuid()
    except FileNotFoundError:  # removed meanwhile
        return True


def _barrier(path: Path, uid: int, groups: set[int]) -> Path | None:
    """The first part of the path that stops this user from reading the file, None: nothing does."""
    if uid == 0:
        return None
    for part in [*reversed(path.parents), path]:
        try:
            found = part.stat()
        except OSError:
            return part
        shift = 6 if found.st_uid == uid else 3 if found.st_gid in groups else 0
        wanted = stat.S_IXOTH if stat.S_ISDIR(found.st_mode) else stat.S_IROTH
        if not found.st_mode & (wanted << shift):
            return part
    return None

"""Durable steps on files: the only module that changes a filesystem.

The functions named in ``SEAMS`` change the outside world. Everybody, this module included, calls them by their module
attribute, so that a fault plan can count, fail or interrupt every step. All raise plain OSError; who calls says what
that means.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from nova_imagecache import _turns
from nova_imagecache._extents import data_extents

if TYPE_CHECKING:
    import ctypes
    from collections.abc import Callable

SEAMS = (
    "mkdir",
    "create",
    "write",
    "truncate",
    "allocate",
    "link",
    "give_name",
    "rename",
    "unlink",
    "rmdir",
    "rmtree",
    "fsync",
    "fsync_dir",
    "chmod",
    "chown",
    "touch",
    "clone_file",
    "copy_range",
)

MIB = 1 << 20
_PIECE = 64 * MIB
_KEEP_SIZE = 1  # FALLOC_FL_KEEP_SIZE, linux/falloc.h
_WRITE = 2  # SYNC_FILE_RANGE_WRITE, linux/fs.h
_FICLONE = 0x40049409  # _IOW(0x94, 9, int), linux/fs.h


@functools.cache
def _libc() -> ctypes.CDLL:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return libc


# --- steps: each one system call as far as a crash can tell ----------------------------------------------------------


def mkdir(path: Path, mode: int) -> None:
    """Make one directory with exactly ``mode``; FileExistsError if there is anything of that name."""
    os.mkdir(path, mode)  # noqa: PTH102 - one call, mode stated
    with suppress(FileNotFoundError):  # swept in between: whoever goes on to use it finds out
        if stat.S_IMODE(path.stat().st_mode) != mode:
            os.chmod(path, mode)  # noqa: PTH101 - the umask took bits away


def create(path: Path, mode: int) -> int:
    """A descriptor of a new file, never of one that exists or hides behind a link (O_EXCL | O_NOFOLLOW)."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(path, flags, mode)


def create_nameless(directory: Path, mode: int) -> int | None:
    """A descriptor of a new file that has no name until ``give_name``; None where the filesystem has no such files."""
    # not in SEAMS: without a name it is gone with the process
    try:
        return os.open(directory, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, mode)
    except OSError as err:
        if err.errno in (errno.EOPNOTSUPP, errno.EISDIR):
            return None
        raise


def write(fd: int, offset: int, buffer: bytes | bytearray | memoryview) -> None:
    """Write all of ``buffer`` at ``offset``."""
    view = memoryview(buffer)
    while view:
        done = os.pwrite(fd, view, offset)
        view = view[done:]
        offset += done


def truncate(fd: int, size: int) -> None:
    """Make the file ``size`` bytes long; what is new reads as zeros."""
    os.ftruncate(fd, size)


def allocate(fd: int, size: int) -> None:
    """Reserve blocks for the first ``size`` bytes, keeping length and content."""
    # os.posix_fallocate lengthens the file, and writes zeros where the filesystem cannot reserve
    with _turns.given_up():
        refused = _libc().fallocate(fd, _KEEP_SIZE, 0, size) != 0
    if refused:
        import ctypes

        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def link(source: Path, target: Path) -> None:
    """A second name for a file; FileExistsError if the name is taken. Symbolic links are not followed."""
    os.link(source, target, follow_symlinks=False)


def give_name(fd: int, target: Path) -> None:
    """The name of an open file that has none yet (O_TMPFILE); FileExistsError if the name is taken."""
    directory = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # only with a dir_fd does Python call linkat, which alone follows the link in /proc to the file
        os.link(f"/proc/self/fd/{fd}", target.name, dst_dir_fd=directory, follow_symlinks=True)
    finally:
        os.close(directory)


def rename(source: Path, target: Path) -> None:
    """Move a name in one atomic step."""
    os.rename(source, target)  # noqa: PTH104 - the system call, by its name


def unlink(path: Path) -> None:
    """Take a name away; a name that is not there is fine."""
    with suppress(FileNotFoundError):
        os.unlink(path)  # noqa: PTH108 - the system call, by its name


def rmdir(path: Path) -> bool:
    """Remove a directory if it is empty; whether it is gone."""
    try:
        path.rmdir()
    except FileNotFoundError:
        return True
    except OSError as err:
        # somebody's files, or his symbolic link to elsewhere: not ours to remove
        if err.errno in (errno.ENOTEMPTY, errno.EEXIST) or path.is_symlink():
            return False
        raise
    return True


def rmtree(path: Path) -> None:
    """Remove a directory and all below it; one that is not there is fine, and so is another who removes it too."""
    with suppress(OSError):  # most are empty by then, and one call is enough; what stands in its way is met below
        os.rmdir(path)  # noqa: PTH106 - the system call, by its name
    while os.path.lexists(path):
        # rmtree stops at the first entry that another took away
        with suppress(FileNotFoundError):
            shutil.rmtree(path)


def fsync(fd: int) -> None:
    """Content and length of the file are on stable storage."""
    with _turns.given_up():
        os.fsync(fd)


def start_writeback(fd: int, offset: int, length: int) -> None:
    """Let the kernel begin to write a part of the file, so that the fsync at the end is short. Promises nothing."""
    # not in SEAMS: it changes nothing that a crash could tell; where the kernel cannot, fsync does all of it
    _libc().sync_file_range(fd, offset, length, _WRITE)


def fsync_dir(path: Path) -> None:
    """The names in the directory are on stable storage."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with _turns.given_up():
            os.fsync(fd)
    finally:
        os.close(fd)


def chmod(path: Path | int, mode: int) -> None:
    """Set the permission bits of a file, by its path or descriptor."""
    os.chmod(path, mode)  # noqa: PTH101 - the system call, by its name


def chown(path: Path | int, gid: int) -> None:
    """Set the group of a file, by its path or descriptor."""
    os.chown(path, -1, gid)


def touch(path: Path, when: float | None = None) -> None:
    """Make the file ``path`` if it is not there and set its mtime to ``when`` (POSIX seconds; None: now)."""
    times = None if when is None else (when, when)
    try:
        os.utime(path, times)
    except FileNotFoundError:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644))
        if times is not None:
            os.utime(path, times)


def clone_file(source: int, target: int) -> bool:
    """Let ``target`` share all blocks of ``source`` (FICLONE); False where the filesystem cannot."""
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as err:
        # no reflink here; two filesystems; a filesystem that knows no such ioctl; sizes it cannot share
        if err.errno in (errno.EOPNOTSUPP, errno.EXDEV, errno.ENOTTY, errno.EINVAL, errno.ENOSYS):
            return False
        raise
    return True


def copy_range(source: int, target: int, offset: int, length: int) -> None:
    """Copy ``length`` bytes at ``offset`` inside the kernel, or through memory where the kernel cannot."""
    end = offset + length
    while offset < end:
        try:
            done = os.copy_file_range(source, target, end - offset, offset, offset)
        except OSError as err:
            # across filesystems, or a filesystem without the call
            if err.errno not in (errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                raise
            data = os.pread(source, min(MIB, end - offset), offset)
            write(target, offset, data)
            done = len(data)
        if done == 0:  # the source became shorter: the caller compares sizes
            return
        offset += done


# --- whole files -----------------------------------------------------------------------------------------------------


def random_suffix() -> str:
    """Text for a name that nobody else uses."""
    return os.urandom(8).hex()


def make_dirs(path: Path, mode: int) -> None:
    """The directory and its parents exist; those that are made get ``mode``, and their names are durable."""
    if path.is_dir():
        return
    make_dirs(path.parent, 0o755)
    with suppress(FileExistsError):  # somebody was first, and may not have come to the next step yet
        mkdir(path, mode)
    fsync_dir(path.parent)


def write_file(path: Path, data: bytes, mode: int) -> None:
    """A new durable file of exactly this content; its name becomes durable with its directory's fsync."""
    fd = create(path, mode)
    try:
        write(fd, 0, data)
        fsync(fd)
    finally:
        os.close(fd)


def publish_file(temporary: Path, final: Path) -> None:
    """Give a finished file its final name; FileExistsError if the name is taken. Never a rename onto it."""
    link(temporary, final)
    unlink(temporary)
    fsync_dir(final.parent)


def publish_copy(source: int, final: Path, size: int, *, check: Callable[[], None] | None = None) -> None:
    """A new durable file ``final`` that holds the first ``size`` bytes of ``source``; FileExistsError if it is there.

    The file has no name until it is whole (O_TMPFILE), so that a crash leaves nothing; where the filesystem cannot do
    that, it has a hidden one beside the target. ``check`` as in ``copy_content``.
    """
    temporary: Path | None = None
    fd = create_nameless(final.parent, 0o600)
    if fd is None:
        temporary = final.with_name(f".{final.name}.{random_suffix()}")
        fd = create(temporary, 0o600)
    try:
        copy_content(source, fd, check=check)
        truncate(fd, size)
        fsync(fd)
        if temporary is None:
            give_name(fd, final)
        else:
            link(temporary, final)
        fsync_dir(final.parent)
    finally:
        os.close(fd)
        if temporary is not None:
            unlink(temporary)


def copy_content(source: int, target: int, *, check: Callable[[], None] | None = None) -> None:
    """``target`` (empty) holds what ``source`` holds: shared blocks, else its data extents only; holes stay holes.

    ``check`` is called before each piece; what it raises ends the copy.
    """
    size = os.fstat(source).st_size
    if clone_file(source, target):
        return
    truncate(target, size)
    for start, end in data_extents(source, size):
        for offset in range(start, end, _PIECE):
            if check is not None:
                check()
            copy_range(source, target, offset, min(_PIECE, end - offset))

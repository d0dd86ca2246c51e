"""Subvolumes and files. What changes storage is named in ``SEAMS``, so that a ``FaultPlan`` sees every step."""

import ctypes
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from os import makedirs, mknod, rename, setxattr, truncate, utime
from pathlib import Path
from shutil import rmtree

__all__ = ["makedirs", "mknod", "rename", "rmtree", "setxattr", "truncate", "utime"]
SEAMS = (*__all__, "create_volume", "snapshot", "freeze", "destroy", "rename_new", "write_bytes", "sync")


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor of a directory or a file, to read it or to change what it is."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def identify(path: Path) -> tuple[bytes, bytes]:
    """The UUID of the subvolume that is there or around it, and of what that is a snapshot of (empty: of nothing).

    Neither ever changes. OSError where there is no btrfs.
    """
    told = bytearray(504)  # a bytearray is filled in, and may be longer than 1024 bytes
    with opened(path) as fd:
        fcntl.ioctl(fd, 0x81F8943C, told)  # BTRFS_IOC_GET_SUBVOL_INFO
    return bytes(told[296:312]), bytes(told[312:328] if any(told[312:328]) else b"")


def _at_name(request: int, path: Path, source: int = 0) -> None:
    with opened(path.parent) as fd:
        fcntl.ioctl(fd, request, bytearray(struct.pack("=q4088s", source, os.fsencode(path.name))))


create_volume = partial(_at_name, 0x5000940E)  # BTRFS_IOC_SUBVOL_CREATE
destroy = partial(_at_name, 0x5000940F)  # BTRFS_IOC_SNAP_DESTROY; blocks that a snapshot shares stay


def snapshot(source: Path, path: Path) -> None:
    """A writable snapshot. The storage writes down whose it is, in the same transaction."""
    with opened(source) as fd:
        _at_name(0x50009401, path, fd)  # BTRFS_IOC_SNAP_CREATE


def freeze(path: Path) -> None:
    """Nobody writes to the subvolume any more. A directory around it can still be renamed."""
    with opened(path) as fd:
        fcntl.ioctl(fd, 0x4008941A, struct.pack("=Q", 2))  # BTRFS_IOC_SUBVOL_SETFLAGS, read-only


write_bytes = Path.write_bytes


def rename_new(source: Path, target: Path) -> None:
    """Move a name; FileExistsError where there is anything at the new one."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(-100, os.fsencode(source), -100, os.fsencode(target), 1):  # from AT_FDCWD, RENAME_NOREPLACE
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(target))


def sync(path: Path) -> None:
    """A file is durable, or a directory's names; with a subvolume's, all that came before: btrfs commits in order."""
    with opened(path) as fd:
        os.fsync(fd)

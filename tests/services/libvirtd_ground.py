"""Where the guests of a LibvirtDaemon and the caches of a test meet: short paths that every user may enter."""

from __future__ import annotations

import contextlib
import itertools
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from harness.children import child
from services.libvirtd import LibvirtDaemon

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """A daemon, and places on two filesystems that it sees. ``user`` is who runs the cache."""

    daemon: LibvirtDaemon
    here: Path
    there: Path
    user: int
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def places(self) -> tuple[Path, Path]:
        """Two new empty directories of the cache's user, on the two filesystems."""
        name = f"t{next(self._numbers)}"
        for parent in (self.here, self.there):
            (parent / name).mkdir()
            (parent / name).chmod(0o755)
            os.chown(parent / name, self.user, self.user)
        return self.here / name, self.there / name

    def run(self, work: Callable[[], _T]) -> _T:
        """What ``work`` returns, done by the cache's user: in a child, unless that is root."""
        if self.user == 0:
            return work()

        def as_user() -> _T:
            os.setgroups([])
            os.setgid(self.user)
            os.setuid(self.user)
            return work()

        with child(as_user) as process:
            return process.result()


@contextlib.contextmanager
def ground(*, owners: bool) -> Iterator[Ground]:
    """A daemon with its ground: with ``owners`` as in production, and the cache is an unprivileged user's."""
    where = Path(tempfile.mkdtemp(prefix="lv-", dir="/tmp"))
    where.chmod(0o755)
    here, there = where / "here", where / "there"
    try:
        for path in (here, there):
            path.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m,mode=755", "tmpfs", there], check=True)
        try:
            with LibvirtDaemon(where / "d", owners=owners) as daemon:
                yield Ground(daemon=daemon, here=here, there=there, user=pwd.getpwnam("nobody").pw_uid if owners else 0)
        finally:
            subprocess.run(["umount", there], check=True)
    finally:
        shutil.rmtree(where)

"""Places for thousands of short-lived caches."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from services.require import require

_ROOM = 512 * 2**20


@contextmanager
def quick(otherwise: Path) -> Iterator[Path]:
    """A directory in memory where there is room: death by a signal asks nothing of a disk, and fsync costs nothing."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or shutil.disk_usage(memory).free < _ROOM:
        yield otherwise
        return
    with tempfile.TemporaryDirectory(dir=memory) as directory:
        yield Path(directory)


@contextmanager
def mounted_again(directory: Path, alias: Path) -> Iterator[Path]:
    """The directory under a second name, which is no symbolic link. Tests that use it are marked ``services``."""
    require(None if os.geteuid() == 0 else "only root can mount a directory again")
    alias.mkdir()
    subprocess.run(["mount", "--bind", directory, alias], check=True)
    try:
        yield alias
    finally:
        subprocess.run(["umount", alias], check=True)

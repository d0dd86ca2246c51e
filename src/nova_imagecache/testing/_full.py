"""Storage that is full: for tests of what has no room."""

from __future__ import annotations

import errno
import os
import tempfile
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)
"""What a system call says of storage without room."""

_PIECES = (2**26, 2**20, 2**12)


@contextmanager
def fill_directory(directory: Path) -> Iterator[None]:
    """While the block runs, the filesystem of ``directory`` has no block left. Meant for a small one of its own."""
    with tempfile.NamedTemporaryFile(dir=directory) as filler:
        size = 0
        for piece in _PIECES:
            try:
                while True:
                    os.posix_fallocate(filler.fileno(), size, piece)
                    size += piece
            except OSError as err:
                if err.errno not in FULL:
                    raise
        yield

"""Overlays without a child process: qemu-img makes one of each shape once, every disk gets the same few KiB.

A fresh overlay depends on its base's format, its own cluster size and its size, and on nothing else but the name of its
backing file, which stands last in the header. ``<root>/templates/<format>.<cluster size>.<size>`` keeps the one that
qemu-img made; what a disk gets is byte for byte what qemu-img would have made for it.
"""

from __future__ import annotations

import os
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nova_imagecache import _entries, _extents, _fs, _qcow2, _qemu, _turns

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_NAME = "base"
_MOST = 256
"""Templates kept in memory, about 1 KiB each."""

_PATIENCE = 2.0
"""Seconds to wait for the thread that makes a template. qemu-img takes some hundredths."""

_Shape = tuple[str, int | None, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """An overlay's bytes: ``head`` is its first cluster, ``pieces`` what else is not zeros; ``length`` of the file."""

    head: bytes
    pieces: tuple[tuple[int, bytes], ...]
    length: int

    def write(self, fd: int, backing: str) -> None:
        """Make the empty file an overlay that names ``backing``.

        Raises:
            Qcow2Error: the name does not fit into the header's cluster.
        """
        head = _qcow2.with_backing_name(self.head, backing)
        for offset, data in ((0, head), *self.pieces):
            _fs.write(fd, offset, data)
        _fs.truncate(fd, self.length)


class Templates:
    """The templates below one root. Of the threads of a process that want a new one together, one makes it; two
    processes may make one at once: they make the same bytes.
    """

    def __init__(self, root: Path) -> None:
        self._directory = root / "templates"
        self._staging = root / "staging"
        self._known: dict[_Shape, Template] = {}
        self._being_made: dict[tuple[int, _Shape], threading.Event] = {}

    def get(self, base_format: str, cluster_size: int | None, size: int) -> Template:
        """The template of overlays of ``size`` bytes; ``cluster_size`` None: qemu-img's own choice.

        Raises:
            CommandError, NoSpaceError: qemu-img cannot make it.
        """
        shape = (base_format, cluster_size, size)
        if (known := self._known.get(shape)) is not None:
            return known
        with self._one_first(shape):
            return self._known.get(shape) or self._find_or_make(*shape)

    @contextmanager
    def _one_first(self, shape: _Shape) -> Iterator[None]:
        """One thread goes ahead; the others follow when it is through, however that ended, or takes too long."""
        through = threading.Event()
        mine = (os.getpid(), shape)  # a child has none of the threads that its parent had at the fork
        first = self._being_made.setdefault(mine, through)
        if first is not through:
            with _turns.given_up():
                first.wait(_PATIENCE)
            yield
            return
        try:
            yield
        finally:
            del self._being_made[mine]
            through.set()

    def _find_or_make(self, base_format: str, cluster_size: int | None, size: int) -> Template:
        path = self._directory / f"{base_format}.{cluster_size or 'default'}.{size}"
        template = _read(path, size)
        if template is None:
            self._make(path, base_format, cluster_size, size)
            template = _read(path, size)
        if template is None:
            raise FileNotFoundError(path)
        if len(self._known) >= _MOST:
            self._known.clear()
        self._known[base_format, cluster_size, size] = template
        return template

    def _make(self, path: Path, base_format: str, cluster_size: int | None, size: int) -> None:
        _fs.make_dirs(self._directory, 0o700)
        _fs.make_dirs(self._staging, 0o700)
        with _entries.entry(self._staging, path.name, 0o700) as making:
            made, sparse = making / "made", making / "sparse"
            _qemu.create_overlay(made, backing=_NAME, backing_format=base_format, cluster_size=cluster_size, size=size)
            template = _parse(made.read_bytes())
            fd = _fs.create(sparse, 0o400)
            try:
                template.write(fd, _NAME)
                _fs.fsync(fd)
            finally:
                os.close(fd)
            _fs.rename(sparse, path)
            _fs.fsync_dir(self._directory)


def _read(path: Path, size: int) -> Template | None:
    """The template in a file; None: it is not there, or is not what it should be, and is made anew."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        header = _qcow2.parse_header(data)
    except _qcow2.Qcow2Error:
        return None
    return _parse(data) if header.virtual_size == size and _qcow2.holds_tables(data) else None


def _parse(data: bytes) -> Template:
    cluster = _qcow2.parse_header(data).cluster_size
    runs = _extents.nonzero_runs(data[cluster:])
    head = data[:cluster].rstrip(b"\0")
    return Template(head=head, pieces=tuple((cluster + at, bytes(run)) for at, run in runs), length=len(data))

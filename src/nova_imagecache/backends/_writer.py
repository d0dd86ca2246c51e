"""A base on files in the making, and the options of the file backends."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from nova_imagecache import _entries, _extents, _fs, _records
from nova_imagecache.backends import BaseImage, BaseRecord, BaseWriter, ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from nova_imagecache.backends._files import FileBases


@dataclass(frozen=True, slots=True, kw_only=True)
class FileOptions:
    """``backend_options`` of the file backends.

    Attributes:
        base_format: "raw": every base is raw bytes; "native": a qcow2 image stays as it came.
        preallocate: "none", or "space": all blocks of a new disk are reserved.
        reference: "auto": a hard link, or the base's path where a link cannot be; "link": a link or an error; "path".
    """

    base_format: str = "raw"
    preallocate: str = "none"
    reference: str = "auto"

    @classmethod
    def parse(cls, options: Mapping[str, Any]) -> Self:
        """The options, checked.

        Raises:
            ConfigError: with all problems at once.
        """
        choices = {
            "base_format": ("raw", "native"),
            "preallocate": ("none", "space"),
            "reference": ("auto", "link", "path"),
        }
        problems = [
            f"backend_options.{name}: unknown option; known: {', '.join(choices)}" for name in options.keys() - choices
        ]
        problems += [
            f"backend_options.{name}: {options[name]!r} is none of {', '.join(allowed)}"
            for name, allowed in choices.items()
            if name in options and options[name] not in allowed
        ]
        if problems:
            raise ConfigError(sorted(problems))
        return cls(**options)


_EARLY = 4 << 20, 8 << 20
"""Bytes that are written before the device is asked to make them durable: of a small base less, since the sync at its
end is a larger part of all."""

_PATIENCE = 0.5
"""Seconds for an early sync to end."""


class _EarlySync:
    """Makes a file durable while it is still written, in a thread: the sync at the end finds little left to do.

    Promises nothing. It has a descriptor of its own, since the kernel tells each descriptor once that something could
    not be written: the writer's own sync hears of it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._more = threading.Event()
        self._over = False
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """There is more to be synced. Not called by two threads at once."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=f"sync-{self._path.parent.name}", daemon=True)
            self._thread.start()
        self._more.set()

    def end(self) -> None:
        """Nothing more comes."""
        self._over = True
        self._more.set()

    def join(self) -> None:
        """The thread has ended, or hangs in the device: then it is left behind, and ends with it."""
        self.end()
        if self._thread is not None:
            self._thread.join(_PATIENCE)

    def _run(self) -> None:
        with suppress(OSError):  # the writer's own sync meets it again, and tells
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                while self._more.wait() and not self._over:
                    self._more.clear()
                    os.fdatasync(fd)
            finally:
                os.close(fd)


class FileWriter(BaseWriter):
    """A base in the making: a directory in staging, held by this process."""

    def __init__(self, bases: FileBases, image_id: str) -> None:
        self._bases = bases
        self._image_id = image_id
        _fs.make_dirs(bases.staging, 0o700)
        self._entry: _entries.Held | None = _entries.new_entry(bases.staging, image_id, 0o700)
        self._directory = self._entry.path
        self.path: Path | None = self._directory / "disk"
        self._fd = -1
        self._mutex = threading.Lock()
        self._written = self._unsynced = 0
        self._early = _EarlySync(self.path)
        try:
            self._fd = _fs.create(self.path, 0o600)
        except BaseException:
            self.discard()
            raise

    def set_size(self, size: int) -> None:
        _fs.truncate(self._fd, size)

    def write_at(self, offset: int, buffer: bytes | bytearray | memoryview) -> None:
        _fs.write(self._fd, offset, buffer)
        with self._mutex:
            self._written += len(buffer)
            self._unsynced += len(buffer)
            if self._unsynced >= min(max(_EARLY[0], self._written // 8), _EARLY[1]):
                self._unsynced = 0
                self._early.begin()

    def read_at(self, offset: int, length: int) -> bytes:
        return os.pread(self._fd, length, offset).ljust(length, b"\0")

    def write_sums(self, sums: bytes | memoryview) -> None:
        fd = _fs.create(self._directory / "disk.sums", 0o600)
        try:
            for offset, run in _extents.nonzero_runs(sums):  # of what holds nothing, there is nothing to write
                _fs.write(fd, offset, run)
            _fs.truncate(fd, len(sums))
            _fs.fsync(fd)
        finally:
            os.close(fd)

    def sync(self) -> None:
        self._early.end()
        _fs.fsync(self._fd)

    def publish(self, record: BaseRecord) -> BaseImage:
        _fs.write_file(self._directory / "base.json", _records.dump_base(record), 0o600)
        _fs.touch(self._directory / "last-used")
        for name in ("disk", "base.json", "disk.sums"):
            with suppress(FileNotFoundError):  # sums only where the bytes are not the source's
                self._bases.open_up(self._directory / name, 0o440 if self._bases.gid is not None else 0o444)
        self.sync()
        self._bases.open_up(self._directory, self._bases.directory_mode)
        _fs.fsync_dir(self._directory)
        published = self._bases.publish(self._image_id, self._directory)
        self.discard()  # gives the hold back; the directory is gone from staging if it was the one that won
        return published

    def discard(self) -> None:
        entry, self._entry = self._entry, None
        fd, self._fd = self._fd, -1
        self._early.join()
        try:
            if entry is not None:
                _fs.rmtree(self._directory)
        finally:  # what cannot be removed now must not look alive: a sweep takes it later
            if entry is not None:
                entry.release()
            if fd >= 0:
                os.close(fd)

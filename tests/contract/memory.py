"""The contract for a storage that has no files."""

from __future__ import annotations

from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

import pytest

from nova_imagecache.backends import Backend, BackendPaths, RootDisk
from nova_imagecache.testing import BackendContract, MemoryBackend, MemoryStorage

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class MemoryContract(BackendContract):
    """The hooks for disks that are no files, and those that fill the storage, hide its users, hold its disks open."""

    forks = False
    actions = ("publish",)
    fault_modules = ()  # no steps can be seen in it
    backend_class: type[MemoryBackend] = MemoryBackend

    @cached_property
    def storages(self) -> dict[Path, MemoryStorage]:
        return {}

    @pytest.fixture(autouse=True)
    def _forget(self) -> Iterator[None]:
        """Pytest keeps the objects of test classes until the end of the run, and every fork copies what they hold."""
        yield
        self.storages.clear()

    def make_backend(self, paths: BackendPaths) -> Backend:
        return self.backend_class({}, paths, storage=self.storages.setdefault(paths.root, MemoryStorage()))

    def read_disk(self, backend: Backend, disk: RootDisk) -> bytes:
        assert isinstance(backend, MemoryBackend)
        return backend.disk_contents(disk.disk_id, disk.name)

    def write_disk(self, backend: Backend, disk: RootDisk, offset: int, data: bytes) -> None:
        assert isinstance(backend, MemoryBackend)
        backend.write_disk(disk.disk_id, disk.name, offset, data)

    @contextmanager
    def filled(self, backend: Backend, paths: BackendPaths) -> Iterator[None]:
        assert isinstance(backend, MemoryBackend)
        backend._total, total = backend.storage.used, backend._total
        yield
        backend._total = total

    @contextmanager
    def hidden_users(self, backend: Backend, paths: BackendPaths) -> Iterator[None]:
        assert isinstance(backend, MemoryBackend)
        backend.users_unknown = True
        yield
        backend.users_unknown = False

    def held_open(self, backend: Backend, disk: RootDisk) -> AbstractContextManager[None]:
        assert isinstance(backend, MemoryBackend)
        return backend.held_open(disk.disk_id, disk.name)

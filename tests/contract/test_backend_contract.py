"""Our own backends keep the contract."""

from __future__ import annotations

import subprocess
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

import pytest

from contract.memory import MemoryContract
from nova_imagecache import _fs
from nova_imagecache.backends import Backend, BackendPaths
from nova_imagecache.backends.file import FileBackend
from nova_imagecache.backends.qcow2 import Qcow2Backend
from nova_imagecache.testing import BackendContract, fill_directory
from nova_imagecache.testing._contract_full import FullContract
from nova_imagecache.testing._samples import MIB
from services.require import require

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def _no_directory_of_references(paths: BackendPaths) -> Iterator[None]:
    """Where the path references are, there is something that cannot be listed."""
    users, aside = paths.root / "users", paths.root / "users.aside"
    there = users.is_dir()
    if there:
        users.rename(aside)
    users.write_text("no directory")
    yield
    users.unlink()
    if there:
        aside.rename(users)


class TestMemory(MemoryContract):
    """A storage without files."""


class TestFile(BackendContract):
    """Copies of raw bases: the three lines."""

    def make_backend(self, paths: BackendPaths) -> Backend:
        return FileBackend({}, paths)


class TestFileNative(BackendContract):
    """Copies of qcow2 bases."""

    base_format = "qcow2"
    actions = ("create",)

    def make_backend(self, paths: BackendPaths) -> Backend:
        return FileBackend({"base_format": "native"}, paths)


class TestFilePreallocated(BackendContract):
    """Copies whose blocks are reserved."""

    large_size = 5 * MIB
    actions = ("create", "resize")

    def make_backend(self, paths: BackendPaths) -> Backend:
        return FileBackend({"preallocate": "space"}, paths)


class TestQcow2(BackendContract):
    """Overlays on raw bases by links."""

    def hidden_users(self, backend: Backend, paths: BackendPaths) -> AbstractContextManager[None]:
        return _no_directory_of_references(paths)

    def make_backend(self, paths: BackendPaths) -> Backend:
        return Qcow2Backend({}, paths)


class TestQcow2Named(BackendContract):
    """Overlays on a filesystem, such as NFS, where every file has a name from the beginning."""

    actions = ("create",)

    @pytest.fixture(autouse=True)
    def _no_tmpfile(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_fs, "create_nameless", lambda *_: None)

    def make_backend(self, paths: BackendPaths) -> Backend:
        return Qcow2Backend({}, paths)


class TestQcow2Native(BackendContract):
    """Overlays on qcow2 bases by links."""

    base_format = "qcow2"
    actions = ("create", "attach-anew")

    def make_backend(self, paths: BackendPaths) -> Backend:
        return Qcow2Backend({"base_format": "native", "reference": "link"}, paths)


class TestQcow2Path(BackendContract):
    """Overlays on raw bases by paths."""

    def hidden_users(self, backend: Backend, paths: BackendPaths) -> AbstractContextManager[None]:
        return _no_directory_of_references(paths)

    def make_backend(self, paths: BackendPaths) -> Backend:
        return Qcow2Backend({"reference": "path"}, paths)


class TestQcow2NativePath(BackendContract):
    """Overlays on qcow2 bases by paths."""

    base_format = "qcow2"
    actions = ("flatten",)

    def make_backend(self, paths: BackendPaths) -> Backend:
        return Qcow2Backend({"base_format": "native", "reference": "path"}, paths)


# --- storage without room --------------------------------------------------------------------------------------------


@pytest.mark.services
class TestFileFull(FullContract):
    """Copies on a small filesystem."""

    @pytest.fixture(autouse=True)
    def _small(self, small: Path) -> None:
        self.small = small

    def make_paths(self, directory: Path) -> BackendPaths:
        return super().make_paths(self.small / directory.name)

    def make_backend(self, paths: BackendPaths) -> Backend:
        return FileBackend({}, paths)

    def filled(self, backend: Backend, paths: BackendPaths) -> AbstractContextManager[None]:
        return fill_directory(self.small)


@pytest.mark.services
class TestQcow2Full(TestFileFull):
    """Overlays on a small filesystem."""

    def make_backend(self, paths: BackendPaths) -> Backend:
        return Qcow2Backend({}, paths)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of its own with room for 16 MiB."""
    where = tmp_path / "small"
    where.mkdir()
    argv = ["mount", "-t", "tmpfs", "-o", f"size={16 * MIB}", "tmpfs", str(where)]
    mounted = subprocess.run(argv, capture_output=True, text=True, check=False)
    require(None if mounted.returncode == 0 else f"no filesystem can be mounted: {mounted.stderr.strip()}")
    yield where
    subprocess.run(["umount", str(where)], check=True)

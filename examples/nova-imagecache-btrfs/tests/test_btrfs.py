"""The backend on a real btrfs: it keeps the contract, is found by its name, outlives a power cut."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import pytest

import nova_imagecache
from nova_imagecache import CacheConfig, FileLocation, ImageCache
from nova_imagecache.backends import Backend, BackendPaths
from nova_imagecache.testing import BackendContract, bench_backend, fill_directory
from nova_imagecache_btrfs import BtrfsBackend

MIB = 2**20


def run(*argv: str | Path) -> None:
    """Run a command; CalledProcessError if it fails."""
    subprocess.run(argv, check=True, capture_output=True)


def missing() -> str | None:
    """What is missing for a btrfs of one's own; None: nothing."""
    if os.geteuid() != 0:
        return "only root can mount a filesystem"
    return None if shutil.which("mkfs.btrfs") else "mkfs.btrfs is missing; install btrfs-progs"


def make_image(path: Path) -> Path:
    """An empty btrfs in a file."""
    with path.open("wb") as file:
        file.truncate(600 * MIB)
    run("mkfs.btrfs", "-q", path)
    return path


@contextmanager
def mounted(image: Path, where: Path) -> Iterator[Path]:
    """The filesystem in a file, mounted."""
    where.mkdir()
    # what is deleted is freed when a commit wakes the cleaner; without the option that is every 30 s
    run("mount", "-o", "loop,commit=1", image, where)
    try:
        yield where
    finally:
        run("umount", where)


@pytest.fixture(scope="session")
def btrfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small btrfs."""
    if reason := missing():
        if os.environ.get("CI") == "true":
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    image = make_image(tmp_path_factory.mktemp("btrfs") / "image")
    with mounted(image, image.with_name("mounted")) as where:
        yield where


@pytest.fixture
def storage(btrfs: Path) -> Iterator[Path]:
    """An empty directory on the btrfs, removed afterwards."""
    path = Path(tempfile.mkdtemp(dir=btrfs))
    yield path
    remove(path)


def remove(path: Path) -> None:
    """Remove a directory, and the subvolumes in it."""
    volumes = [found for found in path.rglob("*") if found.is_dir() and found.stat().st_ino == 256]
    if volumes:
        run("btrfs", "-q", "subvolume", "delete", *volumes)
    shutil.rmtree(path)


def copy_at_one_moment(image: Path, copy: Path) -> None:
    """A copy of a mounted filesystem's file, in which no commit came in between: what a power cut leaves."""
    before: bytes | None = None
    while before is None or before != generation(image):
        before = generation(image)
        run("cp", "--sparse=always", image, copy)


def generation(image: Path) -> bytes:
    """The number of the last commit, in the superblock."""
    with image.open("rb") as file:
        file.seek(0x10000 + 0x48)
        return file.read(8)


class TestBtrfs(BackendContract):
    """The whole contract."""

    fault_modules = ("nova_imagecache_btrfs._volumes", "nova_imagecache._fs")

    @pytest.fixture(autouse=True)
    def _storage(self, storage: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[None]:
        self.storage = storage
        if "full" not in request.node.name:
            yield
            return
        # one of its own: a btrfs that was full keeps for data what metadata then lacks
        with mounted(make_image(tmp_path / "image"), tmp_path / "mounted") as self.storage:
            yield

    def make_paths(self, directory: Path) -> BackendPaths:
        """Empty storage on the btrfs, wherever the test's own directory is."""
        return super().make_paths(Path(tempfile.mkdtemp(dir=self.storage)))

    def make_backend(self, paths: BackendPaths) -> Backend:
        """The backend."""
        return BtrfsBackend({}, paths)

    def filled(self, backend: Backend, paths: BackendPaths) -> AbstractContextManager[None]:
        """A btrfs without room."""
        return fill_directory(self.storage)

    @contextmanager
    def hidden_users(self, backend: Backend, paths: BackendPaths) -> Iterator[None]:
        """A base whose subvolume somebody took away: whose snapshots are whose, nobody can tell."""
        volume = paths.root / "bases" / "img" / "volume"
        volume.rename(volume.with_name("elsewhere"))
        yield
        volume.with_name("elsewhere").rename(volume)


# --- in a cache


@pytest.fixture
def config(storage: Path, tmp_path: Path) -> CacheConfig:
    """A cache on btrfs, over a directory with one image."""
    content = b"image".ljust(3 * MIB, b"\0")
    facts = {"disk_format": "raw", "os_hash_algo": "sha256", "os_hash_value": hashlib.sha256(content).hexdigest()}
    (tmp_path / "img.img").write_bytes(content)
    (tmp_path / "img.json").write_text(json.dumps(facts))
    return CacheConfig(
        root=storage / "cache",
        disks_dir=storage / "instances",
        backend="btrfs",
        source="directory",
        source_options={"path": str(tmp_path)},
    )


def test_it_is_found_by_its_name() -> None:
    """Installed, the distribution's entry point names the backend."""
    assert "btrfs" in nova_imagecache.available_backends()


def test_the_main_job(config: CacheConfig) -> None:
    """From an image to a root disk that is the guest's own; the base stays while it is used, and goes afterwards."""
    (config.root.parent / "instances").mkdir()
    with ImageCache.from_config(config) as cache:
        cache.ensure_base("img")
        assert cache.check().problems == ()
        disk = cache.create_root_disk("img", "vm-1", size=20 * MIB)
        assert isinstance(disk.location, FileLocation)
        with disk.location.path.open("r+b") as file:
            file.write(b"guest")
        assert disk.location.path.stat().st_mode & 0o777 == 0o600
        assert (disk.format, disk.virtual_size, disk.reference) == ("raw", 20 * MIB, "clone")
        assert [(user.disk_id, user.name) for user in cache.users("img")] == [("vm-1", "disk")]
        cache.verify_base("img")
        assert cache.cleanup(cache.plan_cleanup(max_idle=0)).removed == ()
        cache.remove_root_disk("vm-1")
        assert cache.cleanup(cache.plan_cleanup(max_idle=0)).removed == ("img",)
        assert (cache.usage().bases, cache.recover().removed) == (0, ())


def test_no_guest_opens_a_base(config: CacheConfig) -> None:
    """Its files are read-only for everybody, root included, and its directory is entered by nobody else."""
    with ImageCache.from_config(config) as cache:
        base = cache.ensure_base("img")
        assert isinstance(base.location, FileLocation)
        with pytest.raises(OSError, match="Read-only file system"), base.location.path.open("r+b"):
            pass
        assert (config.root / "bases" / "img").stat().st_mode & 0o777 == 0o700


def test_disks_elsewhere_are_a_problem(storage: Path, tmp_path: Path) -> None:
    """A snapshot cannot cross filesystems, and ``check`` says so before anybody tries."""
    (fact,) = BtrfsBackend({}, BackendPaths(root=storage, disks_dir=tmp_path)).check()
    assert fact.problem is not None
    assert "same subvolume" in fact.problem


@pytest.mark.usefixtures("btrfs")
def test_what_was_told_outlives_a_power_cut(tmp_path: Path) -> None:
    """A copy of the filesystem as it lies on its device when a call returns holds what the call has told, whole."""
    image = make_image(tmp_path / "image")
    cuts = {name: tmp_path / name for name in ("published", "created", "resized", "removed", "retired")}
    contract = TestBtrfs()
    with mounted(image, tmp_path / "before") as where:
        backend = BtrfsBackend({}, BackendContract.make_paths(contract, where))
        sample = contract.sample(backend)
        base = contract.publish(backend, "img")
        copy_at_one_moment(image, cuts["published"])
        backend.create_root_disk(base, "vm", "disk", 4 * MIB)
        copy_at_one_moment(image, cuts["created"])
        backend.resize_root_disk("vm", "disk", 5 * MIB)
        copy_at_one_moment(image, cuts["resized"])
        backend.remove_root_disk("vm", "disk")
        copy_at_one_moment(image, cuts["removed"])
        backend.retire_base(base)
        copy_at_one_moment(image, cuts["retired"])
    for name, cut in cuts.items():
        with mounted(cut, tmp_path / f"after-{name}") as where:
            backend = BtrfsBackend({}, BackendPaths(root=where / "root", disks_dir=where / "disks"))
            found, disk = backend.find_base("img"), backend.get_root_disk("vm", "disk")
            assert (found is not None) is (name != "retired"), name
            assert found is None or contract.base_bytes(backend, found) == sample.stored
            assert (disk.virtual_size // MIB if disk else 0) == {"created": 4, "resized": 5}.get(name, 0)
            if found and disk:
                assert contract.read_disk(backend, disk) == sample.guest.ljust(disk.virtual_size, b"\0")
                assert len(list(backend.iter_users(found))) == 1


def test_a_disk_costs_the_same_whatever_its_size(storage: Path) -> None:
    """It is one snapshot: no byte of the base is read or written for it."""
    paths = BackendPaths(root=storage / "root", disks_dir=storage / "disks")
    paths.root.mkdir()
    backend = BtrfsBackend({}, paths)
    reports = [bench_backend(backend, rounds=3, base_size=size * MIB, bases=3) for size in (1, 32)]
    small, large = (report.median("create_root_disk") for report in reports)
    assert large < small + 1.0
    assert (list(backend.iter_bases()), list(backend.iter_root_disks())) == ([], [])
    assert backend.capacity().trash == 0


def test_disk_directories_may_hold_anything(storage: Path, tmp_path: Path) -> None:
    """What a driver keeps beside its disks, links and pipes included, is no disk and in nobody's way."""
    paths = BackendPaths(root=storage / "root", disks_dir=storage / "disks")
    paths.root.mkdir()
    backend = BtrfsBackend({}, paths)
    base = TestBtrfs().publish(backend, "img")
    backend.create_root_disk(base, "vm", "disk", 4 * MIB)
    (paths.disks_dir / "vm" / "console.log").write_text("hello")
    (paths.disks_dir / "vm" / "link").symlink_to(tmp_path)
    (paths.disks_dir / "vm" / "nothing").symlink_to(tmp_path / "nowhere")
    os.mkfifo(paths.disks_dir / "vm" / "pipe")
    run("btrfs", "-q", "subvolume", "create", paths.disks_dir / "vm" / "strangers")
    assert [disk.name for disk in backend.iter_root_disks()] == ["disk"]
    assert len(list(backend.iter_users(base))) == 1
    with suppress(OSError):
        backend.remove_root_disk("vm", "console.log")
    assert (paths.disks_dir / "vm" / "console.log").exists()

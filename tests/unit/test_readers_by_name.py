"""Disks that read a base by its own name: neither is it taken from them, nor do other bytes come to be there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from harness import images, places
from harness.images import MIB, qemu_img
from harness.rig import Rig
from harness.upkeep import names, open_cache
from nova_imagecache import (
    BackendError,
    BaseCorruptError,
    BaseImage,
    BaseInUseError,
    DiskExistsError,
    DiskUser,
    ImageCache,
    ImageRejectedError,
    UserFinder,
    UsersUnknownError,
    _engine,
)
from nova_imagecache.finders import DiskDirectories, ImagesInUse

SIZE = 4 * MIB
OLD, NEW = images.raw("what was cached first"), images.raw("what came later")


class Host:
    """A cache, its disks, and a directory of disks that it did not make."""

    def __init__(self, directory: Path, kind: str) -> None:
        self.rig = Rig(directory, kind, {"img": OLD})
        self.foreign = directory / "foreign"
        self.foreign.mkdir()
        self.rig.disks.mkdir()

    def renew(self) -> None:
        """Cache the old bytes; from now on the source serves the new ones."""
        with self.rig.cache() as cache:
            cache.ensure_base("img")
        self.rig.samples["img"] = NEW

    def cache(self, *finders: UserFinder) -> ImageCache:
        return open_cache(self.rig, user_finders=finders or [DiskDirectories([self.foreign, self.rig.disks])])

    def overlay(self, backing: Path) -> Path:
        path = self.foreign / "vm" / "disk"
        path.parent.mkdir()
        qemu_img("create", "-q", "-f", "qcow2", "-b", str(backing), "-F", "raw", str(path))
        return path

    @property
    def base(self) -> Path:
        return self.rig.root / "bases" / "img" / "disk"

    def damage(self) -> None:
        with self.base.open("r+b") as file:
            file.seek(5000)
            file.write(b"?")


@pytest.fixture(params=["link", "path"])
def host(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Host]:
    with places.quick(tmp_path) as directory:
        yield Host(directory, request.param)


class _Unsure:
    name = "unsure"

    def find(self, bases: Sequence[BaseImage]) -> Iterator[DiskUser]:
        raise UsersUnknownError("nobody can say")


# --- other bytes under the same id


def test_a_disk_that_only_a_finder_knows_keeps_its_bytes(host: Host) -> None:
    """It would read the new ones in the middle of its life."""
    host.renew()
    host.overlay(host.base)
    with host.cache() as cache:
        with pytest.raises(BaseInUseError, match="vm/disk"):
            cache.ensure_base("img", expect=NEW.digest)
        assert host.base.read_bytes() == OLD.guest
        assert names(cache) == {"img"}


@pytest.mark.services
def test_a_disk_that_has_the_name_through_another_mount_keeps_its_bytes(host: Host) -> None:
    """It would read the new ones as well."""
    host.renew()
    with places.mounted_again(host.rig.root, host.rig.dir / "alias") as alias, host.cache() as cache:
        host.overlay(alias / "bases" / "img" / "disk")
        with pytest.raises(BaseInUseError, match="vm/disk"):
            cache.ensure_base("img", expect=NEW.digest)
        assert host.base.read_bytes() == OLD.guest


def test_a_disk_that_came_between_the_looks_keeps_its_bytes(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second look is after the name went: it is known by the name it had."""
    backend = host.rig.backend()
    really = type(backend).retire_base

    def retire(self: object, base: BaseImage) -> object:
        retired = really(self, base)  # type: ignore[arg-type]  # the backend's own
        path = host.foreign / "vm" / "disk"
        path.parent.mkdir()
        qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", str(host.base), "-F", "raw", str(path), "4M")
        return retired

    host.renew()
    with host.cache() as cache:
        monkeypatch.setattr(type(backend), "retire_base", retire)
        with pytest.raises(BaseInUseError):
            cache.ensure_base("img", expect=NEW.digest)
        assert host.base.read_bytes() == OLD.guest


def test_in_doubt_the_old_bytes_stay(host: Host) -> None:
    host.renew()
    with host.cache(_Unsure()) as cache:
        with pytest.raises(UsersUnknownError):
            cache.ensure_base("img", expect=NEW.digest)
        assert host.base.read_bytes() == OLD.guest


def test_links_and_lists_stand_in_nobodys_way(tmp_path: Path) -> None:
    """A disk with a link keeps its bytes by it; a driver's list tells of no disk that would read others."""
    with places.quick(tmp_path) as directory:
        host = Host(directory, "link")
        finders = (DiskDirectories([host.rig.disks, host.foreign]), ImagesInUse(lambda: ["img"]))
        with host.cache() as cache:
            cache.create_root_disk("img", "old", size=SIZE)
        # a snapshot on it, as libvirt makes one
        snapshot = host.rig.disks / "old" / "snap1"
        qemu_img("create", "-q", "-f", "qcow2", "-b", "disk", "-F", "qcow2", str(snapshot))
        host.renew()
        with host.cache(*finders) as cache:
            assert cache.ensure_base("img", expect=NEW.digest).digest == NEW.digest
            assert (host.rig.disks / "old" / "disk.base").read_bytes() == OLD.guest


class _Hypervisor:
    """Tells of one disk as LibvirtDomains does."""

    name = "libvirt"

    def __init__(self, disk: Path) -> None:
        self.disk = disk

    def find(self, bases: Sequence[BaseImage]) -> Iterator[DiskUser]:
        image_id = bases[0].image_id
        yield DiskUser(image_id=image_id, known_by=self.name, disk_id="vm", detail=f"{self.disk} of domain guest")


def test_what_a_hypervisor_tells_is_followed(tmp_path: Path) -> None:
    """A disk that it names by its path and domain reads through its link, or not, or cannot be seen: then it counts."""
    with places.quick(tmp_path) as directory:
        host = Host(directory, "link")
        with host.cache() as cache:
            cache.create_root_disk("img", "old", size=SIZE)
        host.renew()
        for disk in (host.overlay(host.base), host.foreign / "gone"):
            with host.cache(_Hypervisor(disk)) as cache, pytest.raises(BaseInUseError):
                cache.ensure_base("img", expect=NEW.digest)
        with host.cache(_Hypervisor(host.rig.disks / "old" / "disk")) as cache:
            assert cache.ensure_base("img", expect=NEW.digest).digest == NEW.digest


# --- a base that must not be used


def test_a_damaged_base_stays_for_a_disk_that_a_finder_knows(host: Host) -> None:
    with host.cache() as cache:
        cache.ensure_base("img")
        host.overlay(host.base)
        host.damage()
        with pytest.raises(BaseCorruptError, match="It stays"):
            cache.verify_base("img")
        assert host.base.exists()


def test_a_damaged_base_stays_in_doubt(host: Host) -> None:
    with host.cache(_Unsure()) as cache:
        cache.ensure_base("img")
        host.damage()
        with pytest.raises(BaseCorruptError, match="It stays"):
            cache.verify_base("img")
        assert host.base.exists()


@pytest.mark.parametrize("kind", ["path-native", "link-native"])
def test_a_base_that_a_newer_inspector_refuses(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not used any more; a disk that reads it by its name still opens."""
    with places.quick(tmp_path) as directory:
        host = Host(directory, kind)
        host.rig.samples["img"] = images.qcow2("inspected again")
        with host.cache() as cache:
            cache.create_root_disk("img", "vm", size=64 * MIB)
            monkeypatch.setattr(_engine, "INSPECTOR_VERSION", 99)

            def refuse(*_args: object, image_id: str) -> None:
                raise ImageRejectedError("by newer rules", image_id=image_id)

            monkeypatch.setattr(_engine, "inspect_file", refuse)
            with pytest.raises(ImageRejectedError):
                cache.ensure_base("img")
        assert host.base.exists() == (kind == "path-native")
        qemu_img("check", "-q", str(host.rig.disks / "vm" / "disk"))


def test_a_backend_that_keeps_no_checksums(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing proves a converted base there: it is neither passed nor called damaged, and stays."""
    from nova_imagecache.backends import Backend

    with places.quick(tmp_path) as directory:
        rig = Rig(directory, "link", {"img": images.qcow2("converted")})
        with rig.cache() as cache:
            monkeypatch.setattr(type(rig.backend()), "read_sums", Backend.read_sums)
            cache.ensure_base("img")
            with pytest.raises(BackendError, match="keeps no checksums"):
                cache.verify_base("img")
            assert names(cache) == {"img"}


# --- a disk that names its base by path, and what stands there now


def test_every_disk_is_tied_anew_to_a_base_that_came_back_otherwise(tmp_path: Path) -> None:
    """The base was lost and comes back in another format: the first disk asked for brings it, each is mended."""
    with places.quick(tmp_path) as directory:
        rig = Rig(directory, "path", {"img": images.qcow2("again")})
        with rig.cache() as cache:
            for disk_id in ("a", "b"):
                cache.create_root_disk("img", disk_id, size=64 * MIB)
        (rig.root / "bases" / "img").rename(directory / "lost")
        rig.kind, rig.options = "path-native", {"reference": "path", "base_format": "native"}
        with rig.cache() as cache:
            for disk_id in ("a", "b"):
                cache.create_root_disk("img", disk_id, size=64 * MIB)
        rig.check("came back as qcow2")


def test_a_disk_whose_base_has_other_bytes_now_is_not_handed_out(tmp_path: Path) -> None:
    with places.quick(tmp_path) as directory:
        rig = Rig(directory, "path", {"img": OLD})
        with rig.cache() as cache:
            cache.create_root_disk("img", "vm", size=SIZE)
        (rig.root / "bases" / "img").rename(directory / "lost")
        rig.samples["img"] = NEW
        with rig.cache() as cache:
            cache.ensure_base("img")
            with pytest.raises(DiskExistsError):
                cache.create_root_disk("img", "vm", size=SIZE)

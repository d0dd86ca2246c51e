"""Who reads a base through what ties another disk to it: a snapshot beside it does, and stands in a removal's way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conftest import InChild
from harness import images, places
from harness.images import MIB, qemu_img
from harness.rig import Rig
from nova_imagecache import DiskExistsError, ImageCache

SIZE = 4 * MIB
SAMPLES = {"img": images.raw("read through")}


@pytest.fixture(params=["link", "path"])
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    with places.quick(tmp_path) as directory:
        yield Rig(directory, request.param, SAMPLES)


def _overlay(rig: Rig, path: Path) -> None:
    """As of a block job: it reads the base by the name that the disk beside it has for it."""
    below = "disk.base" if rig.kind == "link" else str(rig.root / "bases" / "img" / "disk")
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", below, str(path), str(SIZE))


def test_a_snapshot_beside_the_disk_stands_in_the_way(rig: Rig) -> None:
    """Until it is gone."""
    with rig.cache() as cache:
        cache.create_root_disk("img", "vm", size=SIZE)
        snapshot = rig.disks / "vm" / "disk.snap"
        _overlay(rig, snapshot)
        with pytest.raises(DiskExistsError, match=r"disk\.snap"):
            cache.remove_root_disk("vm")
        snapshot.unlink()
        cache.remove_root_disk("vm")
        assert cache.users("img") == []


def test_a_raw_disk_is_no_reader(rig: Rig) -> None:
    """Its guest writes any header on it, and names a file of its neighbour."""
    with rig.cache() as cache:
        cache.create_root_disk("img", "vm", size=SIZE)
        with Rig(rig.dir, "file", SAMPLES).cache() as copies:
            raw = copies.create_root_disk("img", "vm", name="disk.data", size=SIZE)
        header = rig.scratch / "header"
        _overlay(rig, header)
        with (rig.disks / "vm" / "disk.data").open("r+b") as file:
            file.write(header.read_bytes()[:MIB])
        assert raw.format == "raw"
        cache.remove_root_disk("vm")
        assert cache.users("img") == []


# --- what cannot be read


@pytest.fixture(params=["link", "path"])
def open_rig(request: pytest.FixtureRequest, open_path: Path) -> Rig:
    open_path.chmod(0o777)
    return Rig(open_path, request.param, SAMPLES)


def _as_nobody(rig: Rig, in_child: InChild, act: Callable[[ImageCache], object]) -> None:
    def child() -> None:
        with rig.cache() as cache:
            act(cache)

    in_child(child, unprivileged=True)


def _shut(path: Path) -> None:
    """As libvirt leaves a guest's file: root's, for root alone."""
    path.rename(path.with_suffix(".old"))
    path.write_bytes(path.with_suffix(".old").read_bytes())
    path.with_suffix(".old").unlink()
    path.chmod(0)


@pytest.mark.parametrize("console", ["console.log", "console.log.0"])
def test_a_console_that_root_alone_reads(console: str, open_rig: Rig, in_child: InChild) -> None:
    """It lies in every instance's directory and is no disk: its neighbour goes, and its base with it."""
    _as_nobody(open_rig, in_child, lambda cache: cache.create_root_disk("img", "vm", size=SIZE))
    path = open_rig.disks / "vm" / console
    path.write_text("login: ")
    path.chmod(0)

    def remove(cache: ImageCache) -> None:
        cache.remove_root_disk("vm")
        assert cache.users("img") == []

    _as_nobody(open_rig, in_child, remove)
    assert [entry.name for entry in (open_rig.disks / "vm").iterdir()] == [console]


def test_two_disks_that_root_alone_reads(open_rig: Rig, in_child: InChild) -> None:
    """Each has a record, and so a reference of its own: neither stands in the other's way."""

    def make(cache: ImageCache) -> None:
        for name in ("disk", "disk.rescue"):
            cache.create_root_disk("img", "vm", name=name, size=SIZE)

    def remove(cache: ImageCache) -> None:
        for name in ("disk", "disk.rescue"):
            cache.remove_root_disk("vm", name=name)
        assert cache.users("img") == []

    _as_nobody(open_rig, in_child, make)
    for name in ("disk", "disk.rescue"):
        _shut(open_rig.disks / "vm" / name)
    _as_nobody(open_rig, in_child, remove)


def test_any_other_file_that_root_alone_reads(open_rig: Rig, in_child: InChild) -> None:
    """Nothing says what it is, so it may be a snapshot: what it may read through stays."""
    _as_nobody(open_rig, in_child, lambda cache: cache.create_root_disk("img", "vm", size=SIZE))
    snapshot = open_rig.disks / "vm" / "disk.snap"
    _overlay(open_rig, snapshot)
    snapshot.chmod(0)

    def remove(cache: ImageCache) -> None:
        with pytest.raises(DiskExistsError, match=r"disk\.snap"):
            cache.remove_root_disk("vm")
        assert cache.users("img")

    _as_nobody(open_rig, in_child, remove)


def test_what_a_block_pull_left_beside_a_console(open_rig: Rig, in_child: InChild) -> None:
    """It is swept all the same."""
    _as_nobody(open_rig, in_child, lambda cache: cache.create_root_disk("img", "vm", size=SIZE))
    home = open_rig.disks / "vm"
    qemu_img("rebase", "-q", "-f", "qcow2", "-b", "", str(home / "disk"))
    (home / "console.log").write_text("login: ")
    (home / "console.log").chmod(0)

    def sweep(cache: ImageCache) -> None:
        cache.recover()
        assert cache.users("img") == []

    _as_nobody(open_rig, in_child, sweep)

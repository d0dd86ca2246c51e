"""What ``recover()`` takes and what it leaves, among the disks of a host."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import InChild
from harness import images, places
from harness.images import MIB, qemu_img
from harness.rig import Rig
from nova_imagecache.testing import FaultPlan

SIZE = 4 * MIB


@pytest.fixture(params=["link", "path"])
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    with places.quick(tmp_path) as directory:
        yield Rig(directory, request.param, {"img": images.raw("recovered")})


@pytest.mark.parametrize("damage", [b"QFI\xfb\0\0\0\x09", b"QFI\xfb", b""], ids=["version", "short", "empty"])
def test_a_disk_with_a_damaged_header_keeps_its_base(damage: bytes, rig: Rig) -> None:
    """What it reads through cannot be told: neither its link nor its reference goes, and it can still be mended."""
    cache = rig.cache()
    cache.create_root_disk("img", "vm", size=SIZE)
    disk = rig.disks / "vm" / "disk"
    whole = disk.read_bytes()
    disk.write_bytes(damage)
    assert cache.recover().removed == ()
    assert cache.cleanup(cache.plan_cleanup(max_idle=0)).removed == ()
    disk.write_bytes(whole)
    rig.check("mended")
    rig.check_tidy("mended")


def test_a_disk_that_was_flattened_by_others_lets_its_base_go(rig: Rig) -> None:
    """Its header names nothing any more: what tied it is taken away, once."""
    cache = rig.cache()
    cache.create_root_disk("img", "vm", size=SIZE)
    path = str(rig.disks / "vm" / "disk")
    qemu_img("rebase", "-q", "-f", "qcow2", "-b", "", path)
    assert cache.recover().removed == (("disks/vm/disk.base",) if rig.kind == "link" else ())
    assert cache.users("img") == []
    assert cache.get_root_disk("vm").reference == "none"
    assert cache.recover().removed == ()


def test_directories_of_others_are_passed_over(open_path: Path, in_child: InChild) -> None:
    """A filesystem of its own has one that root alone may list: it stops nothing and is no failure."""
    open_path.chmod(0o777)
    rig = Rig(open_path, "link", {"img": images.raw("recovered")})

    def make() -> None:
        rig.cache().create_root_disk("img", "vm", size=SIZE)

    in_child(make, unprivileged=True)
    (rig.disks / "lost+found").mkdir()
    (rig.disks / "lost+found").chmod(0o700)
    (rig.disks / "vm" / "disk").unlink()

    def recover() -> tuple[tuple[str, ...], dict[str, str]]:
        report = rig.cache().recover()
        return report.removed, report.failed

    removed, failed = in_child(recover, unprivileged=True)
    assert failed == {}
    assert removed == ("disks/vm/disk.base",)
    assert not (rig.disks / "vm").exists(), "its record went along"


def test_a_directory_of_ours_that_cannot_be_listed_is_a_failure(open_path: Path, in_child: InChild) -> None:
    """Told, with the others swept all the same."""
    open_path.chmod(0o777)
    rig = Rig(open_path, "link", {"img": images.raw("recovered")})

    def make() -> None:
        for disk_id in ("a", "b"):
            rig.cache().create_root_disk("img", disk_id, size=SIZE)
        (rig.disks / "a").chmod(0)
        (rig.disks / "b" / "disk").unlink()

    in_child(make, unprivileged=True)

    def recover() -> tuple[int, list[str]]:
        report = rig.cache().recover()
        return len(report.removed), list(report.failed)

    assert in_child(recover, unprivileged=True) == (1, ["disks/a"])
    (rig.disks / "a").chmod(0o755)


@pytest.mark.parametrize("entry", ["staging/img.0123456789abcdef", "trash/img.0123456789abcdef", "users/img"])
def test_an_entry_of_others_is_a_failure(entry: str, open_path: Path, in_child: InChild) -> None:
    """As of a command that root ran and that was killed: told, with everything else swept all the same."""
    open_path.chmod(0o777)
    rig = Rig(open_path, "path", {"img": images.raw("recovered"), "other": images.raw("another")})
    litter = ["staging/x.0123456789abcdef", "staging/z.0123456789abcdef", "trash/z.0123456789abcdef"]

    def make() -> None:
        rig.cache().create_root_disk("other", "vm", size=SIZE)
        for name in ("trash", *litter):
            (rig.root / name).mkdir()
        twice = rig.root / "users" / "other" / "older.disk.json"
        twice.write_bytes((rig.root / "users" / "other" / "vm.disk.json").read_bytes().replace(b"/vm/", b"/older/"))

    in_child(make, unprivileged=True)
    (rig.root / entry).mkdir()
    (rig.root / entry).chmod(0o700)

    def recover() -> tuple[set[str], list[str]]:
        report = rig.cache().recover()
        return set(report.removed), list(report.failed)

    assert in_child(recover, unprivileged=True) == ({*litter, "users/other/older.disk.json"}, [entry])


def test_whole_disks_are_not_held_for_a_look(rig: Rig) -> None:
    """A recover over thousands of directories stands in nobody's way: it holds those where something is dead."""
    cache = rig.cache()
    for number in range(3):
        cache.create_root_disk("img", f"vm-{number}", size=SIZE)
    with FaultPlan() as plan:
        assert cache.recover().removed == ()
    assert plan.trace == ()
    (rig.disks / "vm-1" / "disk").unlink()
    removed = cache.recover().removed
    assert {os.path.dirname(name) for name in removed} == {"disks/vm-1"}  # noqa: PTH120 - reason: of a name
    rig.check_tidy("recovered")

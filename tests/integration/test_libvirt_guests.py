"""Guests of a real libvirtd boot from every kind of root disk; what they depend on stays, and goes after them."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from harness.images import qemu_img
from nova_imagecache import BaseInUseError
from nova_imagecache.domains import disk_element
from services.libvirtd_ground import Ground
from services.libvirtd_guests import Guests
from services.libvirtd_rig import BootRig, path_of, says

pytestmark = pytest.mark.services

SIZE = 4 * 2**20


@pytest.mark.parametrize(
    ("kind", "apart", "finding", "reference"),
    [
        ("link", False, False, "link"),
        ("link-native", False, False, "link"),
        ("path", False, False, "path"),
        ("path-native", False, True, "path"),
        ("link", True, False, "path"),
        ("file", False, False, "none"),
        ("file-native", False, True, "none"),
    ],
    ids=["link", "link-native", "path", "path-native", "another-filesystem", "file", "file-native"],
)
def test_two_guests_of_one_image(
    kind: str, apart: bool, finding: bool, reference: str, libvirt_ground: Ground, libvirt_guests: Guests
) -> None:
    """Each reads the base and writes its own disk; while it runs, or may run again, the base stays, and goes then."""
    rig = BootRig(libvirt_ground, kind, apart=apart)
    source = rig.source()
    with rig.finding(source) if finding else rig.cache(source) as cache:
        first = cache.create_root_disk("one", "vm-1", size=SIZE)
        digest = rig.digest("one")
        assert libvirt_guests.boot("g-1", disk_element(first, cache="writeback")) == says("ONE")
        libvirt_guests["g-1"].destroy()
        assert libvirt_guests["g-1"].boot() == says("ONE", again=True), "its own disk"
        second = cache.create_root_disk("one", "vm-2", size=SIZE)
        assert (first.reference, second.reference, source.opens) == (reference, reference, 1), "from the warm base"
        assert libvirt_guests.boot("g-2", disk_element(second, cache="writeback")) == says("ONE"), "not the first one's"
        assert rig.digest("one") == digest
        cache.verify_base("one")
        cache.ensure_base("two")
        kept = ["one"] if rig.references else []  # a copy needs no base
        for state in ("running", "shut off"):
            cache.cleanup(cache.plan_cleanup(max_idle=0))
            assert [base.image_id for base in cache.bases()] == kept, state
            for number in (1, 2):
                libvirt_guests[f"g-{number}"].destroy()
        if rig.references:
            with pytest.raises(BaseInUseError):
                cache.remove_base("one")
        assert libvirt_guests["g-2"].boot() == says("ONE", again=True), "after the cleanups"
        libvirt_guests.forget()
        for disk in (first, second):
            cache.remove_root_disk(disk.disk_id)
        cache.cleanup(cache.plan_cleanup(max_idle=0))
        assert list(cache.bases()) == []
    rig.check_tidy("after the guests")


def test_what_a_guest_writes_into_its_header(libvirt_ground: Ground, libvirt_guests: Guests) -> None:
    """A raw disk is raw whatever its guest has written on it: no file that a header names is opened (CVE-2014-0134)."""
    rig = BootRig(libvirt_ground, "file")
    secret = rig.dir / "secret"
    secret.write_bytes(bytes(2**20))
    with rig.cache() as cache:
        disk = cache.create_root_disk("one", "vm")
        forged = rig.dir / "forged"
        qemu_img("create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(secret), str(forged))
        with path_of(disk).open("r+b") as file:
            file.write(forged.read_bytes())
        libvirt_guests["g"].define([disk_element(disk)])
        libvirt_guests["g"].start()
        running = ET.fromstring(libvirt_guests["g"].domain.XMLDesc())
        assert running.find("devices/disk/backingStore/source") is None
        assert f":{secret.stat().st_ino} " not in Path("/proc/locks").read_text(), "qemu locks what it opens"
        assert f":{path_of(disk).stat().st_ino} " in Path("/proc/locks").read_text()


@pytest.mark.parametrize("kind", ["link", "path"])
def test_every_disk_of_a_guest_counts(kind: str, libvirt_ground: Ground, libvirt_guests: Guests) -> None:
    """A second disk and a rescue disk keep their bases while the guest runs from them and while it does not."""
    rig = BootRig(libvirt_ground, kind)
    with rig.cache() as cache:
        disk = cache.create_root_disk("one", "vm")
        second = cache.create_root_disk("two", "vm", name="disk.eph1")
        libvirt_guests.boot("g", disk_element(disk), disk_element(second, target="vdb"))
        assert cache.cleanup(cache.plan_cleanup(max_idle=0)).removed == ()
        libvirt_guests["g"].destroy()
        assert cache.cleanup(cache.plan_cleanup(max_idle=0)).removed == ()
        cache.remove_root_disk("vm", name="disk.eph1")
        rescue = cache.create_root_disk("two", "vm", name="disk.rescue")
        assert libvirt_guests.boot("g", disk_element(rescue), disk_element(disk, target="vdb")) == says("TWO")
        assert cache.cleanup(cache.plan_cleanup(max_idle=0)).removed == ()
        libvirt_guests["g"].destroy()
        assert cache.cleanup(cache.plan_cleanup(max_idle=0)).removed == ()
        cache.remove_root_disk("vm", name="disk.rescue")
        assert cache.cleanup(cache.plan_cleanup(max_idle=0)).removed == ("two",)
        assert libvirt_guests.boot("g", disk_element(cache.get_root_disk("vm"))) == says("ONE", again=True)


@pytest.mark.parametrize("kind", ["link", "path"])
def test_a_directory_that_is_put_aside(kind: str, libvirt_ground: Ground, libvirt_guests: Guests) -> None:
    """``<uuid>_resize`` holds the old disk until the resize is confirmed; it boots when the resize is reverted."""
    rig = BootRig(libvirt_ground, kind)
    with rig.cache() as cache:
        libvirt_guests.boot("g", disk_element(cache.create_root_disk("one", "vm")))
        libvirt_guests.forget()
        (rig.disks / "vm").rename(rig.disks / "vm_resize")
        assert cache.cleanup(cache.plan_cleanup(max_idle=0)).removed == ()
        cache.recover()
        assert cache.cleanup(cache.plan_cleanup(max_idle=0)).removed == ()
        (rig.disks / "vm_resize").rename(rig.disks / "vm")
        assert libvirt_guests.boot("g", disk_element(cache.get_root_disk("vm"))) == says("ONE", again=True)


def test_the_element_follows_its_disk(libvirt_ground: Ground, libvirt_guests: Guests) -> None:
    """A disk that moved boots from an element made anew, a flattened one as well."""
    rig = BootRig(libvirt_ground, "link")
    with rig.cache() as cache:
        libvirt_guests.boot("g", disk_element(cache.create_root_disk("one", "vm")))
        libvirt_guests["g"].destroy()
        (rig.disks / "vm").rename(rig.disks / "moved")
        moved = cache.get_root_disk("moved")
        assert _base_of(disk_element(moved)) == rig.disks / "moved" / "disk.base"
        assert libvirt_guests.boot("g", disk_element(moved)) == says("ONE", again=True)
        libvirt_guests["g"].destroy()
        flat = cache.flatten_root_disk("moved")
        assert _base_of(disk_element(flat)) is None
        assert libvirt_guests.boot("g", disk_element(flat)) == says("ONE", again=True)
        assert cache.users("one") == []
        assert path_of(flat).exists()


def _base_of(element: ET.Element) -> Path | None:
    source = element.find("backingStore/source")
    return None if source is None else Path(source.get("file", ""))

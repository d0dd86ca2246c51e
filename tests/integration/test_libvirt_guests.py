"""Guests of a real libvirtd boot from every kind of root disk; what they depend on stays, and goes after them."""

from __future__ import annotations

from pathlib import Path

import pytest

from nova_imagecache import BaseInUseError
from nova_imagecache.domains import disk_element
from services.libvirtd_ground import Ground
from services.libvirtd_guests import Guests
from services.libvirtd_rig import BootRig, path_of, says

pytestmark = pytest.mark.services

SIZE = 4 * 2**20


@pytest.mark.parametrize(
    ("kind", "apart", "reference"),
    [
        ("link", False, "link"),
        ("link-native", False, "link"),
        ("path", False, "path"),
        ("link", True, "path"),
        ("file", False, "none"),
    ],
    ids=["link", "link-native", "path", "another-filesystem", "file"],
)
def test_two_guests_of_one_image(
    kind: str, apart: bool, reference: str, libvirt_ground: Ground, libvirt_guests: Guests
) -> None:
    """Each reads the base, writes its own disk and finds that again; the base's bytes stay as they are."""
    rig = BootRig(libvirt_ground, kind, apart=apart)
    with rig.cache() as cache:
        disks = [cache.create_root_disk("one", f"vm-{number}", size=SIZE) for number in (1, 2)]
        digest = rig.digest("one")
        assert [disk.reference for disk in disks] == [reference] * 2
        elements = [disk_element(disk, cache="writeback") for disk in disks]
        assert libvirt_guests.boot("g-1", elements[0]) == says("ONE")
        libvirt_guests["g-1"].destroy()
        assert libvirt_guests["g-1"].boot() == says("ONE", again=True), "its own disk"
        assert libvirt_guests.boot("g-2", elements[1]) == says("ONE"), "not the first one's"
        assert rig.digest("one") == digest
        libvirt_guests.forget()
        for disk in disks:
            cache.remove_root_disk(disk.disk_id)
        cache.verify_base("one")
    rig.check_tidy("after the guests")


@pytest.mark.parametrize(("kind", "finding"), [("link", False), ("path", False), ("path", True)])
def test_cleanup_while_guests_run(kind: str, finding: bool, libvirt_ground: Ground, libvirt_guests: Guests) -> None:
    """Bases of running and of shut-off guests stay, of guests that are gone they go; a base without guests goes."""
    rig = BootRig(libvirt_ground, kind)
    with rig.finding() if finding else rig.cache() as cache:
        for number in (1, 2):
            disk = cache.create_root_disk("one", f"vm-{number}")
            libvirt_guests.boot(f"g-{number}", disk_element(disk))
        cache.ensure_base("two")
        assert cache.cleanup(cache.plan_cleanup(max_idle=0)).removed == ("two",)
        with pytest.raises(BaseInUseError):
            cache.remove_base("one")
        for number in (1, 2):
            libvirt_guests[f"g-{number}"].destroy()
        assert cache.cleanup(cache.plan_cleanup(max_idle=0)).removed == ()
        assert libvirt_guests["g-1"].boot() == says("ONE", again=True)
        libvirt_guests.forget()
        for number in (1, 2):
            cache.remove_root_disk(f"vm-{number}")
        assert cache.cleanup(cache.plan_cleanup(max_idle=0)).removed == ("one",)
    rig.check_tidy("after the guests")


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


def _base_of(element: object) -> Path | None:
    from xml.etree import ElementTree as ET

    assert isinstance(element, ET.Element)
    source = element.find("backingStore/source")
    return None if source is None else Path(source.get("file", ""))

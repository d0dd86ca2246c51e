"""The ``<disk>`` of every kind of root disk, and what is said where libvirt is not installed."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from harness.images import qemu_img
from harness.rig import Rig
from nova_imagecache import (
    BlockLocation,
    DiskNotFoundError,
    FileLocation,
    InvalidRequestError,
    RbdLocation,
    RootDisk,
    UsersUnknownError,
)
from nova_imagecache._models import Location, Reference
from nova_imagecache.domains import LibvirtDomains, disk_element
from services import libvirtd
from services.libvirtd_guests import Guests
from services.libvirtd_rig import bootable, path_of
from services.require import require

RBD = RbdLocation(
    pool="vms",
    name="vm_disk",
    hosts=(("192.0.2.1", 6789), ("2001:db8::1", 6789)),
    user="nova",
    secret_uuid="5d3cbb5e-0c36-4ac2-8b09-ad7b2ad7b02b",
)


def _disk(location: Location, image_format: str = "raw", reference: Reference = "none") -> RootDisk:
    return RootDisk(
        disk_id="vm",
        name="disk",
        location=location,
        format=image_format,
        virtual_size=2**20,
        image_id="one",
        reference=reference,
    )


def _rig(tmp_path: Path, kind: str) -> Rig:
    return Rig(tmp_path, kind, {"one": bootable("ONE", "qcow2" if "native" in kind else "raw")})


def _text(element: ET.Element) -> str:
    return ET.tostring(element, encoding="unicode")


@pytest.mark.parametrize(("kind", "base_format"), [("link", "raw"), ("link-native", "qcow2")])
def test_a_linked_overlay(kind: str, base_format: str, tmp_path: Path) -> None:
    """The link beside the disk is spelled out, absolute, in its format, with its owner left alone."""
    disk = _rig(tmp_path, kind).cache().create_root_disk("one", "vm")
    assert _text(disk_element(disk)) == (
        '<disk device="disk" type="file"><driver name="qemu" type="qcow2" cache="none" />'
        f'<source file="{tmp_path}/disks/vm/disk" />'
        f'<backingStore type="file"><format type="{base_format}" /><source file="{tmp_path}/disks/vm/disk.base">'
        '<seclabel model="dac" relabel="no" /></source><backingStore /></backingStore>'
        '<target dev="vda" bus="virtio" /></disk>'
    )


def test_an_overlay_that_names_its_base_by_path(tmp_path: Path) -> None:
    """The base's own path is what the overlay says, or what the caller says."""
    rig = _rig(tmp_path, "path")
    disk = rig.cache().create_root_disk("one", "vm")
    for element in (disk_element(disk), disk_element(disk, backing=rig.root / "bases/one/disk")):
        source = element.find("backingStore/source")
        assert source is not None
        assert source.get("file") == str(rig.root / "bases/one/disk")


@pytest.mark.parametrize("kind", ["link", "path"])
def test_an_overlay_that_stands_alone(kind: str, tmp_path: Path) -> None:
    """One that is flattened, by us or behind our back, has an empty backing store: nothing is probed."""
    cache = _rig(tmp_path, kind).cache()
    disk = cache.create_root_disk("one", "vm")
    qemu_img("rebase", "-q", "-f", "qcow2", "-b", "", str(path_of(disk)))
    for flat in (disk, cache.flatten_root_disk("vm")):
        assert "<backingStore />" in _text(disk_element(flat))


def test_an_overlay_that_nobody_here_may_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Libvirt keeps a disk that it could not give back: our record says enough for a link, not for a path."""

    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    rigs = {kind: _rig(tmp_path / kind, kind) for kind in ("link", "path")}
    disks = {kind: rig.cache().create_root_disk("one", "vm") for kind, rig in rigs.items()}
    monkeypatch.setattr("nova_imagecache._qcow2.read_backing_name", forbidden)
    assert disk_element(disks["link"]).find("backingStore/source") is not None
    with pytest.raises(InvalidRequestError, match="backing="):
        disk_element(disks["path"])
    assert disk_element(disks["path"], backing=Path("/base")).find("backingStore/source") is not None


def test_an_overlay_without_its_record(tmp_path: Path) -> None:
    """The base's format is never guessed."""
    disk = _rig(tmp_path, "link").cache().create_root_disk("one", "vm")
    path_of(disk).with_name("disk.json").unlink()
    with pytest.raises(DiskNotFoundError, match="record"):
        disk_element(disk)


def test_disks_without_a_base() -> None:
    """A raw file, a block device: their format is stated, and there is no chain."""
    file = disk_element(_disk(FileLocation(path=Path("/d/vm/disk"))), cache=None, io="threads", discard="unmap")
    assert _text(file) == (
        '<disk device="disk" type="file"><driver name="qemu" type="raw" io="threads" discard="unmap" />'
        '<source file="/d/vm/disk" /><target dev="vda" bus="virtio" /></disk>'
    )
    block = disk_element(_disk(BlockLocation(path=Path("/dev/vg/vm"))), target="sda", bus="scsi")
    assert _text(block) == (
        '<disk device="disk" type="block"><driver name="qemu" type="raw" cache="none" />'
        '<source dev="/dev/vg/vm" /><target dev="sda" bus="scsi" /></disk>'
    )


def test_an_rbd_disk() -> None:
    """Monitors, user and the secret's uuid: never the key."""
    assert _text(disk_element(_disk(RBD, reference="clone"))) == (
        '<disk device="disk" type="network"><driver name="qemu" type="raw" cache="none" />'
        '<source protocol="rbd" name="vms/vm_disk"><host name="192.0.2.1" port="6789" />'
        '<host name="2001:db8::1" port="6789" /><auth username="nova">'
        f'<secret type="ceph" uuid="{RBD.secret_uuid}" /></auth></source>'
        '<target dev="vda" bus="virtio" /></disk>'
    )


@pytest.mark.services
def test_libvirt_takes_every_element(tmp_path: Path, libvirt_guests: Guests) -> None:
    """Libvirt's own schema has no objection to any of them."""
    overlay = _rig(tmp_path, "link-native").cache().create_root_disk("one", "vm")
    disks = [overlay, _disk(RBD), _disk(BlockLocation(path=Path("/dev/vg/vm"))), _disk(FileLocation(path=Path("/d")))]
    elements = [
        disk_element(disk, target=f"vd{letter}", io="threads", discard="unmap")
        for letter, disk in zip("abcd", disks, strict=True)
    ]
    libvirt_guests["g"].define(elements)
    kept = ET.fromstring(libvirt_guests["g"].domain.XMLDesc())
    assert [disk.get("type") for disk in kept.iterfind("devices/disk")] == ["file", "network", "block", "file"]
    assert kept.find("devices/disk/backingStore/source/seclabel[@relabel='no']") is not None


def test_without_libvirt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The finder says what to install, and every base is kept; elements need no libvirt."""
    monkeypatch.setitem(sys.modules, "libvirt", None)
    with _rig(tmp_path, "link").cache(user_finders=[LibvirtDomains()]) as cache:
        disk_element(cache.create_root_disk("one", "vm"))
        cache.remove_root_disk("vm")
        with pytest.raises(UsersUnknownError, match=r"nova-imagecache\[libvirt\].*libvirt-dev"):
            cache.users("one")
        [item] = cache.plan_cleanup(max_idle=0).items
        assert (item.verdict, item.reason) == ("keep", "its users are unknown")


@pytest.mark.services
def test_nobody_listens(tmp_path: Path) -> None:
    """A socket that is not there is doubt."""
    require(libvirtd.missing())
    finder = LibvirtDomains(f"qemu:///system?socket={tmp_path}/nothing")
    with pytest.raises(UsersUnknownError, match="libvirt cannot be asked"):
        list(finder.find([]))

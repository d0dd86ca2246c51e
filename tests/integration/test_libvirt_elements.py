"""The ``<disk>`` of every kind of root disk, and what is said where libvirt is not installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from string import ascii_lowercase
from typing import TYPE_CHECKING
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
from services.libvirtd_guests import Guests, domain_xml
from services.libvirtd_rig import bootable, path_of
from services.require import require

if TYPE_CHECKING:
    from conftest import InChild

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


def test_a_name_that_a_block_job_wrote(tmp_path: Path) -> None:
    """Block jobs write names in JSON or in part: what is spelled out is a file's absolute path."""
    rig = _rig(tmp_path, "path")
    disk = rig.cache().create_root_disk("one", "vm")
    base = rig.root / "bases/one/disk"
    for name in (
        f'json:{{"driver": "raw", "file": {{"driver": "file", "filename": "{base}"}}}}',
        "../../root/bases/one/disk",
    ):
        qemu_img("rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", name, str(path_of(disk)))
        source = disk_element(disk).find("backingStore/source")
        assert source is not None
        spelled = Path(source.get("file", ""))
        assert spelled.is_absolute()
        assert spelled.samefile(base)


def test_a_link_that_the_overlay_names_by_an_old_path(tmp_path: Path) -> None:
    """A block job made the name absolute, and then the disk's directory moved: the link beside it is the base."""
    rig = _rig(tmp_path, "link")
    disk = rig.cache().create_root_disk("one", "vm")
    qemu_img("rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", str(rig.disks / "vm/disk.base"), str(path_of(disk)))
    (rig.disks / "vm").rename(rig.disks / "moved")
    source = disk_element(rig.cache().get_root_disk("moved")).find("backingStore/source")
    assert source is not None
    assert source.get("file") == str(rig.disks / "moved/disk.base")


def test_an_overlay_with_something_in_between(tmp_path: Path) -> None:
    """What is spelled out is believed: a layer that the element would leave out is an error that says what to do."""
    rig = _rig(tmp_path, "link")
    disk = rig.cache().create_root_disk("one", "vm")
    between = path_of(disk).with_name("between")
    qemu_img("create", "-q", "-f", "qcow2", "-F", "raw", "-b", "disk.base", str(between))
    qemu_img("rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", "between", str(path_of(disk)))
    with pytest.raises(InvalidRequestError, match=r"reads through .*/between .*Commit"):
        disk_element(disk)
    between.unlink()
    between.hardlink_to(rig.root / "bases/one/disk")
    assert disk_element(disk).find("backingStore/source") is not None, "another name of the base"


def test_an_overlay_that_the_cache_may_not_read(open_path: Path, in_child: InChild) -> None:
    """Libvirt keeps a disk that it could not give back: our record says enough for a link, not for a path."""
    disks = {}
    for kind in ("link", "path"):
        (open_path / kind).mkdir(mode=0o755)
        disks[kind] = _rig(open_path / kind, kind).cache().create_root_disk("one", "vm")
        for path in (open_path / kind, open_path / kind / "disks", open_path / kind / "disks/vm"):
            path.chmod(0o755)
        path_of(disks[kind]).chmod(0)

    def spelled(kind: str, backing: Path | None = None) -> str:
        return str(in_child(lambda: _text(disk_element(disks[kind], backing=backing)), unprivileged=True))

    assert f'<source file="{open_path}/link/disks/vm/disk.base">' in spelled("link")
    with pytest.raises(InvalidRequestError, match="backing="):
        spelled("path")
    assert '<source file="/base">' in spelled("path", Path("/base"))


def test_an_overlay_without_its_record(tmp_path: Path) -> None:
    """The base's format is never guessed."""
    disk = _rig(tmp_path, "link").cache().create_root_disk("one", "vm")
    path_of(disk).with_name("disk.json").unlink()
    with pytest.raises(DiskNotFoundError, match="record"):
        disk_element(disk)


def test_an_overlay_that_is_not_there(tmp_path: Path) -> None:
    """What was removed is not described as if it stood alone."""
    disk = _rig(tmp_path, "link").cache().create_root_disk("one", "vm")
    path_of(disk).unlink()
    with pytest.raises(DiskNotFoundError):
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


# --- what libvirt's schema says

CACHES = ("none", "writeback", "writethrough", "directsync", "unsafe", None)
IOS = ("native", "threads", "io_uring", None)
DISCARDS = ("unmap", "ignore", None)


def _every_kind(tmp_path: Path) -> dict[str, RootDisk]:
    """A root disk of every kind; those on files are real."""
    kinds = ("link", "link-native", "path", "path-native", "file", "file-native")
    made = {kind: _rig(tmp_path / kind, kind).cache().create_root_disk("one", "vm") for kind in kinds}
    flat = _rig(tmp_path / "flat", "link").cache()
    flat.create_root_disk("one", "vm")
    return {
        **made,
        "flattened": flat.flatten_root_disk("vm"),
        "block": _disk(BlockLocation(path=Path("/dev/vg/vm"))),
        "rbd": _disk(RBD, reference="clone"),
        "rbd of ceph.conf": _disk(RbdLocation(pool="vms", name="vm_disk")),
    }


def _judged(elements: list[ET.Element], tmp_path: Path) -> str:
    """What virt-xml-validate says of a domain with these disks."""
    missing = [name for name in ("virt-xml-validate", "xmllint") if shutil.which(name) is None]
    require(f"{' and '.join(missing)} missing; tools/setup.sh test installs libvirt's schemas" if missing else None)
    path = tmp_path / "domain.xml"
    path.write_text(domain_xml("g", elements, console=tmp_path / "console"))
    done = subprocess.run(["virt-xml-validate", path, "domain"], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


@pytest.mark.services
def test_every_element_fits_the_schema(tmp_path: Path) -> None:
    """Every kind of root disk with every word that libvirt has for cache, io and discard."""
    elements = [
        disk_element(disk, target=f"vd{letter}{other}", cache=cache, io=io, discard=discard)
        for letter, disk in zip("abcdefghij", _every_kind(tmp_path).values(), strict=True)
        for other, (cache, io, discard) in zip(ascii_lowercase, _words(), strict=False)
    ]
    assert len(elements) == 10 * 6
    assert _judged(elements, tmp_path).endswith("domain.xml validates\n")


def _words() -> list[tuple[str | None, str | None, str | None]]:
    """Every word at least once."""
    longest = max(len(words) for words in (CACHES, IOS, DISCARDS))
    return [(CACHES[n % len(CACHES)], IOS[n % len(IOS)], DISCARDS[n % len(DISCARDS)]) for n in range(longest)]


@pytest.mark.services
@pytest.mark.parametrize("option", ["cache", "io", "discard"])
def test_the_schema_refuses_other_words(option: str, tmp_path: Path) -> None:
    """So that the test above says something."""
    disk = _disk(FileLocation(path=Path("/d")))
    element = {
        "cache": disk_element(disk, cache="fast"),
        "io": disk_element(disk, io="fast"),
        "discard": disk_element(disk, discard="fast"),
    }[option]
    assert "fails to validate" in _judged([element], tmp_path)


@pytest.mark.services
def test_libvirt_takes_every_element(tmp_path: Path, libvirt_guests: Guests) -> None:
    """And keeps what it says: the types, the chains to their ends, whose owner stays."""
    disks = _every_kind(tmp_path)
    elements = [
        disk_element(disk, target=f"vd{letter}", io="threads", discard="unmap")
        for letter, disk in zip(ascii_lowercase, disks.values(), strict=False)
    ]
    libvirt_guests["g"].define(elements)
    kept = ET.fromstring(libvirt_guests["g"].domain.XMLDesc()).findall("devices/disk")
    assert [disk.get("type") for disk in kept] == ["file"] * 7 + ["block", "network", "network"]
    for (kind, disk), element in zip(disks.items(), kept, strict=True):
        driver, source = element.find("driver"), element.find("backingStore/source")
        assert driver is not None
        assert driver.attrib == {
            "name": "qemu",
            "type": disk.format,
            "cache": "none",
            "io": "threads",
            "discard": "unmap",
        }, kind
        assert (source is not None) == (disk.reference in ("link", "path")), kind
        if source is not None:
            assert Path(source.get("file", "")).is_absolute()
            assert element.find("backingStore/source/seclabel[@relabel='no'][@model='dac']") is not None
            assert element.find("backingStore/backingStore") is not None, "the end of the chain"


# --- without libvirt


def test_without_libvirt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The finder says what to install, and every base is kept; elements need no libvirt."""
    monkeypatch.setitem(sys.modules, "libvirt", None)
    with _rig(tmp_path, "link").cache(user_finders=[LibvirtDomains()]) as cache:
        disk_element(cache.create_root_disk("one", "vm"))
        cache.remove_root_disk("vm")
        with pytest.raises(UsersUnknownError, match=r"nova-imagecache\[libvirt\].*libvirt-dev"):
            cache.users("one")
        [item] = cache.plan_cleanup(max_idle=0).items
        assert (item.verdict, item.reason[:21]) == ("keep", "its users are unknown")


@pytest.mark.services
def test_nobody_listens(tmp_path: Path) -> None:
    """A socket that is not there is doubt."""
    require(libvirtd.missing())
    finder = LibvirtDomains(f"qemu:///system?socket={tmp_path}/nothing")
    with pytest.raises(UsersUnknownError, match="libvirt cannot be asked"):
        list(finder.find([]))

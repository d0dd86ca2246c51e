"""Guests under libvirt whose disks are clones in Ceph of an image that Glance keeps there."""

from __future__ import annotations

import base64
import hashlib
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import rbd as pool
from harness.images import MIB
from nova_imagecache import CacheConfig, GlanceSource, ImageCache
from nova_imagecache.domains import disk_element
from nova_imagecache.exceptions import DiskInUseError
from services import guest
from services.ceph import CephCluster
from services.glance import GlanceServer
from services.libvirtd_guests import Guests
from services.libvirtd_rig import bootable, says
from services.require import require

pytestmark = pytest.mark.services

SIZE = 4 * MIB


@pytest.fixture(autouse=True)
def _empty(ceph: CephCluster) -> Iterator[None]:
    pool.empty(ceph)
    yield
    pool.empty(ceph)


def _missing() -> str | None:
    found = any(Path("/usr/lib").glob("*/qemu/block-rbd.so"))
    return None if found else "qemu has no driver for Ceph: tools/setup.sh test installs qemu-block-extra"


@pytest.fixture
def secret(ceph: CephCluster, libvirt_guests: Guests) -> Iterator[str]:
    """The uuid of libvirt's secret with the key of client.nova."""
    require(_missing())
    name = str(uuid.uuid4())
    xml = (
        f"<secret ephemeral='yes' private='yes'><uuid>{name}</uuid>"
        f"<usage type='ceph'><name>nova {name}</name></usage></secret>"
    )
    defined = libvirt_guests.connection.secretDefineXML(xml)
    defined.setValue(base64.b64decode(ceph.key("nova")))
    yield name
    libvirt_guests.forget()
    defined.undefine()


def test_two_guests_of_one_clonable_image(
    ceph: CephCluster,
    glance_rbd: GlanceServer,
    libvirt_guests: Guests,
    secret: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each reads Glance's image, writes its own disk and finds that again; the parent's bytes stay as they are."""
    sample = bootable("ONE")
    image_id = glance_rbd.upload(sample.served)
    source = GlanceSource(endpoint=glance_rbd.url, token="admin:testproject:admin,member,reader,service")
    config = CacheConfig(root=tmp_path / "root", disks_dir=tmp_path / "disks", backend="rbd")
    backend = pool.make_backend(ceph, tmp_path, secret_uuid=secret)
    with ImageCache(config, source=source, backend=backend) as cache:
        disks = [cache.create_root_disk(image_id, f"vm-{number}", size=SIZE) for number in (1, 2)]
        assert glance_rbd.downloads(image_id) == 0
        elements = [disk_element(disk, cache="writeback", discard="unmap") for disk in disks]
        assert libvirt_guests.boot("g-1", elements[0]) == says("ONE")
        with monkeypatch.context() as impatient:
            impatient.setattr(backend.store, "patience", 0.5)
            with pytest.raises(DiskInUseError):
                cache.remove_root_disk("vm-1")
        libvirt_guests["g-1"].destroy()
        assert libvirt_guests["g-1"].boot() == says("ONE", again=True), "its own disk"
        assert libvirt_guests.boot("g-2", elements[1]) == says("ONE"), "not the first one's"
        with pool.opened(ceph, image_id, "images") as image:
            assert hashlib.sha512(image.read(0, image.size())).digest() == hashlib.sha512(sample.guest).digest()
        assert sorted(user.disk_id or "" for user in cache.users(image_id)) == ["vm-1", "vm-2"]
        libvirt_guests.forget()
        for disk in disks:
            with pool.opened(ceph, f"{disk.disk_id}_disk") as image:
                assert image.size() == SIZE
                assert image.read(2 * guest.SECTOR, len(guest.WROTE)) == guest.WROTE.encode()
            cache.remove_root_disk(disk.disk_id)
    assert pool.names(ceph) == []
    glance_rbd.delete(image_id)

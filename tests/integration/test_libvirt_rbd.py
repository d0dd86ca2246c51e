"""Guests under libvirt whose disks are clones in Ceph: of Glance's own image, and of a base that was brought in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from harness import rbd as pool
from harness.images import MIB
from nova_imagecache import CacheConfig, GlanceSource, ImageCache, RootDisk
from nova_imagecache.domains import disk_element
from nova_imagecache.exceptions import DiskInUseError
from services import guest, libvirtd
from services.ceph import CephCluster
from services.glance import ADMIN, GlanceServer
from services.libvirtd_guests import Guests, ceph_secret
from services.libvirtd_rig import bootable, says
from services.require import require

pytestmark = pytest.mark.services

SIZE = 4 * MIB


@pytest.fixture(autouse=True)
def _empty(ceph: CephCluster) -> Iterator[None]:
    with pool.emptied(ceph):
        yield


@pytest.fixture
def secret(ceph: CephCluster, libvirt_guests: Guests) -> Iterator[str]:
    """The uuid of libvirt's secret with the key of client.nova."""
    require(libvirtd.missing_rbd())
    with ceph_secret(libvirt_guests.connection, "nova", ceph.key("nova")) as name:
        yield name
        libvirt_guests.forget()


@pytest.mark.parametrize("image_format", ["raw", "qcow2"], ids=["cloned-where-it-lies", "brought-in-once"])
def test_two_guests_of_one_image(
    image_format: str,
    ceph: CephCluster,
    glance_rbd: GlanceServer,
    libvirt_guests: Guests,
    secret: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each reads the base and writes its own disk; while it runs, or may run again, the base stays as it is."""
    sample = bootable("ONE", image_format)
    image_id = glance_rbd.upload(sample.served, disk_format=image_format)
    adopted = image_format == "raw"
    parent = (image_id, "images") if adopted else (f"base.{image_id}", "vms")
    source = GlanceSource(endpoint=glance_rbd.url, token=ADMIN)
    config = CacheConfig(root=tmp_path / "root", disks_dir=tmp_path / "disks", backend="rbd")
    backend = pool.make_backend(ceph, tmp_path, secret_uuid=secret)
    with ImageCache(config, source=source, backend=backend) as cache:
        first = cache.create_root_disk(image_id, "vm-1", size=SIZE)
        assert libvirt_guests.boot("g-1", _element(first)) == says("ONE")
        with monkeypatch.context() as impatient:
            impatient.setattr(backend.store, "patience", 0.5)
            with pytest.raises(DiskInUseError):
                cache.remove_root_disk("vm-1")
        libvirt_guests["g-1"].destroy()
        assert libvirt_guests["g-1"].boot() == says("ONE", again=True), "its own disk"
        second = cache.create_root_disk(image_id, "vm-2", size=SIZE)
        assert glance_rbd.downloads(image_id) == (0 if adopted else 1), "from the warm base"
        assert libvirt_guests.boot("g-2", _element(second)) == says("ONE"), "not the first one's"
        assert [disk.reference for disk in (first, second)] == ["clone"] * 2
        with pool.opened(ceph, *parent) as image:
            assert hashlib.sha512(image.read(0, image.size())).digest() == hashlib.sha512(sample.guest).digest()
        assert sorted(user.disk_id or "" for user in cache.users(image_id)) == ["vm-1", "vm-2"]
        assert cache.cleanup(cache.plan_cleanup(max_idle=0)).removed == (), "while both run"
        libvirt_guests.forget()
        assert cache.cleanup(cache.plan_cleanup(max_idle=0)).removed == (), "while their disks are there"
        for disk in (first, second):
            with pool.opened(ceph, f"{disk.disk_id}_disk") as image:
                assert image.size() == SIZE
                assert image.read(2 * guest.SECTOR, len(guest.WROTE)) == guest.WROTE.encode()
            cache.remove_root_disk(disk.disk_id)
        assert cache.cleanup(cache.plan_cleanup(max_idle=0)).removed == (() if adopted else (image_id,))
    assert pool.names(ceph) == []
    glance_rbd.delete(image_id)


def _element(disk: RootDisk) -> ET.Element:
    return disk_element(disk, cache="writeback", discard="unmap")

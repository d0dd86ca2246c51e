"""Locations that Glance's metadata do not show, from its location API."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest

from nova_imagecache import CacheConfig, GlanceSource, ImageCache, ImageInfo
from nova_imagecache.backends import BackendPaths
from nova_imagecache.backends.rbd import RbdBackend
from services.ceph import CephCluster
from services.glance import GlanceServer

pytestmark = pytest.mark.services

DATA = b"located" * 20_000


class Shy:
    """A Glance whose metadata show no locations, as most are configured."""

    name = "shy"

    def __init__(self, inner: GlanceSource) -> None:
        self.inner = inner

    def get(self, image_id: str) -> ImageInfo:
        return replace(self.inner.get(image_id), locations=())

    def open(self, image: ImageInfo, offset: int = 0) -> AbstractContextManager[Iterator[bytes]]:
        return self.inner.open(image, offset)

    def with_locations(self, image: ImageInfo) -> ImageInfo:
        return self.inner.with_locations(image)


def glance(server: GlanceServer, roles: str) -> GlanceSource:
    return GlanceSource(endpoint=server.url, token=f"someone:testproject:{roles}")


def test_the_location_api_is_asked(glance_rbd: GlanceServer) -> None:
    """A token that may ask gets the image's places; one that may not leaves the image as it is."""
    image_id = glance_rbd.upload(DATA)
    shown = glance(glance_rbd, "admin,member,reader,service").get(image_id)
    hidden = replace(shown, locations=())
    assert glance(glance_rbd, "admin,member,reader,service").with_locations(hidden).locations == shown.locations
    assert glance(glance_rbd, "member").with_locations(hidden) == hidden


def test_an_image_without_shown_locations_is_adopted(
    ceph: CephCluster, glance_rbd: GlanceServer, tmp_path: Path
) -> None:
    """It is cloned where it lies all the same, and nothing is downloaded."""
    image_id = glance_rbd.upload(DATA)
    options = {"conf": str(ceph.conf), "user": "nova", "pool": "vms"}
    paths = BackendPaths(root=tmp_path / "root", disks_dir=tmp_path / "disks")
    source = Shy(glance(glance_rbd, "admin,member,reader,service"))
    config = CacheConfig(root=paths.root, backend="rbd")
    with ImageCache(config, source=source, backend=RbdBackend(options, paths)) as cache:
        assert not cache.ensure_base(image_id).managed
        cache.create_root_disk(image_id, "shy-vm")
        cache.remove_root_disk("shy-vm")
    assert glance_rbd.downloads(image_id) == 0

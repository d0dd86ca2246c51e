"""Locations that Glance's metadata do not show, from its location API."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest

from harness import rbd as pool
from nova_imagecache import CacheConfig, GlanceSource, ImageCache, ImageInfo, ImageRejectedError
from services.ceph import CephCluster
from services.glance import GlanceServer, Request

pytestmark = pytest.mark.services

DATA = b"located" * 20_000
ROLES = "admin,member,reader,service"


class Shy:
    """A Glance whose metadata show locations of some kinds only, by default none, as most are configured."""

    name = "shy"

    def __init__(self, inner: GlanceSource, *shown: str) -> None:
        self.inner = inner
        self.shown = shown

    def _hide(self, image: ImageInfo) -> ImageInfo:
        return replace(image, locations=tuple(url for url in image.locations if url.startswith(self.shown)))

    def get(self, image_id: str) -> ImageInfo:
        return self._hide(self.inner.get(image_id))

    def open(self, image: ImageInfo, offset: int = 0) -> AbstractContextManager[Iterator[bytes]]:
        return self.inner.open(image, offset)

    def with_locations(self, image: ImageInfo) -> ImageInfo:
        return self.inner.with_locations(image)

    def copy_to_store(self, image: ImageInfo, store: str, check: Callable[[], None]) -> ImageInfo:
        return self._hide(self.inner.copy_to_store(image, store, check))


def glance(server: GlanceServer, roles: str) -> GlanceSource:
    return GlanceSource(endpoint=server.url, token=f"someone:testproject:{roles}")


def make_cache(ceph: CephCluster, directory: Path, source: Shy, **changes: str) -> ImageCache:
    config = CacheConfig(root=directory / "root", disks_dir=directory / "disks", backend="rbd")
    return ImageCache(config, source=source, backend=pool.make_backend(ceph, directory, **changes))


def asked(requests: list[Request], end: str) -> int:
    """How many requests were for a path that ends like this."""
    return sum(request.path.endswith(end) for request in requests)


def test_the_location_api_is_asked(glance_rbd: GlanceServer) -> None:
    """A token that may ask gets the image's places; one that may not leaves the image as it is."""
    image_id = glance_rbd.upload(DATA)
    shown = glance(glance_rbd, ROLES).get(image_id)
    hidden = replace(shown, locations=())
    assert glance(glance_rbd, ROLES).with_locations(hidden).locations == shown.locations
    assert glance(glance_rbd, "member").with_locations(hidden) == hidden


def test_an_image_without_shown_locations_is_adopted(
    ceph: CephCluster, glance_rbd: GlanceServer, tmp_path: Path
) -> None:
    """It is cloned where it lies all the same, and nothing is downloaded."""
    image_id = glance_rbd.upload(DATA)
    with make_cache(ceph, tmp_path, Shy(glance(glance_rbd, ROLES))) as cache:
        assert not cache.ensure_base(image_id).managed
        cache.create_root_disk(image_id, "shy-vm")
        cache.remove_root_disk("shy-vm")
    assert glance_rbd.downloads(image_id) == 0
    glance_rbd.delete(image_id)


def test_a_copy_without_shown_locations_is_adopted(ceph: CephCluster, glance_rbd: GlanceServer, tmp_path: Path) -> None:
    """What Glance has copied into the cluster is cloned there, though its metadata show no place of it."""
    image_id = glance_rbd.upload(DATA, store="local")
    with (
        glance_rbd.recorded() as seen,
        make_cache(ceph, tmp_path, Shy(glance(glance_rbd, ROLES)), glance_store="s0") as cache,
    ):
        assert not cache.ensure_base(image_id).managed
    assert asked(seen, "/import") == 1
    assert glance_rbd.downloads(image_id) == 0
    glance_rbd.delete(image_id)


@pytest.mark.parametrize("when_not_clonable", ["import", "refuse"])
def test_where_no_shown_location_will_do(
    ceph: CephCluster, glance_rbd: GlanceServer, tmp_path: Path, when_not_clonable: str
) -> None:
    """The location API is asked then, before a copy is; and only then."""
    image_id = glance_rbd.upload(DATA, store="local")
    glance(glance_rbd, ROLES).copy_to_store(glance(glance_rbd, ROLES).get(image_id), "s0", lambda: None)
    options = {"glance_store": "s0", "when_not_clonable": when_not_clonable}
    for number, (shown, looks) in enumerate({"file://": 1, "rbd://": 0}.items()):
        with (
            glance_rbd.recorded() as seen,
            make_cache(ceph, tmp_path / str(number), Shy(glance(glance_rbd, ROLES), shown), **options) as cache,
        ):
            assert not cache.ensure_base(image_id).managed
        assert asked(seen, "/locations") == looks
        assert asked(seen, "/import") == 0
    assert glance_rbd.downloads(image_id) == 0
    glance_rbd.delete(image_id)


def test_where_no_location_at_all_will_do(ceph: CephCluster, glance_rbd: GlanceServer, tmp_path: Path) -> None:
    """The image is refused where that is asked for, once the location API was asked as well."""
    image_id = glance_rbd.upload(DATA, store="local")
    for number, shown in enumerate([(), ("file://",)]):
        source = Shy(glance(glance_rbd, ROLES), *shown)
        with (
            glance_rbd.recorded() as seen,
            make_cache(ceph, tmp_path / str(number), source, when_not_clonable="refuse") as cache,
            pytest.raises(ImageRejectedError, match=r"file://\.\.\.: it is in a store of another kind"),
        ):
            cache.ensure_base(image_id)
        assert asked(seen, "/locations") == 1
    glance_rbd.delete(image_id)

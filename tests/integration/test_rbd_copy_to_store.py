"""Glance copies an image into the cluster, and the backend ``rbd`` clones it there: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from harness import rbd as pool
from harness.images import qcow2, raw
from nova_imagecache import (
    CacheConfig,
    GlanceSource,
    ImageCache,
    ImageNotActiveError,
    ImageRejectedError,
    RbdLocation,
    SourceForbiddenError,
    SourceUnavailableError,
)
from nova_imagecache.sources import CopyFailedError, CopyRefusedError
from services.ceph import CephCluster
from services.glance import ADMIN, MEMBER, GlanceServer, Request

pytestmark = pytest.mark.services

MIB = 2**20


@pytest.fixture(autouse=True)
def _empty(ceph: CephCluster) -> Iterator[None]:
    with pool.emptied(ceph):
        yield


def make_cache(
    ceph: CephCluster,
    glance: GlanceServer,
    directory: Path,
    *,
    store: str | None = "s0",
    token: str = ADMIN,
    copy_timeout: float = 60,
    **changes: Any,
) -> ImageCache:
    backend = pool.make_backend(ceph, directory, glance_store=store, **changes)
    config = CacheConfig(root=directory / "root", disks_dir=directory / "disks", backend="rbd")
    source = GlanceSource(endpoint=glance.url, token=token, copy_timeout=copy_timeout)
    return ImageCache(config, source=source, backend=backend)


def asked(requests: list[Request]) -> list[int]:
    """What Glance answered to those who asked for a copy."""
    return [request.status for request in requests if request.path.endswith("/import")]


@pytest.mark.parametrize("disk_format", ["raw", "iso"])
@pytest.mark.parametrize("when_not_clonable", ["import", "refuse"])
def test_copied_adopted_and_never_downloaded(
    ceph: CephCluster, glance_rbd: GlanceServer, tmp_path: Path, disk_format: str, when_not_clonable: str
) -> None:
    """Glance is asked once; the disk is a clone of Glance's own image; another host finds it there and asks nothing."""
    sample = raw("copied", 4 * MIB)
    # Glance looks into what is "bare", and finds no ISO 9660 in this
    image_id = glance_rbd.upload(sample.served, store="local", disk_format=disk_format, container_format="ovf")
    with (
        glance_rbd.recorded() as seen,
        make_cache(ceph, glance_rbd, tmp_path / "one", when_not_clonable=when_not_clonable) as cache,
    ):
        base = cache.ensure_base(image_id)
        disk = cache.create_root_disk(image_id, "vm")
    assert isinstance(base.location, RbdLocation)
    assert (base.managed, base.location.pool, base.location.name) == (False, "images", image_id)
    assert isinstance(disk.location, RbdLocation)
    with pool.opened(ceph, disk.location.name) as image:
        assert image.parent_info() == ("images", image_id, "snap")
        assert image.read(0, len(sample.guest)) == sample.guest
    assert asked(seen) == [202]
    with (
        glance_rbd.recorded() as seen,
        make_cache(ceph, glance_rbd, tmp_path / "two", when_not_clonable=when_not_clonable) as cache,
    ):
        assert not cache.ensure_base(image_id).managed
    assert asked(seen) == []
    assert glance_rbd.downloads(image_id) == 0
    assert pool.names(ceph) == ["vm_disk"]
    pool.empty(ceph)
    glance_rbd.delete(image_id)


def test_three_hosts_at_once(ceph: CephCluster, glance_rbd: GlanceServer, tmp_path: Path) -> None:
    """One asks for a copy, the others wait and adopt it as well: of two who ask Glance may delete the first's."""
    image_id = glance_rbd.upload(raw("twice", 32 * MIB).served, store="local")
    caches = [make_cache(ceph, glance_rbd, tmp_path / str(host)) for host in range(3)]
    with glance_rbd.recorded() as seen, ThreadPoolExecutor(3) as threads:
        bases = list(threads.map(lambda cache: cache.ensure_base(image_id), caches))
    for cache in caches:
        cache.close()
    assert [base.managed for base in bases] == [False] * 3
    assert asked(seen) == [202]
    assert pool.claims(ceph) == []
    assert glance_rbd.show(image_id)["stores"].split(",") == ["local", "s0"]
    assert glance_rbd.downloads(image_id) == 0
    glance_rbd.delete(image_id)


def test_what_a_copy_would_not_help_is_imported(ceph: CephCluster, glance_rbd: GlanceServer, tmp_path: Path) -> None:
    """A qcow2 image is not copied by Glance; nor is any where no store is named; and "refuse" goes on refusing."""
    qcow2_id = glance_rbd.upload(qcow2("q").served, store="local", disk_format="qcow2")
    raw_id = glance_rbd.upload(raw("r").served, store="local")
    with glance_rbd.recorded() as seen:
        with make_cache(ceph, glance_rbd, tmp_path / "one") as cache:
            assert cache.ensure_base(qcow2_id).managed
            cache.remove_base(qcow2_id)
        with make_cache(ceph, glance_rbd, tmp_path / "two", store=None) as cache:
            assert cache.ensure_base(raw_id).managed
        with (
            make_cache(ceph, glance_rbd, tmp_path / "three", when_not_clonable="refuse") as cache,
            pytest.raises(ImageRejectedError, match="format is qcow2"),
        ):
            cache.ensure_base(qcow2_id)
    assert asked(seen) == []
    for one in (qcow2_id, raw_id):
        glance_rbd.delete(one)


def test_refusals(ceph: CephCluster, glance_rbd: GlanceServer, tmp_path: Path) -> None:
    """A store that Glance does not have, a user without the right, an image that is not active: each its own error."""
    image_id = glance_rbd.upload(raw("refused").served, store="local", visibility="public")
    with (
        make_cache(ceph, glance_rbd, tmp_path / "one", store="nostore") as cache,
        pytest.raises(CopyRefusedError, match=r"copy into store nostore: the service refuses it: HTTP 409: .*nostore"),
    ):
        cache.ensure_base(image_id)
    with (
        make_cache(ceph, glance_rbd, tmp_path / "two", token=MEMBER) as cache,
        pytest.raises(SourceForbiddenError, match="copy_image"),
    ):
        cache.ensure_base(image_id)
    glance_rbd.deactivate(image_id)
    source = GlanceSource(endpoint=glance_rbd.url, token=ADMIN)
    with pytest.raises(ImageNotActiveError, match="deactivated"):
        source.copy_to_store(source.get(image_id), "s0", lambda: None)
    assert pool.names(ceph) == []
    glance_rbd.delete(image_id)


def test_a_copy_that_fails_and_one_that_hangs(ceph: CephCluster, glance_rbd: GlanceServer, tmp_path: Path) -> None:
    """Glance's list of failed stores is an error; a copy that stands still is one that may be tried again."""
    image_id = glance_rbd.upload(raw("failing", 8 * MIB).served, store="local")
    with make_cache(ceph, glance_rbd, tmp_path / "one") as cache:
        # as if the store had lost its right to write
        ceph.auth_caps("glance", mon="profile rbd", osd="profile rbd-read-only pool=images")
        try:
            with pytest.raises(CopyFailedError, match="the service says that it failed"):
                cache.ensure_base(image_id)
            assert glance_rbd.show(image_id)["os_glance_failed_import"] == "s0"
        finally:
            ceph.reset_caps("glance")
        # the old failure is still listed when the new copy is asked for
        assert not cache.ensure_base(image_id).managed
        glance_rbd.delete(image_id)

        image_id = glance_rbd.upload(raw("hanging", 8 * MIB).served, store="local")
        source = GlanceSource(endpoint=glance_rbd.url, token=ADMIN, copy_timeout=4)
        image = source.get(image_id)
        ceph.pause_osd()
        try:
            held = r"not there after 4 s; the service's import task [0-9a-f-]{36} holds the image"
            with pytest.raises(SourceUnavailableError, match=held):
                source.copy_to_store(image, "s0", lambda: None)
        finally:
            ceph.resume_osd()
        # Glance has gone on, and so does the next call
        assert not cache.ensure_base(image_id).managed
    assert glance_rbd.downloads(image_id) == 0
    glance_rbd.delete(image_id)

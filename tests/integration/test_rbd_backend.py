"""The library over a real Ceph: images are cloned where they lie, others come in once, and nothing is copied twice."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from harness import rbd as pool
from harness.images import qcow2, raw
from nova_imagecache import (
    BaseNotFoundError,
    CacheConfig,
    GlanceSource,
    ImageCache,
    ImageNotFoundError,
    ImageRejectedError,
    RbdLocation,
    RootDisk,
)
from nova_imagecache.backends import _rados, _rbd_look
from nova_imagecache.exceptions import BaseInUseError, DiskInUseError, DiskTooSmallError
from nova_imagecache.testing import FakeImage, FakeSource, FaultPlan
from services.ceph import CephCluster
from services.ceph_bindings import bindings
from services.glance import GlanceServer

pytestmark = pytest.mark.services

MIB = 2**20
GIB = 2**30
PATTERN = bytes(range(256)) * 16


@pytest.fixture(autouse=True)
def _empty(ceph: CephCluster) -> Iterator[None]:
    with pool.emptied(ceph):
        yield


def make_cache(ceph: CephCluster, directory: Path, source: Any, **changes: Any) -> ImageCache:
    backend = pool.make_backend(ceph, directory, **changes)
    config = CacheConfig(root=directory / "root", disks_dir=directory / "disks", backend="rbd")
    return ImageCache(config, source=source, backend=backend)


def content(ceph: CephCluster, disk: RootDisk) -> bytes:
    assert isinstance(disk.location, RbdLocation)
    with pool.opened(ceph, disk.location.name) as image:
        data: bytes = image.read(0, image.size())
        return data


def in_glances_pool(ceph: CephCluster, size: int, data: bytes = PATTERN) -> str:
    """A raw image with the snapshot "snap", as Glance makes it; its location."""
    _, rbd = bindings()
    name = f"glance-{os.urandom(4).hex()}"
    with ceph.pool("images", "glance") as ioctx:
        rbd.RBD().create(ioctx, name, size)
        with rbd.Image(ioctx, name) as image:
            image.write(data, 0)
            image.create_snap("snap")
    return f"rbd://{ceph.fsid}/images/{name}/snap"


def parent_of(ceph: CephCluster, name: str) -> tuple[str, ...]:
    with pool.opened(ceph, name) as image:
        found: tuple[str, ...] = image.parent_info()
        return found


def test_an_image_of_glance_is_cloned_where_it_lies(
    ceph: CephCluster, glance_rbd: GlanceServer, tmp_path: Path
) -> None:
    """No byte of it is downloaded; it is found again without Glance; its clones outlive its deletion there."""
    sample = raw("adopted")
    image_id = glance_rbd.upload(sample.served)
    source = GlanceSource(endpoint=glance_rbd.url, token="admin:testproject:admin,member,reader,service")
    with make_cache(ceph, tmp_path, source) as cache:
        disk = cache.create_root_disk(image_id, "vm-1", size=8 * MIB)
        assert content(ceph, disk) == sample.guest + bytes(8 * MIB - len(sample.guest))
        assert parent_of(ceph, "vm-1_disk") == ("images", image_id, "snap")
        assert glance_rbd.downloads(image_id) == 0
        base = cache.get_base(image_id)
        assert (base.managed, base.record.evidence, cache.base_usage(image_id).allocated) == (False, "none", 0)
        assert [(user.disk_id, user.name) for user in cache.users(image_id)] == [("vm-1", "disk")]
        assert cache.verify_base(image_id) == base
    with make_cache(ceph, tmp_path, FakeSource()) as cache:
        # a source that knows nothing: what was adopted is remembered
        cache.create_root_disk(image_id, "vm-2")
        plan = cache.plan_cleanup(max_idle=0)
        assert [(item.image_id, item.verdict) for item in plan.items] == [(image_id, "keep")]
        glance_rbd.delete(image_id)
        with pytest.raises(ImageNotFoundError):
            cache.create_root_disk(image_id, "vm-3")
        assert not list((tmp_path / "root" / "adopted").iterdir())
        assert content(ceph, cache.get_root_disk("vm-2")) == sample.guest
        for disk_id in ("vm-1", "vm-2"):
            cache.remove_root_disk(disk_id)
    pool.empty(ceph, "images")


def test_location_is_what_libvirt_needs(ceph: CephCluster, tmp_path: Path) -> None:
    """Pool, name, monitors with the ports of the first protocol, user and secret."""
    secret = "6f1b6d0e-5a51-4f0a-9f3b-2d1d9f2a7c11"
    with make_cache(ceph, tmp_path, FakeSource({"img": raw("one").fake}), secret_uuid=secret) as cache:
        disk = cache.create_root_disk("img", "vm")
        assert disk.location == RbdLocation(
            pool="vms", name="vm_disk", hosts=(ceph.monitor,), user="nova", secret_uuid=secret
        )
        assert (disk.format, disk.reference) == ("raw", "clone")


def test_five_instances_are_one_import_and_five_clones(ceph: CephCluster, tmp_path: Path) -> None:
    """An image that cannot be cloned is converted and written once; every disk is a clone of that."""
    sample = qcow2("five", 16 * MIB)
    source = FakeSource({"img": sample.fake})
    with make_cache(ceph, tmp_path, source) as cache, FaultPlan([_rados]) as plan:
        with ThreadPoolExecutor(5) as threads:
            disks = list(threads.map(lambda n: cache.create_root_disk("img", f"vm-{n}", size=20 * MIB), range(5)))
        names = [step.name for step in plan.trace]
        assert source.opens == 1
        assert names.count("rados.clone") == 5
        # an eighth of each MiB is data: the zeros between are not written. Where pieces meet, a run is two writes
        assert names.count("rados.write") <= 16 + 2
        imported = names[: names.index("rados.create_snapshot")]
        assert imported.count("rados.resize") == 1, "it has its size from the beginning"
        assert imported.index("rados.resize") < imported.index("rados.write")
        for disk in disks:
            assert content(ceph, disk) == sample.guest + bytes(4 * MIB)
        assert parent_of(ceph, "vm-4_disk") == ("vms", "base.img", "base")
        cache.verify_base("img")
        assert cache.usage().base_count == 1
        with pytest.raises(BaseInUseError) as caught:
            cache.remove_base("img")
        assert len(caught.value.users) == 5
        for disk in disks:
            cache.remove_root_disk(disk.disk_id)
        cache.remove_base("img")
        with pytest.raises(BaseNotFoundError):
            cache.get_base("img")
    assert pool.names(ceph) == []


def test_a_raw_image_never_touches_the_local_disk(ceph: CephCluster, tmp_path: Path) -> None:
    """What needs no converting goes from the source straight into Ceph."""
    sample = raw("direct", 8 * MIB)
    with make_cache(ceph, tmp_path, FakeSource({"img": sample.fake})) as cache, FaultPlan() as plan:
        cache.ensure_base("img")
    written = {Path(target).name for step in plan.trace if step.name == "fs.write" for target in step.targets}
    assert not written & {"download", "converted"}


def test_clone_time_does_not_depend_on_size(ceph: CephCluster, tmp_path: Path) -> None:
    """A disk of a 5 GiB image takes as long as one of a 10 MiB image, and 50 from 8 threads are made at once."""
    places = {"small": in_glances_pool(ceph, 10 * MIB), "large": in_glances_pool(ceph, 5 * GIB)}
    images = {name: FakeImage(data=b"x", locations=(url,)) for name, url in places.items()}
    with make_cache(ceph, tmp_path, FakeSource(images)) as cache:
        took: dict[str, float] = {}
        for name in (*places, *places):
            cache.ensure_base(name)
            start = time.monotonic()
            cache.create_root_disk(name, f"{name}-{len(took)}-{start}")
            took[name] = time.monotonic() - start
        assert took["large"] < 10 * took["small"] + 0.5

        with FaultPlan([_rados]) as plan:
            held = plan.pause("rados.clone", match="vm-0_disk")
            with ThreadPoolExecutor(8) as threads:
                slow = threads.submit(cache.create_root_disk, "large", "vm-0")
                held.wait()
                # one clone stands still, and the 49 others of the same image are made
                made = list(threads.map(lambda n: cache.create_root_disk("large", f"vm-{n}"), range(1, 50)))
                held.release()
                made.append(slow.result())
        assert len({disk.disk_id for disk in made}) == 50
        assert len(cache.users("large")) == 52
    pool.empty(ceph)
    pool.empty(ceph, "images")


def test_one_connection_however_many_disks(ceph: CephCluster, tmp_path: Path) -> None:
    """Two caches, threads and disks share one client, and close gives it back."""
    rados, _ = bindings()
    made: list[Any] = []

    class Counted(rados.Rados):  # type: ignore[misc, name-defined]  # the bindings have no types
        def connect(self, *args: Any, **kwargs: Any) -> None:
            made.append(self)
            super().connect(*args, **kwargs)

    source = FakeSource({"img": raw("one").fake})
    real, rados.Rados = rados.Rados, Counted
    try:
        with make_cache(ceph, tmp_path, source) as one, make_cache(ceph, tmp_path, source) as two:
            with ThreadPoolExecutor(8) as threads:
                list(threads.map(lambda n: (one, two)[n % 2].create_root_disk("img", f"vm-{n}"), range(16)))
            assert len(made) == 1
    finally:
        rados.Rados = real
    assert len(pool.watchers(ceph)) == 0


def test_reasons_are_told_and_refused_where_asked(
    ceph: CephCluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Foreign, malformed and missing locations are passed by and told once; "refuse" makes them an error."""
    good = in_glances_pool(ceph, 2 * MIB)
    bad = (
        "file:///var/lib/glance/img",
        "rbd://only-an-image",
        f"rbd://{ceph.fsid}/images/100%zz/snap",
        "rbd://00000000-0000-0000-0000-000000000000/images/img/snap",
        f"rbd://{ceph.fsid}/nopool/img/snap",
        f"rbd://{ceph.fsid}/images/nothing/snap",
    )
    images = {
        "late": FakeImage(data=b"x", locations=(*bad, good)),
        "iso": FakeImage(data=b"x", locations=(good,), disk_format="iso"),
        "none": FakeImage(data=raw("none").served, locations=bad),
        "qcow2": FakeImage(data=qcow2("q").served, disk_format="qcow2", locations=(good,)),
    }
    with make_cache(ceph, tmp_path, FakeSource(images), when_not_clonable="refuse") as cache:
        assert cache.ensure_base("late").location.snapshot == "snap"  # type: ignore[union-attr]  # in RBD
        assert not cache.ensure_base("iso").managed
        for image_id, words in (("none", "another cluster"), ("qcow2", "format is qcow2")):
            with pytest.raises(ImageRejectedError, match=words) as caught:
                cache.ensure_base(image_id)
            assert "when_not_clonable" in str(caught.value)
    caplog.clear()
    with caplog.at_level(logging.INFO), make_cache(ceph, tmp_path / "two", FakeSource(images)) as cache:
        for _ in range(2):
            assert cache.ensure_base("none").managed
            cache.remove_base("none")
    told = [record.getMessage() for record in caplog.records if "cannot be cloned" in record.getMessage()]
    assert len(told) == len(bad)
    pool.empty(ceph)
    pool.empty(ceph, "images")


def test_a_disk_in_use_names_its_watchers(ceph: CephCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that a guest has open stays, whole and under its name; the error says who has it."""
    from nova_imagecache.backends.rbd import RbdBackend

    monkeypatch.setattr(RbdBackend, "busy_patience", 0.3)
    with make_cache(ceph, tmp_path, FakeSource({"img": raw("one").fake})) as cache:
        cache.create_root_disk("img", "vm")
        with pool.opened(ceph, "vm_disk", read_only=False) as image:
            with pytest.raises(DiskInUseError, match=r"client \d+ at 127\.0\.0\.1"):
                cache.remove_root_disk("vm")
            image.write(PATTERN, 0)
        assert content(ceph, cache.get_root_disk("vm"))[: len(PATTERN)] == PATTERN
        cache.remove_root_disk("vm")
        assert list(cache.root_disks()) == []


def test_a_disk_that_somebody_else_grows(ceph: CephCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who wants less than the disk has by then is refused: what the guest wrote meanwhile stays."""
    true_resize = _rados.resize
    with make_cache(ceph, tmp_path, FakeSource({"img": raw("one").fake})) as cache:
        cache.create_root_disk("img", "vm", size=4 * MIB)

        def resize(image: Any, size: int, **more: Any) -> None:
            with pool.opened(ceph, "vm_disk", read_only=False) as theirs:
                theirs.resize(16 * MIB)
                theirs.write(PATTERN, 12 * MIB)
            true_resize(image, size, **more)

        with monkeypatch.context() as meanwhile:
            meanwhile.setattr(_rados, "resize", resize)
            with pytest.raises(DiskTooSmallError) as caught:
                cache.resize_root_disk("vm", size=8 * MIB)
        assert (caught.value.disk_id, caught.value.virtual_size) == ("vm", 16 * MIB)
        assert content(ceph, cache.get_root_disk("vm"))[12 * MIB :].startswith(PATTERN)
        assert cache.resize_root_disk("vm", size=16 * MIB).virtual_size == 16 * MIB
        cache.remove_root_disk("vm")
        cache.remove_base("img")


def test_two_hosts_that_grow_a_disk_at_once(ceph: CephCluster, tmp_path: Path) -> None:
    """Whoever comes first, the disk has the larger size in the end."""
    source = FakeSource({"img": raw("one").fake})
    with (
        make_cache(ceph, tmp_path / "one", source) as cache,
        make_cache(ceph, tmp_path / "two", source) as other,
        ThreadPoolExecutor(2) as threads,
    ):
        cache.create_root_disk("img", "vm", size=4 * MIB)
        for number in range(5, 45, 2):
            start = threading.Barrier(2)

            def grow(one: ImageCache, size: int, start: threading.Barrier = start) -> None:
                start.wait()
                with suppress(DiskTooSmallError):
                    one.resize_root_disk("vm", size=size)

            ends = [threads.submit(grow, one, (number + more) * MIB) for more, one in ((0, cache), (1, other))]
            for end in ends:
                end.result()
            assert cache.get_root_disk("vm").virtual_size == (number + 1) * MIB
        cache.remove_root_disk("vm")
        cache.remove_base("img")


def test_clones_of_format_1(ceph: CephCluster, tmp_path: Path) -> None:
    """Where the cluster makes clones of format 1, snapshots are protected, and users are counted all the same."""
    conf = tmp_path / "ceph.conf"
    conf.write_text(ceph.conf.read_text().replace("[client]\n", "[client]\nrbd default clone format = 1\n"))
    with make_cache(ceph, tmp_path, FakeSource({"img": raw("one").fake}), conf=str(conf)) as cache:
        disk = cache.create_root_disk("img", "vm")
        with pool.opened(ceph, "base.img") as image:
            assert image.is_protected_snap("base")
            assert len(_rbd_look.children(image)) == 1
        assert content(ceph, disk) == raw("one").guest
        cache.remove_root_disk("vm")
        cache.remove_base("img")
    assert pool.names(ceph) == []


def test_first_disks_of_format_1(ceph: CephCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a base that was made when clones were of format 2: of many that find it unprotected each makes its disk, and
    one opens the base to protect it, before any clone is tried: librbd may abort where both are done at once."""
    protect, clone, steps = _rados.protect, _rados.clone, []

    def protecting(image: Any, snapshot: str) -> None:
        steps.append("protect")
        protect(image, snapshot)

    def cloning(*args: Any, **options: Any) -> None:
        steps.append("clone")
        clone(*args, **options)

    monkeypatch.setattr(_rados, "protect", protecting)
    monkeypatch.setattr(_rados, "clone", cloning)
    conf = tmp_path / "ceph.conf"
    conf.write_text(ceph.conf.read_text().replace("[client]\n", "[client]\nrbd default clone format = 1\n"))
    source = FakeSource({"img": raw("one").fake})
    with make_cache(ceph, tmp_path / "two", source) as cache:
        cache.ensure_base("img")
    with ExitStack() as stack:
        hosts = [
            stack.enter_context(make_cache(ceph, tmp_path / str(number), source, conf=str(conf))) for number in range(4)
        ]
        start = threading.Barrier(8)

        def make(number: int) -> None:
            start.wait()
            hosts[number % 4].create_root_disk("img", f"vm-{number}")

        with ThreadPoolExecutor(8) as threads:
            list(threads.map(make, range(8)))
        with pool.opened(ceph, "base.img") as image:
            assert len(_rbd_look.children(image)) == 8
        assert steps == ["protect", *["clone"] * 8]
        for number in range(8):
            hosts[0].remove_root_disk(f"vm-{number}")
        hosts[0].remove_base("img")
    assert pool.names(ceph) == []

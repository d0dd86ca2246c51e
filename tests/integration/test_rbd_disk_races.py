"""What two hosts do to one disk at the same moments: attaching, removing, making and growing it."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import pytest

from harness import rbd as pool
from harness.images import raw
from nova_imagecache import CacheConfig, DiskExistsError, DiskInUseError, ImageCache
from nova_imagecache.backends.rbd import RbdBackend
from nova_imagecache.testing import FakeSource, FaultPlan
from services.ceph import CephCluster
from services.ceph_bindings import bindings

pytestmark = pytest.mark.services

MIB = 2**20
SIZE = 4 * MIB
AT = 3 * MIB
WRITTEN = b"written by the guest"
LATER = b"written by it later!"
_T = TypeVar("_T")


class Site:
    """Two hosts with a client, a sign of life and a root each, on one pool; and calls beside the test's own."""

    def __init__(self, ceph: CephCluster, directory: Path, life: ExitStack) -> None:
        self.ceph = ceph
        self._threads = life.enter_context(ThreadPoolExecutor())
        self.backends = [self._backend(directory / name) for name in ("one", "two")]
        self.one, self.two = (
            life.enter_context(_cache(directory / name, backend))
            for name, backend in zip(("one", "two"), self.backends, strict=True)
        )

    def _backend(self, directory: Path) -> RbdBackend:
        directory.mkdir()
        # another file is another connection
        conf = Path(shutil.copy(self.ceph.conf, directory / "ceph.conf"))
        return pool.make_backend(self.ceph, directory, conf=str(conf))

    def written(self) -> None:
        """The disk "vm", in which a guest wrote, and whose base was brought in anew."""
        self.one.create_root_disk("img", "vm", size=SIZE)
        self.write(WRITTEN)
        self.anew()

    def anew(self) -> None:
        self.backends[0].quarantine_base(self.one.get_base("img"))
        self.one.ensure_base("img")
        self.two.ensure_base("img")

    def write(self, data: bytes) -> None:
        """What a guest does that starts, writes and stops."""
        with pool.opened(self.ceph, "vm_disk", read_only=False) as image:
            image.write(data, AT)

    def read(self) -> bytes:
        with pool.opened(self.ceph, "vm_disk") as image:
            return bytes(image.read(AT, len(WRITTEN)))

    def disks(self) -> list[str]:
        """What there is of disks, finished and not."""
        return [name for name in pool.names(self.ceph) if "vm" in name]

    def beside(self, call: Callable[[], _T]) -> Future[_T]:
        return self._threads.submit(call)


def _cache(directory: Path, backend: RbdBackend) -> ImageCache:
    config = CacheConfig(root=directory / "root", disks_dir=directory / "disks", backend="rbd")
    return ImageCache(config, source=FakeSource({"img": raw("one").fake}), backend=backend)


@pytest.fixture
def site(ceph: CephCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(RbdBackend, "busy_patience", 1.0)
    pool.empty(ceph)
    with ExitStack() as life:
        yield Site(ceph, tmp_path, life)
    pool.empty(ceph)


@contextmanager
def steps() -> Iterator[FaultPlan]:
    with FaultPlan(modules=[f"nova_imagecache.backends.{name}" for name in ("_rados", "_rados_claims")]) as plan:
        yield plan


def purge(ceph: CephCluster) -> None:
    """What an operator's ``rbd trash purge`` does, or the cluster by its schedule."""
    _, rbd = bindings()
    with ceph.pool("vms") as ioctx:
        rbd.RBD().trash_purge(ioctx, datetime.now(UTC).replace(tzinfo=None))


def test_a_purge_of_the_trash_while_it_attaches(site: Site) -> None:
    """The old disk lies in the trash, the only one with the guest's bytes, and stays there."""
    site.written()
    with steps() as plan:
        held = plan.pause("rados.trash_move", match="vm_disk", when="after")
        attaching = site.beside(lambda: site.two.attach_root_disk("img", "vm"))
        held.wait()
        purge(site.ceph)
        held.release()
        attaching.result()
    assert site.read() == WRITTEN
    assert site.disks() == ["vm_disk"]


def test_attached_by_another_meanwhile(site: Site) -> None:
    """What a guest wrote to the other host's new disk is not replaced by what was in the old one."""
    site.written()
    with steps() as plan:
        first = plan.pause("rados.trash_move", match="vm_disk", when="before")
        last = plan.pause("rados.trash_remove", when="before")
        attaching = site.beside(lambda: site.one.attach_root_disk("img", "vm"))
        first.wait()
        # as where the claim has ended under a slow host
        pool._end_claims(site.ceph, "vms")
        other = site.beside(lambda: site.two.attach_root_disk("img", "vm"))
        last.wait()
        site.write(LATER)
        first.release()
        with pytest.raises(DiskInUseError):
            attaching.result()
        assert site.read() == LATER
        last.release()
        other.result()
    assert site.read() == LATER
    assert site.disks() == ["vm_disk"]
    assert site.one.recover().failed == {}
    assert site.disks() == ["vm_disk"]


def test_attached_by_another_just_before(site: Site) -> None:
    """The name leads to another disk than was looked at: nothing is moved, and the other host's attaching goes on."""
    site.written()
    with steps() as plan:
        first = plan.pause("rados.resize", nth=1, when="after")
        attaching = site.beside(lambda: site.one.attach_root_disk("img", "vm"))
        first.wait()
        held = plan.pause("rados.trash_move", match="staging.vm_disk", when="before")
        other = site.beside(lambda: site.two.attach_root_disk("img", "vm"))
        held.wait()
        first.release()
        with pytest.raises(DiskInUseError):
            attaching.result()
        assert "vm_disk" not in site.disks()
        held.release()
        other.result()
    assert site.read() == WRITTEN
    assert site.disks() == ["vm_disk"]


def test_removed_and_made_anew_meanwhile(site: Site) -> None:
    """A removal takes the disk that it looked at, not the one that has the name by now."""
    site.one.create_root_disk("img", "vm", size=SIZE)
    with steps() as plan:
        held = plan.pause("rados.trash_move", match="vm_disk", when="before")
        removing = site.beside(lambda: site.one.remove_root_disk("vm"))
        held.wait()
        pool._end_claims(site.ceph, "vms")
        site.two.remove_root_disk("vm")
        site.two.create_root_disk("img", "vm", size=SIZE)
        site.write(LATER)
        held.release()
        with pytest.raises(DiskInUseError, match="made it anew"):
            removing.result()
    assert site.disks() == ["vm_disk"]
    assert site.read() == LATER
    site.one.recover()
    assert site.read() == LATER


def test_attached_while_it_is_removed(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk of before goes as well, whenever attaching put it into the trash."""
    site.written()
    remover, looking, attached = site.backends[0], threading.Event(), threading.Event()
    true = remover._unused

    def held(disk_id: str, name: str) -> str:
        looking.set()
        assert attached.wait(60)
        return true(disk_id, name)

    monkeypatch.setattr(remover, "_unused", held)
    removing = site.beside(lambda: site.one.remove_root_disk("vm"))
    assert looking.wait(60)
    with steps() as plan:
        plan.fail("rados.trash_remove", nth=1, error=KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            site.two.attach_root_disk("img", "vm")
    attached.set()
    removing.result()
    assert site.disks() == []
    assert site.two.recover().restored == ()
    site.two.create_root_disk("img", "vm", size=SIZE)
    assert site.read() == bytes(len(WRITTEN))


@pytest.mark.parametrize("what", ["remove", "recover"])
def test_while_the_attached_disk_is_published(site: Site, what: str) -> None:
    """Nobody has it open then, and it is being attached all the same."""
    site.written()
    with steps() as plan:
        held = plan.pause("rados.trash_move", match="staging.vm_disk", when="before")
        attaching = site.beside(lambda: site.one.attach_root_disk("img", "vm"))
        held.wait()
        if what == "remove":
            with pytest.raises(DiskInUseError, match="being attached"):
                site.two.remove_root_disk("vm")
        else:
            report = site.two.recover()
            assert "trash/vm_disk" in report.alive
            assert (report.restored, report.failed) == ((), {})
        held.release()
        attaching.result()
    assert site.read() == WRITTEN
    assert site.disks() == ["vm_disk"]


def test_made_while_it_is_attached(site: Site) -> None:
    """A new disk whose making began before there was one of that name does not take the other's place."""
    site.one.ensure_base("img")
    with steps() as plan:
        slow = plan.pause("rados.trash_restore", match="vm_disk", when="before")
        making = site.beside(lambda: site.two.create_root_disk("img", "vm", size=SIZE))
        slow.wait()
        site.written()
        cut = plan.pause("rados.trash_move", match="vm_disk", when="after")
        attaching = site.beside(lambda: site.one.attach_root_disk("img", "vm"))
        cut.wait()
        slow.release()
        with pytest.raises(DiskExistsError):
            making.result()
        cut.release()
        attaching.result()
    assert site.read() == WRITTEN
    assert site.disks() == ["vm_disk"]


def test_the_name_is_taken_while_it_is_attached(site: Site) -> None:
    """By whoever does not look: the attaching says so in a public error, and both disks are kept."""
    site.written()
    with steps() as plan:
        held = plan.pause("rados.trash_move", match="vm_disk", when="after")
        attaching = site.beside(lambda: site.one.attach_root_disk("img", "vm"))
        held.wait()
        _, rbd = bindings()
        with site.ceph.pool("vms") as ioctx:
            rbd.RBD().create(ioctx, "vm_disk", MIB)
        held.release()
        with pytest.raises(DiskExistsError, match="Call recover"):
            attaching.result()
    assert sorted(site.disks()) == ["trash/vm_disk", "vm_disk"]


def test_made_anew_while_it_is_grown(site: Site) -> None:
    """A disk that was not claimed is not grown."""
    site.one.create_root_disk("img", "vm", size=SIZE)
    with steps() as plan:
        held = plan.pause("rados_claims.claim_image", when="after")
        growing = site.beside(lambda: site.one.resize_root_disk("vm", size=6 * MIB))
        held.wait()
        pool._end_claims(site.ceph, "vms")
        site.two.remove_root_disk("vm")
        site.two.create_root_disk("img", "vm", size=5 * MIB)
        held.release()
        with pytest.raises(DiskInUseError):
            growing.result()
    disk: Any = site.two.get_root_disk("vm")
    assert disk.virtual_size == 5 * MIB

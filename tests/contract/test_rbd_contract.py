"""The backend ``rbd`` keeps the contract, on a real cluster with the users' capabilities of production."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from harness import places, spawned
from harness import rbd as pool
from harness.waiting import until
from nova_imagecache.backends import Backend, BackendPaths, RbdLocation, RootDisk
from nova_imagecache.backends.rbd import RbdBackend
from nova_imagecache.testing import BackendContract, FaultPlan
from nova_imagecache.testing._contract_crash import CrashContract
from services import ceph_bindings
from services.ceph import CephCluster
from services.require import require

pytestmark = pytest.mark.services


@pytest.fixture(scope="module")
def ceph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CephCluster]:
    """A cluster whose pool vms is this module's alone: it is emptied again and again."""
    require(ceph_bindings.missing())
    with places.quick(tmp_path_factory.mktemp("ceph")) as directory, CephCluster(directory / "ceph") as cluster:
        yield cluster


class OnRbd(CrashContract):
    """The hooks for a pool of a real cluster."""

    fault_modules: ClassVar[tuple[str, ...]] = (
        "nova_imagecache.backends._rados",
        "nova_imagecache.backends._rados_claims",
    )
    changes: ClassVar[dict[str, Any]] = {}
    given: dict[str, Any]

    @pytest.fixture(autouse=True)
    def _cluster(self, ceph: CephCluster) -> None:
        self.ceph = ceph
        self.given = pool.options(ceph, **self.changes)

    def make_paths(self, directory: Path) -> BackendPaths:
        pool.empty(self.ceph)
        return super().make_paths(directory)

    def make_backend(self, paths: BackendPaths) -> Backend:
        return RbdBackend(self.given, paths)

    def read_disk(self, backend: Backend, disk: RootDisk) -> bytes:
        assert isinstance(disk.location, RbdLocation)
        with pool.opened(self.ceph, disk.location.name) as image:
            data: bytes = image.read(0, image.size())
            return data

    def write_disk(self, backend: Backend, disk: RootDisk, offset: int, data: bytes) -> None:
        assert isinstance(disk.location, RbdLocation)
        with pool.opened(self.ceph, disk.location.name, read_only=False) as image:
            image.write(data, offset)

    def litter(self, paths: BackendPaths, disk_id: str) -> list[str]:
        of_the_disk = [name for name in pool.names(self.ceph) if f"{disk_id}_" in name]
        # a base that was retired is no disk's litter
        left = [name for name in pool.leftovers(self.ceph) if not name.startswith("trash/base.")]
        return sorted({*super().litter(paths, disk_id), *of_the_disk, *left})

    def leftovers(self, paths: BackendPaths) -> list[str]:
        return pool.leftovers(self.ceph)

    @contextlib.contextmanager
    def filled(self, backend: Backend, paths: BackendPaths) -> Iterator[None]:
        """The pool's quota is reached, as the monitor has noticed."""
        with self.ceph.pool("vms") as ioctx:
            ioctx.write_full("filler", bytes(8192))
            self.ceph.set_quota("vms", 4096)
            until(lambda: pool.is_full(self.ceph), "the pool to be full")
            try:
                yield
            finally:
                self.ceph.set_quota("vms", 0)
                until(lambda: pool.has_room(self.ceph), "room in the pool")
                ioctx.remove_object("filler")

    @contextlib.contextmanager
    def hidden_users(self, backend: Backend, paths: BackendPaths) -> Iterator[None]:
        """A clone in a pool that the backend's user may not look into."""
        _, rbd = ceph_bindings.bindings()
        self.ceph.create_pool("hidden")
        try:
            with self.ceph.client() as client, client.open_ioctx("vms") as vms, client.open_ioctx("hidden") as hidden:
                rbd.RBD().clone(vms, "base.img", "base", hidden, "elsewhere")
                yield
                rbd.RBD().remove(hidden, "elsewhere")
        finally:
            self.ceph.delete_pool("hidden")

    @contextlib.contextmanager
    def held_open(self, backend: Backend, disk: RootDisk) -> Iterator[None]:
        """Another client has the disk open and, having written to it, its lock, as a guest's has."""
        assert isinstance(disk.location, RbdLocation)
        assert isinstance(backend, RbdBackend)
        with pool.opened(self.ceph, disk.location.name, read_only=False) as image:
            image.write(bytes(512), image.size() - 512)
            backend.store.patience = 0.3
            yield

    def act_in_child(self, action: str, paths: BackendPaths, plan: FaultPlan) -> None:
        living = pool.watchers(self.ceph)
        spawned.run("contract.test_rbd_contract", "act", type(self).__name__, self.given, action, paths, plan.spec())
        # Ceph would take the dead client for a live one for some seconds
        pool.bury(self.ceph, living)


def act(contract: str, given: dict[str, Any], action: str, paths: BackendPaths, plan: str) -> None:
    """What the other process does."""
    kept = globals()[contract]()
    kept.given = given
    kept.child(action, paths, FaultPlan.from_spec(plan))


class TestRbd(OnRbd, BackendContract):
    """Clones of format 2, in the cluster's default features."""


class TestRbdFormat1(OnRbd):
    """Clones of format 1, whose parents are protected: what makes and removes bases, step by step."""

    actions: ClassVar[tuple[str, ...]] = ("publish", "create", "purge")

    @pytest.fixture(autouse=True)
    def _format_1(self, _cluster: None, tmp_path: Path) -> None:
        conf = tmp_path / "ceph.conf"
        conf.write_text(self.ceph.conf.read_text().replace("[client]\n", "[client]\nrbd default clone format = 1\n"))
        self.given = {**self.given, "conf": str(conf)}

    def test_parents_are_protected(self, backend: Backend) -> None:
        """A base's snapshot is protected, and its clones are of the format that needs that."""
        base = self.publish(backend, "img")
        self.create(backend, base)
        with pool.opened(self.ceph, "base.img") as image:
            assert image.is_protected_snap("base")
        with self.ceph.pool("vms") as ioctx:
            assert "rbd_children" in {one.key for one in ioctx.list_objects()}

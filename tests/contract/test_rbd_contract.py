"""The backend ``rbd`` keeps the contract, on a real cluster with the users' capabilities of production."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from harness import rbd as pool
from nova_imagecache.backends import Backend, BackendPaths, RbdLocation, RootDisk
from nova_imagecache.backends.rbd import RbdBackend
from nova_imagecache.testing import BackendContract, FaultPlan
from services import ceph_bindings
from services.ceph import CephCluster
from services.require import require

pytestmark = pytest.mark.services

_CHILD = """
import json, sys
from pathlib import Path
from nova_imagecache.backends import BackendPaths
from nova_imagecache.testing import FaultPlan
from contract import test_rbd_contract
values = json.loads(sys.argv[1])
contract = getattr(test_rbd_contract, values["contract"])()
contract.given = values["options"]
paths = BackendPaths(root=Path(values["root"]), disks_dir=Path(values["disks_dir"]))
contract.child(values["action"], paths, FaultPlan.from_spec(values["plan"]))
"""


@pytest.fixture(scope="module")
def ceph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CephCluster]:
    """A cluster whose pool vms is this module's alone: it is emptied again and again."""
    require(ceph_bindings.missing())
    with CephCluster(tmp_path_factory.mktemp("ceph")) as cluster:
        yield cluster


class TestRbd(BackendContract):
    """Clones of format 2, in the cluster's default features."""

    fault_modules: ClassVar[tuple[str, ...]] = ("nova_imagecache.backends._rados",)
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
        return [*super().litter(paths, disk_id), *(name for name in pool.names(self.ceph) if f"{disk_id}_" in name)]

    def act_in_child(self, action: str, paths: BackendPaths, plan: FaultPlan) -> None:
        living = pool.watchers(self.ceph)
        values = {
            "contract": type(self).__name__,
            "options": self.given,
            "root": str(paths.root),
            "disks_dir": str(paths.disks_dir),
            "action": action,
            "plan": plan.spec(),
        }
        pool.spawn(f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n{_CHILD}", json.dumps(values))
        # Ceph would take the dead client for a live one for some seconds
        pool.bury(self.ceph, living)

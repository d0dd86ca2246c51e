"""SIGKILL at any moment, in the middle of Ceph's own operations too: recover tidies up, and everything works again."""

from __future__ import annotations

import random
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import places
from harness import rbd as pool
from harness.images import raw
from nova_imagecache import CacheConfig, ImageCache
from nova_imagecache.backends import Retired, _rados, _rbd_going
from nova_imagecache.backends._rbd_names import RETIRED
from nova_imagecache.backends.rbd import RbdBackend
from nova_imagecache.testing import FakeSource
from services import ceph_bindings
from services.ceph import CephCluster
from services.require import require

pytestmark = [pytest.mark.services, pytest.mark.slow]

MIB = 2**20
ROUNDS = 12
SIZE = 4 * MIB

_VICTIM = """
import sys
from pathlib import Path
from harness import rbd as pool
from harness.images import raw
from nova_imagecache import CacheConfig, ImageCache
from nova_imagecache.testing import FakeSource
directory = Path(sys.argv[2])
config = CacheConfig(root=directory / "root", disks_dir=directory / "disks", backend="rbd")
source = FakeSource({"img": raw("killed", 4 * 2**20).fake})
with ImageCache(config, source=source, backend=pool.from_spec(sys.argv[1])) as cache:
    print("ready", flush=True)
    while True:
        for disk_id in ("vm-1", "vm-2"):
            cache.create_root_disk("img", disk_id, size=6 * 2**20)
        cache.flatten_root_disk("vm-1")
        for disk_id in ("vm-1", "vm-2"):
            cache.remove_root_disk(disk_id)
        cache.remove_base("img")
"""


@pytest.fixture(scope="module")
def ceph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CephCluster]:
    """A cluster for this module alone."""
    require(ceph_bindings.missing())
    with places.quick(tmp_path_factory.mktemp("ceph")) as directory, CephCluster(directory / "ceph") as cluster:
        yield cluster


def test_death_at_random_moments(ceph: CephCluster, tmp_path: Path) -> None:
    """Bases and disks that are there are whole, nothing else is left, and the next call works."""
    seed = random.randrange(1 << 30)
    words = random.Random(seed)
    guest = raw("killed", SIZE).guest
    tests = str(Path(__file__).parents[1])
    for number in range(ROUNDS):
        when = f"round {number} of seed {seed}"
        code = f"import sys; sys.path.insert(0, {tests!r})\n{_VICTIM}"
        victim = subprocess.Popen(
            [sys.executable, "-c", code, pool.spec(ceph, tmp_path), str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert victim.stdout is not None
        with victim.stdout:
            assert victim.stdout.readline() == "ready\n", when
            time.sleep(words.uniform(0.0, 0.8))
            victim.kill()
            victim.wait()
        pool.bury(ceph, set())
        config = CacheConfig(root=tmp_path / "root", disks_dir=tmp_path / "disks", backend="rbd")
        source = FakeSource({"img": raw("killed", SIZE).fake})
        with ImageCache(config, source=source, backend=pool.make_backend(ceph, tmp_path)) as cache:
            report = cache.recover()
            assert (report.failed, report.alive) == ({}, ()), f"{when}: {report}"
            again = cache.recover()
            assert (again.removed, again.restored) == ((), ()), f"{when}: {report}, then {again}"
            for base in cache.bases():
                cache.verify_base(base.image_id)
            disks = {f"{disk.disk_id}_disk" for disk in cache.root_disks()}
            left = {name for name in pool.names(ceph) if name != "base.img"} - disks
            assert left == set(), f"{when}: {left} is left ({report})"
            for name in disks:
                with pool.opened(ceph, name) as image:
                    assert image.read(0, SIZE) == guest, f"{when}: {name}"
            cache.create_root_disk("img", "vm-3", size=6 * MIB)
            for disk in list(cache.root_disks()):
                cache.remove_root_disk(disk.disk_id)
            cache.remove_base("img")
        assert pool.names(ceph) == [], when


MOVING, RESTORING = 1, 3
"""States of an entry of the trash, as Ceph's class rbd numbers them."""


def _half(ceph: CephCluster, begins: str, state: int) -> None:
    """Put an entry of the trash into the state in which a death in the middle of Ceph's operation leaves it."""
    _, rbd = ceph_bindings.bindings()
    with ceph.pool("vms") as ioctx:
        [rbd_id] = [one["id"] for one in rbd.RBD().trash_list(ioctx) if one["name"].startswith(begins)]
        data = struct.pack("<I", len(rbd_id)) + rbd_id.encode() + bytes([state, 0])
        ioctx.execute("rbd_trash", "rbd", "trash_state_set", data)


def _look_done(backend: RbdBackend, retired: Retired) -> None:
    """What is in the trash when the remover of a base begins to free it."""
    _rados.set_metadata(backend.store.io, retired.token, {RETIRED: None})
    backend._let_go(retired.token)


@pytest.mark.parametrize("state", [MOVING, RESTORING])
def test_half_states_of_the_trash(ceph: CephCluster, tmp_path: Path, state: int) -> None:
    """What died in the middle of Ceph's own two steps is finished or taken back, at once and without waiting."""
    pool.empty(ceph)
    started = time.monotonic()
    config = CacheConfig(root=tmp_path / "root", disks_dir=tmp_path / "disks", backend="rbd")
    source = FakeSource({"img": raw("killed", SIZE).fake})
    backend = pool.make_backend(ceph, tmp_path)
    with ImageCache(config, source=source, backend=backend) as cache:
        # as if its remover had died before its second look, and after it
        backend._let_go(backend.retire_base(cache.ensure_base("img")).token)
        _half(ceph, "base.", state)
        assert cache.recover().restored == ("trash/base.img",)
        cache.verify_base("img")
        _look_done(backend, backend.retire_base(cache.get_base("img")))
        _half(ceph, "base.", state)
        assert cache.recover().removed == ("trash/base.img",)

        cache.create_root_disk("img", "vm")
        _look_done(backend, backend.retire_base(cache.get_base("img")))
        _half(ceph, "base.", state)
        assert cache.recover().restored == ("trash/base.img",)
        cache.verify_base("img")

        rbd_id = backend.store.id_of("vm_disk")
        assert rbd_id is not None
        _rbd_going.take_out(backend.store, rbd_id, "vm_disk", _rbd_going.going())
        _half(ceph, "vm_disk", state)
        report = cache.recover()
        outcome = report.removed if state == MOVING else report.restored
        assert outcome == ("trash/vm_disk",), report
        cache.remove_root_disk("vm")

        writer = backend.stage_base("other", "raw")
        writer._close()  # type: ignore[attr-defined]  # the rbd backend's writer
        [staged] = [name for name in pool.names(ceph) if name.startswith("staging.")]
        _rados.trash_move(backend.store.io, staged, 60)
        backend.store.owner.done(staged)
        _half(ceph, "staging.", state)
        assert cache.recover().removed == (f"trash/{staged}",)
        cache.remove_base("img")
    assert pool.names(ceph) == []
    assert time.monotonic() - started < 15

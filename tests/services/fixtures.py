"""Real services for every kind of test, each started once in a process when first asked for."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator

import pytest

from harness import places
from services import ceph_bindings, libvirtd
from services import glance as glance_service
from services.ceph import CephCluster
from services.glance import GlanceServer, Store
from services.libvirtd_ground import Ground, ground
from services.libvirtd_guests import Guests, guests
from services.require import require


@pytest.fixture(autouse=True)
def _no_connection_left() -> Iterator[None]:
    """A test that leaves a connection to a Ceph open, or a claim that is renewed, is told so: later ones fail of it."""
    before = _connections()
    yield
    assert _connections() <= before
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("claim of ")] == []


def _connections() -> set[object]:
    ours = sys.modules.get("nova_imagecache.backends._rbd_connection")
    return set() if ours is None else set(ours._PROCESS.connections)


@pytest.fixture(scope="session")
def glance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GlanceServer]:
    """A real Glance with a file store; tests tell their images apart by id."""
    require(glance_service.missing())
    with GlanceServer(tmp_path_factory.mktemp("glance")) as server:
        yield server


@pytest.fixture(scope="session")
def ceph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CephCluster]:
    """A real Ceph cluster in memory; tests tell their images apart by name, and leave it as they found it."""
    require(ceph_bindings.missing())
    with places.quick(tmp_path_factory.mktemp("ceph")) as directory, CephCluster(directory / "ceph") as cluster:
        yield cluster


@pytest.fixture(scope="session")
def ceph_bluestore(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CephCluster]:
    """A real Ceph cluster on disk, for tests that stop and kill it; each leaves it running."""
    require(ceph_bindings.missing())
    with CephCluster(tmp_path_factory.mktemp("ceph-bluestore"), store="bluestore") as cluster:
        yield cluster


@pytest.fixture(scope="session")
def glance_rbd(ceph: CephCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GlanceServer]:
    """A real Glance whose images lie in ``ceph``; those uploaded with ``store="local"`` lie in a file store."""
    require(glance_service.missing())
    directory = tmp_path_factory.mktemp("glance-rbd")
    local = Store(name="local", kind="file", options={"filesystem_store_datadir": str(directory / "images")})
    with GlanceServer(
        directory,
        store="rbd",
        store_options=ceph.glance_store_options(),
        python_path=ceph.bindings_path(),
        more_stores=[local],
    ) as server:
        yield server


@pytest.fixture(scope="session")
def libvirt_ground() -> Iterator[Ground]:
    """A real libvirtd whose guests run as root, as the cache does; no file changes its owner."""
    require(libvirtd.missing())
    with ground(owners=False) as place:
        yield place


@pytest.fixture(scope="session")
def owners_ground() -> Iterator[Ground]:
    """A real libvirtd as in production: guests, cache and libvirtd are three users, and libvirtd changes owners."""
    require(libvirtd.missing())
    with ground(owners=True) as place:
        yield place


@pytest.fixture
def libvirt_guests(libvirt_ground: Ground) -> Iterator[Guests]:
    """Guests on ``libvirt_ground``, gone after the test."""
    with guests(libvirt_ground.daemon) as these:
        yield these


@pytest.fixture
def owners_guests(owners_ground: Ground) -> Iterator[Guests]:
    """Guests on ``owners_ground``, gone after the test."""
    with guests(owners_ground.daemon) as these:
        yield these

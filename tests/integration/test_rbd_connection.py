"""One connection for a whole process: how many there are, and when it is taken for lost."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from harness import rbd as pool
from nova_imagecache.backends import _rados, _rbd_connection, _rbd_look, _rbd_store
from nova_imagecache.backends._rados_errors import LOSSES, StuckError
from nova_imagecache.backends._rbd_connection import Address, Connection, hold, release
from nova_imagecache.backends.rbd import RbdBackend
from nova_imagecache.exceptions import BackendUnavailableError
from services.ceph import CephCluster
from services.ceph_bindings import bindings

pytestmark = pytest.mark.services

MIB = 2**20


@pytest.fixture(autouse=True)
def _empty(ceph: CephCluster) -> Iterator[None]:
    with pool.emptied(ceph):
        yield


@pytest.fixture
def made(ceph: CephCluster, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The clients that the process makes of this cluster, by the library or by others."""
    rados, _ = bindings()
    clients: list[Any] = []

    class Counted(rados.Rados):  # type: ignore[misc, name-defined]  # the bindings have no types
        def connect(self, *args: Any, **kwargs: Any) -> None:
            clients.append(self)
            super().connect(*args, **kwargs)

    monkeypatch.setattr(rados, "Rados", Counted)
    return clients


def blocklist(ceph: CephCluster) -> None:
    """Throw out of the cluster whoever has an image open."""
    for address in pool.watchers(ceph):
        ceph.command("osd blocklist", blocklistop="add", addr=address, expire=60.0)


def test_old_news_of_a_loss_costs_no_connection(ceph: CephCluster, tmp_path: Path, made: list[Any]) -> None:
    """Images of a lost connection go on saying so; the one that was made since stays."""
    backend = pool.make_backend(ceph, tmp_path, connect_timeout=2)
    writers = [backend.stage_base(f"img-{number}", "raw") for number in range(3)]
    blocklist(ceph)
    deadline = time.monotonic() + 20
    while True:
        try:
            backend.find_base("img")
        except BackendUnavailableError:
            break
        assert time.monotonic() < deadline
    assert backend.find_base("img") is None
    now = _client(backend)
    made.clear()
    for writer in writers:
        seen = LOSSES.count
        with pytest.raises(BackendUnavailableError):
            writer.set_size(MIB)
        assert LOSSES.count > seen
        assert backend.find_base("img") is None
    assert made == []
    assert _client(backend) == now
    for writer in writers:
        with contextlib.suppress(BackendUnavailableError):
            writer.discard()
    assert backend.recover().failed == {}
    backend.close()


def _client(backend: RbdBackend) -> int:
    return backend.store.connection.client()


def test_many_that_are_thrown_out_at_once(ceph: CephCluster, tmp_path: Path, made: list[Any]) -> None:
    """All threads of a blocklisted client go on over one new connection."""
    backend = pool.make_backend(ceph, tmp_path, connect_timeout=2)
    backend.stage_base("img", "raw").discard()
    blocklist(ceph)
    made.clear()
    deadline = time.monotonic() + 20

    def use(_number: int) -> bool:
        """Whether it was told of the loss."""
        told = False
        while time.monotonic() < deadline:
            try:
                backend.find_base("img")
            except BackendUnavailableError:
                told = True
            else:
                if told or made:
                    return told
        raise AssertionError("it was not thrown out, or did not come back")

    with ThreadPoolExecutor(8) as threads:
        assert any(threads.map(use, range(8)))
    assert len(made) == 1
    backend.close()


def test_two_who_come_first(ceph: CephCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that use a new backend at once hold its connection once: closing it gives it back."""

    def slowly(address: Address, timeout: float) -> Connection:
        time.sleep(0.05)
        return hold(address, timeout)

    monkeypatch.setattr(_rbd_store, "hold", slowly)
    backend = pool.make_backend(ceph, tmp_path)
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda _: backend.find_base("img"), range(8))) == [None] * 8
    assert backend.store.connection.holders == 1
    backend.close()
    assert Address(conf=str(ceph.conf), user="nova") not in _rbd_connection._PROCESS.connections


def test_time_limits_make_no_second_connection(ceph: CephCluster, tmp_path: Path, made: list[Any]) -> None:
    """Backends that wait for different times share one connection, which waits for the shortest."""
    patient = pool.make_backend(ceph, tmp_path / "one", connect_timeout=30)
    hasty = pool.make_backend(ceph, tmp_path / "two", connect_timeout=3)
    assert patient.store.connection is hasty.store.connection
    assert (patient.find_base("img"), hasty.find_base("img")) == (None, None)
    assert len(made) == 1
    for option in ("rados_osd_op_timeout", "rados_mon_op_timeout", "client_mount_timeout"):
        assert float(made[0].conf_get(option)) == 3
    patient.close()
    hasty.close()


def test_a_hasty_backend_that_comes_later(ceph: CephCluster, tmp_path: Path, made: list[Any]) -> None:
    """The connection that is there waits no longer than the newcomer wants: its writes fail, they do not hang."""
    patient = pool.make_backend(ceph, tmp_path / "one", connect_timeout=30)
    assert patient.find_base("img") is None
    hasty = pool.make_backend(ceph, tmp_path / "two", connect_timeout=1)
    writer = hasty.stage_base("img", "raw")
    writer.set_size(MIB)
    ceph.pause_osd()
    try:
        start = time.monotonic()
        writer.write_at(0, bytes(4096))
        with pytest.raises(BackendUnavailableError) as caught:
            writer.sync()
        assert not isinstance(caught.value, StuckError)
        with pytest.raises(BackendUnavailableError):
            patient.find_base("img")
        assert time.monotonic() - start < 15
    finally:
        ceph.resume_osd()
    writer.discard()
    assert len(made) == 1
    hasty.close()
    patient.close()


def test_librbd_copies_what_it_writes(ceph: CephCluster, tmp_path: Path, made: list[Any]) -> None:
    """Whatever the conf says: without a copy a write to a dead OSD does not end at its time limit."""
    conf = tmp_path / "ceph.conf"
    conf.write_text(f"{ceph.conf.read_text()}\n[client]\nrbd_disable_zero_copy_writes = false\n")
    connection = hold(Address(conf=str(conf), user="nova"), 5)
    connection.pool("vms")
    assert made[0].conf_get("rbd_disable_zero_copy_writes") == "true"
    release(connection)


def test_an_image_is_closed_in_turn(ceph: CephCluster) -> None:
    """Librbd may still be at work on one that it says is open: closing waits for it, as it does for any callback."""
    connection = hold(Address(conf=str(ceph.conf), user="nova"), 5)
    ioctx = connection.pool("vms")
    _rados.create(ioctx, "turns", 4096, 1)
    number = _rbd_look.named(ioctx, "turns")
    assert number is not None
    for opened in (_rbd_look.opened(ioctx, "turns"), _rbd_look.opened_by_id(ioctx, number)):
        begun, held = threading.Event(), threading.Event()

        def hold_turn(*_: object, begun: threading.Event = begun, held: threading.Event = held) -> None:
            begun.set()
            held.wait(30)

        with ThreadPoolExecutor(1) as threads:
            opened.__enter__()
            ioctx.aio_read("rbd_directory", 1, 0, hold_turn)
            assert begun.wait(30)
            closing = threads.submit(opened.__exit__, None, None, None)
            with pytest.raises(TimeoutError):
                closing.result(0.3)
            held.set()
            closing.result(30)
    _rados.remove(ioctx, "turns")
    release(connection)


def test_a_pool_is_opened_once(ceph: CephCluster) -> None:
    """Threads that ask for a pool at the same moment get one and the same."""
    connection = hold(Address(conf=str(ceph.conf), user="nova"), 5)
    with ThreadPoolExecutor(8) as threads:
        assert len(set(map(id, threads.map(lambda _: connection.pool("vms"), range(16))))) == 1
    release(connection)

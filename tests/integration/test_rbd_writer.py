"""Bytes on their way into a pool: several writes at once, what fails of them, and nothing of them on this host."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import rbd as pool
from harness.images import guest_bytes
from harness.waiting import until
from nova_imagecache.backends import _rados, _rbd_look, _rbd_writer
from nova_imagecache.backends._rados_errors import StuckError
from nova_imagecache.backends.rbd import RbdBackend
from services.ceph import CephCluster

pytestmark = pytest.mark.services

MIB = 2**20


@pytest.fixture(autouse=True)
def _empty(ceph: CephCluster) -> Iterator[None]:
    with pool.emptied(ceph):
        yield


@pytest.fixture
def backend(ceph: CephCluster, tmp_path: Path) -> Iterator[RbdBackend]:
    made = pool.make_backend(ceph, tmp_path)
    yield made
    made.close()


def test_writes_are_in_flight_together(backend: RbdBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """No write waits for the one before it, up to a number of them; the end waits for all."""
    most = _rbd_writer._IN_FLIGHT
    assert most > 1
    writer = backend.stage_base("img", "raw")
    writer.set_size(64 * MIB)
    begun: list[int] = []
    ends: list[Callable[[], None]] = []
    true_write = _rados.write

    def write(image: Any, offset: int, data: bytes, done: Callable[[int], None]) -> None:
        begun.append(offset)
        true_write(image, offset, data, lambda code: ends.append(lambda: done(code)))

    monkeypatch.setattr(_rados, "write", write)
    offsets = [number * MIB for number in range(most + 8)]

    def fill() -> None:
        for number, offset in enumerate(offsets):
            writer.write_at(offset, bytes([number + 1]) * 4096)
        writer.sync()

    thread = threading.Thread(target=fill)
    thread.start()
    until(lambda: len(ends) == most, "as many writes as are made at once")
    time.sleep(0.2)
    assert len(begun) == most
    while thread.is_alive():
        if ends:
            ends.pop()()
        thread.join(0.001)
    assert begun == offsets
    assert [writer.read_at(offset, 1) for offset in offsets] == [bytes([n + 1]) for n in range(len(offsets))]
    writer.discard()


@pytest.mark.parametrize("copies", ["true", "false"])
def test_bytes_outlive_their_buffer(ceph: CephCluster, tmp_path: Path, copies: str) -> None:
    """What is handed over may be used again at once, however many writes are on their way; Ceph need not copy it."""
    conf = tmp_path / "ceph.conf"
    changed = f"[client]\nrbd disable zero copy writes = {copies}\n"
    conf.write_text(ceph.conf.read_text().replace("[client]\n", changed))
    backend = pool.make_backend(ceph, tmp_path, conf=str(conf))
    data = guest_bytes("buffer", 32 * MIB)
    writer = backend.stage_base("img", "raw")
    writer.set_size(len(data))
    buffer = bytearray(MIB)
    for offset in range(0, len(data), MIB):
        buffer[:] = data[offset : offset + MIB]
        writer.write_at(offset, buffer)
    buffer[:] = bytes(MIB)
    base = writer.publish(pool.record("img", len(data)))
    found = bytearray(len(data))
    for extent in backend.read_base(base):
        found[extent.offset : extent.offset + len(extent.data)] = extent.data
    assert found == data
    backend.close()


def test_reading_back(backend: RbdBackend) -> None:
    """What was written is read while it is on its way; what was not, and what lies behind the end, is zeros."""
    writer = backend.stage_base("img", "raw")
    writer.set_size(3 * MIB)
    for offset in (2 * MIB, 0, MIB + 4096):
        writer.write_at(offset, bytes([offset // MIB + 1]) * 512)
    assert writer.read_at(0, MIB) == b"\1" * 512 + bytes(MIB - 512)
    assert writer.read_at(MIB, MIB) == bytes(4096) + b"\2" * 512 + bytes(MIB - 4096 - 512)
    assert writer.read_at(2 * MIB, 2 * MIB) == b"\3" * 512 + bytes(2 * MIB - 512)
    writer.discard()


@pytest.mark.slow
def test_an_image_that_was_removed_under_its_writer(
    ceph: CephCluster, backend: RbdBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ceph's library waits for ever then: neither the writer does nor who discards it, and nothing is published."""
    monkeypatch.setattr(type(backend.store), "longest", 1.0)
    for number, act in enumerate((_write, _sync)):
        writer = backend.stage_base(f"img-{number}", "raw")
        writer.set_size(MIB)
        [name] = [name for name in pool.names(ceph) if name.startswith("staging.img-")]
        rbd_id = _rbd_look.named(backend.store.io, name)
        with ceph.pool("vms") as ioctx:
            ioctx.remove_object(f"rbd_header.{rbd_id}")
        time.sleep(6)  # until its client has noticed, a write still fails as it should
        start = time.monotonic()
        with pytest.raises(StuckError, match="taken it for dead"):
            act(writer)
        writer.discard()
        assert time.monotonic() - start < 4
        assert backend.find_base(f"img-{number}") is None
        assert backend.recover().failed == {}
        assert pool.names(ceph) == []


def test_writes_that_hang_and_end_after_all(
    ceph: CephCluster, backend: RbdBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer does not wait for them; once they have ended nothing of it is left open, and ``recover`` sweeps it."""
    writer = backend.stage_base("img", "raw")
    writer.set_size(MIB)
    writer.write_at(0, b"ours")
    writer.sync()
    [name] = [name for name in pool.names(ceph) if name.startswith("staging.img")]
    monkeypatch.setattr(type(backend.store), "longest", 1.0)
    with pool.lock_taken(ceph, name):
        start = time.monotonic()
        writer.write_at(0, b"ours again")
        with pytest.raises(StuckError):
            writer.sync()
        writer.discard()
        assert time.monotonic() - start < 5
        report = backend.recover()
        assert (report.alive, report.removed, report.failed) == ((f"staging/{name}",), (), {})
    until(lambda: backend.recover().removed == (f"staging/{name}",), "the image to be closed and swept")
    assert pool.names(ceph) == []


def _write(writer: Any) -> None:
    writer.write_at(0, b"x" * 4096)
    writer.publish(pool.record("img", MIB))


def _sync(writer: Any) -> None:
    writer.sync()

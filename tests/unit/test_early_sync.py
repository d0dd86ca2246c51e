"""A base is made durable while it is still written: early syncs promise nothing, and leave nothing behind."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nova_imagecache import BackendPaths, BaseRecord
from nova_imagecache.backends._writer import FileWriter
from nova_imagecache.backends.qcow2 import Qcow2Backend

MIB = 1 << 20
RECORD = BaseRecord(
    image_id="img",
    format="raw",
    virtual_size=64 * MIB,
    size=64 * MIB,
    source_format="raw",
    source_size=64 * MIB,
    source_digest=None,
    evidence="none",
    made_by="stored",
    source="fake",
    fetched_at=0.0,
)


class Device:
    """What was asked of the device: each early sync as the size that the file had, held up until ``go``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.early: list[int] = []
        self.go = threading.Event()
        self.error: OSError | None = None
        self.seconds = 0.0
        monkeypatch.setattr(os, "fdatasync", self._sync)

    def _sync(self, fd: int) -> None:
        self.early.append(os.fstat(fd).st_size)
        assert self.go.wait(20)
        time.sleep(self.seconds)
        if self.error is not None:
            raise self.error


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    device = Device(monkeypatch)
    yield device
    device.go.set()


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[FileWriter]:
    backend = Qcow2Backend({}, BackendPaths(root=tmp_path, disks_dir=tmp_path / "disks"))
    writer = backend.stage_base("img", "raw")
    assert isinstance(writer, FileWriter)
    yield writer
    writer.discard()


def fill(writer: FileWriter, start: int, end: int) -> None:
    for number in range(start, end):
        writer.write_at(number * MIB, bytes([number + 1]) * MIB)


def syncing() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("sync-")]


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def wait_for(device: Device, count: int) -> None:
    waited = threading.Event()
    while len(device.early) < count:
        assert not waited.wait(0.01)


def test_the_device_works_while_bytes_are_written(device: Device, writer: FileWriter) -> None:
    """After 4 MiB; what comes while it is busy is synced once it is free, together."""
    fill(writer, 0, 3)
    assert syncing() == []
    fill(writer, 3, 4)
    wait_for(device, 1)
    fill(writer, 4, 48)
    assert len(device.early) == 1
    device.go.set()
    wait_for(device, 2)
    assert device.early[-1] == 48 * MIB


def test_a_large_base_is_synced_in_larger_parts(
    device: Device, writer: FileWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 MiB of the first 32, from then on an eighth of what is there, 8 MiB at most."""
    device.go.set()
    begun: list[int] = []
    monkeypatch.setattr(writer._early, "begin", lambda: begun.append(writer._written // MIB))
    fill(writer, 0, 96)
    assert begun == [4, 8, 12, 16, 20, 24, 28, 32, 37, 43, 50, 58, 66, 74, 82, 90]


@pytest.mark.parametrize("published", [True, False])
def test_nothing_is_left_behind(device: Device, writer: FileWriter, tmp_path: Path, *, published: bool) -> None:
    """Neither a thread nor a descriptor, whether the base is published or thrown away while the device is busy."""
    before = descriptors()  # with the writer's own
    device.seconds = 0.1
    device.go.set()
    fill(writer, 0, 64)
    wait_for(device, 1)
    if published:
        writer.publish(RECORD)
        assert (tmp_path / "bases" / "img" / "disk").stat().st_size == 64 * MIB
    else:
        writer.discard()
        assert not (tmp_path / "bases").exists()
    assert syncing() == []
    assert descriptors() < before


def test_one_that_hangs_holds_up_nobody(device: Device, writer: FileWriter, tmp_path: Path) -> None:
    """A fetch that is given up while the device is busy ends; the thread ends with the device."""
    fill(writer, 0, 16)
    wait_for(device, 1)
    (thread,) = syncing()
    writer.discard()
    assert list((tmp_path / "staging").iterdir()) == []
    device.go.set()
    thread.join(20)
    assert not thread.is_alive()


def test_its_errors_are_the_last_syncs_to_tell(
    device: Device, writer: FileWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It swallows its own; the kernel tells them to the writer's descriptor once more."""
    device.error = OSError(5, "Input/output error")
    device.go.set()
    fill(writer, 0, 48)
    for thread in syncing():
        thread.join(20)
    assert device.early
    writer.sync()

    def broken(_fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output"):
        writer.publish(RECORD)

"""qcow2 images on their way into a pool: decoded as they come, with nothing of them on this host."""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import runner
from benchmarks.images import write_disk
from harness import rbd as pool
from harness.images import Sample, qemu_img
from nova_imagecache import BaseCorruptError, CacheConfig, ImageCache
from nova_imagecache.backends import _rados, _rbd_look, _rbd_writer
from nova_imagecache.testing import FakeSource, FaultPlan
from services.ceph import CephCluster

pytestmark = pytest.mark.services

MIB = 2**20
KIB = 2**10
CLUSTER = 64 * KIB
SIZE = 24 * MIB


@pytest.fixture(autouse=True)
def _empty(ceph: CephCluster) -> Iterator[None]:
    with pool.emptied(ceph):
        yield


def make_cache(ceph: CephCluster, directory: Path, sample: Sample) -> ImageCache:
    config = CacheConfig(root=directory / "root", disks_dir=directory / "disks", backend="rbd")
    return ImageCache(config, source=FakeSource({"img": sample.fake}), backend=pool.make_backend(ceph, directory))


def qcow2(directory: Path, guest: bytes, seed: str | None) -> Sample:
    """A qcow2 image whose clusters lie in the file in the order of the guest's, or with a seed in a shuffled one."""
    directory.mkdir()
    path, source = directory / "qcow2", directory / "raw"
    source.write_bytes(guest)
    if seed is None:
        qemu_img("convert", "-q", "-f", "raw", "-O", "qcow2", "-S", "0", str(source), str(path))
        return Sample(guest=guest, served=path.read_bytes(), disk_format="qcow2")
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"cluster_size={CLUSTER}", str(path), str(len(guest)))
    offsets = [at for at in range(0, len(guest), CLUSTER) if guest[at : at + CLUSTER].strip(b"\0")]
    random.Random(seed).shuffle(offsets)
    commands: list[str] = []
    for offset in offsets:
        piece = directory / str(offset)
        piece.write_bytes(guest[offset : offset + CLUSTER])
        commands += ["-c", f"write -q -s {piece} {offset} {CLUSTER}"]
    subprocess.run(["qemu-io", "-f", "qcow2", *commands, str(path)], check=True, capture_output=True)
    return Sample(guest=guest, served=path.read_bytes(), disk_format="qcow2")


def content(ceph: CephCluster, name: str) -> bytes:
    with pool.opened(ceph, name) as image:
        data: bytes = image.read(0, image.size())
        return data


def dense(seed: str, size: int) -> bytes:
    """Bytes without a hole."""
    return random.Random(seed).randbytes(size)


def test_shuffled_clusters_are_summed_right(ceph: CephCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that come in another order than the guest's are read back for their checksums, which verify_base uses."""
    read: list[int] = []
    true_read = _rbd_writer.RbdWriter.read_at

    def read_at(self: _rbd_writer.RbdWriter, offset: int, length: int) -> bytes:
        read.append(offset)
        return true_read(self, offset, length)

    monkeypatch.setattr(_rbd_writer.RbdWriter, "read_at", read_at)
    sample = qcow2(tmp_path / "image", dense("shuffled", 5 * MIB + 4 * CLUSTER), "shuffled")
    with make_cache(ceph, tmp_path, sample) as cache:
        base = cache.ensure_base("img")
        assert base.record.made_by == "qcow2 decoder"
        assert len(read) == 6, "every MiB came in parts and out of order"
        assert content(ceph, "base.img") == sample.guest
        assert cache.verify_base("img") == base
        # a sum that is another MiB's does not pass
        with ceph.pool("vms") as ioctx:
            [key] = [one.key for one in ioctx.list_objects() if one.key.startswith("nova_imagecache.sums.")]
            sums = ioctx.read(key)
            ioctx.write_full(key, sums[8:16] + sums[:8] + sums[16:])
        with pytest.raises(BaseCorruptError):
            cache.verify_base("img")
    assert pool.leftovers(ceph) == []


def test_memory(ceph: CephCluster, tmp_path: Path) -> None:
    """An import into Ceph takes less than 100 MiB of memory above what importing the bindings took."""
    write_disk(tmp_path / "raw", 512 * MIB, 192 * MIB, seed="memory")
    source = tmp_path / "images"
    source.mkdir()
    qemu_img("convert", "-f", "raw", "-O", "qcow2", "-c", str(tmp_path / "raw"), str(source / "img.img"))
    (source / "img.json").write_text(json.dumps({"disk_format": "qcow2"}))
    config = {
        "root": str(tmp_path / "root"),
        "source": "directory",
        "source_options": {"path": str(source)},
        "allow_unverified": True,
        "backend": "rbd",
        "backend_options": pool.options(ceph),
    }
    answer = runner.measure("benchmarks.worker", {"what": "cold", "config": config, "image": "img"})
    assert answer["made_by"] == "qcow2 decoder"
    assert answer["memory_grown"] < 100 * MIB, f"{answer['memory_grown'] / MIB:.0f} MiB"


def local_bytes(root: Path) -> int:
    """What the files below the cache's root take."""
    found = 0
    for directory, _, names in os.walk(root):
        for name in names:
            path = Path(directory, name)
            if path.exists():
                found += path.stat().st_blocks * 512
    return found


@pytest.mark.parametrize("seed", [None, "shuffled"])
def test_nothing_of_an_image_is_kept_here(
    ceph: CephCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: str | None
) -> None:
    """While a qcow2 image comes in the cache's root holds none of its bytes, and no qemu-img is run."""
    sample = qcow2(tmp_path / "image", dense("local", SIZE), seed)
    held: list[int] = []
    true_write = _rados.write

    def write(image: Any, offset: int, data: bytes, done: Any) -> None:
        held.append(local_bytes(tmp_path / "root"))
        true_write(image, offset, data, done)

    with make_cache(ceph, tmp_path, sample) as cache:
        cache.recover()  # makes the root
        before = local_bytes(tmp_path / "root")
        monkeypatch.setattr(_rados, "write", write)
        with FaultPlan(["nova_imagecache._exec"]) as plan:
            assert cache.ensure_base("img").record.made_by == "qcow2 decoder"
        assert plan.trace == ()
        assert len(held) >= SIZE // (4 * MIB)
        assert max(held) - before <= 2 * CLUSTER, "more than a spool of a few clusters"
        assert local_bytes(tmp_path / "root") - before <= 16 * KIB
        cache.verify_base("img")
    assert content(ceph, "base.img") == sample.guest


def test_zeros_take_no_room(ceph: CephCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of zeros that the image holds as data are not written: what is staged takes what is data in it."""
    data = dense("zeros", 128 * KIB)
    # an object of RBD, which counts from its begin to its last byte, is 4 MiB long
    guest = b"".join(data + bytes(8 * MIB - len(data)) for _ in range(3))
    sample = qcow2(tmp_path / "image", guest, None)
    assert len(sample.served) > len(guest)
    written: list[int] = []
    staged: list[int] = []
    true_write, true_publish = _rados.write, _rbd_writer.RbdWriter.publish

    def write(image: Any, offset: int, data: bytes, done: Any) -> None:
        written.append(len(data))
        true_write(image, offset, data, done)

    def publish(self: _rbd_writer.RbdWriter, record: Any) -> Any:
        self.sync()
        staged.append(sum(length for _, length in _rbd_look.data_extents(self._live(), fixed=False)))
        return true_publish(self, record)

    monkeypatch.setattr(_rados, "write", write)
    monkeypatch.setattr(_rbd_writer.RbdWriter, "publish", publish)
    with make_cache(ceph, tmp_path, sample) as cache:
        cache.ensure_base("img")
        assert (sum(written), staged) == (3 * len(data), [3 * len(data)])
        cache.verify_base("img")
    assert content(ceph, "base.img") == guest

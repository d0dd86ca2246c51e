"""Of all who ask for one cold image, one fetches it and everybody gets the same base."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from harness import images
from harness.images import MIB
from harness.rig import Rig, compare, truth_file
from nova_imagecache import CacheConfig, ImageCache, RootDisk
from nova_imagecache.testing import FakeSource, MemoryBackend, MemoryStorage
from services.glance import GlanceServer

PROCESSES, THREADS = 4, 16
SIZE = 64 * MIB


@pytest.mark.services
def test_one_download_for_processes_and_threads(tmp_path: Path, glance: GlanceServer) -> None:
    """Four processes of sixteen threads make disks of one cold image: Glance serves it once, every disk is whole."""
    sample = images.qcow2("asked for by many", 24 * MIB)
    image_id = glance.upload(sample.served, disk_format="qcow2")
    rig = Rig(tmp_path, "link", {image_id: sample})
    job: dict[str, Any] = {"root": str(rig.root), "disks": str(rig.disks), "endpoint": glance.url, "image": image_id}
    job |= {"threads": THREADS, "size": SIZE}
    with glance.recorded() as requests:
        answers = _work_together([job | {"prefix": f"vm-{number}"} for number in range(PROCESSES)])
    data = [request for request in requests if request.path == f"/v2/images/{image_id}/file"]
    assert len(data) == 1, f"{len(data)} downloads"
    assert len(requests) == 2, f"one for the metadata, one for the data: {requests}"
    assert len(answers) == PROCESSES * THREADS
    assert all(answer["record"] == answers[0]["record"] for answer in answers), "they got different bases"
    truth = truth_file(sample.guest, tmp_path)
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda answer: _is_whole(Path(answer["disk"]), truth), answers))
    assert len(rig.cache().users(image_id)) == PROCESSES * THREADS
    rig.check_tidy("after all of them")


def _is_whole(disk: Path, truth: Path) -> bool:
    """The disk is consistent, opens with its base, and reads as the raw file ``truth``."""
    compare(disk, "qcow2", truth, str(disk))
    images.qemu_img("check", "-q", "-f", "qcow2", str(disk))
    return True


def _work_together(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "harness.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        for _job in jobs
    ]
    try:
        for worker, job in zip(workers, jobs, strict=True):
            assert worker.stdin is not None
            worker.stdin.write(json.dumps(job) + "\n")
            worker.stdin.flush()
        for worker in workers:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "ready\n"
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write("go\n")
            worker.stdin.flush()
        answers: list[dict[str, Any]] = []
        for worker in workers:
            out, _ = worker.communicate(timeout=90)
            assert worker.returncode == 0
            answers += json.loads(out)
        return answers
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
            with worker:  # its pipes
                pass


def _make_at_once(caches: list[ImageCache], image_id: str) -> list[RootDisk]:
    barrier = Barrier(len(caches) * THREADS)

    def one(number: int) -> RootDisk:
        barrier.wait()
        return caches[number % len(caches)].create_root_disk(image_id, f"vm-{number}", size=SIZE)

    with ThreadPoolExecutor(len(caches) * THREADS) as pool:
        return list(pool.map(one, range(len(caches) * THREADS)))


@pytest.mark.parametrize("kind", ["link", "path", "file", "link-native"])
def test_one_download_for_threads_of_many_caches(kind: str, tmp_path: Path) -> None:
    """Sixty-four threads over four caches of one root cause one fetch; every disk reads as the image."""
    sample = images.qcow2("asked for by threads")
    rig = Rig(tmp_path, kind, {"img": sample})
    source = rig.source()
    disks = _make_at_once([rig.cache(source) for _number in range(4)], "img")
    assert (source.gets, source.opens) == (1, 1), "one for the metadata, one for the data"
    assert len({disk.location for disk in disks}) == 4 * THREADS
    rig.check("after all of them")
    rig.check_tidy("after all of them")


def test_one_download_on_another_storage(tmp_path: Path) -> None:
    """What holds for files holds for any backend: the core brings an image in once."""
    sample = images.qcow2("asked for in memory")
    source = FakeSource({"img": sample.fake})
    storage = MemoryBackend({}, None).storage
    assert isinstance(storage, MemoryStorage)
    caches = [
        ImageCache(
            CacheConfig(root=tmp_path / "root", backend="memory"),
            source=source,
            backend=MemoryBackend({}, None, storage=storage),
        )
        for _number in range(4)
    ]
    disks = _make_at_once(caches, "img")
    assert (source.gets, source.opens) == (1, 1)
    assert len({disk.disk_id for disk in disks}) == 4 * THREADS
    assert len(caches[0].users("img")) == 4 * THREADS

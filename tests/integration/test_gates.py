"""What noise cannot touch: bytes written, child processes, files synced, disk and memory that are used at most.

Each cold fetch is measured by the benchmarks' own worker, in a process of its own.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks import images as bench_images
from benchmarks import runner
from harness import images
from harness.rig import Rig
from nova_imagecache.testing import FaultPlan, Step

KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40
SIZE, DATA = 128 * MIB, 32 * MIB
SYNCS_OF_A_BASE = 6
"""Disk, sums, record, reservation, the base's directory, and the one above it."""
SYNCS_OF_A_DISK = 4
"""Record, disk, the instance's directory, and the one above it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What one fetch cost; ``data`` are the bytes of the image that are not zeros, in blocks of 4 KiB."""

    data: int
    written: int
    children: int
    commands: list[str]
    most_on_disk: int
    base: int
    memory: int


Fetched = Callable[[str], Figures]


@pytest.fixture(scope="module")
def fetched(tmp_path_factory: pytest.TempPathFactory) -> Fetched:
    """The figures of a cold fetch, by the kind of image; each kind is fetched once."""
    ground = tmp_path_factory.mktemp("gates")

    @functools.cache
    def fetch(kind: str) -> Figures:
        source = ground / kind
        source.mkdir()
        data = _make(kind, source / "image.img", ground)
        note = {"disk_format": "raw" if kind.startswith("raw") else "qcow2", "os_hash_algo": "sha512"}
        note["os_hash_value"] = _sha512(source / "image.img")
        (source / "image.json").write_text(json.dumps(note))
        top = ground / f"{kind}-cache"
        top.mkdir()
        config = {"root": str(top / "root"), "source": "directory", "source_options": {"path": str(source)}}
        answer = runner.measure("benchmarks.worker", {"what": "cold", "config": config, "image": "image"}, watched=top)
        return Figures(
            data=data,
            written=answer["written"],
            children=answer["children"],
            commands=answer["commands"],
            most_on_disk=answer["disk_peak"] - answer["disk_before"],
            base=answer["base_allocated"],
            memory=answer["memory_grown"],
        )

    return fetch


def _sha512(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha512").hexdigest()


_CONVERT: dict[str, tuple[str, ...]] = {
    "qcow2": (),
    "zlib": ("-c",),
    "zstd": ("-c", "-o", "compression_type=zstd"),
    "large clusters": ("-c", "-o", "cluster_size=2M"),
    "small clusters": ("-o", "cluster_size=4k"),
}


def _make(kind: str, target: Path, ground: Path) -> int:
    """The image; how many bytes of it are data."""
    if kind == "raw 512 MiB":
        bench_images.write_disk(target, 512 * MIB, DATA, seed=kind)
        return target.stat().st_blocks * 512
    if kind == "virtual 10 TiB":
        images.qemu_img("create", "-q", "-f", "qcow2", str(target), str(10 * TIB))
        for offset in (0, TIB, 10 * TIB - 8 * MIB):
            command = ["qemu-io", "-f", "qcow2", "-c", f"write -q -P 7 {offset} 8M", str(target)]
            subprocess.run(command, check=True, capture_output=True)
        return 3 * 8 * MIB
    raw = ground / "disk.raw"
    if not raw.exists():
        bench_images.write_disk(raw, SIZE, DATA, seed="gates")
    if kind == "raw":
        os.link(raw, target)
    else:
        images.qemu_img("convert", "-f", "raw", "-O", "qcow2", *_CONVERT[kind], str(raw), str(target))
    return raw.stat().st_blocks * 512


FORMATS = ("raw", "qcow2", "zlib", "zstd")


@pytest.mark.parametrize("kind", FORMATS)
def test_bytes_written(fetched: Fetched, kind: str) -> None:
    """A fetch writes the image's data once, and nothing else of any size."""
    figures = fetched(kind)
    limit = int(1.02 * figures.data) + MIB
    assert figures.written <= limit, f"{figures.written / MIB:.1f} MiB for {figures.data / MIB:.1f} MiB of data"


@pytest.mark.parametrize("kind", FORMATS)
def test_no_child_process(fetched: Fetched, kind: str) -> None:
    """A fetch starts no child process."""
    figures = fetched(kind)
    assert figures.children == 0, figures.commands


@pytest.mark.parametrize("kind", FORMATS)
def test_peak_disk(fetched: Fetched, kind: str) -> None:
    """At no moment does a fetch take more disk than the base it makes: there is no temporary copy."""
    figures = fetched(kind)
    assert figures.most_on_disk <= figures.base + MIB, f"{(figures.most_on_disk - figures.base) / MIB:.1f} MiB more"


@pytest.mark.parametrize("kind", FORMATS)
def test_holes_stay_holes(fetched: Fetched, kind: str) -> None:
    """A base takes the disk that the image's data need."""
    figures = fetched(kind)
    assert figures.base <= 1.02 * figures.data + MIB, f"{figures.base / MIB:.1f} MiB for {figures.data / MIB:.1f} MiB"


@pytest.mark.parametrize("kind", [*FORMATS, "large clusters", "small clusters", "raw 512 MiB", "virtual 10 TiB"])
def test_memory(fetched: Fetched, kind: str) -> None:
    """A fetch takes less than 100 MiB of memory above what importing the package took, whatever the image."""
    figures = fetched(kind)
    assert figures.memory < 100 * MIB, f"{figures.memory / MIB:.0f} MiB"


# --- steps -----------------------------------------------------------------------------------------------------------


def _syncs(trace: tuple[Step, ...]) -> list[str]:
    return [target for step in trace if step.name in {"fs.fsync", "fs.fsync_dir"} for target in step.targets]


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    """A cache over one raw and one qcow2 image, whose root is there."""
    rig = Rig(tmp_path, "link", {"raw": images.raw("gates"), "qcow2": images.qcow2("gates"), "one": images.raw("one")})
    rig.cache().ensure_base("one")
    return rig


@pytest.mark.parametrize("image_id", ["raw", "qcow2"])
def test_syncs_of_a_base(rig: Rig, image_id: str) -> None:
    """A new base syncs each of its files once."""
    with FaultPlan() as plan:
        rig.cache().ensure_base(image_id)
    syncs = _syncs(plan.trace)
    assert len(syncs) == len(set(syncs)), f"synced twice: {sorted(syncs)}"
    assert len(syncs) <= SYNCS_OF_A_BASE, syncs


@pytest.mark.parametrize("image_id", ["raw", "qcow2"])
@pytest.mark.parametrize("size", [GIB, 10 * TIB], ids=["1GiB", "10TiB"])
def test_a_warm_disk(rig: Rig, image_id: str, size: int) -> None:
    """A root disk of a base that is there starts no child process and syncs four things, whatever its size."""
    cache = rig.cache()
    cache.create_root_disk(image_id, "first", size=size)
    with FaultPlan() as plan:
        cache.create_root_disk(image_id, "second", size=size)
    assert [step for step in plan.trace if step.name == "exec.run"] == []
    syncs = _syncs(plan.trace)
    assert len(syncs) == len(set(syncs)), f"synced twice: {sorted(syncs)}"
    assert len(syncs) <= SYNCS_OF_A_DISK, syncs


@pytest.mark.parametrize("size", [GIB, 10 * TIB], ids=["1GiB", "10TiB"])
def test_what_warm_disks_write(tmp_path: Path, size: int) -> None:
    """Warm root disks start no child process and write a few KiB each, whatever their size."""
    count = 20
    sample: Any = images.qcow2("warm disks")
    source = tmp_path / "source"
    source.mkdir()
    (source / "image.img").write_bytes(sample.served)
    note = {"disk_format": "qcow2", "os_hash_algo": "sha512", "os_hash_value": sample.digest.value}
    (source / "image.json").write_text(json.dumps(note))
    config = {"root": str(tmp_path / "root"), "source": "directory", "source_options": {"path": str(source)}}
    task = {"what": "warm", "config": config, "image": "image", "size": size, "n": count}
    figures = runner.measure("benchmarks.worker", task, watched=tmp_path)
    assert figures["children"] == 0, figures["commands"]
    assert figures["written"] <= count * 128 * KIB, f"{figures['written'] / count / KIB:.0f} KiB each"
    taken = figures["disk_after"] - figures["disk_before"]
    assert taken <= count * 128 * KIB, f"{taken / count / KIB:.0f} KiB each"


def test_a_hit(rig: Rig) -> None:
    """ensure_base of a base that is there syncs nothing, makes nothing, and starts nothing."""
    cache = rig.cache()
    with FaultPlan() as plan:
        cache.ensure_base("one")
    steps = {step.name for step in plan.trace}
    assert steps <= {"fs.touch", "fs.unlink"}, steps

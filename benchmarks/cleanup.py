"""A cleanup pass over many bases and disks: plan, and users by finder, at growing sizes. Prints JSON.

    python benchmarks/cleanup.py [--sizes 1000,10000] [--runs 3] [--dir DIR]

One base is brought in and one disk is made by the library; the others are copies of what it left on disk, so that
making ten thousand takes seconds. Medians of the runs; the first pass of a process also parses every record once.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from nova_imagecache import CacheConfig, ImageCache
from nova_imagecache.backends import BackendPaths
from nova_imagecache.backends.qcow2 import Qcow2Backend
from nova_imagecache.finders import DiskDirectories
from nova_imagecache.testing import FakeImage, FakeSource


def make_cache(root: Path, *, finder: bool) -> ImageCache:
    """A cache over ``root``, with or without a look at every disk's header."""
    disks = root / "disks"
    return ImageCache(
        CacheConfig(root=root, disks_dir=disks),
        source=FakeSource({"seed": FakeImage(data=b"seed" * 1024)}),
        backend=Qcow2Backend({}, BackendPaths(root=root, disks_dir=disks)),
        user_finders=[DiskDirectories([disks])] if finder else (),
    )


def populate(root: Path, count: int) -> None:
    """``count`` bases, each with one disk that is linked to it."""
    with make_cache(root, finder=False) as cache:
        cache.create_root_disk("seed", "seed-vm", size=1 << 30)
    seed, disk = root / "bases" / "seed", root / "disks" / "seed-vm"
    record = (seed / "base.json").read_text(encoding="utf-8")
    disk_record = (disk / "disk.json").read_text(encoding="utf-8")
    for number in range(count - 1):
        image_id = f"image-{number:05d}"
        base = root / "bases" / image_id
        base.mkdir(0o711)
        shutil.copyfile(seed / "disk", base / "disk")
        (base / "base.json").write_text(record.replace('"seed"', f'"{image_id}"'), encoding="utf-8")
        (base / "last-used").touch()
        home = root / "disks" / f"vm-{number:05d}"
        home.mkdir()
        os.link(base / "disk", home / "disk.base")
        shutil.copyfile(disk / "disk", home / "disk")
        (home / "disk.json").write_text(disk_record.replace('"seed"', f'"{image_id}"'), encoding="utf-8")


def measure(count: int, runs: int, top: Path) -> dict[str, float]:
    """Seconds of one pass over ``count`` bases and disks."""
    root = top / f"cache-{count}"
    root.mkdir()
    populate(root, count)
    figures: dict[str, list[float]] = {"first_plan": [], "plan": [], "plan_with_finder": [], "recover": [], "usage": []}
    for _run in range(runs):
        with make_cache(root, finder=False) as cache:
            for name, call in (
                ("first_plan", cache.plan_cleanup),
                ("plan", cache.plan_cleanup),
                ("usage", cache.usage),
                ("recover", cache.recover),
            ):
                start = time.perf_counter()
                call()
                figures[name].append(time.perf_counter() - start)
        with make_cache(root, finder=True) as cache:
            start = time.perf_counter()
            plan = cache.plan_cleanup()
            figures["plan_with_finder"].append(time.perf_counter() - start)
            if any(item.verdict != "keep" or item.users != 2 for item in plan.items):
                raise SystemExit("the plan is wrong: every base has its disk, by link and by header")
    shutil.rmtree(root)
    return {name: round(statistics.median(times), 4) for name, times in figures.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sizes", default="1000,10000")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir) as top:
        sizes = [int(size) for size in options.sizes.split(",")]
        result = {str(size): measure(size, options.runs, Path(top)) for size in sizes}
    json.dump({"benchmark": "cleanup", "unit": "seconds", "runs": options.runs, "sizes": result}, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()

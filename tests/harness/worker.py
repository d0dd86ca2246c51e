"""A process of its own that makes many disks at once: ``python -m harness.worker``, told what to do on stdin.

The first line is JSON: root, disks, endpoint, image, prefix, threads, size. It says "ready"; a second line starts it;
it answers with JSON: the bases that its threads got, and where the disks are.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nova_imagecache import BackendPaths, CacheConfig, FileLocation, GlanceSource, ImageCache
from nova_imagecache.backends.qcow2 import Qcow2Backend
from services.glance import ADMIN


def main() -> None:
    job = json.loads(sys.stdin.readline())
    root, disks = Path(job["root"]), Path(job["disks"])
    cache = ImageCache(
        CacheConfig(root=root, disks_dir=disks),
        source=GlanceSource(endpoint=job["endpoint"], token=ADMIN),
        backend=Qcow2Backend({}, BackendPaths(root=root, disks_dir=disks)),
    )

    def one(number: int) -> dict[str, Any]:
        disk = cache.create_root_disk(job["image"], f"{job['prefix']}-{number}", size=job["size"])
        assert isinstance(disk.location, FileLocation)
        base = cache.ensure_base(job["image"])
        return {"disk": str(disk.location.path), "reference": disk.reference, "record": asdict(base.record)}

    with cache, ThreadPoolExecutor(job["threads"]) as pool:
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        sys.stdin.readline()
        answers = list(pool.map(one, range(job["threads"])))
    json.dump(answers, sys.stdout, default=str)


if __name__ == "__main__":
    main()

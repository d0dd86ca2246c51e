"""A process of its own that fetches one image: ``python -m harness.fetcher ROOT ENDPOINT IMAGE``.

It answers with JSON: its memory in KiB before anything was done and at the highest point, and what came.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from nova_imagecache import BackendPaths, CacheConfig, GlanceSource, ImageCache
from nova_imagecache.backends.qcow2 import Qcow2Backend


def _memory(figure: str) -> int:
    found = re.search(rf"^{figure}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


def main() -> None:
    start = _memory("VmRSS")
    root, endpoint, image_id = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    paths = BackendPaths(root=root, disks_dir=root / "disks")
    # no digest is announced of what is generated; it is hashed all the same
    config = CacheConfig(root=root, allow_unverified=True)
    source = GlanceSource(endpoint=endpoint, token="any")
    with ImageCache(config, source=source, backend=Qcow2Backend({}, paths)) as cache:
        base = cache.ensure_base(image_id)
        answer = {
            "start": start,
            "peak": _memory("VmHWM"),
            "size": base.record.size,
            "made_by": base.record.made_by,
            "usage": cache.usage().bases,
        }
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main()

"""One measurement of Ironic's image cache: ``.venv-ironic/bin/python -m benchmarks.peers.ironic TASK``.

What runs is ``image_cache.ImageCache.fetch_image`` as the conductor calls it: ``force_raw``, with checksum and format
from Glance. Its product is a hard link to the raw master image; it makes no disk and syncs nothing. Not Ironic's
production set-up: no Keystone (``[glance]auth_type = none`` and ``endpoint_override``), no database, no conductor.

Imports and configuration are not in the times.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import meter

if TYPE_CHECKING:
    from benchmarks.meter import Figures

_CACHE_SIZE = 200 * 2**30
_CACHE_TTL = 86400


def set_up(task: Figures) -> None:
    """Import and configure Ironic."""
    from ironic.common import service  # noqa: F401 - registers the options
    from ironic.conf import CONF

    CONF([], project="ironic", default_config_files=[])
    CONF.set_override("auth_type", "none", "glance")
    CONF.set_override("endpoint_override", task["endpoint"], "glance")


class Fetcher:
    """Ironic's cache in the task's directory."""

    def __init__(self, task: Figures) -> None:
        from ironic.common import context
        from ironic.drivers.modules import image_cache

        root = Path(task["root"])
        self._context = context.RequestContext(is_admin=True, overwrite=False)
        self._cache = image_cache.ImageCache(str(root / "master"), _CACHE_SIZE, _CACHE_TTL)
        self._images = root / "images"
        self._images.mkdir()

    def fetch(self, image: Figures, name: str) -> float:
        """Seconds until the image lies at ``name``."""
        start = time.perf_counter()
        self._cache.fetch_image(
            image["image_id"],
            str(self._images / name),
            ctx=self._context,
            force_raw=True,
            expected_format=image["disk_format"],
            expected_checksum=image["sha512"],
            expected_checksum_algo="sha512",
        )
        return time.perf_counter() - start

    def allocated(self, name: str) -> int:
        """Bytes that the image takes."""
        return (self._images / name).stat().st_blocks * 512


def cold(task: Figures) -> Figures:
    """An image becomes a master image with a link to it."""
    fetcher = Fetcher(task)
    fetcher.fetch(task["warm_up"], "warm-up")
    meter.ready()
    with meter.Meter() as costs:
        fetcher.fetch(task["image"], "measured")
    return {**costs.figures, "base_allocated": fetcher.allocated("measured")}


def warm(task: Figures) -> Figures:
    """More links to a master image that is there: a question to Glance and a link each."""
    fetcher = Fetcher(task)
    fetcher.fetch(task["image"], "first")
    meter.ready()
    with meter.Meter() as costs:
        times = [fetcher.fetch(task["image"], f"image-{number}") for number in range(task["n"])]
    return {**costs.figures, **meter.spread(times)}


_WORK: dict[str, Any] = {"cold": cold, "warm": warm}


def main() -> None:
    """Do what the task says."""
    task = meter.task()
    set_up(task)
    meter.answer(_WORK[task["what"]](task))
    # threads of oslo's would keep the process
    os._exit(0)


if __name__ == "__main__":
    main()

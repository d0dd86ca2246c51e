"""Ceph: root disks beside the bare calls of librbd; images that are brought in, beside the tools that operators use and
the physical terms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks import runner
from benchmarks.bench import Bench, Sample
from benchmarks.floors import TERMS
from benchmarks.scale import GIB
from harness import rbd as in_ceph
from services.glance import ADMIN

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from benchmarks.images import Image
    from benchmarks.meter import Figures

_SIZE = 20 * GIB
_WORKER = "benchmarks.rbd_worker"
_IMPORTS = ("qcow2", "qcow2-zlib", "small")
_TOOLS = {"tools": "glanceclient", "tools, unverified": "connection"}
"""Who imports by hand, and by what they download: an image is used when its digest was right, as everywhere."""


def _storage(bench: Bench) -> Figures:
    return {"backend": "rbd", "backend_options": in_ceph.options(bench.ceph)}


def rbd_clone(bench: Bench, number: int) -> Iterator[Sample]:
    """Root disks of a base that is there: clone, resize, publish."""
    bare: Figures = {"what": "bare_clone", "conf": str(bench.ceph.conf), "size": _SIZE, "n": bench.scale.clones}
    turns = ["ours", "librbd"]
    for who in reversed(turns) if number % 2 else turns:
        in_ceph.empty(bench.ceph)
        with runner.fresh(bench.dir) as root:
            config = bench.config(root, source="directory", **_storage(bench))
            task: Figures = {"config": config, "image": bench.image("small").image_id}
            if who == "ours":
                figures = bench.ours("warm", **task, size=_SIZE, n=bench.scale.clones)
            else:
                figures = runner.measure(_WORKER, {**bare, **task})
            yield Sample(case="clone", who=who, figures=figures)
    in_ceph.empty(bench.ceph)


def rbd_import(bench: Bench, number: int) -> Iterator[Sample]:
    """An image that is not in the cluster becomes a base in it; beside download, qemu-img convert and rbd import, with
    and without a look at the digest.
    """
    for image in [bench.served(name) for name in _IMPORTS if name in bench.cold]:
        for turn in bench.turns(image.name, number):
            turns = ["ours", *_TOOLS]
            for who in [*(reversed(turns) if turn % 2 else turns), *bench.terms(image)]:
                in_ceph.empty(bench.ceph)
                with runner.fresh(bench.dir) as root:
                    yield Sample(case=image.name, who=who, figures=_import(bench, who, image, root))
    in_ceph.empty(bench.ceph)


def _import(bench: Bench, who: str, image: Image, root: Path) -> Figures:
    if who == "write":
        return runner.measure(_WORKER, {"what": "bare_write", "conf": str(bench.ceph.conf), "raw": image.raw})
    if who in TERMS:
        return bench.term(who, root, image)
    warm_up = bench.served("tiny").image_id
    if who == "ours":
        config = bench.config(root, **_storage(bench))
        return bench.ours("cold", config=config, image=image.image_id, warm_up=warm_up)
    task = {
        "what": "tools_import",
        "conf": str(bench.ceph.conf),
        "directory": str(root),
        "download": _TOOLS[who],
        "endpoint": bench.glance.url,
        "token": ADMIN,
        "image": image.image_id,
        "warm_up": warm_up,
        "format": image.disk_format,
    }
    return runner.measure(_WORKER, task)

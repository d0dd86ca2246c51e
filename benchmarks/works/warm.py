"""Warm: root disks and hits of a base that is there, and what importing the package takes."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from benchmarks import runner
from benchmarks.bench import Bench, Sample
from benchmarks.scale import GIB, TIB

if TYPE_CHECKING:
    from collections.abc import Iterator

_SIZES = {"1 GiB": GIB, "10 TiB": 10 * TIB}


def warm(bench: Bench, number: int) -> Iterator[Sample]:
    """Root disks of two sizes, beside Nova's and a bare ``qemu-img create``; Ironic's links to its master image."""
    for case, size in _SIZES.items():
        turns = ["ours", "qemu-img create", *(["nova"] if "nova" in bench.peers else [])]
        for who in reversed(turns) if number % 2 else turns:
            yield Sample(case=case, who=who, figures=_warm(bench, who, size))
    if "ironic" in bench.peers:
        with runner.fresh(bench.dir) as root:
            image = asdict(bench.served("small"))
            figures = bench.peer("ironic", "warm", root, image=image, n=bench.scale.warm_disks[1])
            yield Sample(case="a link", who="ironic", figures=figures)


def _warm(bench: Bench, who: str, size: int) -> dict[str, object]:
    many, few = bench.scale.warm_disks
    image = bench.image("small")
    root = bench.temporary()  # kept until the run ends: see runner.free
    if who == "nova":
        return bench.peer("nova", "warm", root, image=bench.served("small").image_id, size=size, n=few)
    if who == "ours":
        config = bench.config(root, source="directory")
        return bench.ours("warm", config=config, image=image.image_id, size=size, n=many)
    return bench.ours("bare", config={}, directory=str(root), base=image.raw, size=size, n=many)


def hit(bench: Bench, _number: int) -> Iterator[Sample]:
    """ensure_base of a base that is there."""
    with runner.fresh(bench.dir) as root:
        config = bench.config(root, source="directory")
        figures = bench.ours("hit", config=config, image=bench.image("tiny").image_id, n=bench.scale.hits)
        yield Sample(case="ensure_base", who="ours", figures=figures)


def start_up(bench: Bench, _number: int) -> Iterator[Sample]:
    """Importing the package, above what an empty interpreter takes."""
    figures = bench.ours("start_up", config={}, python=sys.executable)
    yield Sample(case="import", who="ours", figures=figures)

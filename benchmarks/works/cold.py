"""Cold: from an image in Glance to the first root disk, beside both peers, the four physical terms, and a pass with no
library around it.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from benchmarks import runner
from benchmarks.bench import Bench, Sample
from benchmarks.scale import GIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from benchmarks.images import Image
    from benchmarks.meter import Figures

_SIZE = 20 * GIB
_SPARSE_ROUNDS = 3
"""Rounds of the largest image, whose peers write gigabytes of zeros."""


def cold(bench: Bench, number: int) -> Iterator[Sample]:
    """Every image by everybody; every second round in the opposite order."""
    for name in bench.cold:
        if name == "sparse" and number >= _SPARSE_ROUNDS:
            continue
        for turn in bench.turns(name, number):
            yield from _turn(bench, bench.served(name), turn)


def _turn(bench: Bench, image: Image, turn: int) -> Iterator[Sample]:
    everybody = [("ours", _ours), *((peer, _PEERS[peer]) for peer in bench.peers)]
    for who, work in reversed(everybody) if turn % 2 else everybody:
        with runner.fresh(bench.dir) as root:
            # watched once: it takes time from what is watched, and shows the same every time
            watched = root if turn == 0 else None
            yield Sample(case=image.name, who=who, figures=work(bench, image, root, watched))
    for term in bench.terms(image):
        with runner.fresh(bench.dir) as root:
            yield Sample(case=image.name, who=term, figures=bench.term(term, root, image))
    if not image.compressed:
        with runner.fresh(bench.dir) as root:
            yield Sample(case=image.name, who="bare pass", figures=bench.bare_pass(root, image))


def _ours(bench: Bench, image: Image, root: Path, watched: Path | None) -> Figures:
    warm_up = bench.served("tiny").image_id
    task = {"image": image.image_id, "warm_up": warm_up, "size": _SIZE}
    return bench.ours("cold", config=bench.config(root), watched=watched, **task)


def _nova(bench: Bench, image: Image, root: Path, watched: Path | None) -> Figures:
    warm_up = bench.served("tiny").image_id
    return bench.peer("nova", "cold", root, watched=watched, image=image.image_id, warm_up=warm_up, size=_SIZE)


def _ironic(bench: Bench, image: Image, root: Path, watched: Path | None) -> Figures:
    warm_up = asdict(bench.served("tiny"))
    return bench.peer("ironic", "cold", root, watched=watched, image=asdict(image), warm_up=warm_up)


_PEERS: dict[str, Callable[[Bench, Image, Path, Path | None], Figures]] = {"nova": _nova, "ironic": _ironic}

"""A cleanup pass over thousands of bases, each with its disk, beside the pass of Nova's image cache manager."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from benchmarks import populate, runner
from benchmarks.bench import Bench, Sample

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def cleanup(bench: Bench, number: int) -> Iterator[Sample]:
    """Both look at the header of every disk. Nova's pass takes minutes and is run once."""
    for count in bench.scale.bases:
        config = {"root": str(_populated(bench, count)), "source": "directory", "source_options": {"path": "/"}}
        figures = bench.ours("cleanup", config=config, finder=True, bases=count)
        yield Sample(case=str(count), who="ours", figures=figures)
        if number == 0:
            yield Sample(case=str(count), who="ours, removing", figures=_going(bench, count))
        if number == 0 and "nova" in bench.peers and count in bench.scale.peer_bases:
            with runner.fresh(bench.dir) as root:
                yield Sample(case=str(count), who="nova", figures=_nova(root, count))


def _going(bench: Bench, count: int) -> dict[str, object]:
    """A pass that marks and one that removes: they need a cache of their own."""
    with runner.fresh(bench.dir) as directory:
        populate.populate(directory / "root", count)
        config = {"root": str(directory / "root"), "source": "directory", "source_options": {"path": "/"}}
        return bench.ours("going", config=config, finder=True)


@functools.cache
def _populated(bench: Bench, count: int) -> Path:
    root = bench.temporary() / "root"
    populate.populate(root, count)
    return root


def _nova(root: Path, count: int) -> dict[str, object]:
    task = {"what": "cleanup", "root": str(root), "endpoint": "http://127.0.0.1:1", "bases": count}
    python = runner.python_of("nova")
    return runner.measure("benchmarks.peers.nova", task, python=python)

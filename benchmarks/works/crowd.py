"""Many at once: on one image that is not there yet, and on a base that is there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks import meter, runner
from benchmarks.bench import Bench, Sample
from benchmarks.scale import GIB

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from benchmarks.meter import Figures

_SIZE = 20 * GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class _Turn:
    """Who asks, in how many processes and threads; ``size`` of the root disks, None: bases alone."""

    case: str
    who: str
    processes: int
    threads: int
    size: int | None = _SIZE


def crowd(bench: Bench, number: int) -> Iterator[Sample]:
    """One cold image, asked for by many: a few threads beside Nova's, then as many as a busy host ever has."""
    (processes, threads), few = bench.scale.crowd, bench.scale.crowd_beside
    many = f"{processes} x {threads}"
    turns = [
        *(_Turn(case=f"1 x {few}", who=who, processes=1, threads=few) for who in ("ours", "nova")),
        _Turn(case=f"{many}, bases alone", who="ours", processes=processes, threads=threads, size=None),
        _Turn(case=many, who="ours", processes=processes, threads=threads),
    ]
    if number == 0:  # minutes of qemu-img info: once is enough
        turns.append(_Turn(case=many, who="nova", processes=processes, threads=threads))
    for turn in turns:
        if turn.who == "ours" or turn.who in bench.peers:
            root = bench.temporary()
            yield Sample(case=turn.case, who=turn.who, figures=_crowd(bench, turn, root))
            runner.free(root)


def _crowd(bench: Bench, turn: _Turn, root: Path) -> Figures:
    image, warm_up = bench.served("qcow2"), bench.served("tiny")
    task: Figures = {"what": "crowd", "image": image.image_id, "warm_up": warm_up.image_id}
    task |= {"threads": turn.threads, "size": turn.size}
    module, python = "benchmarks.worker", None
    if turn.who == "ours":
        task["config"] = bench.config(root)
    else:
        module, python = f"benchmarks.peers.{turn.who}", runner.python_of(turn.who)
        task |= {"root": str(root), "endpoint": bench.glance.url}
    downloads = bench.glance.downloads(image.image_id)
    tasks = [{**task, "prefix": f"disk-{process}"} for process in range(turn.processes)]
    answers = runner.measure_together(module, tasks, python=python)
    return {**_summary(answers), "downloads": bench.glance.downloads(image.image_id) - downloads}


def _summary(answers: Sequence[Figures]) -> Figures:
    """Seconds until the first had its base, and how long after that the others had theirs, and their disks."""
    start = min(answer["start"] for answer in answers)
    based = sorted(moment for answer in answers for moment in answer["based"])
    made = sorted(moment for answer in answers for moment in answer["made"])
    first = based[0]
    return {
        "first": first - start,
        "seconds": made[-1] - start,
        "based": meter.spread([moment - first for moment in based]),
        "made": meter.spread([moment - first for moment in made]),
        "cpu": sum(answer["cpu"] + answer["cpu_children"] for answer in answers),
        "written": sum(answer["written"] for answer in answers),
        "children": sum(answer["children"] for answer in answers),
        "memory_grown": max(answer["memory_grown"] for answer in answers),
        "cpu_servers": answers[0]["cpu_servers"],
    }


def at_once(bench: Bench, _number: int) -> Iterator[Sample]:
    """Warm root disks, all at one moment and one after the other."""
    root = bench.temporary()  # kept until the run ends: see runner.free
    image = bench.image("small").image_id
    config = bench.config(root, source="directory")
    figures = bench.ours("at_once", config=config, image=image, size=_SIZE, n=bench.scale.at_once)
    yield Sample(case=f"{bench.scale.at_once} disks", who="ours", figures=figures)

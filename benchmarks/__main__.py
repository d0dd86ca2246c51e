"""``python -m benchmarks``: measure, keep the figures as JSON, and say what came out."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import images, machine, pages, tables
from benchmarks.bench import PEERS, Bench, Sample
from benchmarks.results import Results
from benchmarks.runner import REPO, MeasureError
from benchmarks.scale import FULL, QUICK
from benchmarks.works import WORKS

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what the command line says."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.publish and (options.image or options.no_peers or (options.only and not options.resume)):
        parser.error("the documentation shows a whole run")
    # so that services end in this case, too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    scale = QUICK if options.quick else FULL
    rounds = options.rounds or scale.rounds
    peers = () if options.no_peers else PEERS
    directory: Path = options.dir
    directory.mkdir(parents=True, exist_ok=True)
    out: Path = options.out or REPO / "benchmarks" / "results" / f"{time.strftime('%Y%m%dT%H%M%S')}-{scale.name}.json"
    results = Results(out, scale=scale.name, rounds=rounds, machine=machine.describe(directory))
    if options.resume:
        results.take_over(options.resume)
    cold = tuple(options.image or images.COLD)
    with Bench(scale, directory, rounds=rounds, peers=peers, cold=cold) as bench:
        for name in options.only or [name for name in WORKS if name not in results.complete]:
            _measure(bench, results, name)
    results.write()
    print()
    print(tables.everything(results.document))
    print(f"\nfigures: {out}")
    wanted = WORKS if options.publish else options.only or WORKS
    missing = [name for name in wanted if name not in results.complete]
    if missing:
        raise SystemExit(f"not measured to the end: {', '.join(missing)}; go on with --resume {out}")
    if options.publish:
        pages.FIGURES.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(out, pages.FIGURES)
        pages.regenerate()
        print(f"published: {pages.FIGURES}, {pages.PAGE} and its plots")


def _measure(bench: Bench, results: Results, name: str) -> None:
    """All rounds of one work. The others go on without one that fails."""
    results.begin(name)
    try:
        for number in range(bench.rounds):
            for sample in WORKS[name](bench, number):
                results.add(name, sample)
                _say(name, number, sample)
    except MeasureError as err:
        print(f"{name}: {err}", file=sys.stderr, flush=True)
    else:
        results.end(name)


def _say(name: str, number: int, sample: Sample) -> None:
    interesting = {key: sample.figures[key] for key in ("seconds", "p50") if key in sample.figures}
    words = "  ".join(f"{key} {value:.6f}" for key, value in interesting.items())
    print(f"{name:<10} round {number + 1}  {sample.case:<22} {sample.who:<16} {words}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure the library beside its peers.")
    parser.add_argument("--quick", action="store_true", help="small images and few rounds: to see that it works")
    parser.add_argument("--only", action="append", choices=list(WORKS), help="this alone; may be given several times")
    parser.add_argument(
        "--image", action="append", choices=images.COLD, help="cold, rbd-import: this one alone; likewise"
    )
    parser.add_argument("--rounds", type=int, help="rounds of everything")
    parser.add_argument("--no-peers", action="store_true", help="without Nova and Ironic")
    parser.add_argument("--dir", type=Path, default=REPO / ".work" / "bench", help="images, services, measured roots")
    parser.add_argument("--out", type=Path, help="the JSON file (default: benchmarks/results/<time>-<scale>.json)")
    parser.add_argument("--resume", type=Path, help="go on with the figures of this JSON file: measure what it lacks")
    parser.add_argument("--publish", action="store_true", help="make these the figures of the documentation")
    return parser


if __name__ == "__main__":
    main()

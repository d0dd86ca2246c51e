"""The least that bringing an image in can take: the slowest of four physical terms, or all the CPU work spread over
the cores.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.meter import Figures

TERMS = ("download", "hash", "decode", "write")
_CPU = ("cpu", "cpu_children", "cpu_servers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """Medians of the rounds of one case. ``seconds`` is the wall time, ``times`` that of the floor's, paired by round;
    ``slowest`` names what the floor is made of most often."""

    seconds: float
    floor: float
    times: float
    slowest: str
    terms: dict[str, float]
    cpu: float


def floor_of(document: Figures, case: str, work: str = "cold", who: str = "ours") -> Floor | None:
    """The floor of one image's runs by ``who``, None: not measured."""
    samples = document["works"].get(work, {}).get(case, {})
    cores = document["machine"]["cores"]
    rounds = []
    for number, run in enumerate(samples.get(who, [])):
        terms = {
            name: float(samples[name][number]["seconds"])
            for name in TERMS
            if number < len(samples.get(name, [])) and samples[name][number]["seconds"]
        }
        cpu = sum(float(run[name]) for name in _CPU) / cores
        limits = {**terms, "CPU": cpu}
        slowest = max(limits, key=lambda name: limits[name])
        rounds.append((float(run["seconds"]), limits[slowest], slowest, terms, cpu))
    if not rounds:
        return None
    names = [one[2] for one in rounds]
    return Floor(
        seconds=statistics.median(one[0] for one in rounds),
        floor=statistics.median(one[1] for one in rounds),
        times=statistics.median(one[0] / one[1] for one in rounds),
        slowest=max(names, key=names.count),  # of as many, the first: the page must not change by itself
        terms={
            name: statistics.median(one[3][name] for one in rounds if name in one[3])
            for name in TERMS
            if any(name in one[3] for one in rounds)
        },
        cpu=statistics.median(one[4] for one in rounds),
    )

"""The figures of a run: written as they come, read for tables and plots."""

from __future__ import annotations

import json
import statistics
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.bench import Sample
    from benchmarks.meter import Figures

VERSION = 1
_DIGITS = 6


class Results:
    """What was measured so far: ``document``, a file ``path`` of JSON that is complete after each sample."""

    def __init__(self, path: Path, *, scale: str, rounds: int, machine: Figures) -> None:
        self.path = path
        self.document: Figures = {
            "version": VERSION,
            "made_at": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
            "scale": scale,
            "rounds": rounds,
            "machine": machine,
            "complete": [],
            "works": {},
        }

    def take_over(self, path: Path) -> None:
        """Go on with the works that an earlier run of this scale has measured to their end."""
        earlier = json.loads(path.read_text(encoding="utf-8"))
        if (earlier["version"], earlier["scale"]) != (VERSION, self.document["scale"]):
            raise SystemExit(f"{path}: of another scale, or made by another version of the benchmarks")
        for work in earlier["complete"]:
            self.document["works"][work] = earlier["works"][work]
            self.document["complete"].append(work)

    def begin(self, work: str) -> None:
        """Forget earlier figures of this work."""
        self.document["works"].pop(work, None)
        if work in self.document["complete"]:
            self.document["complete"].remove(work)

    def end(self, work: str) -> None:
        """Every round of this work was measured."""
        self.document["complete"].append(work)
        self.write()

    @property
    def complete(self) -> set[str]:
        """The works that were measured to their end."""
        return set(self.document["complete"])

    def add(self, work: str, sample: Sample) -> None:
        """One more sample."""
        cases = self.document["works"].setdefault(work, {})
        cases.setdefault(sample.case, {}).setdefault(sample.who, []).append(_rounded(sample.figures))
        self.write()

    def write(self) -> None:
        """Bring the file up to date."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.document, indent=1) + "\n", encoding="utf-8")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, _DIGITS)
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list) else value


class Case:
    """One case of a run: medians of who took part, and ratios of pairs of one round."""

    def __init__(self, document: Figures, work: str, case: str) -> None:
        self._samples: dict[str, list[Figures]] = document["works"].get(work, {}).get(case, {})

    def __contains__(self, who: str) -> bool:
        return bool(self._samples.get(who))

    def values(self, who: str, figure: str) -> list[float]:
        """The figure in each round; ``made.p95`` is a figure within a figure."""
        found = []
        for sample in self._samples.get(who, []):
            value: Any = sample
            for key in figure.split("."):
                value = value.get(key) if isinstance(value, dict) else None
            if value is not None:
                found.append(float(value))
        return found

    def median(self, who: str, figure: str = "seconds") -> float | None:
        """The median of all rounds, None: not measured."""
        values = self.values(who, figure)
        return statistics.median(values) if values else None

    def ratio(self, who: str, other: str, figure: str = "seconds") -> float | None:
        """How many times ``other``'s figure is ``who``'s: the median of the ratios of each round."""
        pairs = list(zip(self.values(who, figure), self.values(other, figure), strict=False))
        ratios = [theirs / ours for ours, theirs in pairs if ours]
        return statistics.median(ratios) if ratios else None

    def word(self, who: str, figure: str) -> str | None:
        """A figure that is a word, from the first round."""
        samples = self._samples.get(who)
        value = samples[0].get(figure) if samples else None
        return None if value is None else str(value)


def cases(document: Figures, work: str) -> list[str]:
    """The cases of a work, in the order in which they were measured."""
    return list(document["works"].get(work, {}))

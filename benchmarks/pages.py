"""The page on performance: ``python -m benchmarks.pages`` makes its tables and plots anew from the committed figures.

A table stands between ``<!-- figures: NAME -->`` and ``<!-- end of figures -->``, with a name of ``tables.TABLES``.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from benchmarks.plots import PLOTS
from benchmarks.runner import REPO
from benchmarks.tables import TABLES

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.meter import Figures

PAGE = REPO / "docs" / "explanation" / "performance.md"
FIGURES = REPO / "docs" / "explanation" / "data" / "performance.json"
_PLACE = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)


def load(path: Path = FIGURES) -> Figures:
    """The figures of a run."""
    document: Figures = json.loads(path.read_text(encoding="utf-8"))
    return document


def page_with(document: Figures, text: str) -> str:
    """The page with its tables made of these figures."""
    return _PLACE.sub(lambda place: f"{place[1]}\n{TABLES[place[2]](document)}\n\n{place[3]}", text)


def plot_files(document: Figures) -> dict[Path, str]:
    """The plots, by where they lie."""
    return {FIGURES.with_name(f"{name}.svg"): draw(document) for name, draw in PLOTS.items()}


def regenerate() -> None:
    """Write page and plots."""
    document = load()
    PAGE.write_text(page_with(document, PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    for path, drawing in plot_files(document).items():
        path.write_text(drawing, encoding="utf-8")


if __name__ == "__main__":
    regenerate()

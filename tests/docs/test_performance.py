"""The page on performance shows the figures that lie beside it."""

from __future__ import annotations

from benchmarks import pages
from benchmarks.tables import TABLES


def test_tables_are_those_of_the_figures() -> None:
    """Every table of the page is what the committed figures give; ``python -m benchmarks.pages`` makes it so."""
    text = pages.PAGE.read_text(encoding="utf-8")
    assert pages.page_with(pages.load(), text) == text


def test_every_table_has_a_place() -> None:
    """No table that is made is left out of the page."""
    text = pages.PAGE.read_text(encoding="utf-8")
    for name in TABLES:
        assert text.count(f"<!-- figures: {name} -->") == 1, name


def test_plots_are_those_of_the_figures() -> None:
    """Every plot is what the committed figures give, and stands on the page."""
    text = pages.PAGE.read_text(encoding="utf-8")
    for path, drawing in pages.plot_files(pages.load()).items():
        assert path.read_text(encoding="utf-8") == drawing, path.name
        assert f"](data/{path.name})" in text, path.name

"""The pictures of the command line show what it prints."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from xml.etree import ElementTree as ET

import pytest

from .pages import DOCS

SVG = "{http://www.w3.org/2000/svg}text"


def drawn(name: str) -> list[str]:
    """The lines of a picture, from the texts in it."""
    rows: dict[str, list[str]] = {}
    for text in ET.parse(DOCS / "terminal" / f"{name}.svg").iter(SVG):
        rows.setdefault(text.get("y", ""), []).append((text.text or "").replace("\N{NO-BREAK SPACE}", " "))
    return [" ".join(parts) for _, parts in sorted(rows.items(), key=lambda row: float(row[0]))]


def shape(lines: list[str]) -> Iterator[list[str]]:
    """What of a table does not change from run to run: the command, the headings, and the names of facts."""
    yield lines[0].split()
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    yield table[0]
    if table[0][0] in ("Field", "Name"):
        yield [row[0] for row in table if row[0]]


@pytest.mark.slow
def test_pictures_show_what_commands_print() -> None:
    """Each picture has the command, the headings and the facts that the command has now."""
    argv = [sys.executable, str(DOCS / "screenshots.py"), "--text"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    played = json.loads(done.stdout)
    assert set(played) | {"ensure"} == {path.stem for path in (DOCS / "terminal").glob("*.svg")}
    for name, lines in played.items():
        assert list(shape(drawn(name))) == list(shape(lines)), f"{name}: run python docs/screenshots.py"


def test_the_picture_of_a_fetch_shows_progress() -> None:
    """What a person sees while an image comes in: stage, image, percentage, bytes and rate."""
    lines = drawn("ensure")
    assert lines[0].startswith("$ nova-imagecache ensure")
    assert re.search(r"fetching .* \d+% .*iB of .*iB/s", re.sub(r"\s+", " ", lines[1]))


def test_pictures_name_no_place_of_the_machine_they_were_made_on() -> None:
    """Nothing of the machine that made them: a compute host's places instead."""
    for path in (DOCS / "terminal").glob("*.svg"):
        assert "/tmp" not in path.read_text(encoding="utf-8"), path.name

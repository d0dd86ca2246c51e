"""The reference says what the code says: options, commands, errors, events, entry points, names, rooms, words."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

import nova_imagecache
from nova_imagecache import exceptions
from nova_imagecache._config import parse_duration
from nova_imagecache.backends._rbd_options import RbdOptions
from nova_imagecache.backends._writer import FileOptions
from nova_imagecache.cli._app import _COMMANDS, CacheApp
from nova_imagecache.cli._base import CacheCommand
from nova_imagecache.sources._glance_options import GlanceOptions

from .pages import DOCS, REPO, blocks, pages

REFERENCE = DOCS / "reference"
SOURCE = REPO / "src/nova_imagecache"


def tables(page: Path) -> dict[str, list[list[str]]]:
    """The rows of the page's tables by the heading they stand under, cells without spaces around them."""
    found: dict[str, list[list[str]]] = {}
    heading = ""
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ").strip()
        elif line.startswith("|") and not set(line) <= set("|-: "):
            cells = re.split(r"(?<!\\)\|", line.strip()[1:-1])
            found.setdefault(heading, []).append([cell.strip() for cell in cells])
    return {name: rows[1:] for name, rows in found.items()}


# --- configuration


def plain(value: Any) -> Any:
    """A default as the page writes it."""
    if isinstance(value, timedelta):
        return {"seconds": value.total_seconds()}
    return list(value) if isinstance(value, tuple) else value


def as_written(cell: str) -> Any:
    """What the page writes as a default: TOML, or a word for what is not there."""
    if cell in ("none", ""):
        return None
    value = tomllib.loads(f"x = {cell.strip('`')}")["x"]
    if isinstance(value, str) and re.fullmatch(r"\d+[smhd]", value):
        return {"seconds": parse_duration(value).total_seconds()}
    return value


def defaults(cls: Any) -> dict[str, Any]:
    found = {}
    for field in dataclasses.fields(cls):
        if field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
        else:
            found[field.name] = None if field.default is dataclasses.MISSING else field.default
    return found


ELSEWHERE = {"disks_dir": "`<root>/disks`", "features": "the cluster's", "endpoints": "the catalogue's"}
"""Defaults that are made from something else."""


@pytest.mark.parametrize(
    ("heading", "cls"),
    [
        ("Configuration", nova_imagecache.CacheConfig),
        ("`backend_options` of `file` and `qcow2`", FileOptions),
        ("`backend_options` of `rbd`", RbdOptions),
        ("`source_options` of `glance`", GlanceOptions),
    ],
)
def test_every_option_stands_in_the_reference_with_its_default(heading: str, cls: Any) -> None:
    """A row for every field of the options' class and none for others, each with the default that the class has."""
    written = {}
    for option, default, meaning in tables(REFERENCE / "configuration.md")[heading]:
        for name in re.findall(r"`(\w+)`", option):
            written[name] = default
            assert meaning, name
    # another word for endpoints
    written.pop("endpoint", None)
    expected = defaults(cls)
    assert set(written) == set(expected)
    for name, default in written.items():
        if name in ELSEWHERE:
            assert default == ELSEWHERE[name]
        else:
            assert as_written(default) == plain(expected[name]), name


# --- the command line


def test_the_command_line_page_says_what_the_parsers_say() -> None:
    """The generated part is what docs/commands.py would write now."""
    argv = [sys.executable, str(DOCS / "commands.py"), "--check"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_command_and_option_stands_on_the_command_line_page() -> None:
    """Whatever the generator does: a heading for each command, and each of its own options below it."""
    text = (REFERENCE / "command-line.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^### (\S+)\n(.*?)(?=^### |\Z)", text, re.DOTALL | re.MULTILINE))
    assert set(sections) == {*_COMMANDS, "help", "complete"}
    app = CacheApp()
    for name, command in _COMMANDS.items():
        shown = command(app, None).get_parser(name).format_help().split("output formatters:")[0]
        options = set(re.findall(r"(?<!\w)--[a-z][a-z-]+", shown)) - {"--help"}
        # the first lines of the help name options of the formats too
        options -= set(re.findall(r"--[a-z-]+", shared()))
        for option in options:
            assert f"`{option}" in sections[name], f"{name} {option}"
        for column in command.columns:
            assert f"`{column}`" in sections[name], f"{name}: {column}"
        assert issubclass(command, CacheCommand)


def shared() -> str:
    """The options that cliff gives to commands, in the words of its help."""
    app = CacheApp()
    texts = []
    for name in ("list", "show"):
        help_ = _COMMANDS[name](app, None).get_parser(name).format_help()
        texts.append(help_.split("output formatters:")[1])
    return "\n".join(texts)


@pytest.mark.parametrize("option", ["-f", "-c", "--sort-column"])
def test_options_of_answers_exist(option: str) -> None:
    """What the page says of formats and columns is what cliff offers."""
    assert f"`{option} " in (REFERENCE / "command-line.md").read_text(encoding="utf-8")
    assert f"{option} " in shared()


def test_every_command_on_a_page_exists() -> None:
    """What the pages tell to type is a command of the command line."""
    for page in pages():
        for block in blocks(page):
            for found in re.findall(r"nova-imagecache (?:--?[\w-]+ (?:\S+ )?)*([a-z][a-z-]*)\b", block.code):
                if block.language == "console":
                    assert found in {*_COMMANDS, "help", "complete"}, f"{block}: {found}"


# --- exceptions

CLASSES = [
    cls for cls in vars(exceptions).values() if isinstance(cls, type) and issubclass(cls, exceptions.ImageCacheError)
]


def test_every_exception_stands_in_the_reference() -> None:
    """The table names every class with its own fields, its exit code, and whether to call again."""
    rows = tables(REFERENCE / "exceptions.md")["Exceptions"]
    table = {re.findall(r"`(\w+)`", row[0])[0]: row for row in rows}
    assert set(table) == {cls.__name__ for cls in CLASSES}
    for cls in CLASSES:
        _, fields, code, _ = table[cls.__name__]
        assert code == f"{cls.exit_code}" + (", retryable" if cls.retryable else ""), cls.__name__
        assert re.findall(r"`(\w+)`", fields) == own_fields(cls), cls.__name__
        builtins = [base.__name__ for base in cls.__bases__ if base.__module__ == "builtins" and base is not Exception]
        assert re.findall(r"\((\w+)\)", table[cls.__name__][0]) == builtins, cls.__name__


COMMON = ("image_id", "disk_id", "name", "stage", "todo")


def own_fields(cls: type[exceptions.ImageCacheError]) -> list[str]:
    """The attributes that the class adds, in the order in which it sets them."""
    if "__init__" not in vars(cls):
        return []
    names = re.findall(r"^\s+self\.(\w+) = ", inspect.getsource(vars(cls)["__init__"]), re.MULTILINE)
    # name is a field of all, but for the error that means a plug-in's by it
    return [name for name in names if name not in COMMON or cls is exceptions.BackendNotFoundError]


def test_every_exception_is_described_in_detail() -> None:
    """Its docstring is on the page."""
    text = (REFERENCE / "exceptions.md").read_text(encoding="utf-8")
    assert Counter(re.findall(r"autoexception:: (\w+)", text)) == Counter(cls.__name__ for cls in CLASSES)


def test_exit_codes_of_the_command_line_are_those_of_the_exceptions() -> None:
    """The command line's table has every code that an exception can end with."""
    rows = tables(REFERENCE / "command-line.md")["Exit codes"]
    assert {str(cls.exit_code) for cls in CLASSES} <= {row[0] for row in rows}


# --- events


def emitted() -> Iterator[tuple[str, tuple[str, ...]]]:
    """The kind and the details of every event that the code emits."""
    for path in SOURCE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or not node.args:
                continue
            kind = node.args[0]
            if node.func.attr in ("emit", "_send") and isinstance(kind, ast.Constant):
                yield str(kind.value), tuple(keyword.arg or "" for keyword in node.keywords)


def test_every_event_stands_in_the_reference() -> None:
    """A row for every kind that the code emits and none for others, with the names of its details."""
    rows = {row[0].strip("`"): row for row in tables(REFERENCE / "events.md")["Events"]}
    kinds = dict(emitted())
    assert len(kinds) > 10
    assert set(rows) == set(kinds)
    for kind, details in kinds.items():
        assert re.findall(r"`(\w+)`", rows[kind][2]) == list(details), kind


# --- entry points


def test_entry_points_stand_in_the_reference() -> None:
    """The groups and names that the distribution brings, and nothing else."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    rows = tables(REFERENCE / "entry-points.md")["Entry points"]
    written = {row[0].strip("`"): sorted(re.findall(r"`(\w+)`", row[1])) for row in rows if len(row) == 4}
    assert written == {group: sorted(names) for group, names in project["entry-points"].items()}


# --- architecture, glossary, decisions


def test_every_room_stands_on_the_architecture_page() -> None:
    """A module that the page does not name is found by nobody who reads it."""
    text = (DOCS / "explanation/architecture.md").read_text(encoding="utf-8")
    rooms = re.search(r"## Rooms\n```\n(.*?)```", text, re.DOTALL)
    assert rooms is not None
    named = set(re.findall(r"[\w]+", rooms[1]))
    assert {path.stem for path in SOURCE.glob("*.py") if path.stem != "__main__"} <= named


@pytest.mark.parametrize(
    "word",
    [
        *("image", "source", "base image, base", "backing file / overlay", "parent snapshot / clone", "root disk"),
        *("reference", "backend", "stage, publish", "adopt", "retire, restore, purge", "users", "pin", "idle time"),
        *("virtual / allocated size", "flatten / attach", "pool / store"),
    ],
)
def test_the_projects_words_stand_in_the_glossary(word: str) -> None:
    """One word for one idea, and its meaning on one page."""
    assert word in {row[0] for row in tables(REFERENCE / "glossary.md")["Glossary"]}


def test_every_decision_is_in_the_index() -> None:
    """A row for each record, in order, and each record begins with its number."""
    rows = [row[0] for row in tables(DOCS / "adr/README.md")["Architecture decision records"]]
    records = sorted(DOCS.glob("adr/0*.md"))
    assert rows == [f"[{path.name[:4]}]({path.name})" for path in records]
    for path in records:
        assert path.read_text(encoding="utf-8").startswith(f"# {path.name[:4]}: ")

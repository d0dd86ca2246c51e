"""The pages cannot rot: their code runs, their links lead somewhere, their tables name what there is."""

from __future__ import annotations

import ast
import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import nova_imagecache
from nova_imagecache import exceptions

REPO = Path(__file__).resolve().parents[2]
PAGES = sorted([REPO / "README.md", REPO / "CONTRIBUTING.md", *(REPO / "docs").rglob("*.md")])
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: Path, language: str) -> list[str]:
    return [code for kind, code in _BLOCK.findall(page.read_text(encoding="utf-8")) if kind == language]


def shell_of(console: str) -> str:
    """The commands of a console block: lines after a prompt, with the lines that continue them."""
    return "\n".join(line.removeprefix("$ ") for line in console.splitlines())


def test_the_tutorial_runs_as_it_stands(tmp_path: Path) -> None:
    """Every block of the first tutorial runs, one after the other, and says what the text says."""
    page = REPO / "docs/tutorial/first-cache.md"
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    said = ""
    for kind, code in _BLOCK.findall(page.read_text(encoding="utf-8")):
        argv = [sys.executable, "-W", "error", "-c", code] if kind == "python" else ["bash", "-euc", shell_of(code)]
        done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{code}\n{done.stderr}"
        said += done.stdout
    assert "removed ('demo',)" in said
    assert "backing file: disk.base" in said


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_python_on_every_page_parses_and_imports_what_exists(page: Path) -> None:
    """A name imported from the library on a page is one it has."""
    for code in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "nova_imagecache":
                module = __import__(node.module or "", fromlist=["x"])
                for name in node.names:
                    assert hasattr(module, name.name), f"{page.name}: {node.module} has no {name.name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_links_lead_to_files(page: Path) -> None:
    """Every relative link of a page leads to something in the repository."""
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_exception_stands_in_the_reference_with_its_exit_code() -> None:
    """The table of exceptions names every class, its exit code and whether to retry."""
    table = (REPO / "docs/reference/exceptions.md").read_text(encoding="utf-8")
    classes = [
        cls
        for cls in vars(exceptions).values()
        if isinstance(cls, type) and issubclass(cls, exceptions.ImageCacheError)
    ]
    assert len(classes) > 20
    for cls in classes:
        row = re.search(rf"^\| `{cls.__name__}`[^|]*\|[^|]*\|([^|]*)\|", table, re.MULTILINE)
        assert row is not None, f"{cls.__name__} has no row"
        cell = row[1].strip()
        assert cell == f"{cls.exit_code}" + (", retryable" if cls.retryable else ""), cls.__name__


def test_every_option_stands_in_the_reference() -> None:
    """The configuration page has a row for every field of CacheConfig, and none for others."""
    text = (REPO / "docs/reference/configuration.md").read_text(encoding="utf-8")
    table = text.split("## `backend_options`")[0]
    rows = set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
    assert rows == {field.name for field in dataclasses.fields(nova_imagecache.CacheConfig)}


def test_every_command_on_a_page_exists() -> None:
    """What the pages tell to type is a command of the command line."""
    done = subprocess.run(
        [sys.executable, "-m", "nova_imagecache", "--help"], capture_output=True, text=True, check=True
    )
    for page in PAGES:
        for code in blocks(page, "console"):
            for line in code.splitlines():
                if found := re.match(r"\$ nova-imagecache (?:--config \S+ )?([a-z-]+)", line):
                    assert re.search(rf"^\s+{found[1]}\b", done.stdout, re.MULTILINE), f"{page.name}: {line}"


def test_every_command_stands_in_the_reference() -> None:
    """The command-line page has a row for every command there is."""
    done = subprocess.run(
        [sys.executable, "-m", "nova_imagecache", "--help"], capture_output=True, text=True, check=True
    )
    commands = re.findall(r"^  ([a-z-]+) {2,}", done.stdout.split("commands:")[1], re.MULTILINE)
    assert len(commands) > 15
    table = (REPO / "docs/reference/command-line.md").read_text(encoding="utf-8")
    rows = "\n".join(line for line in table.splitlines() if line.startswith("| `"))
    for command in commands:
        assert re.search(rf"`{command}\b", rows), command

"""News fragments become a change log: every one of them, under the heading of its kind."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from harness.built import PROJECT, REPO

KINDS = {kind["directory"]: kind["name"] for kind in PROJECT["tool"]["towncrier"]["type"]}
FRAGMENTS = sorted(path for path in (REPO / "changelog.d").iterdir() if path.name != "README.md")


def draft(directory: Path) -> subprocess.CompletedProcess[str]:
    """What a release would write; nothing is written."""
    argv = [sys.executable, "-m", "towncrier", "build", "--draft", "--version", "9.9.9", "--date", "2030-01-01"]
    return subprocess.run([*argv, "--dir", str(directory)], check=False, capture_output=True, text=True, timeout=60)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The configuration and the fragments, somewhere else."""
    shutil.copy(REPO / "pyproject.toml", tmp_path)
    shutil.copytree(REPO / "changelog.d", tmp_path / "changelog.d")
    return tmp_path


def test_every_fragment_stands_under_the_heading_of_its_kind() -> None:
    """None is skipped, cut or mistaken for another kind."""
    done = draft(REPO)
    assert done.returncode == 0, done.stderr
    assert done.stdout.lstrip().startswith("## 9.9.9 (2030-01-01)")
    parts = re.split(r"^### (\w+)$", done.stdout, flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert FRAGMENTS
    for path in FRAGMENTS:
        kind = path.name.split(".")[-2]
        text = " ".join(path.read_text(encoding="utf-8").split())
        assert text, path.name
        assert text in " ".join(sections[KINDS[kind]].split()), path.name


@pytest.mark.parametrize("name", ["+words.improved.md", "12.md", "notes.txt"])
def test_a_fragment_of_no_kind_is_an_error(project: Path, name: str) -> None:
    """Instead of being left out of the release without a word."""
    assert draft(project).returncode == 0
    (project / "changelog.d" / name).write_text("Something.\n")
    done = draft(project)
    assert done.returncode != 0
    assert name in done.stdout + done.stderr


def test_an_issues_number_stands_beside_its_news(project: Path) -> None:
    """Those without one have none."""
    (project / "changelog.d/12.fixed.md").write_text("A bug is gone.\n")
    (project / "changelog.d/+words.security.md").write_text("A hole is closed.\n")
    said = draft(project).stdout
    assert "- A bug is gone. (#12)" in said
    assert "- A hole is closed.\n" in said


def test_the_readme_names_the_kinds_that_there_are() -> None:
    """In the order in which they are printed."""
    table = (REPO / "changelog.d/README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(KINDS)

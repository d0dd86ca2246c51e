"""What type checkers say to users of the public API: right uses are clean, and each wrong one is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
REPO = HERE.parents[1]
WRONG = HERE / "wrong_uses.py"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def wrong_lines() -> set[int]:
    lines = WRONG.read_text(encoding="utf-8").splitlines()
    return {number for number, line in enumerate(lines, start=1) if "# type: ignore[" in line}


@pytest.fixture(scope="module")
def pyright() -> list[dict[str, Any]]:
    """What pyright says of both files, in strict mode."""
    # beside the interpreter, and with it: the packages are looked up where the tests run
    program = Path(sys.executable).parent / "basedpyright"
    argv = [str(program), "--project", str(HERE), "--pythonpath", sys.executable, "--outputjson"]
    done = subprocess.run(argv, cwd=HERE, check=False, capture_output=True, text=True, timeout=240)
    assert done.stdout, done.stderr
    answer = json.loads(done.stdout)
    assert answer["summary"]["filesAnalyzed"] == 2
    found: list[dict[str, Any]] = answer["generalDiagnostics"]
    return found


def lines_of(diagnostics: list[dict[str, Any]], path: Path) -> dict[int, str]:
    return {one["range"]["start"]["line"] + 1: one["message"] for one in diagnostics if one["file"].endswith(path.name)}


def test_there_are_wrong_uses_of_every_kind() -> None:
    """Names, arguments, results, values and plug-ins."""
    assert len(wrong_lines()) > 35


def test_mypy_takes_the_right_uses_and_refuses_the_wrong_ones() -> None:
    """Strict: an ignore over a line that mypy would have taken is an error."""
    argv = [sys.executable, "-m", "mypy", "--warn-unused-ignores", str(HERE / "public_api.py"), str(WRONG)]
    done = subprocess.run(argv, cwd=REPO, check=False, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout


def test_pyright_takes_the_right_uses(pyright: list[dict[str, Any]]) -> None:
    """Not a word, in strict mode."""
    assert lines_of(pyright, HERE / "public_api.py") == {}


def test_pyright_refuses_the_wrong_uses_and_nothing_else(pyright: list[dict[str, Any]]) -> None:
    """Line by line the same as mypy."""
    found = lines_of(pyright, WRONG)
    assert {line: message for line, message in found.items() if line not in wrong_lines()} == {}
    assert wrong_lines() - set(found) == set()

"""What builds on the library goes on working with it: the examples' suites, run as their authors run them."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from harness.built import REPO

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PATIENCE = 540
TOOL = REPO / "tools/downstream.sh"
PROJECTS = sorted({path.parents[1].name for path in (REPO / "examples").glob("*/tests/test_*.py")})
PYPROJECT = """
[build-system]
requires = ["setuptools>=61"]
build-backend = "setuptools.build_meta"

[project]
name = "nova-imagecache-toy"
version = "1.0"
dependencies = ["nova-imagecache{version}"]

[project.entry-points."nova_imagecache.backends"]
toy = "nova_imagecache_toy:ToyBackend"

[tool.setuptools]
py-modules = ["nova_imagecache_toy"]
"""
MODULE = """
from nova_imagecache.testing import MemoryBackend

class ToyBackend(MemoryBackend):
    pass
"""
SUITE = """
import os
import nova_imagecache

def test_the_library_finds_the_backend():
    assert "toy" in nova_imagecache.available_backends()
    assert nova_imagecache.__file__.startswith(os.environ["REPO"])

def test_what_is_asked_for():
    assert os.environ.get("TOY") != "broken"
"""


def downstream(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    # a group of its own: what hangs is ended with all that it started
    argv = [str(TOOL), *map(str, arguments)]
    with subprocess.Popen(
        argv,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            pytest.fail(f"not done after {PATIENCE} s\n{out}{err}")
    return subprocess.CompletedProcess(argv, process.returncode, out, err)


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """The project of a third party."""
    path = tmp_path / "nova-imagecache-toy"
    (path / "tests").mkdir(parents=True)
    (path / "pyproject.toml").write_text(PYPROJECT.format(version=">=0.1"))
    (path / "nova_imagecache_toy.py").write_text(MODULE)
    (path / "tests/test_toy.py").write_text(SUITE)
    return path


def test_all_that_have_tests_are_listed() -> None:
    """Nobody has to name an example anywhere."""
    listed = downstream("--list").stdout.split()
    assert listed == [*PROJECTS, *(["examples"] if (REPO / "tests/examples").is_dir() else [])]


def test_a_project_is_installed_for_its_tests_alone(toy: Path) -> None:
    """Its entry points are found, the library is this folder's, and nothing is left in either."""
    before = sorted(path for path in toy.rglob("*"))
    done = downstream(toy, REPO=str(REPO))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
    assert sorted(path for path in toy.rglob("*")) == before
    listing = subprocess.run(
        [REPO / ".venv/bin/python", "-m", "pip", "list"], check=True, capture_output=True, text=True
    )
    assert "toy" not in listing.stdout


def test_a_broken_project_is_a_failure(toy: Path) -> None:
    """With its name at the end."""
    done = downstream(toy, REPO=str(REPO), TOY="broken")
    assert done.returncode == 1
    assert f"failed: {toy}" in done.stderr


def test_a_project_that_needs_another_release_is_told_so(toy: Path) -> None:
    """Before its tests fail for reasons that nobody understands."""
    (toy / "pyproject.toml").write_text(PYPROJECT.format(version=">=99"))
    done = downstream(toy, REPO=str(REPO))
    assert done.returncode == 1
    assert "needs nova-imagecache>=99" in done.stderr


def test_an_unknown_name_is_refused_with_those_that_there_are() -> None:
    """Instead of passing because nothing ran."""
    done = downstream("no-such-example")
    assert done.returncode == 1
    assert "no-such-example" in done.stderr


@pytest.mark.services
@pytest.mark.parametrize("name", PROJECTS)
def test_the_suite_of_an_example_passes(name: str) -> None:
    """Against the library of this folder, with what it needs of this machine."""
    done = downstream(name)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout

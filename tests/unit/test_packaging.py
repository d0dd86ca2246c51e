"""What the distribution says of itself: its dependencies, their oldest releases, its rooms."""

from __future__ import annotations

import ast
import inspect
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from filelock import UnixFileLock

import nova_imagecache

HERE = Path(__file__).parents[2]
SOURCE = Path(nova_imagecache.__file__).parent
FROM_ELSEWHERE = {"rados", "rbd", "pytest"}
"""Ceph's bindings come with its packages and are in no index; pytest is where the testing kit's suites are run."""


@pytest.fixture(scope="module")
def project() -> dict[str, object]:
    """The table ``project`` of pyproject.toml."""
    found: dict[str, object] = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]
    return found


def _imported() -> set[str]:
    """The top-level names that the package imports, anywhere."""
    names = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
                names.add(node.module.partition(".")[0])
    return names - sys.stdlib_module_names - {"nova_imagecache"}


@pytest.mark.slow
def test_all_that_is_imported_is_declared(project: dict[str, object]) -> None:
    """As a dependency or in an extra: whoever installs the distribution has what it needs."""
    declared = _requirements(project)
    owners = packages_distributions()
    for name in _imported() - FROM_ELSEWHERE:
        assert any(_plain(owner) in declared for owner in owners.get(name, ())) or name == "libvirt", name
    assert "libvirt-python" in declared


def _requirements(project: dict[str, object]) -> set[str]:
    found = list(project["dependencies"])  # type: ignore[call-overload]  # a list, as the build checks
    for extra in project["optional-dependencies"].values():  # type: ignore[attr-defined]  # a table of lists
        found += extra
    names = {re.match(r"[\w.-]+", requirement) for requirement in found}
    return {_plain(name[0]) for name in names if name is not None}


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("option", ["fallback_to_soft", "preserve_lock_file"])
def test_the_lock_library_knows_what_is_asked_of_it(option: str) -> None:
    """Older releases take any option and do nothing with it: a lock would become a file that outlives its owner."""
    assert option in inspect.signature(UnixFileLock.__init__).parameters


def test_contributors_are_told_of_every_room() -> None:
    """Whoever looks for where a change belongs finds each module named."""
    text = (HERE / "CONTRIBUTING.md").read_text()
    rooms = {path.name for path in SOURCE.glob("*.py")} - {"__main__.py"}
    assert [room for room in sorted(rooms) if room not in text] == []

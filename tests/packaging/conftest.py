"""One build and two environments for all tests of all workers."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
from filelock import FileLock

from harness.built import Built, Environment, build, new_environment

T = TypeVar("T")


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A directory that all workers of this run see."""
    base = tmp_path_factory.getbasetemp()
    path = (base if worker_id == "master" else base.parent) / "distribution"
    path.mkdir(exist_ok=True)
    return path


def once(shared: Path, name: str, make: Callable[[Path], T]) -> T:
    """What ``make`` makes in a directory of its own, by the first worker that asks."""
    with FileLock(shared / f"{name}.lock"):
        answer = shared / f"{name}.pickle"
        if not answer.exists():
            where = shared / name
            where.mkdir()
            answer.write_bytes(pickle.dumps(make(where)))
        made: T = pickle.loads(answer.read_bytes())
        return made


@pytest.fixture(scope="session")
def built(shared: Path) -> Built:
    """The sdist and its wheels."""
    return once(shared, "built", build)


@pytest.fixture(scope="session")
def core(shared: Path, built: Built) -> Environment:
    """The wheel, and what it says it needs."""
    return once(shared, "core", lambda where: new_environment(where / "venv", str(built.wheel)))


@pytest.fixture(scope="session")
def full(shared: Path, built: Built) -> Environment:
    """The wheel with the extras that an operator installs."""
    return once(shared, "full", lambda where: new_environment(where / "venv", f"{built.wheel}[cli,oslo]"))

"""What every kind of test may ask for: other filesystems, other users, processes of their own."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest
from hypothesis import HealthCheck, settings

from harness import said
from services.require import require

# the time that an example takes says nothing on a machine that runs other tests beside it
settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("default")

pytest_plugins = ["services.fixtures"]


def pytest_collection_finish() -> None:
    """What was imported and collected stays: no collection of garbage looks at it again, and no fork copies it."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What tests say of themselves, below what pytest says of them."""
    said.tell(terminalreporter)


MIB = 1 << 20


class InChild(Protocol):
    """Runs a function in a forked process and gives what it returned; what it raised is raised here."""

    def __call__(self, function: Callable[[], Any], *, unprivileged: bool = False) -> Any: ...


@pytest.fixture
def in_child() -> InChild:
    """A process of its own for a function, as another user if ``unprivileged`` and this one is root."""
    context = multiprocessing.get_context("fork")

    def run(function: Callable[[], Any], *, unprivileged: bool = False) -> Any:
        here, there = context.Pipe(duplex=False)

        def child() -> None:
            if unprivileged and os.geteuid() == 0:
                nobody = pwd.getpwnam("nobody")
                os.setgroups([])
                os.setgid(nobody.pw_gid)
                os.setuid(nobody.pw_uid)
            try:
                there.send((function(), None))
            except Exception as err:  # noqa: BLE001 - reason: handed to the parent, which raises it
                there.send((None, err))

        process = context.Process(target=child)
        process.start()
        there.close()
        try:
            result, error = here.recv()
        finally:
            process.join()
            here.close()
        if error is not None:
            raise error
        return result

    return run


@pytest.fixture
def open_path() -> Iterator[Path]:
    """A temporary directory that every user may enter; pytest's own are for this user alone."""
    path = Path(tempfile.mkdtemp(prefix="open-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def xfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The mount point of a small XFS with reflinks (about 500 MiB free). Tests that use it are marked ``services``."""
    missing = None
    if os.geteuid() != 0:
        missing = "only root can mount a filesystem"
    elif shutil.which("mkfs.xfs") is None:
        missing = "mkfs.xfs is missing; install xfsprogs"
    require(missing)
    where = tmp_path_factory.mktemp("xfs")
    image, mounted = where / "image", where / "mounted"
    mounted.mkdir()
    with image.open("wb") as file:
        file.truncate(600 * MIB)
    subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", image], check=True, capture_output=True)
    subprocess.run(["mount", "-o", "loop", image, mounted], check=True, capture_output=True)
    yield mounted
    subprocess.run(["umount", mounted], check=True, capture_output=True)


@pytest.fixture
def xfs_path(xfs: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """An empty directory on the XFS, removed afterwards."""
    path = Path(tempfile.mkdtemp(dir=xfs))
    yield path
    shutil.rmtree(path)

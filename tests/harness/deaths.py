"""Deaths at every step of an operation: the steps, the cache as it was, and what must hold after each."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from harness.children import run_to_death
from harness.rig import Rig
from nova_imagecache import ImageCacheError
from nova_imagecache.testing import FaultPlan, Step
from nova_imagecache.testing._faults import When


def open_root(rig: Rig) -> None:
    """There is an empty cache: the steps that make its root are tried once, not with each operation."""
    rig.cache().recover()


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One thing that a driver does: ``prepare`` makes what it starts from, ``done`` asserts what it came to.

    ``finished`` are the errors that a second call may raise where the first one had done its work; ``mends``: what it
    starts from is not whole.
    """

    act: Callable[[Rig], object]
    kinds: tuple[str, ...]
    done: Callable[[Rig, str], None]
    prepare: Callable[[Rig], object] = field(default=open_root)
    finished: tuple[type[ImageCacheError], ...] = ()
    mends: bool = False


def under(plan: FaultPlan, act: Callable[[Rig], object], rig: Rig) -> None:
    with plan:
        act(rig)


def _again(operation: Operation, rig: Rig) -> None:
    with suppress(*operation.finished):
        operation.act(rig)


class Moment:
    """A cache as it was at one moment, copied to the same place again and again: paths are in it."""

    def __init__(self, rig: Rig, kept: Path) -> None:
        self._rig = rig
        self._kept = kept
        if kept.exists():
            shutil.rmtree(kept)
        rig.dir.rename(kept)

    def again(self) -> Rig:
        """The cache as it was then."""
        if self._rig.dir.exists():
            shutil.rmtree(self._rig.dir)
        # hard links stay links
        subprocess.run(["cp", "-a", str(self._kept), str(self._rig.dir)], check=True)
        return self._rig


def beginning(operation: Operation, rig: Rig) -> Moment:
    """What the operation starts from."""
    rig.dir.mkdir()
    operation.prepare(rig)
    return Moment(rig, rig.dir.with_name("beginning"))


class Watch(FaultPlan):
    """Sees what a directory holds before each step."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory = directory
        self.states: list[list[tuple[object, ...]]] = []

    def _count(self, module: str, name: str, targets: tuple[str, ...]) -> list[int]:
        self.states.append(_state(self._directory))
        return super()._count(module, name, targets)


def _state(directory: Path) -> list[tuple[object, ...]]:
    """All that a death leaves: what is there, and what it holds."""
    state: list[tuple[object, ...]] = []
    for path in sorted(directory.rglob("*")):
        try:
            found = path.lstat()
            content = path.read_bytes() if path.is_file() else b""
        except FileNotFoundError:  # another thread is at work
            continue
        words = (found.st_ino, found.st_mode, found.st_nlink, found.st_uid, found.st_gid, found.st_size)
        state.append((str(path), *words, found.st_mtime_ns, hashlib.blake2b(content).digest()))
    return state


def deaths(operation: Operation, rig: Rig) -> list[tuple[Step, When]]:
    """The steps to die at: a death leaves the same before two steps between which nothing has changed."""
    with Watch(rig.dir) as watch:
        operation.act(rig)
    operation.done(rig, "undisturbed")
    rig.check("undisturbed")
    rig.check_tidy("undisturbed")
    assert watch.trace, "the operation takes no step that a plan sees"
    before = [None, *watch.states]
    found: list[tuple[Step, When]] = [
        (step, "before") for step, was, state in zip(watch.trace, before, watch.states, strict=False) if was != state
    ]
    return [*found, (watch.trace[-1], "after")]


def kill_at_every_step(operation: Operation, rig: Rig, name: str) -> None:
    """Whatever step a process dies at: all that is there is whole, the same call works, recover() leaves no litter."""
    start = beginning(operation, rig)
    for step, moment in deaths(operation, start.again()):
        start.again()
        when = f"{name} with {rig.kind}, killed {moment} step {step}"
        plan = FaultPlan().kill(step.index, when=moment)
        killed = run_to_death(partial(under, plan, operation.act, rig), when)
        assert killed, f"{when}: that step was not reached"
        death = Moment(rig, rig.dir.with_name("death"))
        for recover_first in (False, True):
            _judge(operation, death.again(), when, recover_first=recover_first)


def _judge(operation: Operation, rig: Rig, when: str, *, recover_first: bool) -> None:
    try:
        if recover_first:
            report = rig.cache().recover()
            assert not report.failed, f"{when}: recover() failed: {report}"
            assert not report.alive, f"{when}: recover() took the dead for alive: {report}"
            when = f"{when}, recovered"
            rig.check_tidy(when, arrived=operation.mends)
        if not operation.mends:
            rig.check(when)
        _again(operation, rig)
        when = f"{when}, called again"
        operation.done(rig, when)
        if not recover_first:
            report = rig.cache().recover()
            assert not report.failed, f"{when}: recover() failed: {report}"
            when = f"{when}, recovered"
        rig.check(when)
        rig.check_tidy(when)
        operation.done(rig, when)
    except ImageCacheError as err:
        err.add_note(when)
        raise

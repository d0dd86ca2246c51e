"""FaultPlan sees every step that goes through the seams, and puts faults in its way."""

from __future__ import annotations

import ast
import errno
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nova_imagecache import _exec, _fs
from nova_imagecache.testing import Fault, FaultPlan
from nova_imagecache.testing._faults import ENVIRONMENT

SOURCE = Path(_fs.__file__).parents[1]


def _publish(directory: Path) -> None:
    """Three steps of its own, more through functions of ``_fs`` that call each other."""
    _fs.mkdir(directory / "sub", 0o755)
    _fs.write_file(directory / "sub" / "new", b"data", 0o644)
    _fs.rename(directory / "sub" / "new", directory / "final")


def test_trace_lists_every_step(tmp_path: Path) -> None:
    """Steps are named by module and function, also those that _fs itself calls, and show their paths."""
    with FaultPlan() as plan:
        _publish(tmp_path)
    steps = plan.trace
    assert [step.name for step in steps] == ["fs.mkdir", "fs.create", "fs.write", "fs.fsync", "fs.rename"]
    assert [step.index for step in steps] == [0, 1, 2, 3, 4]
    assert steps[0].targets == (str(tmp_path / "sub"),)
    assert steps[2].targets == (str(tmp_path / "sub" / "new"),), "a descriptor is shown as its file"
    assert steps[4].targets == (str(tmp_path / "sub" / "new"), str(tmp_path / "final"))
    assert str(steps[4]) == "04-fs.rename-new-final"
    assert (tmp_path / "final").read_bytes() == b"data"


def test_trace_shows_commands(tmp_path: Path) -> None:
    """A child process is a step that is known by the beginning of its command line."""
    with FaultPlan() as plan:
        _exec.run(["touch", "--no-create", str(tmp_path / "x")], timeout=10)
    assert [(step.name, step.targets) for step in plan.trace] == [("exec.run", ("touch --no-create",))]


def test_every_seam_is_replaced_and_given_back() -> None:
    """While a plan is active all functions of SEAMS are its own; afterwards they are what they were."""
    before = {(module, name): getattr(module, name) for module in (_fs, _exec) for name in module.SEAMS}
    with FaultPlan():
        for (module, name), original in before.items():
            assert getattr(module, name) is not original
            assert getattr(module, name).__wrapped__ is original
    for (module, name), original in before.items():
        assert getattr(module, name) is original


def test_every_seam_is_a_function() -> None:
    """SEAMS names nothing twice and nothing that is not there."""
    for module in (_fs, _exec):
        assert len(set(module.SEAMS)) == len(module.SEAMS)
        assert all(callable(getattr(module, name)) for name in module.SEAMS)


def test_seams_come_back_after_an_error(tmp_path: Path) -> None:
    """An error in the block does not leave the plan active."""
    original = _fs.mkdir
    with pytest.raises(OSError), FaultPlan().fail("fs.mkdir"):  # noqa: PT011 - which one is another test's business
        _publish(tmp_path)
    assert _fs.mkdir is original
    with FaultPlan():
        pass


def test_one_plan_at_a_time() -> None:
    """A second plan is refused, and the first goes on."""
    with FaultPlan() as plan:
        with pytest.raises(RuntimeError, match="another FaultPlan is active"), FaultPlan():
            pass
        _fs.unlink(Path("/nonexistent/file"))
        assert len(plan.trace) == 1


def test_fail_raises_enospc_and_changes_nothing(tmp_path: Path) -> None:
    """A failed step is not made."""
    plan = FaultPlan().fail("fs.rename")
    with pytest.raises(OSError, match="No space left") as caught, plan:
        _publish(tmp_path)
    assert caught.value.errno == errno.ENOSPC
    assert not (tmp_path / "final").exists()
    assert plan.trace[-1].name == "fs.rename"


def test_fail_after_the_step(tmp_path: Path) -> None:
    """A step can be made and then be reported as failed."""
    with pytest.raises(OSError, match="No space left"), FaultPlan().fail("fs.rename", when="after"):
        _publish(tmp_path)
    assert (tmp_path / "final").exists()


def test_fail_with_an_error_of_ones_own(tmp_path: Path) -> None:
    """The very error that was asked for comes out."""
    error = PermissionError(errno.EACCES, "no")
    with pytest.raises(PermissionError) as caught, FaultPlan().fail("fs.create", error=error):
        _publish(tmp_path)
    assert caught.value is error


@pytest.mark.parametrize("index", range(5))
def test_fail_by_index(index: int, tmp_path: Path) -> None:
    """Each step of a sequence can be failed by its number."""
    plan = FaultPlan().fail(index)
    with pytest.raises(OSError, match="No space left"), plan:
        _publish(tmp_path)
    assert len(plan.trace) == index + 1
    with FaultPlan():
        _fs.rmtree(tmp_path)


def test_nth_and_match(tmp_path: Path) -> None:
    """``nth`` counts the steps of the name that match; 0 means each of them."""
    plan = FaultPlan().fail("fs.mkdir", nth=2).fail("fs.create", match="bad").fail("fs.unlink", nth=0)
    with plan:
        _fs.mkdir(tmp_path / "one", 0o755)
        with pytest.raises(OSError, match="No space left"):
            _fs.mkdir(tmp_path / "two", 0o755)
        _fs.mkdir(tmp_path / "three", 0o755)
        _fs.write_file(tmp_path / "good", b"", 0o644)
        with pytest.raises(OSError, match="No space left"):
            _fs.write_file(tmp_path / "bad", b"", 0o644)
        for _ in range(3):
            with pytest.raises(OSError, match="No space left"):
                _fs.unlink(tmp_path / "good")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good", "one", "three"]


def test_pause_holds_one_thread_only(tmp_path: Path) -> None:
    """A held step stops its own thread, while others go on with the same step."""
    with FaultPlan() as plan:
        hold = plan.pause("fs.mkdir")
        held = threading.Thread(target=_fs.mkdir, args=(tmp_path / "held", 0o755))
        held.start()
        hold.wait()
        _fs.mkdir(tmp_path / "free", 0o755)
        assert not (tmp_path / "held").exists()
        hold.release()
        held.join(10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["free", "held"]


def test_pause_with_an_event_of_ones_own(tmp_path: Path) -> None:
    """The caller's event releases the step, and a step may be held after it was made."""
    event = threading.Event()
    with FaultPlan() as plan:
        hold = plan.pause("fs.mkdir", when="after", event=event)
        held = threading.Thread(target=_fs.mkdir, args=(tmp_path / "held", 0o755))
        held.start()
        hold.wait()
        assert (tmp_path / "held").exists()
        event.set()
        held.join(10)
        assert not held.is_alive()


def test_end_of_plan_releases_who_is_held(tmp_path: Path) -> None:
    """A test that fails leaves no thread behind."""
    with FaultPlan() as plan:
        hold = plan.pause("fs.mkdir")
        held = threading.Thread(target=_fs.mkdir, args=(tmp_path / "held", 0o755))
        held.start()
        hold.wait()
    held.join(10)
    assert not held.is_alive()


def test_pause_that_nobody_comes_to() -> None:
    """Waiting for a step that is never made ends with an error."""
    with FaultPlan() as plan:
        hold = plan.pause("fs.mkdir")
        hold.timeout = 0.01
        with pytest.raises(TimeoutError, match="no thread came"):
            hold.wait()


def test_steps_of_many_threads_are_each_counted(tmp_path: Path) -> None:
    """Every step has a number of its own, and a fault strikes exactly once."""
    plan = FaultPlan().fail("fs.mkdir", nth=50)

    def make(number: int) -> int:
        try:
            _fs.mkdir(tmp_path / str(number), 0o755)
        except OSError:
            return 1
        return 0

    with plan, ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(make, range(100))) == 1
    assert [step.index for step in plan.trace] == list(range(100))
    assert sorted(step.nth for step in plan.trace) == list(range(1, 101))


def test_modules_of_a_plugin_take_part() -> None:
    """Any module with SEAMS can be watched."""
    module = ModuleType("somebody._radio")
    module.__dict__.update(SEAMS=("send",), send=lambda text: text.upper())
    with FaultPlan([module]) as plan:
        assert module.send("x") == "X"
    assert [str(step) for step in plan.trace] == ["00-radio.send-x"]
    assert module.send("y") == "Y"
    assert len(plan.trace) == 1


def test_spec_round_trips() -> None:
    """A plan is the same after it went through text."""
    plan = FaultPlan(["nova_imagecache._fs"]).fail("fs.link", nth=2, error=OSError(errno.EXDEV, "x"))
    plan.kill(7, when="after").kill("fs.rename", match="disk")
    again = FaultPlan.from_spec(plan.spec())
    assert again.spec() == plan.spec()
    assert repr(again) == "<FaultPlan 3 fault(s), 0 step(s) seen>"


@pytest.mark.parametrize("make", [lambda p: p.pause("fs.link"), lambda p: p.fail("fs.link", error=ValueError())])
def test_spec_refuses_what_cannot_cross(make: Any) -> None:
    """A held step, or an error of any class, belongs to one process."""
    plan = FaultPlan()
    make(plan)
    with pytest.raises(ValueError, match="cannot cross processes"):
        plan.spec()


def test_from_environ_without_a_plan() -> None:
    """A child that was given no plan makes every step."""
    assert FaultPlan.from_environ({}).spec() == FaultPlan().spec()


def test_fault_is_a_value() -> None:
    """Faults compare by what they say."""
    assert Fault(step="fs.link", action="kill") == Fault(step="fs.link", action="kill", nth=1, when="before")


@pytest.mark.parametrize(("when", "made"), [("before", False), ("after", True)])
def test_kill_in_a_child(when: Any, made: bool, tmp_path: Path) -> None:
    """A plan in the environment kills a child before or after the step, with no chance to tidy up."""
    code = """
import sys, pathlib
from nova_imagecache import _fs
from nova_imagecache.testing import FaultPlan
directory = pathlib.Path(sys.argv[1])
with FaultPlan.from_environ():
    try:
        _fs.mkdir(directory / "first", 0o755)
        _fs.mkdir(directory / "second", 0o755)
    finally:
        (directory / "tidy").touch()
"""
    spec = FaultPlan().kill("fs.mkdir", nth=2, when=when).spec()
    env = {**os.environ, ENVIRONMENT: spec, "PYTHONPATH": str(SOURCE)}
    child = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=env, check=False, timeout=60)
    assert child.returncode == -signal.SIGKILL
    assert (tmp_path / "first").exists()
    assert (tmp_path / "second").exists() is made
    assert not (tmp_path / "tidy").exists()


def test_kit_needs_no_pytest() -> None:
    """Doubles and faults can be imported where pytest is not installed."""
    code = """
import sys
sys.modules["pytest"] = None
from nova_imagecache.testing import FaultPlan, FakeSource, MemoryBackend
try:
    from nova_imagecache.testing import BackendContract
except ImportError:
    sys.exit(0)
sys.exit("the contract came without pytest")
"""
    env = {**os.environ, "PYTHONPATH": str(SOURCE)}
    child = subprocess.run([sys.executable, "-c", code], env=env, check=False, timeout=60)
    assert child.returncode == 0


def test_seams_are_called_by_their_module() -> None:
    """A step that is imported by its own name would escape every plan."""
    seams = {"_fs": set(_fs.SEAMS), "_exec": set(_exec.SEAMS)}
    for path in SOURCE.joinpath("nova_imagecache").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                hidden = seams.get(node.module.rpartition(".")[2], set()) & {alias.name for alias in node.names}
                assert not hidden, f"{path.name} imports {hidden} by name"

"""Faults at named steps: count, fail, hold or kill at each change that the library makes to the outside world.

The modules ``_fs`` and ``_exec`` name in ``SEAMS`` their functions that change the world, and everybody calls those as
attributes of their module. A plan replaces these attributes while it is active, so it sees every step of every thread.
A plug-in's own module takes part the same way: give it a tuple ``SEAMS`` and hand it in as ``modules``.

    with FaultPlan() as plan:                  # which steps does the operation take?
        operation()
    for step in plan.trace:                    # and what if one of them fails?
        with FaultPlan().fail(step.index), pytest.raises(OSError):
            operation()
"""

from __future__ import annotations

import errno
import functools
import importlib
import json
import os
import signal
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import ModuleType, TracebackType

ENVIRONMENT = "NOVA_IMAGECACHE_FAULTS"
"""The variable that ``FaultPlan.from_environ`` reads in a child process."""

DEFAULT_MODULES = ("nova_imagecache._fs", "nova_imagecache._exec")

When = Literal["before", "after"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One change of the outside world: the ``index``-th of the plan, the ``nth`` of its ``name`` ("fs.rename").

    ``targets`` are the paths it was called with (of a descriptor: the file's), or the beginning of a command line.
    ``module`` is the one whose ``SEAMS`` name it.
    """

    index: int
    name: str
    nth: int
    targets: tuple[str, ...] = ()
    module: str = ""

    def __str__(self) -> str:
        return "-".join([f"{self.index:02d}", self.name, *(Path(target).name for target in self.targets)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What happens at one step.

    Attributes:
        step: the step's index in the whole sequence, or its name.
        action: "fail" raises, "kill" ends the process with SIGKILL, "pause" holds the thread.
        nth: which of the steps of that name (that match) is meant, from 1; 0: each of them. Not used with an index.
        when: before the step changes anything, or after.
        match: the step counts only if one of its targets contains this text.
        errno: of the OSError that "fail" raises.
    """

    step: str | int
    action: Literal["fail", "kill", "pause"]
    nth: int = 1
    when: When = "before"
    match: str = ""
    errno: int = errno.ENOSPC


class Pause:
    """A held step. ``wait`` for a thread to arrive at it, then ``release`` it."""

    def __init__(self, event: threading.Event | None = None, timeout: float = 60.0) -> None:
        self.reached = threading.Event()
        self.event = event or threading.Event()
        self.timeout = timeout

    def wait(self) -> None:
        """Come back when a thread is held at the step.

        Raises:
            TimeoutError: none came.
        """
        if not self.reached.wait(self.timeout):
            raise TimeoutError("no thread came to the step that was to be held")

    def release(self) -> None:
        """Let the thread go on."""
        self.event.set()

    def hold(self) -> None:
        """Hold this thread until ``release``.

        Raises:
            TimeoutError: nobody released it.
        """
        self.reached.set()
        if not self.event.wait(self.timeout):
            raise TimeoutError("a held step was never released")


class FaultPlan:
    """The steps that are made while it is active, in ``trace``, and the faults that it puts in their way.

    A context manager; one may be active per process, since it replaces attributes of modules. A forked child goes on
    under its parent's plan; a spawned one takes part when it enters ``FaultPlan.from_environ()``.

    Args:
        modules: those that name their steps in ``SEAMS``, as modules or by name.

    Raises:
        RuntimeError: another plan is active.
    """

    _guard: ClassVar[threading.Lock] = threading.Lock()
    _active: ClassVar[FaultPlan | None] = None

    def __init__(self, modules: Sequence[str | ModuleType] = DEFAULT_MODULES) -> None:
        self._modules = tuple(modules)
        self._faults: list[tuple[Fault, BaseException | None, Pause | None]] = []
        self._hits: list[int] = []
        self._lock = threading.Lock()
        self._trace: list[Step] = []
        self._counts: dict[str, int] = {}
        self._originals: list[tuple[ModuleType, str, Callable[..., Any]]] = []

    def __repr__(self) -> str:
        return f"<FaultPlan {len(self._faults)} fault(s), {len(self._trace)} step(s) seen>"

    @property
    def trace(self) -> tuple[Step, ...]:
        """The steps so far, of all threads, in the order in which they began."""
        with self._lock:
            return tuple(self._trace)

    # --- what shall happen

    def fail(
        self,
        step: str | int,
        *,
        nth: int = 1,
        when: When = "before",
        match: str = "",
        error: BaseException | None = None,
    ) -> Self:
        """Raise ``error`` at the step; without one OSError(ENOSPC). Returns the plan, so that faults can be chained."""
        number = error.errno if isinstance(error, OSError) and error.errno else errno.ENOSPC
        fault = Fault(step=step, action="fail", nth=nth, when=when, match=match, errno=number)
        return self._add(fault, error=error)

    def kill(self, step: str | int, *, nth: int = 1, when: When = "before", match: str = "") -> Self:
        """End the process with SIGKILL at the step: no ``finally`` runs and nothing is flushed."""
        return self._add(Fault(step=step, action="kill", nth=nth, when=when, match=match))

    def pause(
        self,
        step: str | int,
        *,
        nth: int = 1,
        when: When = "before",
        match: str = "",
        event: threading.Event | None = None,
    ) -> Pause:
        """Hold the thread that comes to the step, until ``release`` (or ``event``) or the end of the plan."""
        pause = Pause(event)
        self._add(Fault(step=step, action="pause", nth=nth, when=when, match=match), pause=pause)
        return pause

    def _add(self, fault: Fault, *, error: BaseException | None = None, pause: Pause | None = None) -> Self:
        with self._lock:
            self._faults.append((fault, error, pause))
            self._hits.append(0)
        return self

    # --- across processes

    def spec(self) -> str:
        """The plan as text for another process.

        Raises:
            ValueError: it holds a pause, an error that is no OSError, or a module that cannot be named.
        """
        for fault, error, _ in self._faults:
            if fault.action == "pause" or (error is not None and not isinstance(error, OSError)):
                raise ValueError(f"this fault cannot cross processes: {fault}")
        modules = [module if isinstance(module, str) else module.__name__ for module in self._modules]
        return json.dumps({"modules": modules, "faults": [asdict(fault) for fault, _, _ in self._faults]})

    @classmethod
    def from_spec(cls, spec: str) -> Self:
        """The plan that ``spec`` has written."""
        values = json.loads(spec)
        plan = cls(values["modules"])
        for fault in values["faults"]:
            plan._add(Fault(**fault))
        return plan

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ) -> Self:
        """The plan in the variable ``ENVIRONMENT``; one without faults if it is not set."""
        spec = environ.get(ENVIRONMENT)
        return cls.from_spec(spec) if spec else cls()

    # --- at work

    def __enter__(self) -> Self:
        modules = [importlib.import_module(m) if isinstance(m, str) else m for m in self._modules]
        with FaultPlan._guard:
            if FaultPlan._active is not None:
                raise RuntimeError("another FaultPlan is active in this process")
            FaultPlan._active = self
        for module in modules:
            prefix = module.__name__.rpartition(".")[2].lstrip("_")
            for name in module.SEAMS:
                original = getattr(module, name)
                self._originals.append((module, name, original))
                setattr(module, name, self._wrapped(module.__name__, f"{prefix}.{name}", original))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for module, name, original in reversed(self._originals):
            setattr(module, name, original)
        self._originals.clear()
        for _, _, pause in self._faults:
            if pause is not None:
                pause.release()
        FaultPlan._active = None

    def _wrapped(self, module: str, step_name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def step(*args: Any, **kwargs: Any) -> Any:
            due = self._count(module, step_name, _targets((*args, *kwargs.values())))
            self._strike(due, "before")
            result = original(*args, **kwargs)
            self._strike(due, "after")
            return result

        return step

    def _count(self, module: str, name: str, targets: tuple[str, ...]) -> list[int]:
        # decided under the lock, acted upon outside: a held thread must not hold the others
        with self._lock:
            nth = self._counts[name] = self._counts.get(name, 0) + 1
            made = Step(index=len(self._trace), name=name, nth=nth, targets=targets, module=module)
            self._trace.append(made)
            return [index for index, (fault, _, _) in enumerate(self._faults) if self._is_due(index, fault, made)]

    def _is_due(self, index: int, fault: Fault, made: Step) -> bool:
        if isinstance(fault.step, int):
            return fault.step == made.index
        if fault.step != made.name or not (not fault.match or any(fault.match in t for t in made.targets)):
            return False
        self._hits[index] += 1
        return fault.nth in (0, self._hits[index])

    def _strike(self, due: list[int], when: When) -> None:
        for index in due:
            fault, error, pause = self._faults[index]
            if fault.when != when:
                continue
            if pause is not None:
                pause.hold()
            elif fault.action == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            else:
                raise error or OSError(fault.errno, os.strerror(fault.errno), f"fault at {fault.step}")


def _targets(values: tuple[Any, ...]) -> tuple[str, ...]:
    found = []
    for value in values:
        if isinstance(value, os.PathLike | str):
            found.append(os.fspath(value))
        elif isinstance(value, list | tuple) and value and all(isinstance(word, str) for word in value):
            found.append(" ".join(value[:2]))
        elif isinstance(value, int) and not isinstance(value, bool) and not found:
            # only a leading number is a descriptor; later ones are offsets, sizes, modes
            found += _file_of(value)
    return tuple(text for text in found if isinstance(text, str))


def _file_of(descriptor: int) -> list[str]:
    try:
        return [str(Path(f"/proc/self/fd/{descriptor}").readlink())]
    except OSError:  # not a descriptor, or another kernel than Linux: the trace is for reading only
        return []

"""Which steps of a backend can be seen, so that a contract can disturb each of them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nova_imagecache.backends import Backend
from nova_imagecache.testing._faults import DEFAULT_MODULES, FaultPlan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nova_imagecache.testing._faults import Step

MAY_TAKE_NONE = ("flatten", "attach", "attach-anew")
"""Actions that change nothing on some storage: of a copy, that it stands alone and whose bytes it holds."""

_LIBRARY = __name__.partition(".")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """The steps that an action of a backend takes.

    Attributes:
        names: each step in words, in order.
        modules: the modules whose ``SEAMS`` were watched.
        unseen: why the action's changes cannot be seen, and what to do about it; empty: they can.
    """

    names: tuple[str, ...]
    modules: tuple[str, ...]
    unseen: str

    def plan(self) -> FaultPlan:
        """A plan that counts these steps."""
        return FaultPlan(self.modules)


def watched_modules(backend: Backend, named: tuple[str, ...] | None) -> tuple[str, ...]:
    """The modules that are ``named``; None: the library's, and those of the backend's own packages with ``SEAMS``."""
    if named is not None:
        return named
    packages = _packages(backend) - {_LIBRARY}
    loaded = [name for name, module in list(sys.modules.items()) if getattr(module, "SEAMS", None)]
    return (*DEFAULT_MODULES, *sorted(name for name in loaded if _package(name) in packages))


def traced(action: str, backend: Backend, named: tuple[str, ...] | None, trace: Sequence[Step]) -> Steps:
    """The steps that a plan has seen of the action."""
    modules = watched_modules(backend, named)
    names = tuple(str(step) for step in trace)
    return Steps(names=names, modules=modules, unseen=_unseen(action, backend, named, trace))


def _unseen(action: str, backend: Backend, named: tuple[str, ...] | None, trace: Sequence[Step]) -> str:
    if named is not None:
        if not named:
            return "no steps of this backend can be seen: fault_modules is empty"
        told = f"no step of {', '.join(named)} was tried: {action} takes none there. Set fault_modules"
        return "" if trace or action in MAY_TAKE_NONE else f"{told} to the modules that change your storage"
    packages = _packages(backend)
    if _LIBRARY in packages:  # one of the library's backends, or built upon one: the steps are the library's
        seen = bool(trace) or action in MAY_TAKE_NONE
    elif action in MAY_TAKE_NONE:
        seen = len(watched_modules(backend, named)) > len(DEFAULT_MODULES)
    else:
        seen = any(_package(step.module) in packages for step in trace)
    package = " or ".join(sorted(packages))
    todo = f"Name the functions that change your storage in SEAMS of a module of {package}, or set fault_modules"
    return "" if seen else f"no step of {package} was tried: {action} takes none that can be seen. {todo}"


def _packages(backend: Backend) -> set[str]:
    classes = (cls for cls in type(backend).__mro__ if issubclass(cls, Backend) and cls is not Backend)
    return {_package(cls.__module__) for cls in classes}


def _package(module: str) -> str:
    return module.partition(".")[0]

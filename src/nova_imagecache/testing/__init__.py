"""The public testing kit: doubles of a storage and of an image service, contracts for plug-ins, faults, a benchmark.

All but the contracts needs nothing but the library; ``BackendContract`` and ``SourceContract`` need pytest and are
imported when they are first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nova_imagecache.testing._bench import BackendBench, BenchReport, BenchTiming, bench_backend
from nova_imagecache.testing._faults import Fault, FaultPlan, Pause, Step
from nova_imagecache.testing._full import fill_directory
from nova_imagecache.testing._memory import MemoryBackend
from nova_imagecache.testing._memory_store import MemoryStorage
from nova_imagecache.testing._promises import CONTRACT_VERSION, Promise, promises
from nova_imagecache.testing._source import FakeImage, FakeSource

if TYPE_CHECKING:
    from nova_imagecache.testing._contract import BackendContract
    from nova_imagecache.testing._source_contract import SourceContract

__all__ = [
    "CONTRACT_VERSION",
    "BackendBench",
    "BackendContract",
    "BenchReport",
    "BenchTiming",
    "FakeImage",
    "FakeSource",
    "Fault",
    "FaultPlan",
    "MemoryBackend",
    "MemoryStorage",
    "Pause",
    "Promise",
    "SourceContract",
    "Step",
    "bench_backend",
    "fill_directory",
    "promises",
]

_NEED_PYTEST = {
    "BackendContract": "_contract",
    "SourceContract": "_source_contract",
}


if not TYPE_CHECKING:  # a type checker that saw this would take every name for one of ours

    def __getattr__(name: str) -> Any:
        if name in _NEED_PYTEST:
            from importlib import import_module

            return getattr(import_module(f"{__name__}.{_NEED_PYTEST[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

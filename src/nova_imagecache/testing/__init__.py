"""The public testing kit: doubles of a storage and of an image service, contracts for plug-ins, and faults.

The doubles and faults need nothing but the library; ``BackendContract`` and ``SourceContract`` need pytest and are
imported when they are first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nova_imagecache.testing._faults import Fault, FaultPlan, Pause, Step
from nova_imagecache.testing._memory import MemoryBackend
from nova_imagecache.testing._memory_store import MemoryStorage
from nova_imagecache.testing._source import FakeImage, FakeSource

if TYPE_CHECKING:
    from nova_imagecache.testing._contract import CONTRACT_VERSION, BackendContract
    from nova_imagecache.testing._source_contract import SourceContract

__all__ = [
    "CONTRACT_VERSION",
    "BackendContract",
    "FakeImage",
    "FakeSource",
    "Fault",
    "FaultPlan",
    "MemoryBackend",
    "MemoryStorage",
    "Pause",
    "SourceContract",
    "Step",
]

_NEED_PYTEST = {
    "BackendContract": "_contract",
    "CONTRACT_VERSION": "_contract",
    "SourceContract": "_source_contract",
}


def __getattr__(name: str) -> Any:
    if name in _NEED_PYTEST:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_NEED_PYTEST[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

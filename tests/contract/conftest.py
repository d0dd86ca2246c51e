"""Where the contract's tests put their caches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import places


@pytest.fixture
def tmp_path(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """On disk; in memory for those that make a new cache for each step of an operation."""
    if "at_each_step" not in request.node.name:
        yield tmp_path
        return
    with places.quick(tmp_path) as directory:
        yield directory

"""Where the tests of this directory put their caches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import places


@pytest.fixture
def quick_path(tmp_path: Path) -> Iterator[Path]:
    """A directory for many short-lived caches."""
    with places.quick(tmp_path) as directory:
        yield directory

"""The real Glance that the tests of this directory ask, started once when first asked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import places
from services import glance as glance_service
from services.glance import GlanceServer
from services.require import require


@pytest.fixture
def quick_path(tmp_path: Path) -> Iterator[Path]:
    """A directory for many short-lived caches."""
    with places.quick(tmp_path) as directory:
        yield directory


@pytest.fixture(scope="session")
def glance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GlanceServer]:
    """A real Glance with a file store; tests tell their images apart by id."""
    require(glance_service.missing())
    with GlanceServer(tmp_path_factory.mktemp("glance")) as server:
        yield server

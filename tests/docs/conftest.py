"""The grounds that pages run on; a page says with its own words what it needs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from nova_imagecache import ImageCache

from .ground import Ground


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ground]:
    """An empty directory, as a beginner has it."""
    monkeypatch.chdir(tmp_path)
    root = logging.getLogger()
    before = root.level, list(root.handlers), logging.getLogger("nova_imagecache").level
    yield Ground(tmp_path)
    root.setLevel(before[0])
    root.handlers[:] = before[1]
    logging.getLogger("nova_imagecache").setLevel(before[2])


@pytest.fixture
def ground(bare: Ground) -> Iterator[Ground]:
    """A cache with the image ``demo``, which the disk ``vm-1`` uses, and the image ``other`` that is not cached yet."""
    for image_id in ("demo", "other"):
        bare.image(image_id)
    config = bare.configure(source="directory", source_options={"path": str(bare.directory / "images")})
    with ImageCache.from_config(config) as cache:
        cache.create_root_disk("demo", "vm-1")
        bare.furnish(config, cache, "demo")
        nova = bare.directory / "nova.conf"
        nova.write_text(f"[DEFAULT]\ninstances_path = {bare.directory}/instances\n")
        bare.replaced["/etc/nova/nova.conf"] = str(nova)
        yield bare

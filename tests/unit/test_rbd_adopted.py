"""The notes of a base's use: without a cluster."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nova_imagecache import BaseRecord, _cleanup
from nova_imagecache.backends import BaseImage, RbdLocation
from nova_imagecache.backends._rbd_adopted import TOUCH_INTERVAL, Adopted

NOBODY = 65534


@pytest.fixture
def directory() -> Iterator[Path]:
    """One that every user can look into."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        path.chmod(0o755)
        yield path


def test_a_base_in_use_is_recent() -> None:
    """However old the note of its last use may be, most of the time is left in which it is not evicted."""
    assert TOUCH_INTERVAL <= _cleanup.RECENT / 5


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user takes root")
def test_a_use_of_what_another_user_adopted(directory: Path) -> None:
    """That it cannot be noted stops nobody from making a disk."""
    record = BaseRecord(
        image_id="img",
        format="raw",
        virtual_size=512,
        size=512,
        source_format="raw",
        source_size=512,
        source_digest=None,
        evidence="none",
        made_by="stored",
        source="test",
        fetched_at=0.0,
    )
    location = RbdLocation(pool="images", name="img", snapshot="snap", hosts=(), user="nova", secret_uuid=None)
    base = BaseImage(image_id="img", location=location, record=record, managed=False, last_used=0.0)
    (directory / "adopted").mkdir(mode=0o755)
    file = directory / "adopted" / "img.json"
    file.write_text("{}")
    os.utime(file, (0, 0))
    store: Any = None  # a note asks no cluster
    adopted = Adopted(store, directory)
    os.seteuid(NOBODY)
    try:
        adopted.touch(base)
    finally:
        os.seteuid(0)
    assert file.stat().st_mtime == 0
    adopted.touch(base)
    assert file.stat().st_mtime > 0

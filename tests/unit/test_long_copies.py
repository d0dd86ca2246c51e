"""A copy that takes long ends with its call: by the deadline, by the cancel, with nothing left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.rig import Rig
from harness.upkeep import dense
from nova_imagecache import CancelledError, DeadlineError, ImageCache, _fs

MIB = 1 << 20
COPIES: dict[str, tuple[str, Callable[..., Any]]] = {
    "create_root_disk": ("file", lambda cache, path, **call: cache.create_root_disk("img", path.name, **call)),
    "copy_base": ("link", lambda cache, path, **call: cache.copy_base("img", path, **call)),
    "ensure_base": ("link", lambda cache, _path, **call: cache.ensure_base("twin", **call)),
}


@pytest.fixture(params=COPIES)
def copying(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Rig, ImageCache, Callable[..., Any]]:
    """A cache that has the image, and a call that copies it."""
    kind, copy = COPIES[request.param]
    sample = dense("long", 4 * MIB)
    rig = Rig(tmp_path, kind, {"img": sample, "twin": sample})
    cache = rig.cache()
    cache.ensure_base("img")
    return rig, cache, copy


def in_pieces(monkeypatch: pytest.MonkeyPatch, piece: Callable[[], None]) -> list[int]:
    """Let copies be made in pieces of a MiB, and something happen at each; the offsets of those that were begun."""
    begun = []
    real = _fs.copy_range

    def copy_range(source: int, target: int, offset: int, length: int) -> None:
        begun.append(offset)
        piece()
        real(source, target, offset, length)

    monkeypatch.setattr(_fs, "_PIECE", MIB)
    monkeypatch.setattr(_fs, "clone_file", lambda *_: False)
    monkeypatch.setattr(_fs, "copy_range", copy_range)
    return begun


def files(rig: Rig) -> list[Path]:
    """What was made of the base: disks, copies, the base of its twin, and what is unfinished."""
    below = [rig.disks, rig.root / "bases" / "twin", rig.root / "staging"]
    found = [path for directory in below for path in directory.rglob("*")]
    return sorted(path for path in [*found, *rig.dir.glob("copy*")] if path.is_file())


def test_a_cancel_ends_it(copying: tuple[Rig, ImageCache, Callable[..., Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """After the piece that is under way."""
    rig, cache, copy = copying
    cancel = threading.Event()
    begun = in_pieces(monkeypatch, cancel.set)
    with pytest.raises(CancelledError):
        copy(cache, rig.dir / "copy", cancel=cancel)
    assert begun == [0]
    assert files(rig) == []
    cancel.clear()
    monkeypatch.undo()
    copy(cache, rig.dir / "copy", cancel=cancel)
    assert 4 * MIB in {path.stat().st_size for path in files(rig)}


@pytest.mark.slow
def test_a_deadline_ends_it(
    copying: tuple[Rig, ImageCache, Callable[..., Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same for time that is up."""
    rig, cache, copy = copying
    begun = in_pieces(monkeypatch, lambda: time.sleep(1.1))
    with pytest.raises(DeadlineError):
        copy(cache, rig.dir / "copy", deadline=1)
    assert begun == [0]
    assert files(rig) == []

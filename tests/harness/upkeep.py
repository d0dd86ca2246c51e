"""What the tests of cleanup, limits and finders share: a clock, dense images, figures as ``du`` has them."""

from __future__ import annotations

import functools
import hashlib
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from harness.images import MIB, Sample
from harness.rig import Rig
from nova_imagecache import CacheConfig, CacheUsage, CleanupReport, Event, ImageCache, ImageSource, UserFinder

MINUTE = 60.0
HOUR = 3600.0
DAY = 24 * HOUR


class Clock:
    """A clock that stands still until it is moved; it starts at the true time, as marks of the storage do."""

    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now

    def move(self, seconds: float) -> None:
        """Let time pass, or put the clock back."""
        self.now += seconds


class Events(list[Event]):
    """What a driver was told."""

    def kinds(self, kind: str) -> list[str | None]:
        """The image ids of the events of one kind."""
        return [event.image_id for event in self if event.kind == kind]


@functools.cache
def dense(seed: str, size: int = MIB) -> Sample:
    """A raw image without holes: what it is announced with is what it takes."""
    data = hashlib.shake_256(seed.encode()).digest(size)
    return Sample(guest=data, served=data, disk_format="raw")


def open_cache(
    rig: Rig,
    clock: Callable[[], float] = time.time,
    *,
    source: ImageSource | None = None,
    user_finders: Sequence[UserFinder] = (),
    on_event: Callable[[Event], None] | None = None,
    **config: Any,
) -> ImageCache:
    """A cache over the rig's directories, by this clock."""
    values = {"root": rig.root, "disks_dir": rig.disks, "backend": rig.backend_name, "backend_options": rig.options}
    return ImageCache(
        CacheConfig(**{**values, **config}),
        source=rig.source() if source is None else source,
        backend=rig.backend(),
        user_finders=user_finders,
        clock=clock,
        on_event=on_event,
    )


def last_used(rig: Rig, image_id: str, when: float) -> None:
    """The base was used then, and never since."""
    os.utime(rig.root / "bases" / image_id / "last-used", (when, when))


def clean_twice(cache: ImageCache, clock: Clock, wait: float = 2 * DAY) -> CleanupReport:
    """Two passes, more than the idle time apart: the second one's report."""
    cache.cleanup()
    clock.move(wait)
    return cache.cleanup()


def names(cache: ImageCache) -> set[str]:
    """The ids of the bases that are there."""
    return {base.image_id for base in cache.bases()}


def allocated(*trees: Path) -> int:
    """What ``du`` says of the trees: bytes of blocks, each inode once; what vanishes meanwhile takes nothing."""
    return sum(inodes(*trees).values())


def inodes(*trees: Path) -> dict[tuple[int, int], int]:
    """The bytes of blocks of every inode below the trees."""
    seen: dict[tuple[int, int], int] = {}
    stack = list(trees)
    while stack:
        path = stack.pop()
        try:
            found = path.lstat()
            inside = list(path.iterdir()) if path.is_dir() and not path.is_symlink() else []
        except (FileNotFoundError, NotADirectoryError):
            continue
        seen[found.st_dev, found.st_ino] = found.st_blocks * 512
        stack += inside
    return seen


def counted(rig: Rig) -> int:
    """What ``max_bytes`` counts, as ``du`` does: not what is on its way out."""
    return allocated(rig.root / "bases", rig.root / "staging")


def assert_counts_as_du(rig: Rig, usage: CacheUsage, when: str) -> None:
    """The figures are those of ``du``, to the byte, while nobody is at work."""
    assert usage.complete, f"{when}: usage() is not complete"
    expected = allocated(rig.root)
    assert usage.allocated == expected, f"{when}: usage says {usage.allocated}, du {expected}: {usage}"

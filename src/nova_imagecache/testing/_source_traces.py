"""What a source may leave behind where nothing should stay: open descriptors, and changes of what it reads from."""

from __future__ import annotations

import hashlib
import os
import stat
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nova_imagecache.exceptions import ImageNotFoundError
from nova_imagecache.testing._promises import refused

if TYPE_CHECKING:
    from collections.abc import Callable

    from nova_imagecache._models import ImageInfo
    from nova_imagecache.sources import ImageSource

_DESCRIPTORS = Path("/proc/self/fd")
_TICK = 0.02
"""Seconds after which a change has another time than what came before it, by the kernel's coarse clock."""


def descriptors() -> dict[str, str]:
    """What each open descriptor of this process leads to, by its number; skips the test where nobody can say."""
    if not _DESCRIPTORS.is_dir():
        pytest.skip(f"open descriptors cannot be counted: there is no {_DESCRIPTORS}")
    found = {}
    for name in os.listdir(_DESCRIPTORS):  # noqa: PTH208 - names, not paths
        try:
            found[name] = os.readlink(_DESCRIPTORS / name)  # noqa: PTH115 - text, not a path
        except FileNotFoundError:  # the listing's own, or another thread's
            continue
    return found


def below(top: Path) -> dict[str, object]:
    """What lies below ``top``, itself included, by relative path: so much of it that every change shows."""
    time.sleep(_TICK)
    return {str(path.relative_to(top)): _seen(path) for path in (top, *sorted(top.rglob("*")))}


def _seen(path: Path) -> tuple[object, ...]:
    status = path.lstat()
    content = hashlib.sha256(path.read_bytes()).hexdigest() if stat.S_ISREG(status.st_mode) else ""
    return (status.st_ino, status.st_mode, status.st_uid, status.st_size, status.st_mtime_ns, content)


def changed(before: dict[str, object], after: dict[str, object]) -> list[str]:
    """The names of what came, went or is another now."""
    names = before.keys() | after.keys()
    return sorted(name for name in names if before.get(name) != after.get(name))


# --- what may leave something behind. What was handed out is held, so that nothing is closed by being forgotten -------


def _get(source: ImageSource, image: ImageInfo, held: list[object]) -> None:
    held.append(source.get(image.image_id))


def _whole(source: ImageSource, image: ImageInfo, held: list[object]) -> None:
    context = source.open(image)
    with context as chunks:
        held += [context, chunks]
        for _ in chunks:
            pass


def _early(source: ImageSource, image: ImageInfo, held: list[object]) -> None:
    context = source.open(image)
    with context as chunks:
        held += [context, chunks]
        next(chunks)


def _unread(source: ImageSource, image: ImageInfo, held: list[object]) -> None:
    context = source.open(image)
    with context as chunks:
        held += [context, chunks]


def _gone(source: ImageSource, image: ImageInfo, held: list[object]) -> None:
    call = partial(_whole, source, image, held)
    refused(ImageNotFoundError, call, "`open` of an image that is gone is ImageNotFoundError")


WAYS: dict[str, Callable[[ImageSource, ImageInfo, list[object]], None]] = {
    "get": _get,
    "whole": _whole,
    "early": _early,
    "unread": _unread,
    "gone": _gone,
}
"""What is done with a source, by a short name; what it hands out goes to the list."""

WORDS = {
    "get": "`get` leaves nothing open",
    "whole": "leaving a stream that was read whole closes what was opened for it",
    "early": "leaving a stream early closes what was opened for it",
    "unread": "leaving a stream that was not read closes what was opened for it",
    "gone": "`open` of an image that is gone leaves nothing open",
}
"""What each of them promises."""

"""Images that stay open for long, when the process forks: a child that frees its parent's image hangs in librbd.

Python frees what is left when a process ends, so that also a child that never touches the cache would not end.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Holder(Protocol):
    """Whoever keeps an image open beyond one call."""

    def leave_to_parent(self) -> None:
        """Called in a child, right after the fork: forget the image without closing it. Takes no lock."""


_HOLDERS: weakref.WeakSet[Holder] = weakref.WeakSet()


def note(holder: Holder) -> None:
    """Have ``leave_to_parent`` called in each child that is forked while the holder is there."""
    _HOLDERS.add(holder)


def _in_child() -> None:
    for holder in list(_HOLDERS):
        holder.leave_to_parent()


os.register_at_fork(after_in_child=_in_child)

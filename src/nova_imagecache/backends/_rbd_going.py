"""The mark of a root disk that is moved to the trash: why, when, and which disk takes its place."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from typing import Final, Literal

from nova_imagecache.backends import BackendError
from nova_imagecache.backends._rbd_store import GOING

_WHYS: Final[dict[str, Literal["removed", "replaced"]]] = {"removed": "removed", "replaced": "replaced"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Going:
    """What ``recover`` must know of a disk that it finds in the trash.

    ``at``: POSIX seconds. ``by``: the RBD id of the successor of a "replaced" one; None in marks of older versions.
    """

    why: Literal["removed", "replaced"]
    at: float
    by: str | None = None

    def dump(self) -> str:
        """The mark as it is written."""
        return json.dumps(asdict(self))


def going(*, by: str | None = None) -> Going:
    """The mark of a disk that goes now, for good or for its successor of that RBD id."""
    return Going(why="removed" if by is None else "replaced", at=time.time(), by=by)


def load(text: str) -> Going:
    """The mark that was written.

    Raises:
        BackendError: it cannot be read.
    """
    try:
        values = json.loads(text)
        mark = Going(why=_WHYS[values["why"]], at=float(values["at"]), by=values.get("by"))
    except (ValueError, TypeError, KeyError) as err:
        raise BackendError(f"its {GOING} cannot be read: {text[:80]!r}", todo="Remove or restore it by hand") from err
    return mark

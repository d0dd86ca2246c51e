"""Where Glance says that an image lies: ``rbd://<fsid>/<pool>/<image>/<snapshot>``, each part percent-encoded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote

_SCHEME = "rbd://"
_KIND = re.compile(r"[a-z][a-z0-9+.-]{0,30}://", re.IGNORECASE)
_BROKEN = re.compile(r"%(?![0-9A-Fa-f]{2})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A snapshot in a pool of a cluster."""

    fsid: str
    pool: str
    image: str
    snapshot: str


class UnusableError(ValueError):
    """A location from which nothing can be cloned, and why, in words for a log."""


def parse(url: str) -> Place:
    """The place that a location names.

    Raises:
        UnusableError: it is of another kind of store, or malformed.
    """
    if not url.startswith(_SCHEME):
        raise UnusableError("it is in a store of another kind")
    parts = url.removeprefix(_SCHEME).split("/")
    if len(parts) == 1:
        raise UnusableError("it names an image and neither cluster nor pool")
    if len(parts) != 4 or not all(parts):
        raise UnusableError("it is malformed: not rbd://<fsid>/<pool>/<image>/<snapshot>")
    if any(_BROKEN.search(part) for part in parts):
        raise UnusableError("it is malformed: its percent-encoding is broken")
    try:
        fsid, pool, image, snapshot = (unquote(part, errors="strict") for part in parts)
    except UnicodeDecodeError:
        raise UnusableError("it is malformed: its percent-encoding is not UTF-8") from None
    if any("\0" in part for part in (pool, image, snapshot)):  # where a name ends for Ceph
        raise UnusableError("it is malformed: it has a name with a zero byte")
    return Place(fsid=fsid, pool=pool, image=image, snapshot=snapshot)


def shown(url: str) -> str:
    """A location as it may be told: of other stores nothing but their kind, since some have keys in their URLs."""
    if url.startswith(_SCHEME):
        return url
    found = _KIND.match(url)
    return f"{found[0]}..." if found else "a location without a scheme"


def in_cluster(place: Place, fsid: str) -> None:
    """Come back if the place is in the cluster with this fsid.

    Raises:
        UnusableError: it is in another one.
    """
    if place.fsid.lower() != fsid.lower():
        raise UnusableError(f"it is in another cluster ({place.fsid})")

"""How much room a pool has, and when it is the lack of it that a client waits for."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nova_imagecache.exceptions import BackendUnavailableError, NoSpaceError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nova_imagecache.backends._rbd_connection import Connection


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Bytes stored in a pool and bytes that fit. ``counted`` is False for a pool too new to be counted."""

    stored: int
    free: int
    counted: bool


def left(connection: Connection, pool: str) -> Room:
    """The pool's room within its quota, as the mgr last counted it.

    Raises:
        BackendUnavailableError: nobody counts.
        NoPoolError: there is no such pool.
    """
    connection.pool(pool)
    figures = connection.command("df")
    if not figures["stats"]["total_bytes"]:
        raise BackendUnavailableError("the cluster counts no bytes", todo="Start a ceph-mgr, and call again")
    counted = [one["stats"] for one in figures["pools"] if one["name"] == pool]
    stored = int(counted[0].get("stored", 0)) if counted else 0
    free = int(counted[0]["max_avail"] if counted else figures["stats"]["total_avail_bytes"])
    quota = int(_described(connection, pool).get("quota_max_bytes", 0))
    if quota:
        free = max(0, min(free, quota - stored))
    return Room(stored=stored, free=free, counted=bool(counted))


@contextmanager
def told(connection: Connection, pool: str) -> Iterator[None]:
    """Run the block; where writing hangs since the pool is full, that comes out as NoSpaceError."""
    try:
        yield
    except BackendUnavailableError as err:
        # a client waits for room in a full pool until its time is up
        if not _is_full(connection, pool):
            raise
        raise NoSpaceError(free=0, limit=f"the quota of pool {pool}, or the cluster's capacity,") from err


def _is_full(connection: Connection, pool: str) -> bool:
    try:
        flags = str(_described(connection, pool).get("flags_names", "")).split(",")
    except BackendUnavailableError:  # nobody answers at all
        return False
    return "full" in flags


def _described(connection: Connection, pool: str) -> dict[str, Any]:
    pools = connection.command("osd pool ls", detail="detail")
    return next((one for one in pools if one["pool_name"] == pool), {})

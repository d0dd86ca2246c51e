"""What the RBD backend tells apart among Ceph's refusals. All are BackendErrors, so that none needs translating."""

from __future__ import annotations

import errno

from nova_imagecache.exceptions import BackendError, BackendUnavailableError, NoSpaceError


class RadosError(BackendError):
    """Ceph refused an operation."""

    default_todo = "Look at the cause, and at the cluster's health (ceph -s)"


class NotThereError(RadosError):
    """There is no such image, snapshot, object, pool or keyring."""


class NoPoolError(RadosError):
    """There is no such pool."""

    default_todo = "Create the pool, or correct backend_options.pool"


class ExistsError(RadosError):
    """There is one of that name."""


class BusyError(RadosError):
    """Somebody has it open, or works on it."""


class UnfinishedError(BusyError):
    """A move of the image to the trash died half-way. Moving it again finishes that."""


class SnapshotsError(RadosError):
    """The image has snapshots, shown or hidden."""


class RefusedError(RadosError):
    """The operation does not fit the image: it has no parent, its snapshot is not protected."""


class ForbiddenError(RadosError):
    """The user's key or its capabilities do not allow it."""

    default_todo = "Check the keyring, and the user's capabilities (ceph auth get)"


class ForkedError(RadosError):
    """The process was forked from one that has used Ceph; librbd hangs in such a child."""

    default_todo = 'Start processes by "spawn" instead of fork, or fork before the first use'


class ConnectionLostError(BackendUnavailableError):
    """The cluster has thrown this client out; the next call connects anew."""


class StuckError(BackendUnavailableError):
    """Writes neither end nor fail.

    librbd waits for ever for an image that was removed under it, and for the lock of one that another client has, until
    that gives it back or is thrown out.
    """

    default_todo = "Call again; if the process stood still for long, recover on another host has taken it for dead"


class Losses:
    """How often this process's client was thrown out of a cluster: a connection older than the last time is dead."""

    def __init__(self) -> None:
        self.count = 0


LOSSES = Losses()


_KINDS: dict[int, type[RadosError]] = {
    errno.ENOENT: NotThereError,
    errno.EEXIST: ExistsError,
    errno.EBUSY: BusyError,
    errno.EUCLEAN: UnfinishedError,
    errno.ENOTEMPTY: SnapshotsError,
    errno.EPERM: ForbiddenError,
    errno.EACCES: ForbiddenError,
    errno.EINVAL: RefusedError,
}
_NO_ANSWER = (errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ECONNABORTED)


def error_of(code: int | None, text: str) -> BackendError:
    """The error of ours for an errno of Ceph's."""
    if code in (errno.ENOSPC, errno.EDQUOT):
        return NoSpaceError(limit=f"the pool's quota or the cluster's capacity ({text})")
    if code in _NO_ANSWER:
        return BackendUnavailableError(f"Ceph does not answer in time: {text}")
    if code == errno.ESHUTDOWN:
        LOSSES.count += 1
        return ConnectionLostError(f"the cluster has blocklisted this client: {text}")
    return _KINDS.get(code or 0, RadosError)(text)

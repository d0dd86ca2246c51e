"""One connection to a cluster for a whole process, however many backends, threads and disks there are."""

from __future__ import annotations

import math
import os
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nova_imagecache.backends import _rbd_look
from nova_imagecache.backends._rados import answers, bindings
from nova_imagecache.backends._rados_errors import (
    LOSSES,
    ConnectionLostError,
    ForbiddenError,
    ForkedError,
    NoPoolError,
    NotThereError,
    RadosError,
    RefusedError,
)
from nova_imagecache.exceptions import BackendError, BackendUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from nova_imagecache.backends._rados import Ioctx


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Which cluster, and as whom."""

    conf: str
    user: str


class Connection:
    """A connection that is made when it is first used, and made again when it is lost. Thread-safe.

    All of a process's backends with the same address share it, and give it back with ``release``.
    """

    def __init__(self, address: Address) -> None:
        self.address = address
        self.holders = 0
        self.timeout = math.inf
        """Seconds that the cluster may take to answer: the least that any of its holders has asked for."""
        self._limit = math.inf
        self._lock = threading.Lock()
        self._cluster: Any = None
        self._lost: list[Any] = []
        self._losses = 0
        self._pid = 0
        self._pools: dict[str, tuple[int, Ioctx]] = {}
        self._failed: tuple[float, BackendError] | None = None
        self._hosts: tuple[tuple[str, int], ...] | None = None
        self._endings: list[Callable[[], None]] = []
        self._shared: dict[tuple[type, str], Any] = {}

    # --- using it

    def pool(self, name: str) -> Ioctx:
        """The pool, open. One that was deleted and made again is opened anew.

        Raises:
            NoPoolError: there is none of that name.
            BackendUnavailableError: the cluster does not answer.
        """
        while True:
            cluster = self._connected()
            number = self._number(cluster, name)
            known = self._pools.get(name)
            if known is not None and known[0] == number:
                return known[1]
            ioctx = _open_pool(cluster, name)
            with self._lock:
                known = self._pools.get(name)
                if self._cluster is cluster and (known is None or known[0] != number):
                    self._pools[name] = (number, ioctx)
                    return ioctx
            ioctx.close()  # another thread was first, or the connection was lost meanwhile

    def _number(self, cluster: Any, name: str) -> int:
        with suppress(NotThereError), answers(f"look for pool {name}"):
            # the client's own map knows; what is not in it is asked for by a call that ends: pool_lookup waits for a
            # newer map as long as that takes
            if name in cluster.list_pools() or name in _rbd_look.command(cluster, "osd pool ls"):
                return int(cluster.pool_lookup(name))
        raise NoPoolError(f"there is no pool {name!r} in the cluster")

    def fsid(self) -> str:
        """The cluster's id."""
        cluster = self._connected()
        with answers("ask for the fsid"):
            return str(cluster.get_fsid())

    def config(self, name: str) -> str:
        """What the client's configuration says, defaults included."""
        cluster = self._connected()
        with answers(f"read option {name}"):
            return str(cluster.conf_get(name) or "")

    def command(self, prefix: str, **arguments: str) -> Any:
        """The monitors' answer, from JSON."""
        return _rbd_look.command(self._connected(), prefix, **arguments)

    def monitors(self) -> tuple[tuple[str, int], ...]:
        """(address, port) of each monitor, as libvirt and qemu take them; asked once a connection."""
        self._connected()
        hosts = self._hosts
        if hosts is None:
            hosts = self._hosts = tuple(_hosts(self.command("mon dump")))
        return hosts

    def client(self) -> int:
        """The number by which the cluster knows this client, in lists of watchers for instance."""
        cluster = self._connected()
        with answers("ask for the client's number"):
            return int(cluster.get_instance_id())

    def shared(self, kind: type, pool: str, make: Callable[[], Any]) -> Any:
        """The one thing of this kind and pool that all holders share, made by whoever asks first."""
        with self._lock:
            if (kind, pool) not in self._shared:
                self._shared[kind, pool] = make()
            return self._shared[kind, pool]

    def at_end(self, call: Callable[[], None]) -> None:
        """Call this before the connection is given up in good order."""
        with self._lock:
            self._endings.append(call)

    # --- making and ending it

    def _connected(self) -> Any:
        cluster = self._cluster
        if (
            cluster is not None
            and self._pid == os.getpid()
            and self._losses == LOSSES.count
            and self._limit == self.timeout
        ):
            return cluster
        _refuse_forked()
        asked = time.monotonic()
        with self._lock:
            if self._cluster is not None and (seen := LOSSES.count) != self._losses:
                # that may be old news, of an image that was opened before the connection was made
                if self._is_lost():
                    self._lose()
                else:
                    self._losses = seen
            if self._cluster is None:
                # of many that wait for a cluster that is down, one finds out
                if self._failed is not None and self._failed[0] >= asked:
                    raise BackendUnavailableError(self._failed[1].detail) from self._failed[1]
                self._losses = LOSSES.count
                try:
                    self._cluster = self._connect()
                except BackendUnavailableError as err:
                    self._failed = (time.monotonic(), err)
                    raise
                self._pid = os.getpid()
            elif self._limit != self.timeout:
                self._limit = self.timeout
                for option, seconds in _limits(self._limit).items():
                    self._cluster.conf_set(option, seconds)
            return self._cluster

    def _connect(self) -> Any:
        rados, _ = bindings()
        _PROCESS.pid = os.getpid()
        self._limit = self.timeout
        # librbd writes from a copy: without one a write to a dead OSD ends only when the connection lets the bytes go
        writes = {"rbd_disable_zero_copy_writes": "true"}
        what = f"connect as client.{self.address.user} by {self.address.conf}"
        try:
            with answers(what):
                name = f"client.{self.address.user}"
                # connect(timeout=) is ignored
                cluster = rados.Rados(conffile=self.address.conf, name=name, conf=_limits(self._limit) | writes)
                cluster.connect()
        except (NotThereError, RefusedError) as err:
            todo = "Check backend_options.conf and user, and that the keyring the file names is there and readable"
            raise RadosError(err.detail, stage="connecting", todo=todo) from err
        except ForbiddenError as err:
            todo = f"Check that the keyring holds the cluster's key of client.{self.address.user}"
            raise ForbiddenError(err.detail, stage="connecting", todo=todo) from err
        return cluster

    def _is_lost(self) -> bool:
        """Whether the cluster has thrown this very connection out: then it refuses everything, also a look."""
        known = next(iter(self._pools.values()), None)
        if known is None:  # no image was opened over it yet
            return False
        try:
            _rbd_look.read_object(known[1], "rbd_directory")
        except ConnectionLostError:
            return True
        except BackendError:  # whoever goes on hears of that
            return False
        return False

    def _lose(self) -> None:
        """Forget the connection: the cluster has thrown it out. It is kept, since open images hold on to it."""
        self._lost.append(self._cluster)
        self._cluster = self._hosts = None
        self._pools, self._shared, self._endings = {}, {}, []

    @property
    def is_anothers(self) -> bool:
        """Whether this is a forked child's copy of its parent's connection."""
        return self._cluster is not None and self._pid != os.getpid()

    def end(self) -> None:
        """Give the connection back to the cluster."""
        if self._cluster is None or self.is_anothers:
            return
        for call in self._endings:
            call()
        with self._lock:
            cluster, self._cluster, self._hosts = self._cluster, None, None
            pools, self._pools, self._shared, self._endings = self._pools, {}, {}, []
        for _, ioctx in pools.values():
            ioctx.close()
        with answers("disconnect"):
            cluster.shutdown()


class _Process:
    """What this process has open. librados is one library per process: so is this."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.connections: dict[Address, Connection] = {}
        self.pid = 0


_PROCESS = _Process()


def _refuse_forked() -> None:
    if _PROCESS.pid not in (0, os.getpid()):
        raise ForkedError("this process was forked from one that has used Ceph, whose client does not survive that")


def hold(address: Address, timeout: float) -> Connection:
    """The process's connection to this address; nothing is connected yet. ``timeout`` as in ``Connection``."""
    with _PROCESS.lock:
        connection = _PROCESS.connections.setdefault(address, Connection(address))
        connection.holders += 1
        connection.timeout = min(connection.timeout, timeout)
        return connection


def release(connection: Connection) -> None:
    """Give it back; the last holder ends it."""
    with _PROCESS.lock:
        connection.holders -= 1
        if connection.holders > 0:
            return
        _PROCESS.connections.pop(connection.address, None)
    connection.end()


def _limits(seconds: float) -> dict[str, str]:
    """The options by which a client waits so long: for the first answer, and for each operation."""
    whole = str(math.ceil(seconds))  # Ceph takes whole ones
    return dict.fromkeys(("client_mount_timeout", "rados_osd_op_timeout", "rados_mon_op_timeout"), whole)


def _open_pool(cluster: Any, name: str) -> Ioctx:
    with answers(f"open pool {name}"):
        ioctx: Any = cluster.open_ioctx(name)
        # a full pool refuses at once what takes room, and lets pass what frees it: otherwise both wait until it is not
        ioctx.set_osdmap_full_try()
        return ioctx  # type: ignore[no-any-return]  # the bindings have no types


def _hosts(answer: Any) -> Iterator[tuple[str, int]]:
    for monitor in answer["mons"]:
        addresses = {one["type"]: one["addr"] for one in monitor["public_addrs"]["addrvec"]}
        # libvirt and qemu speak to the port of the first protocol unless told otherwise
        address = addresses.get("v1") or addresses.get("v2")
        if address:
            host, _, port = address.rpartition(":")
            yield host.strip("[]"), int(port)

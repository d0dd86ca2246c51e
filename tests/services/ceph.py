"""A real Ceph cluster of one node for tests and demonstrations: mon, mgr and osd in one directory, on 127.0.0.1.

Debian's packages ceph-mon, ceph-mgr, ceph-osd, ceph-common, python3-rados and python3-rbd are what it needs.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Self

from services import ceph_files, ceph_make
from services.ceph_bindings import bindings, link_bindings
from services.ceph_daemon import Daemon

# for what the cluster does with itself: more than any test waits for
_PATIENT = {"client_mount_timeout": "30", "rados_osd_op_timeout": "30", "rados_mon_op_timeout": "30"}


class CephCluster:
    """A cluster of its own in ``directory``, new or empty; a context manager, or ``start`` and ``stop``.

    It has the pools images and vms and the users of ``ceph_files.CLIENTS``: admin, glance and nova, named here without
    "client.". With ``store`` "memstore" all data are in memory: quick, and gone when the osd ends. With "bluestore"
    they are on disk, and whatever is stopped or killed has them again when it is started.

    Args:
        store: where the osd keeps data.
        size: the storage it says it has, in bytes; takes no room before it is written to.
        client_timeout: seconds after which a client gives up that has no options of its own: more than any test allows
            for, so that it is by its own options that the library ends in time.
        watch_timeout: seconds for which an image stays in use by a client that died.
    """

    def __init__(
        self,
        directory: Path,
        *,
        store: Literal["memstore", "bluestore"] = "memstore",
        size: int = 10 * 2**30,
        client_timeout: int = 90,
        watch_timeout: int = 5,
    ) -> None:
        self.dir = directory.absolute()
        self.store = store
        self.fsid = ""
        self.ports = (0, 0)
        self._size = size
        self._client_timeout = client_timeout
        self._watch_timeout = watch_timeout
        self._made = False
        self._osd_uuid = ""
        self._starter: ThreadPoolExecutor | None = None
        self._daemons: dict[str, Daemon] = {}
        self._clients: dict[tuple[object, ...], Any] = {}

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<CephCluster {self.fsid} ({self.store}) in {self.dir}>"

    # --- what clients need

    @property
    def conf(self) -> Path:
        """The clients' ceph.conf; it names the keyrings too."""
        return self.dir / "ceph.conf"

    @property
    def monitor(self) -> tuple[str, int]:
        """Host and port of the monitor as libvirt and qemu take them: those of the first protocol."""
        return "127.0.0.1", self.ports[1]

    @property
    def pids(self) -> dict[str, int | None]:
        """The process ids of mon, mgr and osd."""
        return {name: daemon.pid for name, daemon in self._daemons.items()}

    def keyring(self, user: str) -> Path:
        """The user's keyring."""
        return self.dir / f"ceph.client.{user}.keyring"

    def key(self, user: str) -> str:
        """The user's cephx secret, in base64 as libvirt takes it."""
        return self.keyring(user).read_text().split("key = ")[1].split()[0]

    @contextlib.contextmanager
    def client(self, user: str = "admin", **options: str) -> Iterator[Any]:
        """A connected rados.Rados; ``options`` are Ceph's, such as rados_osd_op_timeout="1".

        Those who ask for the same share one, which lives as long as the cluster.
        """
        key = (os.getpid(), user, *sorted(options.items()))
        if key not in self._clients:
            rados, _ = bindings()
            connection = rados.Rados(conffile=str(self.conf), name=f"client.{user}", conf=options)
            connection.connect()
            self._clients[key] = connection
        yield self._clients[key]

    @contextlib.contextmanager
    def pool(self, pool: str, user: str = "admin", **options: str) -> Iterator[Any]:
        """An open rados.Ioctx of the pool."""
        with self.client(user, **options) as connection:
            # a pool that was deleted and made again has another number
            connection.wait_for_latest_osdmap()
            with connection.open_ioctx(pool) as ioctx:
                yield ioctx

    def glance_store_options(self) -> dict[str, str]:
        """What Glance's store of type rbd needs to keep images in the pool images."""
        return {
            "rbd_store_ceph_conf": str(self.conf),
            "rbd_store_user": "glance",
            "rbd_store_pool": "images",
            "rbd_store_chunk_size": "8",
            "rados_connect_timeout": "5",
        }

    def bindings_path(self) -> Path:
        """A directory with rados and rbd and nothing else, for another environment of this same Python."""
        return link_bindings(self.dir / "bindings")

    # --- life

    def start(self) -> None:
        """Return when the pools can be read and written, and are counted; RuntimeError with a log if that fails.

        After ``stop`` or ``kill`` it brings the same cluster back; with memstore a new one, empty, under the same path.
        """
        self._starter = ThreadPoolExecutor(1, "ceph")
        atexit.register(self.stop)
        try:
            if self.store == "memstore" or not self._made:
                self._make()
            self._prepare_daemons()
            self._daemons["mon"].start()
            self._daemons["mgr"].start()
            self._wait("the monitor", self._listening, "mon")
            self.command("osd new", uuid=self._osd_uuid, id=0)
            self.start_osd()
            if not self._made:
                # from here on clone format "auto" is v2, as on every cluster without clients from before 2018
                self.command("osd set-require-min-compat-client", version="mimic")
                self.create_pool("images")
                self.create_pool("vms")
            self._made = True
            self._wait("the mgr", self._counting, "mgr")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the daemons, by their process ids; idempotent. Data on bluestore stay."""
        # the osd first: it says goodbye to the monitor, and waits a second for one that is gone
        self._end(Daemon.stop)

    def kill(self) -> None:
        """End all daemons at once, as a power cut does."""
        self._end(Daemon.kill)

    def _end(self, end: Callable[[Daemon], None]) -> None:
        atexit.unregister(self.stop)
        while self._clients:
            self._clients.popitem()[1].shutdown()
        for name in ("osd", "mgr", "mon"):
            if name in self._daemons:
                end(self._daemons[name])
        if self._starter is not None:
            self._starter.shutdown()

    # --- what goes wrong

    def pause_osd(self) -> None:
        """Stop the osd where it is: the monitor answers and no data come or go."""
        self._daemons["osd"].pause()

    def resume_osd(self) -> None:
        """Take ``pause_osd`` back."""
        self._daemons["osd"].resume()

    def pause_monitor(self) -> None:
        """Stop the monitor where it is: data come and go, and nobody answers what only a monitor knows."""
        self._daemons["mon"].pause()

    def resume_monitor(self) -> None:
        """Take ``pause_monitor`` back."""
        self._daemons["mon"].resume()

    def kill_osd(self) -> None:
        """Kill the osd; the monitor goes on."""
        self._daemons["osd"].kill()

    def start_osd(self) -> None:
        """Start the osd that was killed, and return when it serves; RuntimeError on memstore: its data are lost."""
        if self._made and self.store == "memstore":
            raise RuntimeError(
                "memstore is empty after its osd has ended: use a cluster on bluestore, or stop and start"
            )
        # one that was killed is still up in the map: its clients would knock at the old address for 15 s
        self.command("osd down", ids=["0"])
        self._daemons["osd"].start()
        self._wait("the osd", lambda: self.command("osd stat")["num_up_osds"] == 1, "osd")
        if self._made:
            self._probe("images")

    # --- administration

    def create_pool(self, name: str) -> None:
        """Make a pool for RBD images, in a few placement groups and one copy."""
        self.command("osd pool create", pool=name, pg_num=4, size=1)
        _, rbd = bindings()
        with self.pool(name, **_PATIENT) as ioctx:
            rbd.RBD().pool_init(ioctx, True)

    def delete_pool(self, name: str) -> None:
        """Delete the pool and all that is in it."""
        self.command("osd pool delete", pool=name, pool2=name, yes_i_really_really_mean_it=True)

    def set_quota(self, pool: str, max_bytes: int) -> None:
        """Limit the pool; 0: no limit. The monitor notices a full pool some 2 s after the write."""
        self.command("osd pool set-quota", pool=pool, field="max_bytes", val=str(max_bytes))

    def auth_caps(self, user: str, **caps: str) -> None:
        """Replace all of the user's capabilities: ``auth_caps("nova", mon="profile rbd", osd="profile rbd pool=vms")``.

        A connection that is open goes on with the old ones; ``client`` gives a new one.
        """
        self.command("auth caps", entity=f"client.{user}", caps=_pairs(caps))
        for key in [key for key in self._clients if key[1] == user]:
            self._clients.pop(key).shutdown()

    def reset_caps(self, user: str) -> None:
        """Give admin, glance or nova the capabilities back that they began with."""
        self.auth_caps(user, **ceph_files.CLIENTS[f"client.{user}"])

    def create_user(self, user: str, **caps: str) -> Path:
        """The keyring of a new user with these capabilities."""
        entity = f"client.{user}"
        [made] = self.command("auth get-or-create", entity=entity, caps=_pairs(caps))
        ceph_make.write_secret(self.keyring(user), ceph_files.keyring(entity, made["key"], caps))
        return self.keyring(user)

    def command(self, prefix: str, **arguments: Any) -> Any:
        """The monitor's answer to this command, from JSON; OSError with its errno and words if it refuses."""
        command = json.dumps({"prefix": prefix, "format": "json", **arguments})
        with self.client(**_PATIENT) as connection:
            code, answer, words = connection.mon_command(command, b"")
        if code:
            raise OSError(-code, f"ceph {prefix}: {words}")
        return json.loads(answer) if answer.strip() else None

    # --- how it comes up

    def _make(self) -> None:
        if self._made:
            ceph_make.unmake(self.dir)
            self._made = False
        made = ceph_make.make(
            self.dir,
            store=self.store,
            size=self._size,
            client_timeout=self._client_timeout,
            watch_timeout=self._watch_timeout,
        )
        self.fsid, self.ports, self._osd_uuid = made.fsid, made.ports, made.osd_uuid

    def _prepare_daemons(self) -> None:
        assert self._starter is not None
        for name, number in (("mon", "a"), ("mgr", "x"), ("osd", "0")):
            command = [f"ceph-{name}", "-f", "-c", str(self.conf), "-i", number]
            self._daemons[name] = Daemon(f"ceph-{name}", command, self.dir / "log" / f"{name}.out", self._starter)

    def _listening(self) -> bool:
        # asked before any client does, which would try again after seconds
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.ports[0])) == 0

    def _counting(self) -> bool:
        """Whether the mgr has begun to report the pools' sizes, which it does once a second."""
        pools = {pool["name"]: pool["stats"]["max_avail"] for pool in self.command("df")["pools"]}
        return bool(pools.get("images") and pools.get("vms"))

    def _probe(self, pool: str) -> None:
        """Return when an object can be written and removed: "up" alone may be the map's memory."""
        with self.pool(pool, **_PATIENT) as ioctx:
            ioctx.write_full("probe", b"1")
            ioctx.remove_object("probe")

    def _wait(self, what: str, ready: Callable[[], bool], daemon: str) -> None:
        deadline = time.monotonic() + 60
        while not ready():
            self._daemons[daemon].check()
            if time.monotonic() > deadline:
                raise RuntimeError(f"{what} does not come up; the logs are in {self.dir / 'log'}")
            time.sleep(0.02)


def _pairs(caps: dict[str, str]) -> list[str]:
    """Capabilities as the monitor takes them: service and capability by turns."""
    return [word for pair in caps.items() for word in pair]

"""What a new Ceph cluster of one node begins with: its configuration, keys, and the first data of mon and osd."""

from __future__ import annotations

import random
import shutil
import socket
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from services import ceph_daemon, ceph_files

_DIRECTORIES = ("mon", "mgr", "osd", "run", "log")
_MGR_MODULES = Path("/usr/share/ceph/mgr")


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A cluster that is ready to be started; ``ports`` are the monitor's for the second and the first protocol."""

    fsid: str
    osd_uuid: str
    ports: tuple[int, int]


def make(directory: Path, *, store: str, size: int, client_timeout: int, watch_timeout: int) -> Made:
    """Make a cluster in the directory; FileExistsError if there is one."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in _DIRECTORIES:
        (directory / name).mkdir()
    made = Made(fsid=str(uuid.uuid4()), osd_uuid=str(uuid.uuid4()), ports=free_ports())
    mon_host = f"[v2:127.0.0.1:{made.ports[0]},v1:127.0.0.1:{made.ports[1]}]"
    conf = directory / "ceph.conf"
    conf.write_text(
        ceph_files.CONF.format(
            dir=directory,
            fsid=made.fsid,
            mon_host=mon_host,
            store=store,
            size=size,
            client_timeout=client_timeout,
            watch_timeout=watch_timeout,
            disabled_modules=",".join(_disabled_modules()),
        )
    )
    _make_keyrings(directory)
    log = directory / "log" / "make"
    programs = ["ceph-osd", "-c", str(conf), "-i", "0", "--no-mon-config", "--mkfs", "--osd-uuid", made.osd_uuid]
    osd = ceph_daemon.run(programs, directory / "log" / "make-osd")
    try:
        monmap = str(directory / "mon.map")
        command = ["monmaptool", "--create", "--fsid", made.fsid, "--addv", "a", mon_host]
        ceph_daemon.finish(ceph_daemon.run([*command, "--set-min-mon-release", "pacific", monmap], log), log)
        command = ["ceph-mon", "-c", str(conf), "-i", "a", "--mkfs", "--monmap", monmap]
        ceph_daemon.finish(ceph_daemon.run([*command, "--keyring", str(directory / "mon.keyring")], log), log)
    finally:
        ceph_daemon.finish(osd, directory / "log" / "make-osd")
    return made


def unmake(directory: Path) -> None:
    """Remove what ``make`` made, so that it can be made again."""
    for name in _DIRECTORIES:
        shutil.rmtree(directory / name, ignore_errors=True)
    (directory / "mon.map").unlink(missing_ok=True)


def write_secret(path: Path, text: str) -> None:
    """Write a file that its owner alone can read."""
    path.unlink(missing_ok=True)
    path.touch(0o600)
    path.write_text(text)


def free_ports() -> tuple[int, int]:
    """Two ports of the loopback address that nobody listens at.

    They lie below those that the kernel gives to outgoing connections, so that they are still free when a cluster
    that was stopped comes back.
    """
    found: list[int] = []
    while len(found) < 2:
        port = random.randrange(20000, 32768)
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                # whatever the reason, another port is tried
                continue
        if port not in found:
            found.append(port)
    return found[0], found[1]


def _make_keyrings(directory: Path) -> None:
    """One keyring for each user and daemon, and all of them in the monitor's first: nobody must be added later."""
    places = {"mgr.x": directory / "mgr" / "keyring", "osd.0": directory / "osd" / "keyring"}
    first = ""
    entities: dict[str, Mapping[str, str]] = {**ceph_files.DAEMONS, **ceph_files.CLIENTS}
    for entity, caps in entities.items():
        text = ceph_files.keyring(entity, ceph_files.new_key(), caps)
        first += text
        if entity != "mon.":
            write_secret(places.get(entity, directory / f"ceph.{entity}.keyring"), text)
    write_secret(directory / "mon.keyring", first)


def _disabled_modules() -> list[str]:
    """All modules of the mgr but rbd_support: some are always on unless named, and each costs time and memory."""
    names = sorted(path.name for path in _MGR_MODULES.glob("*/") if (path / "__init__.py").exists())
    return [name for name in names if name != "rbd_support"]

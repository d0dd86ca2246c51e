"""Hosts for virt drivers: a LibvirtDaemon, images in a directory, a backend, and configuration files that say so."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import rbd as pool
from services import libvirtd
from services.ceph import CephCluster
from services.libvirtd_ground import Ground
from services.libvirtd_guests import ceph_secret, listen
from services.libvirtd_rig import bootable, shelve
from services.require import require

BACKENDS = ("qcow2", "file", "rbd")


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """A host with images "one" (raw) and "two" (qcow2).

    ``cache`` is a file that configures the cache alone, ``driver`` one with tables for examples/minidriver as well.
    """

    ground: Ground
    dir: Path
    backend: str
    driver: Path
    cache: Path

    @property
    def reference(self) -> str:
        """What ties a root disk to its base here."""
        return {"qcow2": "link", "file": "none", "rbd": "clone"}[self.backend]

    def console(self, name: str) -> list[str]:
        """What minidriver's guest of that name says, when it has said all."""
        return listen(self.ground.daemon.dir / "consoles" / f"{name}.log")


@contextmanager
def host(ground: Ground, backend: str, ceph: Callable[[], CephCluster], *, apart: bool = False) -> Iterator[Host]:
    """A host whose guests are gone after the block; ``apart``: its cache has a filesystem of its own."""
    with ExitStack() as stack:
        options = _rbd_options(ceph(), ground, stack) if backend == "rbd" else {}
        stack.callback(forget_guests, ground)
        yield _configured(ground, backend, options, apart=apart)


def _configured(ground: Ground, backend: str, options: Mapping[str, Any], *, apart: bool) -> Host:
    here, there = ground.places()
    shelve(here / "images", {"one": bootable("ONE"), "two": bootable("TWO", "qcow2")})
    cache = {
        "root": str((there if apart else here) / "root"),
        "disks_dir": str(here / "disks"),
        "backend": backend,
        "backend_options": options,
        "max_idle": 0,
        "source": "directory",
        "source_options": {"path": str(here / "images")},
    }
    driver = {
        "uri": ground.daemon.uri,
        "type": "qemu",
        "consoles": str(ground.daemon.dir / "consoles"),
        "reserved_disk_mb": 2000,
        "disk": {"cache": "writeback", "discard": "unmap"},
    }
    (here / "cache.toml").write_text(_toml(cache))
    (here / "driver.toml").write_text(f"[driver]\n{_toml(driver)}\n[cache]\n{_toml(cache)}")
    return Host(ground=ground, dir=here, backend=backend, driver=here / "driver.toml", cache=here / "cache.toml")


def _toml(values: Mapping[str, Any]) -> str:
    return "".join(f"{name} = {_value(value)}\n" for name, value in values.items())


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{name} = {_value(inner)}" for name, inner in value.items()) + " }"
    return json.dumps(value)


def _rbd_options(ceph: CephCluster, ground: Ground, stack: ExitStack) -> dict[str, Any]:
    """Options of the backend for the cache's user, who can read no keyring but his own."""
    require(libvirtd.missing_rbd())
    pool.empty(ceph)
    stack.callback(pool.empty, ceph)
    where, _ = ground.places()
    keyring = where / "keyring"
    shutil.copyfile(ceph.keyring("nova"), keyring)
    keyring.chmod(0o600)
    os.chown(keyring, ground.user, ground.user)
    conf = where / "ceph.conf"
    conf.write_text(ceph.conf.read_text().replace(f"{ceph.dir}/$cluster.$name.keyring", str(keyring)))
    connection = stack.enter_context(ground.daemon.connection())
    secret = stack.enter_context(ceph_secret(connection, "nova", ceph.key("nova")))
    return {"conf": str(conf), "user": "nova", "pool": "vms", "connect_timeout": 5, "secret_uuid": secret}


def forget_guests(ground: Ground) -> None:
    """End and undefine every guest of the daemon."""
    with ground.daemon.connection() as connection:
        for domain in connection.listAllDomains():
            if domain.isActive():
                domain.destroy()
            domain.undefine()

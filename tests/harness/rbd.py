"""The backend ``rbd`` in tests: a pool that is emptied, images as others open them, processes of their own."""

from __future__ import annotations

import contextlib
import errno
import json
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from nova_imagecache.backends import BackendPaths, BaseRecord, _rbd_connection
from nova_imagecache.backends._rados import close_unwritten
from nova_imagecache.backends.rbd import RbdBackend
from services.ceph import CephCluster
from services.ceph_bindings import bindings

_PART = re.compile(r"(?:rbd_header|rbd_object_map|rbd_data|nova_imagecache\.sums)\.([0-9a-f]+)(?:\..*)?")


def options(cluster: CephCluster, **changes: Any) -> dict[str, Any]:
    """Options of the backend for this cluster, as the user nova."""
    return {"conf": str(cluster.conf), "user": "nova", "pool": "vms", "connect_timeout": 5, **changes}


_MADE: list[RbdBackend] = []


def make_backend(cluster: CephCluster, directory: Path, **changes: Any) -> RbdBackend:
    """The backend over the cluster; its files are below ``directory``."""
    paths = BackendPaths(root=directory / "root", disks_dir=directory / "disks")
    _MADE.append(RbdBackend(options(cluster, **changes), paths))
    return _MADE[-1]


def record(image_id: str, size: int, **changes: Any) -> BaseRecord:
    """What is written down of a raw base of so many bytes."""
    made = BaseRecord(
        image_id=image_id,
        format="raw",
        virtual_size=size,
        size=size,
        source_format="raw",
        source_size=size,
        source_digest=None,
        evidence="unverified",
        made_by="stored",
        source="test",
        fetched_at=1_700_000_000.0,
    )
    return replace(made, **changes)


@contextlib.contextmanager
def opened(cluster: CephCluster, name: str, pool: str = "vms", *, read_only: bool = True) -> Iterator[Any]:
    """An image, as somebody else's client has it open."""
    _, rbd = bindings()
    with (
        cluster.pool(pool) as ioctx,
        reading(ioctx, name) if read_only else rbd.Image(ioctx, name) as image,
    ):
        yield image


@contextlib.contextmanager
def reading(ioctx: Any, name: str | None = None, **which: str) -> Iterator[Any]:
    """An image, for reading, closed as the library does it: librbd may abort the process otherwise."""
    _, rbd = bindings()
    image = rbd.Image(ioctx, name, read_only=True, **which)
    try:
        yield image
    finally:
        close_unwritten(ioctx, image)


def names(cluster: CephCluster, pool: str = "vms") -> list[str]:
    """Everything in the pool: images, and the trash as ``trash/<name>``; signs of life left out."""
    _, rbd = bindings()
    with cluster.pool(pool) as ioctx:
        found = [name for name in rbd.RBD().list(ioctx) if not name.startswith("staging._owner.")]
        return sorted([*found, *(f"trash/{entry['name']}" for entry in rbd.RBD().trash_list(ioctx))])


def leftovers(cluster: CephCluster, pool: str = "vms") -> list[str]:
    """What nothing in the pool needs: unfinished images, trashed ones without clones, parts without an image."""
    _, rbd = bindings()
    with cluster.pool(pool) as ioctx:
        found = [name for name in names(cluster, pool) if name.startswith("staging.")]
        ids = {_id(ioctx, name) for name in rbd.RBD().list(ioctx)}
        for entry in rbd.RBD().trash_list(ioctx):
            ids.add(entry["id"])
            if not _has_clones(ioctx, entry["id"]):
                found.append(f"trash/{entry['name']}")
        for key in (one.key for one in ioctx.list_objects()):
            part = _PART.fullmatch(key)
            if part and part[1] not in ids:
                found.append(key)
    return sorted(found)


def _id(ioctx: Any, name: str) -> str:
    _, rbd = bindings()
    with contextlib.suppress(rbd.ImageNotFound), reading(ioctx, name) as image:
        return str(image.id())
    return ""


def _has_clones(ioctx: Any, image_id: str) -> bool:
    _, rbd = bindings()
    with contextlib.suppress(rbd.ImageNotFound), reading(ioctx, image_id=image_id) as image:
        return any(image.list_children2())
    return False


@contextlib.contextmanager
def damaged(cluster: CephCluster, name: str, pool: str = "vms") -> Iterator[None]:
    """While the block runs the image's header says nonsense."""
    with cluster.pool(pool) as ioctx:
        with reading(ioctx, name) as image:
            header, size = f"rbd_header.{image.id()}", image.size()
        _set_size(ioctx, header, b"\1")
        try:
            yield
        finally:
            _set_size(ioctx, header, struct.pack("<Q", size))


def _set_size(ioctx: Any, header: str, value: bytes) -> None:
    rados, _ = bindings()
    with rados.WriteOpCtx() as operation:
        ioctx.set_omap(operation, ("size",), (value,))
        ioctx.operate_write_op(operation, header)


def is_full(cluster: CephCluster, pool: str = "vms") -> bool:
    """Whether the pool refuses what takes room: the monitor has noticed that its quota is reached, and told the osd."""
    return _refuses(cluster, pool) == {True}


def has_room(cluster: CephCluster, pool: str = "vms") -> bool:
    """Whether the pool takes what takes room: the opposite of ``is_full`` is known to all of it some time later."""
    return _refuses(cluster, pool) == {False}


def _refuses(cluster: CephCluster, pool: str) -> set[bool]:
    rados, _ = bindings()
    answers = set()
    with cluster.pool(pool) as ioctx:
        ioctx.set_osdmap_full_try()
        for number in range(32):  # each placement group learns of it by itself
            try:
                ioctx.write_full(f"probe.{number}", b"1")
            except rados.Error as err:
                if err.errno not in (errno.EDQUOT, errno.ENOSPC):
                    raise
                answers.add(True)
            else:
                ioctx.remove_object(f"probe.{number}")
                answers.add(False)
    return answers


def claims(cluster: CephCluster, pool: str = "vms") -> list[str]:
    """The objects by which the right to bring an image in is held, or was when its holder died."""
    with cluster.pool(pool) as ioctx:
        return sorted(one.key for one in ioctx.list_objects() if one.key.startswith("claim."))


def _end_claims(cluster: CephCluster, pool: str) -> None:
    """Those of the right to bring an image in, and those of images whose names are taken away."""
    rados, _ = bindings()
    with cluster.pool(pool) as ioctx:
        for key in [one.key for one in ioctx.list_objects()]:
            with contextlib.suppress(rados.ObjectNotFound, rados.NoData):
                if key.startswith("claim."):
                    ioctx.remove_object(key)
                elif key.startswith("rbd_header."):
                    ioctx.rm_xattr(key, "lock.nova_imagecache.claim")


def empty(cluster: CephCluster, pool: str = "vms") -> None:
    """Remove every image of the pool, clones before their parents; and the clients and claims of the dead."""
    _, rbd = bindings()
    _end_claims(cluster, pool)
    deadline = time.monotonic() + 30
    with cluster.pool(pool) as ioctx:
        while left := _remove_all(rbd, ioctx):
            assert time.monotonic() < deadline, f"{left} cannot be removed"
            time.sleep(0.1)
        for key in leftovers(cluster, pool):
            ioctx.remove_object(key)


_TAKE_LOCK = """
import sys, rados, rbd
with rados.Rados(conffile=sys.argv[1], name="client.admin") as cluster, cluster.open_ioctx("vms") as vms:
    with rbd.Image(vms, sys.argv[2]) as image:
        image.write(b"theirs", 0)
        print("locked", flush=True)
        sys.stdin.read()
"""


@contextlib.contextmanager
def lock_taken(cluster: CephCluster, name: str) -> Iterator[None]:
    """Another client has the image's lock, and stands still while the block runs."""
    with subprocess.Popen(
        [sys.executable, "-c", _TAKE_LOCK, str(cluster.conf), name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as peer:
        assert peer.stdout is not None
        assert peer.stdout.readline() == "locked\n"
        peer.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            peer.send_signal(signal.SIGCONT)
            peer.communicate(timeout=60)


@contextlib.contextmanager
def emptied(cluster: CephCluster, *pools: str) -> Iterator[None]:
    """Run a test over pools that are empty, ``vms`` if none is named, and leave them so.

    The test closes what it opens; where it fails before that, the tests after it do not find it open.
    """
    for pool in pools or ("vms",):
        empty(cluster, pool)
    before = set(_rbd_connection._PROCESS.connections)
    yield
    left = set(_rbd_connection._PROCESS.connections) - before
    while _MADE:
        _MADE.pop().close()
    for pool in pools or ("vms",):
        empty(cluster, pool)
    assert not left, f"left open: {left}"


def _remove_all(rbd: Any, ioctx: Any) -> list[str]:
    failed = []
    for name in rbd.RBD().list(ioctx):
        try:
            with rbd.Image(ioctx, name) as image:
                _strip(image)
            rbd.RBD().remove(ioctx, name)
        except rbd.ImageNotFound:
            continue
        except (rbd.ImageBusy, rbd.ImageHasSnapshots):
            if not name.startswith("staging._owner."):  # a backend that a failed test did not close
                failed.append(name)
    for entry in rbd.RBD().trash_list(ioctx):
        try:
            with contextlib.suppress(rbd.ImageNotFound), rbd.Image(ioctx, image_id=entry["id"]) as image:
                _strip(image)
            rbd.RBD().trash_remove(ioctx, entry["id"], True)
        except rbd.ImageNotFound:
            continue
        except (rbd.ImageBusy, rbd.ImageHasSnapshots):
            failed.append(entry["name"])
    return failed


def _strip(image: Any) -> None:
    for snapshot in image.list_snaps():
        if snapshot["namespace"] == 0:
            if image.is_protected_snap(snapshot["name"]):
                image.unprotect_snap(snapshot["name"])
            image.remove_snap(snapshot["name"])


def watchers(cluster: CephCluster, pool: str = "vms") -> set[str]:
    """The addresses of the clients that have an image of the pool open for writing."""
    _, rbd = bindings()
    found = set()
    with cluster.pool(pool) as ioctx:
        opening = [{"name": name} for name in rbd.RBD().list(ioctx)]
        opening += [{"image_id": entry["id"]} for entry in rbd.RBD().trash_list(ioctx)]
        for which in opening:
            with (
                contextlib.suppress(rbd.ImageNotFound),
                reading(ioctx, **which) as image,
            ):
                found |= {watcher["addr"] for watcher in image.watchers_list()}
    return found


def bury(cluster: CephCluster, living: set[str]) -> None:
    """Let the cluster know that clients are dead whose watches it would keep for seconds, all but the ``living``.

    Claims end as well: a dead one's would for some seconds keep its image from being brought in.
    """
    _end_claims(cluster, "vms")
    while dead := watchers(cluster) - living:
        for address in dead:
            cluster.command("osd blocklist", blocklistop="add", addr=address, expire=60.0)
        time.sleep(0.01)


def spawn(code: str, *arguments: object, timeout: float = 60) -> int:
    """The exit code of a Python process of its own that runs ``code``; librbd does not survive a fork."""
    command = [sys.executable, "-c", code, *(str(argument) for argument in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode in (0, -signal.SIGKILL), f"the child ended with {done.returncode}: {done.stderr}"
    return done.returncode


def spec(cluster: CephCluster, directory: Path, **changes: Any) -> str:
    """What a spawned process needs to make the same backend."""
    return json.dumps({"options": options(cluster, **changes), "directory": str(directory)})


def from_spec(text: str) -> RbdBackend:
    """The backend of ``spec``."""
    values = json.loads(text)
    directory = Path(values["directory"])
    return RbdBackend(values["options"], BackendPaths(root=directory / "root", disks_dir=directory / "disks"))

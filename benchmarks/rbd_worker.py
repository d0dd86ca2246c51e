"""What Ceph itself needs, in a process of its own: ``python -m benchmarks.rbd_worker TASK``."""

from __future__ import annotations

import http.client
import os
import subprocess
import threading
import time
import urllib.parse
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import glanceclient

from benchmarks import meter
from benchmarks.layouts import extents
from benchmarks.worker import open_cache
from nova_imagecache import RbdLocation
from services.ceph_bindings import bindings

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.meter import Figures

_PIECE = 4 * 2**20
_IN_FLIGHT = 8
_POOL, _USER = "vms", "nova"


def bare_clone(task: Figures) -> Figures:
    """The calls of librbd that make a root disk and nothing else, over one connection: clone, open, resize, metadata,
    and the two that publish. ``clone_and_resize`` are the seconds of the first three alone."""
    rados, rbd = bindings()
    with open_cache(task) as cache:
        location = cache.ensure_base(task["image"]).location
    assert isinstance(location, RbdLocation)  # noqa: S101 - the backend makes nothing else
    cluster = rados.Rados(conffile=task["conf"], name=f"client.{_USER}")
    cluster.connect()
    short, whole = [], []
    with cluster.open_ioctx(_POOL) as pool:
        with rbd.Image(pool, location.name) as image:
            features = image.features()
        meter.ready()
        with meter.Meter() as costs:
            for number in range(task["n"]):
                staging, final = f"bare.{uuid.uuid4().hex}", f"bare-{number}_disk"
                start = time.perf_counter()
                rbd.RBD().clone(pool, location.name, location.snapshot, pool, staging, features=features)
                with rbd.Image(pool, staging) as image:
                    image.resize(task["size"])
                    short.append(time.perf_counter() - start)
                    identity = image.id()
                    image.metadata_set("record", "a record of a few hundred bytes " * 10)
                    image.metadata_set("name", final)
                rbd.RBD().trash_move(pool, staging, 0)
                rbd.RBD().trash_restore(pool, identity, final)
                whole.append(time.perf_counter() - start)
    cluster.shutdown()
    return {**costs.figures, **meter.spread(whole), "clone_and_resize": meter.spread(short)}


def bare_write(task: Figures) -> Figures:
    """Seconds of making an image, writing the data of the raw file ``raw`` with eight writes in flight, and a flush;
    reading them is not counted."""
    rados, rbd = bindings()
    file = os.open(task["raw"], os.O_RDONLY)
    parts = [
        (offset, os.pread(file, min(_PIECE - offset % _PIECE, end - offset), offset))
        for start, end in extents(file)
        for offset in (start, *range(start - start % _PIECE + _PIECE, end, _PIECE))  # no write is in two objects
    ]
    size = os.fstat(file).st_size
    os.close(file)
    slots, codes = threading.BoundedSemaphore(_IN_FLIGHT), set()

    def ended(completion: Any) -> None:
        codes.add(completion.get_return_value())
        slots.release()

    cluster = rados.Rados(conffile=task["conf"], name=f"client.{_USER}")
    cluster.connect()
    with cluster.open_ioctx(_POOL) as pool:
        meter.ready()
        with meter.Meter() as costs:
            rbd.RBD().create(pool, "written", size, old_format=False)
            with rbd.Image(pool, "written") as image:
                for offset, data in parts:
                    slots.acquire()
                    image.aio_write(data, offset, ended)
                for _ in range(_IN_FLIGHT):
                    slots.acquire()
                image.flush()
    cluster.shutdown()
    if codes - {0}:
        raise SystemExit(f"writes failed: {codes}")
    return {**costs.figures, "written": sum(len(data) for _, data in parts)}


def _glanceclient(task: Figures) -> Callable[[str, Path], None]:
    """What brings an image to a file, and looks at its digest on the way."""
    client: Any = glanceclient.Client("2", endpoint=task["endpoint"], token=task["token"])

    def download(image_id: str, path: Path) -> None:
        with path.open("wb", buffering=0) as file:
            for chunk in client.images.data(image_id):
                file.write(chunk)

    return download


def _connection(task: Figures) -> Callable[[str, Path], None]:
    """What brings an image to a file, and nothing else."""
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(task["endpoint"]).netloc)
    buffer = memoryview(bytearray(_PIECE))

    def download(image_id: str, path: Path) -> None:
        connection.request("GET", f"/v2/images/{image_id}/file", headers={"X-Auth-Token": task["token"]})
        answer = connection.getresponse()
        with path.open("wb", buffering=0) as file:
            while count := answer.readinto(buffer):
                file.write(buffer[:count])

    return download


_DOWNLOADS = {"glanceclient": _glanceclient, "connection": _connection}


def tools_import(task: Figures) -> Figures:
    """Download to a file, ``qemu-img convert`` to raw, ``rbd import``, a snapshot: what a base needs, by hand.

    ``download`` says by what: glanceclient, as Nova and the ``glance`` command do, which looks at the digest; or
    nothing but a connection, which does not.
    """
    download = _DOWNLOADS[task["download"]](task)
    fetched, raw = Path(task["directory"], "fetched"), Path(task["directory"], "raw")
    ceph = ["--conf", task["conf"], "--id", _USER]
    download(task["warm_up"], fetched)
    meter.ready()
    with meter.Meter() as costs:
        download(task["image"], fetched)
        if task["format"] != "raw":
            argv = ["qemu-img", "convert", "-f", task["format"], "-O", "raw", str(fetched), str(raw)]
            subprocess.run(argv, check=True)
        else:
            raw = fetched
        argv = ["rbd", *ceph, "import", "--no-progress", "--dest-pool", _POOL, str(raw), "imported"]
        subprocess.run(argv, check=True)
        argv = ["rbd", *ceph, "snap", "create", "--no-progress", f"{_POOL}/imported@base"]
        subprocess.run(argv, check=True)
    return costs.figures


_WORK = {"bare_clone": bare_clone, "bare_write": bare_write, "tools_import": tools_import}


def main() -> None:
    """Do what the task says."""
    task = meter.task()
    meter.answer(_WORK[task["what"]](task))


if __name__ == "__main__":
    main()

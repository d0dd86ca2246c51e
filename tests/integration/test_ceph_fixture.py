"""The Ceph cluster that other tests use is what production looks like."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from harness.rbd import reading
from services.ceph import CephCluster
from services.ceph_bindings import bindings
from services.glance import GlanceServer

pytestmark = pytest.mark.services

MIB = 2**20
DATA = random.Random(3).randbytes(MIB)


def write(ioctx: Any, name: str, data: bytes = DATA, *, snapshot: str | None = None) -> None:
    """An image of 16 MiB that begins with the data."""
    _, rbd = bindings()
    rbd.RBD().create(ioctx, name, 16 * MIB)
    with rbd.Image(ioctx, name) as image:
        image.write(data, 0)
        if snapshot:
            image.create_snap(snapshot)


def read(ioctx: Any, name: str) -> bytes:
    with reading(ioctx, name) as image:
        data: bytes = image.read(0, len(DATA))
    return data


@pytest.fixture
def image(ceph: CephCluster) -> Iterator[str]:
    """An image with the snapshot "snap" in the pool images, as Glance makes it."""
    _, rbd = bindings()
    name = f"image-{os.urandom(4).hex()}"
    with ceph.pool("images", "glance") as images:
        write(images, name, snapshot="snap")
        yield name
        with rbd.Image(images, name) as opened:
            opened.remove_snap("snap")
        rbd.RBD().remove(images, name)


def test_nova_clones_an_image_of_glance(ceph: CephCluster, image: str) -> None:
    """A clone in Nova's pool reads as the image, and Nova sees it as the snapshot's child; nothing was protected."""
    _, rbd = bindings()
    with ceph.client("nova") as client, client.open_ioctx("images") as images, client.open_ioctx("vms") as vms:
        rbd.RBD().clone(images, image, "snap", vms, f"{image}_disk")
        try:
            assert read(vms, f"{image}_disk") == DATA
            with reading(images, image, snapshot="snap") as parent:
                [child] = parent.list_children2()
            assert (child["pool"], child["image"]) == ("vms", f"{image}_disk")
        finally:
            rbd.RBD().remove(vms, f"{image}_disk")


def test_nova_can_only_read_images(ceph: CephCluster, image: str) -> None:
    """Nova can neither write, nor snapshot, nor remove an image of Glance."""
    _, rbd = bindings()
    with ceph.pool("images", "nova") as images:
        assert read(images, image) == DATA
        with pytest.raises(rbd.PermissionError):
            rbd.RBD().remove(images, image)
        with pytest.raises(rbd.PermissionError):
            rbd.RBD().create(images, f"{image}-new", MIB)


def test_glance_cannot_see_novas_pool(ceph: CephCluster) -> None:
    """Glance's user is limited to its own pool."""
    _, rbd = bindings()
    with ceph.pool("vms", "glance") as vms, pytest.raises(rbd.PermissionError):
        rbd.RBD().list(vms)


def test_images_of_glance_can_be_cloned_where_they_lie(ceph: CephCluster, glance_rbd: GlanceServer) -> None:
    """An uploaded image's direct_url names this cluster and a snapshot from which Nova can clone."""
    _, rbd = bindings()
    image_id = glance_rbd.upload(DATA)
    shown = glance_rbd.show(image_id)
    fsid, pool, name, snapshot = (unquote(part) for part in shown["direct_url"].removeprefix("rbd://").split("/"))
    assert (fsid, pool, name, snapshot) == (ceph.fsid, "images", image_id, "snap")
    assert [location["url"] for location in shown["locations"]] == [shown["direct_url"]]
    with ceph.client("nova") as client, client.open_ioctx(pool) as images, client.open_ioctx("vms") as vms:
        assert client.get_fsid() == fsid
        rbd.RBD().clone(images, name, snapshot, vms, f"{image_id}_disk")
        assert read(vms, f"{image_id}_disk") == DATA
        rbd.RBD().remove(vms, f"{image_id}_disk")
    glance_rbd.delete(image_id)


def test_glance_copies_an_image_into_the_cluster(ceph: CephCluster, glance_rbd: GlanceServer) -> None:
    """An image in Glance's file store gets a location in Ceph when Glance is asked to copy it."""
    image_id = glance_rbd.upload(DATA, store="local")
    assert glance_rbd.show(image_id)["direct_url"].startswith("file://")
    body = b'{"method": {"name": "copy-image"}, "stores": ["s0"]}'
    glance_rbd.call("POST", f"/v2/images/{image_id}/import", body, "application/json")
    location = f"rbd://{ceph.fsid}/images/{image_id}/snap"
    deadline = time.monotonic() + 20
    while location not in [place["url"] for place in glance_rbd.show(image_id)["locations"]]:
        assert time.monotonic() < deadline, glance_rbd.show(image_id)
        time.sleep(0.1)
    glance_rbd.delete(image_id)


def test_a_paused_osd_times_out_and_comes_back(ceph: CephCluster, image: str) -> None:
    """While the osd is paused an operation ends after the client's own limit; then the same connection works again."""
    _, rbd = bindings()
    with ceph.pool("images", "nova", rados_osd_op_timeout="1") as images:
        ceph.pause_osd()
        try:
            started = time.monotonic()
            with pytest.raises(rbd.Timeout):
                rbd.RBD().list(images)
            assert 0.9 < time.monotonic() - started < 5
        finally:
            ceph.resume_osd()
        assert read(images, image) == DATA


def test_capacity_is_counted(ceph: CephCluster) -> None:
    """The cluster tells its size from the start: the mgr runs."""
    with ceph.client("nova") as client:
        assert client.get_cluster_stats()["kb"] == 10 * 2**20


def test_pools_and_users_can_be_made_and_taken_away(ceph: CephCluster) -> None:
    """A pool and a user for one test; a user without capabilities for a pool is refused there."""
    rados, rbd = bindings()
    ceph.create_pool("mine")
    ceph.create_user("me", mon="profile rbd", osd="profile rbd pool=mine")
    with ceph.pool("mine", "me") as mine:
        write(mine, "disk")
    ceph.auth_caps("me", mon="profile rbd", osd="profile rbd pool=other")
    with ceph.pool("mine", "me") as mine, pytest.raises(rbd.PermissionError):
        rbd.RBD().list(mine)
    ceph.delete_pool("mine")
    with pytest.raises(rados.ObjectNotFound), ceph.pool("mine", "me"):
        pass


def test_bluestore_keeps_data(ceph_bluestore: CephCluster) -> None:
    """What was written is there after a stop, after the osd alone was killed and after all was."""
    with ceph_bluestore.pool("vms", "nova") as vms:
        write(vms, "kept")
        ceph_bluestore.kill_osd()
        ceph_bluestore.start_osd()
        assert read(vms, "kept") == DATA
    fsid = ceph_bluestore.fsid
    for end in (ceph_bluestore.stop, ceph_bluestore.kill):
        end()
        ceph_bluestore.start()
        with ceph_bluestore.pool("vms", "nova") as vms:
            assert read(vms, "kept") == DATA
    assert ceph_bluestore.fsid == fsid


_HOLDER = """
import sys, time
from pathlib import Path
from services.ceph import CephCluster
cluster = CephCluster(Path(sys.argv[1]))
cluster.start()
print(*cluster.pids.values(), flush=True)
time.sleep(60)
"""


def test_the_cluster_ends_with_the_run_that_is_killed(ceph: CephCluster, tmp_path: Path) -> None:
    """A test run that is killed leaves no daemon behind; another cluster beside it is none of its business."""
    tests = str(Path(__file__).parents[1])
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(tmp_path / "ceph")],
        env={**os.environ, "PYTHONPATH": tests},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    with holder.stdout:
        pids = [int(word) for word in holder.stdout.readline().split()]
        assert len(pids) == 3
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    deadline = time.monotonic() + 10
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with ceph.client() as client:
        assert client.get_fsid() == ceph.fsid


def _runs(pid: int) -> bool:
    """Whether the process is there and more than an entry that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False

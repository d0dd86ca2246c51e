"""A pool without room: what takes some is refused at once and whole, and what frees some works."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from harness import rbd as pool
from harness.images import raw
from harness.waiting import until
from nova_imagecache import CacheConfig, ImageCache, NoSpaceError
from nova_imagecache.backends import Backend, BaseWriter
from nova_imagecache.testing import FakeSource
from services.ceph import CephCluster

pytestmark = pytest.mark.services

MIB = 2**20
QUOTA = 4 * MIB
AT_ONCE = 4.0
"""Seconds, far below the 20 for which a client waits by default."""

_T = TypeVar("_T")


@pytest.fixture
def small(ceph: CephCluster) -> Iterator[str]:
    """A pool for one test, and a user who may write it."""
    ceph.create_pool("small")
    ceph.create_user("squeezed", mon="profile rbd", osd="profile rbd pool=small")
    yield "small"
    ceph.delete_pool("small")


def at_once(call: Callable[[], _T]) -> _T:
    """What the call answers; it waits for no time-out."""
    start = time.monotonic()
    try:
        return call()
    finally:
        assert time.monotonic() - start < AT_ONCE


def no_room(call: Callable[[], object]) -> NoSpaceError:
    """The error that says so, at once."""
    with pytest.raises(NoSpaceError) as caught:
        at_once(call)
    return caught.value


def write(writer: BaseWriter, count: int, begin: int = 0) -> None:
    """Some MiB of data, on stable storage."""
    for number in range(begin, begin + count):
        writer.write_at(number * MIB, b"x" * MIB)
    writer.sync()


@contextlib.contextmanager
def cache_over(ceph: CephCluster, directory: Path, **changes: str) -> Iterator[tuple[ImageCache, Backend]]:
    images = {name: raw(name, 2 * MIB).fake for name in ("img", "idle", "late")}
    config = CacheConfig(root=directory / "root", disks_dir=directory / "disks", backend="rbd")
    backend = pool.make_backend(ceph, directory, pool="small", user="squeezed", connect_timeout=20, **changes)
    with ImageCache(config, source=FakeSource(images), backend=backend) as cache:
        yield cache, backend


@pytest.mark.usefixtures("small")
def test_a_full_pool_can_be_emptied(ceph: CephCluster, tmp_path: Path) -> None:
    """While its quota is reached disks, bases, unfinished and dead things go as ever, and nothing stays "alive"."""
    with cache_over(ceph, tmp_path) as (cache, backend):
        cache.create_root_disk("img", "vm")
        cache.ensure_base("idle")
        writer, dead = backend.stage_base("other", "raw"), backend.stage_base("dead", "raw")
        write(writer, 8)
        write(dead, 1)
        ceph.set_quota("small", QUOTA)
        until(lambda: pool.is_full(ceph, "small"), "the pool to be full")
        at_once(writer.discard)
        at_once(lambda: cache.remove_root_disk("vm"))
        at_once(lambda: cache.remove_base("idle"))
        # as if its maker had died
        dead._close()  # type: ignore[attr-defined]  # the rbd backend's writer
        [left] = [name for name in pool.names(ceph, "small") if name.startswith("staging.")]
        backend.store.owner.done(left)  # type: ignore[attr-defined]  # the rbd backend's
        report = at_once(cache.recover)
        assert (report.removed, report.alive, report.failed) == ((f"staging/{left}",), (), {})
        assert pool.is_full(ceph, "small"), "it was emptied before the monitor noticed"
        assert pool.names(ceph, "small") == ["base.img"]
        cache.remove_base("img")
    with ceph.pool("small") as ioctx:
        # what Ceph itself keeps in every pool for RBD
        assert {one.key for one in ioctx.list_objects()} <= {"rbd_directory", "rbd_info", "rbd_trash", "rbd_children"}


@pytest.mark.usefixtures("small")
def test_a_process_that_comes_to_a_full_pool(ceph: CephCluster, tmp_path: Path) -> None:
    """It cannot show that it lives, and removes bases all the same."""
    with cache_over(ceph, tmp_path) as (cache, backend):
        cache.ensure_base("idle")
        writer = backend.stage_base("other", "raw")
        write(writer, 8)
        ceph.set_quota("small", QUOTA)
        until(lambda: pool.is_full(ceph, "small"), "the pool to be full")
        other = tmp_path / "other"
        other.mkdir()
        # another file is another connection, with a sign of life of its own
        with cache_over(ceph, other, conf=str(shutil.copy(ceph.conf, other))) as (late, _):
            at_once(lambda: late.remove_base("idle"))
        assert pool.is_full(ceph, "small"), "it was emptied before the monitor noticed"
        writer.discard()
    assert pool.names(ceph, "small") == []


@pytest.mark.usefixtures("small")
def test_a_full_pool_refuses_at_once(ceph: CephCluster, tmp_path: Path) -> None:
    """A write, a disk, a flatten and an image without room are NoSpaceError, without a time-out, and leave nothing."""
    with cache_over(ceph, tmp_path) as (cache, backend):
        cache.create_root_disk("img", "vm")
        writer = backend.stage_base("other", "raw")
        write(writer, 8)
        ceph.set_quota("small", QUOTA)
        until(lambda: pool.is_full(ceph, "small"), "the pool to be full")
        no_room(lambda: write(writer, 16))
        for call in (
            lambda: cache.create_root_disk("img", "vm-2"),
            lambda: cache.flatten_root_disk("vm"),
            lambda: cache.ensure_base("late"),
            lambda: backend.stage_base("more", "raw"),
        ):
            no_room(call)
        at_once(writer.discard)
        assert pool.names(ceph, "small") == ["base.img", "vm_disk"]
        ceph.set_quota("small", 0)
        until(lambda: pool.has_room(ceph, "small"), "room")
        cache.create_root_disk("late", "vm-2")


@pytest.mark.usefixtures("small")
def test_a_pool_that_fills_in_the_middle(ceph: CephCluster, tmp_path: Path) -> None:
    """A quota is room that is not there: before a byte is fetched, and when it is reached by what was written."""
    ceph.set_quota("small", MIB)
    with cache_over(ceph, tmp_path) as (cache, backend):
        no_room(lambda: cache.ensure_base("img"))
        writer = backend.stage_base("other", "raw")

        def fill() -> None:
            # the monitor notices some seconds after the write
            for number in range(64):
                write(writer, 1, number)
                time.sleep(0.3)

        with pytest.raises(NoSpaceError):
            fill()
        at_once(writer.discard)
        assert pool.names(ceph, "small") == []

"""What goes wrong with a Ceph is a typed error within its time, leaves no half image, and is over when Ceph is back."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from harness import rbd as pool
from harness.images import raw
from nova_imagecache import CacheConfig, ImageCache, UsersUnknownError
from nova_imagecache.backends import BackendPaths
from nova_imagecache.backends._rados_errors import ForbiddenError, ForkedError, NoPoolError
from nova_imagecache.backends.rbd import RbdBackend
from nova_imagecache.exceptions import BackendError, BackendUnavailableError, ImageCacheError
from nova_imagecache.testing import FakeImage, FakeSource
from services.ceph import CephCluster
from services.ceph_bindings import bindings

pytestmark = pytest.mark.services

MIB = 2**20
TIMEOUT = 1
IMAGE = raw("outage", 4 * MIB)


@pytest.fixture(autouse=True)
def _empty(ceph: CephCluster) -> Iterator[None]:
    with pool.emptied(ceph):
        yield


@contextlib.contextmanager
def cache_over(ceph: CephCluster, directory: Path, **changes: object) -> Iterator[ImageCache]:
    changes = {"connect_timeout": TIMEOUT, **changes}
    source = FakeSource({"img": IMAGE.fake, "other": raw("other", 4 * MIB).fake})
    config = CacheConfig(root=directory / "root", disks_dir=directory / "disks", backend="rbd")
    with ImageCache(config, source=source, backend=pool.make_backend(ceph, directory, **changes)) as cache:
        yield cache


def takes(seconds: float, call: Callable[[], object]) -> None:
    """The call ends with BackendUnavailableError before that."""
    start = time.monotonic()
    with pytest.raises(BackendUnavailableError) as caught:
        call()
    assert time.monotonic() - start < seconds
    assert caught.value.retryable
    assert caught.value.exit_code == 75


def test_wrong_surroundings_are_told_apart(ceph: CephCluster, tmp_path: Path) -> None:
    """No conf, no keyring, a wrong key, no pool, a user without capabilities: each says what to correct."""
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    keyring = wrong / "ceph.client.nova.keyring"
    keyring.write_text(f"[client.nova]\n\tkey = {ceph.key('glance')}\n")
    text = ceph.conf.read_text()
    (wrong / "key.conf").write_text(text.replace("keyring = ", "keyring = /nowhere/", 1))
    bad_key = text.replace(f"{ceph.dir}/$cluster.$name.keyring", str(keyring))
    assert bad_key != text
    (wrong / "bad-key.conf").write_text(bad_key)
    ceph.create_user("poor", mon="profile rbd", osd="profile rbd pool=images")
    cases: list[tuple[dict[str, str], type[ImageCacheError], str]] = [
        ({"conf": "/nowhere/ceph.conf"}, BackendError, "backend_options.conf"),
        ({"user": "nobody-knows"}, BackendError, "backend_options.conf and user"),
        ({"conf": str(wrong / "bad-key.conf")}, ForbiddenError, "keyring"),
        ({"pool": "nopool"}, NoPoolError, "backend_options.pool"),
        ({"user": "poor"}, ForbiddenError, "capabilities"),
    ]
    for changes, kind, words in cases:
        with cache_over(ceph, tmp_path, **changes) as cache:
            with pytest.raises(kind, match=words):
                cache.create_root_disk("img", "vm")
            assert not cache.check().ok
    with cache_over(ceph, tmp_path) as cache:
        assert [fact.name for fact in cache.check().problems] == ["secret_uuid"]
        cache.create_root_disk("img", "vm")


def test_no_permission_on_images(ceph: CephCluster, tmp_path: Path) -> None:
    """A location in a pool that the user cannot read is passed by; clones in such a pool make the users unknown."""
    _, rbd = bindings()
    with ceph.pool("images", "glance") as ioctx:
        rbd.RBD().create(ioctx, "hidden", MIB)
        with rbd.Image(ioctx, "hidden") as image:
            image.create_snap("snap")
    ceph.create_user("narrow", mon="profile rbd", osd="profile rbd pool=vms")
    source = FakeSource({"img": FakeImage(data=IMAGE.served, locations=(f"rbd://{ceph.fsid}/images/hidden/snap",))})
    config = CacheConfig(root=tmp_path / "root", disks_dir=tmp_path / "disks", backend="rbd")
    backend = pool.make_backend(ceph, tmp_path, user="narrow")
    with ImageCache(config, source=source, backend=backend) as cache:
        assert cache.ensure_base("img").managed
        with ceph.client() as client, client.open_ioctx("vms") as vms, client.open_ioctx("images") as images:
            rbd.RBD().clone(vms, "base.img", "base", images, "elsewhere")
            with pytest.raises(UsersUnknownError):
                cache.users("img")
            with pytest.raises(UsersUnknownError):
                cache.remove_base("img")
            assert cache.cleanup(cache.plan_cleanup(max_idle=0)).removed == ()
            rbd.RBD().remove(images, "elsewhere")
        cache.remove_base("img")
    pool.empty(ceph, "images")


def test_a_paused_osd(ceph: CephCluster, tmp_path: Path) -> None:
    """Every call ends in time; afterwards the same connection works, and recover leaves nothing half-made."""
    with cache_over(ceph, tmp_path) as cache:
        cache.create_root_disk("img", "vm")
        ceph.pause_osd()
        try:
            takes(8 * TIMEOUT, lambda: cache.create_root_disk("img", "vm-2"))
            takes(8 * TIMEOUT, lambda: cache.ensure_base("other"))
            takes(8 * TIMEOUT, lambda: cache.remove_root_disk("vm"))
            takes(8 * TIMEOUT, lambda: list(cache.bases()))
        finally:
            ceph.resume_osd()
        deadline = time.monotonic() + 30
        while True:
            try:
                cache.create_root_disk("img", "vm-2")
                break
            except BackendUnavailableError:
                assert time.monotonic() < deadline
        cache.ensure_base("other")
        assert cache.recover().failed == {}
        assert pool.names(ceph) == ["base.img", "base.other", "vm-2_disk", "vm_disk"]


def test_an_osd_that_pauses_in_the_middle_of_an_import(ceph: CephCluster, tmp_path: Path) -> None:
    """The import ends in time, and what it had written goes with recover once Ceph answers again."""
    backend = pool.make_backend(ceph, tmp_path, connect_timeout=TIMEOUT)
    writer = backend.stage_base("img", "raw")
    writer.set_size(8 * MIB)
    writer.write_at(0, b"a" * MIB)
    writer.sync()
    ceph.pause_osd()
    try:
        writer.write_at(MIB, b"b" * MIB)
        takes(5 * TIMEOUT, writer.sync)  # four, if it hangs
        start = time.monotonic()
        with contextlib.suppress(BackendUnavailableError):
            writer.discard()
        assert time.monotonic() - start < 12 * TIMEOUT
    finally:
        ceph.resume_osd()
    deadline = time.monotonic() + 30
    while pool.names(ceph):
        with contextlib.suppress(BackendUnavailableError):
            assert backend.recover().failed == {}
        assert time.monotonic() < deadline, pool.names(ceph)
        time.sleep(0.2)
    backend.close()


def test_a_paused_monitor(ceph: CephCluster, tmp_path: Path) -> None:
    """What asks it ends in time, an absent pool too, and holds nobody else up; what needs no monitor goes on."""
    with cache_over(ceph, tmp_path) as cache, ThreadPoolExecutor(1) as threads:
        cache.create_root_disk("img", "vm")
        elsewhere = pool.make_backend(ceph, tmp_path, pool="nopool", connect_timeout=TIMEOUT)
        backend = pool.make_backend(ceph, tmp_path, connect_timeout=TIMEOUT)
        writer = backend.stage_base("other", "raw")
        writer.set_size(MIB)
        ceph.pause_monitor()
        try:
            waiting = threads.submit(takes, 3 * TIMEOUT, lambda: elsewhere.find_base("img"))
            start = time.monotonic()
            cache.create_root_disk("img", "vm-2")
            assert time.monotonic() - start < TIMEOUT
            waiting.result()
            takes(3 * TIMEOUT, cache.usage)
            takes(3 * TIMEOUT, lambda: cache.ensure_base("other"))
            # a snapshot's number is the monitor's to give
            takes(4 * TIMEOUT, lambda: writer.publish(pool.record("other", MIB)))
        finally:
            ceph.resume_monitor()
        _until_writable(writer.discard)
        _until_writable(lambda: cache.ensure_base("other"))
        with pytest.raises(NoPoolError):
            elsewhere.find_base("img")
        for one in (backend, elsewhere):
            one.close()
        report = cache.recover()
        assert (report.alive, report.failed) == ((), {})
        assert pool.names(ceph) == ["base.img", "base.other", "vm-2_disk", "vm_disk"]


def test_a_cluster_that_is_down(tmp_path: Path, ceph: CephCluster) -> None:
    """Nobody at the monitors' address: an error in time, for many threads at once as for one."""
    conf = tmp_path / "ceph.conf"
    lines = ceph.conf.read_text().splitlines()
    conf.write_text(
        "\n".join("mon host = [v2:127.0.0.1:1,v1:127.0.0.1:2]" if "mon host" in x else x for x in lines) + "\n"
    )
    backend = pool.make_backend(ceph, tmp_path, conf=str(conf), connect_timeout=TIMEOUT)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: takes(3 * TIMEOUT, lambda: backend.find_base("img")), range(8)))
    takes(3 * TIMEOUT, lambda: backend.find_base("img"))
    assert [fact.name for fact in backend.check() if fact.problem] == ["cluster"]
    backend.close()


def test_a_pool_that_is_deleted_and_made_again(ceph: CephCluster, tmp_path: Path) -> None:
    """While it is gone that is what errors say; the new one is used without a restart."""
    ceph.create_pool("short-lived")
    ceph.create_user("guest", mon="profile rbd", osd="profile rbd pool=short-lived")
    with cache_over(ceph, tmp_path, pool="short-lived", user="guest") as cache:
        cache.create_root_disk("img", "vm")
        ceph.delete_pool("short-lived")
        with pytest.raises(BackendError):
            cache.create_root_disk("img", "vm-2")
        ceph.create_pool("short-lived")
        disk = cache.create_root_disk("img", "vm-2")
        with pool.opened(ceph, "vm-2_disk", "short-lived") as image:
            assert image.read(0, disk.virtual_size) == IMAGE.guest
    ceph.delete_pool("short-lived")


def _until_writable(call: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            call()
        except BackendUnavailableError:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        else:
            return


def test_a_blocklisted_client_connects_anew(ceph: CephCluster, tmp_path: Path) -> None:
    """A client that the cluster has thrown out fails once at most, and goes on over a new connection."""
    with cache_over(ceph, tmp_path) as cache, contextlib.closing(pool.make_backend(ceph, tmp_path)) as beside:
        cache.create_root_disk("img", "vm")
        connection = beside.store.connection
        before, failures = connection.client(), 0
        for address in pool.watchers(ceph):
            ceph.command("osd blocklist", blocklistop="add", addr=address, expire=60.0)
        deadline = time.monotonic() + 20
        while connection.client() == before:  # the osd hears of it a moment later
            try:
                cache.create_root_disk("img", f"vm-{time.monotonic()}")
            except BackendUnavailableError:
                failures += 1  # none where all that failed was noting the base's use
            assert time.monotonic() < deadline
        assert failures <= 1
        cache.create_root_disk("img", "vm-new")


def test_a_killed_osd(ceph_bluestore: CephCluster, tmp_path: Path) -> None:
    """Every call ends in time, in the middle of an import too; with it back they work, and nothing is left."""
    cluster = ceph_bluestore
    pool.empty(cluster)
    with cache_over(cluster, tmp_path) as cache:
        cache.create_root_disk("img", "vm")
        backend = pool.make_backend(cluster, tmp_path, connect_timeout=TIMEOUT)
        writer = backend.stage_base("half", "raw")
        writer.set_size(8 * MIB)
        writer.write_at(0, b"a" * MIB)
        writer.sync()
        cluster.kill_osd()
        writer.write_at(MIB, b"b" * MIB)
        takes(5 * TIMEOUT, writer.sync)  # four, if it hangs
        takes(8 * TIMEOUT, lambda: cache.create_root_disk("img", "vm-2"))
        takes(8 * TIMEOUT, lambda: cache.ensure_base("other"))
        takes(8 * TIMEOUT, lambda: cache.remove_root_disk("vm"))
        cluster.start_osd()
        _until_writable(lambda: cache.create_root_disk("img", "vm-2"))
        _until_writable(lambda: cache.ensure_base("other"))
        with contextlib.suppress(BackendError):  # what could not be closed is thrown out with what it wrote
            writer.discard()
        report = cache.recover()
        assert (report.alive, report.failed) == ((), {})
        assert pool.names(cluster) == ["base.img", "base.other", "vm-2_disk", "vm_disk"]
        for name in ("img", "other"):
            cache.verify_base(name)
        backend.close()
    pool.empty(cluster)


def test_a_restart_of_the_whole_cluster(ceph_bluestore: CephCluster, tmp_path: Path) -> None:
    """Stopped, then killed: calls end in time, and go on when the cluster is back, with all that was there."""
    cluster = ceph_bluestore
    pool.empty(cluster)
    with cache_over(cluster, tmp_path, connect_timeout=2) as cache:
        disk = cache.create_root_disk("img", "vm")
        for end in (cluster.stop, cluster.kill):
            end()
            takes(20, lambda: cache.create_root_disk("img", "vm-2"))
            cluster.start()
            _until_writable(lambda: cache.get_root_disk("vm"))
            assert cache.get_root_disk("vm") == disk
            _until_writable(lambda: cache.create_root_disk("img", "vm-2"))
            report = cache.recover()
            assert (report.alive, report.failed) == ((), {})
            assert pool.names(cluster) == ["base.img", "vm-2_disk", "vm_disk"]
            cache.remove_root_disk("vm-2")
        cache.verify_base("img")
    pool.empty(cluster)


_FORKS = """
import gc, os, sys, time
from harness import rbd as pool
from nova_imagecache.backends import _rbd_forks
backend = pool.from_spec(sys.argv[1])
writer = backend.stage_base("img", "raw")
writer.write_at(0, b"x")
for close in (False, True):
    child = os.fork()
    if child == 0:
        if close:
            backend.close()
            del writer, backend
            gc.collect()
        sys.exit(7)
    end = time.monotonic() + 20
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > end:
            os.kill(child, 9)
            sys.exit("the child hangs")
        time.sleep(0.02)
    assert os.waitstatus_to_exitcode(ended[1]) == 7, ended
writer.discard()
backend.close()
del writer, backend
gc.collect()
assert len(_rbd_forks._HOLDERS) == 0
"""


def test_a_forked_child_ends(ceph: CephCluster, tmp_path: Path) -> None:
    """With the sign of life and a writer open in its parent, which goes on; what is closed is not kept for forks."""
    tests = str(Path(__file__).parents[1])
    assert pool.spawn(f"import sys; sys.path.insert(0, {tests!r})\n{_FORKS}", pool.spec(ceph, tmp_path)) == 0
    assert pool.names(ceph) == []


def test_a_forked_child_is_refused(ceph: CephCluster, tmp_path: Path) -> None:
    """A child that was forked after the first use gets an error at once, from old and new backends; it never hangs."""
    backend = pool.make_backend(ceph, tmp_path)
    backend.find_base("img")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        answers = []
        for one in (backend, RbdBackend(pool.options(ceph), BackendPaths(root=tmp_path, disks_dir=tmp_path))):
            try:
                one.find_base("img")
            except ForkedError as err:
                answers.append("spawn" in str(err))
        backend.close()
        os.write(writing, repr(answers).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        assert pipe.read() == b"[True, True]"
    os.waitpid(child, 0)
    assert backend.find_base("img") is None
    backend.close()

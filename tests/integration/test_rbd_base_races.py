"""What hosts do to one pool at the same moments: removals, recoveries, reads and publications of bases that meet."""

from __future__ import annotations

import shutil
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import pytest

from harness import rbd as pool
from harness.images import qcow2, raw
from nova_imagecache import (
    BaseImage,
    BaseNotFoundError,
    CacheConfig,
    ImageCache,
    RecoveryReport,
    UsersUnknownError,
)
from nova_imagecache.backends import _rbd_look, _rbd_store
from nova_imagecache.backends._rbd_names import DAMAGED, LAST_USED, SUMS, UNUSED_SINCE
from nova_imagecache.backends.rbd import RbdBackend
from nova_imagecache.exceptions import BaseCorruptError, BaseInUseError, BasePinnedError, DiskInUseError
from nova_imagecache.testing import FakeSource, FaultPlan
from services.ceph import CephCluster
from services.ceph_bindings import bindings

pytestmark = pytest.mark.services

MIB = 2**20
_T = TypeVar("_T")
SIZE = 4 * MIB
WRITTEN = b"written by the guest"
IMAGES = {"img": raw("one", SIZE), "decoded": qcow2("two"), "other": raw("three")}


class Site:
    """Hosts with a client, a sign of life and a root each, on one pool; and calls that run beside the test's own."""

    def __init__(self, ceph: CephCluster, directory: Path, life: ExitStack) -> None:
        self.ceph = ceph
        self._directory = directory
        self._life = life
        self._threads = life.enter_context(ThreadPoolExecutor())

    def host(self, name: str, **changes: Any) -> ImageCache:
        """The cache of one host."""
        directory = self._directory / name
        directory.mkdir()
        # another file is another connection
        conf = Path(shutil.copy(self.ceph.conf, directory / "ceph.conf"))
        self._life.callback(lambda: shutil.rmtree(directory))
        backend = pool.make_backend(self.ceph, directory, conf=str(conf))
        config = CacheConfig(root=directory / "root", disks_dir=directory / "disks", backend="rbd", **changes)
        source = FakeSource({image_id: sample.fake for image_id, sample in IMAGES.items()})
        return self._life.enter_context(ImageCache(config, source=source, backend=backend))

    def beside(self, call: Callable[[], _T]) -> Future[_T]:
        """A call in a thread of its own."""
        return self._threads.submit(call)

    def names(self) -> list[str]:
        """What is in the pool."""
        return pool.names(self.ceph)


@pytest.fixture
def site(ceph: CephCluster, tmp_path: Path) -> Iterator[Site]:
    pool.empty(ceph)
    with ExitStack() as life:
        yield Site(ceph, tmp_path, life)
    pool.empty(ceph)


@pytest.fixture
def plan() -> Iterator[FaultPlan]:
    with FaultPlan(["nova_imagecache.backends._rados", "nova_imagecache.backends._rados_claims"]) as made:
        yield made


def backend_of(cache: ImageCache) -> RbdBackend:
    inner = cache._engine.backend._inner
    assert isinstance(inner, RbdBackend)
    return inner


def found(cache: ImageCache, image_id: str = "img") -> BaseImage:
    base = backend_of(cache).find_base(image_id)
    assert base is not None
    return base


@contextmanager
def recovering(site: Site, cache: ImageCache, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[RecoveryReport]]:
    """While the block runs a recover has listed the pool and waits; what it reports is there afterwards."""
    listed, go = threading.Event(), threading.Event()
    names = _rbd_look.names

    def held(ioctx: Any) -> list[str]:
        answer = names(ioctx)
        if not listed.is_set():
            listed.set()
            assert go.wait(60)
        return answer

    monkeypatch.setattr(_rbd_look, "names", held)
    report = site.beside(cache.recover)
    assert listed.wait(60)
    reports: list[RecoveryReport] = []
    try:
        yield reports
    finally:
        go.set()
        reports.append(report.result(60))


# --- recover acts on what is there, not on what was listed


def test_a_disk_that_was_published_since(site: Site, plan: FaultPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was in the making when it was listed, and is being attached by now: the only copy of its data stays."""
    maker, user, sweeper = (site.host(name) for name in ("maker", "user", "sweeper"))
    user.ensure_base("img")
    publishing = plan.pause("rados.trash_restore", match="vm_disk")
    attaching = plan.pause("rados.trash_move", match="vm_disk", nth=2, when="after")
    made = site.beside(lambda: maker.create_root_disk("img", "vm", size=SIZE))
    publishing.wait()
    with recovering(site, sweeper, monkeypatch) as reports:
        publishing.release()
        made.result(60)
        maker.close()
        with pool.opened(site.ceph, "vm_disk", read_only=False) as image:
            image.write(WRITTEN, 3 * MIB)
        backend_of(user).quarantine_base(found(user))
        user.ensure_base("img")
        attached = site.beside(lambda: user.attach_root_disk("img", "vm"))
        attaching.wait()
    assert reports[0].removed == ()
    attaching.release()
    attached.result(60)
    with pool.opened(site.ceph, "vm_disk") as image:
        assert image.read(3 * MIB, len(WRITTEN)) == WRITTEN


def test_a_base_that_was_published_since(site: Site, plan: FaultPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was in the making when it was listed, and is retired by now: it keeps its snapshot, and gets its name back."""
    maker, remover, sweeper = (site.host(name) for name in ("maker", "remover", "sweeper"))
    publishing = plan.pause("rados.trash_restore", match="base.img")
    made = site.beside(lambda: maker.ensure_base("img"))
    publishing.wait()
    with recovering(site, sweeper, monkeypatch) as reports:
        publishing.release()
        made.result(60)
        maker.close()
        retired = backend_of(remover).retire_base(found(remover))
    assert (reports[0].removed, reports[0].restored) == ((), ())
    backend_of(remover).restore_base(retired)
    remover.verify_base("img")
    remover.create_root_disk("img", "vm")


def test_a_base_that_has_its_name_back(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was retired when it was listed: it is not retired again."""
    remover, sweeper = site.host("remover"), site.host("sweeper")
    remover.ensure_base("img")
    retired = backend_of(remover).retire_base(found(remover))
    with recovering(site, sweeper, monkeypatch) as reports:
        backend_of(remover).restore_base(retired)
    assert (reports[0].removed, reports[0].restored) == ((), ())
    remover.verify_base("img")


def test_a_disk_that_has_its_name_back(site: Site, plan: FaultPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its removal was refused since it was listed: it is not removed, though its mark has still to go."""
    remover, sweeper = site.host("remover"), site.host("sweeper")
    backend_of(remover).store.patience = 0.3
    remover.create_root_disk("img", "vm")
    moved = plan.pause("rados.trash_move", match="vm_disk", when="after")
    unmarking = plan.pause("rados.trash_restore", match="vm_disk", when="after")
    removed = site.beside(lambda: remover.remove_root_disk("vm"))
    moved.wait()
    _, rbd = bindings()
    with site.ceph.pool("vms") as ioctx, recovering(site, sweeper, monkeypatch) as reports:
        [rbd_id] = [entry["id"] for entry in rbd.RBD().trash_list(ioctx)]
        with rbd.Image(ioctx, image_id=rbd_id) as guest:
            guest.write(WRITTEN, 0)
            moved.release()
            unmarking.wait()
    assert reports[0].removed == ()
    unmarking.release()
    with pytest.raises(DiskInUseError):
        removed.result(60)
    with pool.opened(site.ceph, "vm_disk") as image:
        assert image.read(0, len(WRITTEN)) == WRITTEN


# --- a retired base is its remover's


def test_recover_leaves_what_another_host_has_retired(
    site: Site, plan: FaultPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the remover knows what its second look finds: the base has its name back for a pin of that moment."""
    remover, sweeper = site.host("remover"), site.host("sweeper")
    remover.ensure_base("img")
    monkeypatch.setattr(_rbd_store, "_CLAIM_SECONDS", 1)  # which is held there
    retiring = plan.pause("rados.trash_move", match="base.img", when="after")
    removed = site.beside(lambda: remover.remove_base("img"))
    retiring.wait()
    remover.pin("img", "operator")
    assert sweeper.recover().alive == ("trash/base.img",)
    retiring.release()
    with pytest.raises(BasePinnedError):
        removed.result(60)
    assert site.names() == ["base.img"]
    remover.verify_base("img")


def test_a_remover_that_died_between_its_looks(site: Site, plan: FaultPlan) -> None:
    """The base has its name back; whether it goes, the next pass finds out. One that was to go is freed."""
    cache = site.host("one")
    cache.ensure_base("img")
    plan.fail("rados.trash_move", match="base.img", when="after", error=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        cache.remove_base("img")
    cache.pin("img", "operator")
    assert cache.recover().restored == ("trash/base.img",)
    cache.verify_base("img")
    cache.unpin("img", "operator")
    plan.fail("rados.remove_snapshot", error=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        cache.remove_base("img")
    assert site.names() == ["trash/base.img"]
    assert site.host("two").recover().removed == ("trash/base.img",)
    assert pool.leftovers(site.ceph) == []


def test_a_removal_that_comes_to_nothing(site: Site) -> None:
    """A base that found a user when it was to be freed is anybody's to restore, though its remover lives on."""
    cache, other = site.host("one"), site.host("two")
    cache.create_root_disk("img", "vm")
    backend = backend_of(cache)
    with pytest.raises(BaseInUseError):
        backend.purge_base(backend.retire_base(found(cache)))
    assert other.recover().restored == ("trash/base.img",)


def test_a_base_that_another_retired_since(site: Site) -> None:
    """Who was taken for dead between its two looks does not free what somebody else has retired by then."""
    late, other = site.host("late"), site.host("other")
    late.ensure_base("img")
    retired = backend_of(late).retire_base(found(late))
    backend_of(other).store.give_back(retired.token, "base.img")
    again = backend_of(other).retire_base(found(other))
    backend_of(late).purge_base(retired)
    backend_of(other).restore_base(again)
    other.verify_base("img")


# --- what is read is the base


def test_a_base_that_goes_while_it_is_read(site: Site) -> None:
    """What was removed would read as zeros: it is told instead, also where another base has the name by then."""
    reader, remover = site.host("reader"), site.host("remover")
    base = reader.ensure_base("img")
    extents = backend_of(reader).read_base(base)
    next(extents)
    remover.remove_base("img")
    with pytest.raises(BaseNotFoundError):
        list(extents)
    remover.ensure_base("img")
    with pytest.raises(BaseNotFoundError):
        next(backend_of(reader).read_base(base))
    assert b"".join(extent.data for extent in backend_of(reader).read_base(found(reader)))


def test_checksums_of_a_retired_base(site: Site) -> None:
    """They are not gone, so that nobody takes the base for damaged; they are where the base is there without them."""
    reader, remover = site.host("reader"), site.host("remover")
    base = reader.ensure_base("decoded")
    sums = backend_of(reader).read_sums(base)
    assert sums
    retired = backend_of(remover).retire_base(found(remover, "decoded"))
    with pytest.raises(BaseNotFoundError):
        reader.verify_base("decoded")
    with pytest.raises(BaseNotFoundError):
        backend_of(reader).read_sums(base)
    backend_of(remover).restore_base(retired)
    assert backend_of(reader).read_sums(base) == sums
    with site.ceph.pool("vms") as ioctx:
        ioctx.remove_object(SUMS + retired.token)
    assert backend_of(reader).read_sums(base) is None
    with pytest.raises(BaseCorruptError, match="checksums are gone"):
        reader.verify_base("decoded")


# --- who takes a name away takes the base that was meant


def test_another_base_has_the_name(site: Site) -> None:
    """Who judged the one before neither retires nor marks it."""
    late, other = site.host("late"), site.host("other")
    old = late.ensure_base("img")
    backend_of(other).quarantine_base(found(other))
    other.ensure_base("img")
    backend_of(late).quarantine_base(old)
    with pytest.raises(BaseNotFoundError):
        backend_of(late).retire_base(old)
    other.verify_base("img")
    assert site.names() == ["base.img"]
    with pool.opened(site.ceph, "base.img") as image, pytest.raises(KeyError):
        image.metadata_get(DAMAGED)


def test_a_claim_that_ends_under_a_slow_remover(site: Site, plan: FaultPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name that it takes away leads to another base by then, which has it back at once."""
    slow, quick = site.host("slow"), site.host("quick")
    slow.ensure_base("img")
    monkeypatch.setattr(_rbd_store, "_CLAIM_SECONDS", 1)
    moving = plan.pause("rados.trash_move", match="base.img")
    removed = site.beside(lambda: slow.remove_base("img"))
    moving.wait()
    quick.remove_base("img")
    quick.ensure_base("img")
    moving.release()
    with pytest.raises(BaseNotFoundError):
        removed.result(60)
    assert site.names() == ["base.img"]
    quick.verify_base("img")


def test_a_base_that_came_in_the_place_of_a_useless_one(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hosts sweep the base without a snapshot; the slower one does not take the sound base that came then."""
    slow, quick = site.host("slow"), site.host("quick")
    slow.ensure_base("img")
    with pool.opened(site.ceph, "base.img", read_only=False) as image:
        if image.is_protected_snap("base"):
            image.unprotect_snap("base")
        image.remove_snap("base")
    reached, go = threading.Event(), threading.Event()
    store = backend_of(slow).store
    id_of = store.id_of

    def held(name: str) -> str | None:
        if not reached.is_set():
            reached.set()
            assert go.wait(60)
        return id_of(name)

    monkeypatch.setattr(store, "id_of", held)
    report = site.beside(slow.recover)
    assert reached.wait(60)
    assert quick.recover().removed == ("bases/base.img",)
    quick.ensure_base("img")
    go.set()
    assert report.result(60).removed == ()
    quick.verify_base("img")


def test_a_quarantine_that_died_half_way(site: Site, plan: FaultPlan) -> None:
    """A base that is marked as damaged is not used, wherever it is; check tells of it, and recover frees it."""
    cache = site.host("one")
    cache.ensure_base("img")
    plan.fail("rados.trash_move", match="base.img", error=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        backend_of(cache).quarantine_base(found(cache))
    assert site.names() == ["base.img"]
    with pytest.raises(BaseNotFoundError):
        cache.get_base("img")
    assert list(cache.bases()) == []
    assert "base.img" in [fact.name for fact in cache.check().problems]
    assert cache.recover().removed == ("bases/base.img",)
    assert site.names() == []
    cache.create_root_disk("img", "vm")


# --- looks that others' steps come between


def test_a_base_that_is_removed_as_it_is_published(site: Site, plan: FaultPlan) -> None:
    """Its maker does not bring it back under its remover's hands: that would be a base without a snapshot."""
    maker, remover = site.host("maker"), site.host("remover")
    published = plan.pause("rados.trash_restore", match="base.img", when="after")
    freeing = plan.pause("rados.remove_snapshot")
    made = site.beside(lambda: maker.ensure_base("img"))
    published.wait()
    removed = site.beside(lambda: remover.remove_base("img"))
    freeing.wait()
    published.release()
    made.result(60)
    freeing.release()
    removed.result(60)
    assert site.names() == []
    for number, cache in enumerate((maker, remover)):
        cache.create_root_disk("img", f"vm-{number}")


def test_a_clone_that_is_on_its_way(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ceph fails to list clones while one of them is neither in the pool's directory nor in its trash: unknown users
    are not none."""
    cache = site.host("one")
    cache.create_root_disk("img", "vm")
    backend = backend_of(cache)
    retired = backend.retire_base(found(cache))
    rbd_id = backend.store.id_of("vm_disk")
    assert rbd_id is not None
    words = [struct.pack("<I", len(text)) + text.encode() for text in ("vm_disk", rbd_id)]
    with site.ceph.pool("vms") as ioctx:
        ioctx.execute("rbd_directory", "rbd", "dir_remove_image", b"".join(words))
        with pytest.raises(UsersUnknownError):
            list(backend.iter_users(retired.base))
        with pytest.raises(UsersUnknownError):
            backend.purge_base(retired)
        ioctx.execute("rbd_directory", "rbd", "dir_add_image", b"".join(words))
    [user] = backend.iter_users(retired.base)
    assert user.disk_id == "vm"
    backend.restore_base(retired)
    cache.verify_base("img")


def test_a_use_between_judging_and_retiring(site: Site, plan: FaultPlan) -> None:
    """A base that another host was handed in that moment stays."""
    cleaner, user = site.host("cleaner", max_idle=timedelta(hours=24)), site.host("user")
    cleaner.ensure_base("img")
    with pool.opened(site.ceph, "base.img", read_only=False) as image:
        for key in (LAST_USED, UNUSED_SINCE):
            image.metadata_set(key, repr(time.time() - 2e5))
    judged = plan.pause("rados_claims.claim_image")
    cleaned = site.beside(cleaner.cleanup)
    judged.wait()
    user.ensure_base("img")
    judged.release()
    assert cleaned.result(60).removed == ()
    assert site.names() == ["base.img"]

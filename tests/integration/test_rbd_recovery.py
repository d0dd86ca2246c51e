"""What ``recover`` takes for a dead process's, and what it leaves to others."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import rbd as pool
from harness.images import raw
from nova_imagecache import BackendError, CacheConfig, ImageCache
from nova_imagecache.backends import _rados, _rbd_going, _rbd_owner
from nova_imagecache.backends._rados_errors import BusyError, NotThereError
from nova_imagecache.backends._rbd_names import GOING, RECORD
from nova_imagecache.backends.rbd import RbdBackend
from nova_imagecache.testing import FakeSource
from services.ceph import CephCluster
from services.ceph_bindings import bindings

pytestmark = pytest.mark.services

MIB = 2**20


@pytest.fixture(autouse=True)
def _empty(ceph: CephCluster) -> Iterator[None]:
    with pool.emptied(ceph):
        yield


@pytest.fixture
def backend(ceph: CephCluster, tmp_path: Path) -> RbdBackend:
    return pool.make_backend(ceph, tmp_path, secret_uuid="6f1b6d0e-5a51-4f0a-9f3b-2d1d9f2a7c11")


@pytest.fixture
def cache(backend: RbdBackend, tmp_path: Path) -> Iterator[ImageCache]:
    config = CacheConfig(root=tmp_path / "root", disks_dir=tmp_path / "disks", backend="rbd")
    with ImageCache(config, source=FakeSource({"img": raw("one").fake}), backend=backend) as made:
        yield made


def make(ceph: CephCluster, *names: str, snapshot: str | None = None, **metadata: str) -> None:
    """Images of somebody else's."""
    _, rbd = bindings()
    with ceph.pool("vms") as ioctx:
        for name in names:
            rbd.RBD().create(ioctx, name, MIB)
            with rbd.Image(ioctx, name) as image:
                image.write(b"theirs", 0)
                for key, value in metadata.items():
                    image.metadata_set(key, value)
                if snapshot:
                    image.create_snap(snapshot)


def test_images_of_others_are_left_alone(ceph: CephCluster, cache: ImageCache) -> None:
    """Volumes, Nova's disks, what is merely named like ours, others' trash: not listed, not removed, not swept."""
    _, rbd = bindings()
    make(ceph, "volume-1", "vm_disk", "vm_disk.swap")
    alike = ["base.theirs", "staging.mydb", "staging.my_db", "staging._owner.mydb", "staging.0123456789abcdef"]
    alike += ["staging.img.0123456789ABCDEF", "staging.img.0123456789abcdef.bak", "old_disk"]
    trashed = [f"{name}.old" for name in alike]
    make(ceph, *alike, *trashed, snapshot="keep")
    with ceph.pool("vms") as ioctx:
        for name in trashed:
            rbd.RBD().trash_move(ioctx, name, 0)
    before = pool.names(ceph)
    cache.create_root_disk("img", "vm", name="disk.rescue")
    cache.remove_root_disk("vm", name="disk.rescue")
    assert list(cache.root_disks()) == []
    assert [base.image_id for base in cache.bases()] == ["img"]
    report = cache.recover()
    assert (report.removed, report.restored, report.failed) == ((), (), {})
    assert pool.names(ceph) == sorted([*before, "base.img"])
    for name in alike:
        with pool.opened(ceph, name) as image:
            assert [snapshot["name"] for snapshot in image.list_snaps()] == ["keep"]
            assert image.read(0, 6) == b"theirs"


def test_capacity_counts_nothing_of_others(ceph: CephCluster, backend: RbdBackend) -> None:
    """An operator's image that is named like something unfinished is not in the figures of staging."""
    make(ceph, "staging.mydb")
    assert backend.capacity().staging == 0
    backend.close()


def test_a_base_that_has_lost_its_snapshot(ceph: CephCluster, cache: ImageCache, backend: RbdBackend) -> None:
    """It blocks its image: check says so; recover takes it out of the way if it is ours; its users go on."""
    base = cache.ensure_base("img")
    disk = cache.create_root_disk("img", "vm")
    make(ceph, "base.other")
    with pool.opened(ceph, "base.img", read_only=False) as image:
        if image.is_protected_snap("base"):
            image.unprotect_snap("base")
        image.remove_snap("base")
    with pytest.raises(BackendError, match=r"something else has the name base\.img.* Call recover"):
        cache.ensure_base("img")
    problems = {fact.name: str(fact.problem) for fact in cache.check().problems}
    assert problems.keys() == {"base.img", "base.other"}
    assert "recover" in problems["base.img"]
    report = cache.recover()
    assert (report.removed, report.failed) == (("bases/base.img",), {})
    assert pool.names(ceph) == ["base.other", "trash/base.img", "vm_disk"]
    assert cache.ensure_base("img").record.source_digest == base.record.source_digest
    with pool.opened(ceph, "vm_disk") as image:
        assert image.read(0, disk.virtual_size) == raw("one").guest
    cache.remove_root_disk("vm")
    assert cache.recover().removed == ("trash/base.img",)
    assert pool.names(ceph) == ["base.img", "base.other"]
    # somebody else's, until it says that it is a base of ours
    with pool.opened(ceph, "base.other", read_only=False) as image:
        image.metadata_set(RECORD, "{}")
    assert cache.recover().removed == ("bases/base.other",)
    backend.close()


def test_one_that_cannot_be_read_stops_no_other(ceph: CephCluster, cache: ImageCache, backend: RbdBackend) -> None:
    """A disk in the trash whose mark is damaged is told of; the next one is swept."""
    for disk_id in ("vm-1", "vm-2"):
        cache.create_root_disk("img", disk_id)
        rbd_id = backend.store.id_of(f"{disk_id}_disk")
        assert rbd_id is not None
        _rbd_going.take_out(backend.store, rbd_id, f"{disk_id}_disk", _rbd_going.going())
    _, rbd = bindings()
    with ceph.pool("vms") as ioctx:
        [damaged] = [one["id"] for one in rbd.RBD().trash_list(ioctx) if one["name"] == "vm-1_disk"]
        for mark in ("{", "[]", '{"why": 1}', '{"why": "removed", "at": "then"}'):
            with rbd.Image(ioctx, image_id=damaged) as image:
                image.metadata_set(GOING, mark)
            report = cache.recover()
            assert report.failed.keys() == {"trash/vm-1_disk"}
            assert "cannot be read" in report.failed["trash/vm-1_disk"]
    assert pool.names(ceph) == ["base.img", "trash/vm-1_disk"]


def test_a_base_that_cannot_be_opened(ceph: CephCluster, cache: ImageCache) -> None:
    """One damaged header keeps neither the list nor recover from going on; check and the report name it."""
    cache.ensure_base("img")
    make(ceph, "base.bad", "staging.dead.0123456789abcdef")
    with pool.damaged(ceph, "base.bad"):
        assert [base.image_id for base in cache.bases()] == ["img"]
        assert [fact.name for fact in cache.check().problems] == ["base.bad"]
        report = cache.recover()
        assert report.removed == ("staging/staging.dead.0123456789abcdef",)
        assert report.failed.keys() == {"bases/base.bad"}
        assert cache.cleanup(cache.plan_cleanup(max_idle=0)).removed == ("img",)
    assert pool.names(ceph) == ["base.bad"]


def test_taking_away_what_is_gone_leaves_nothing(ceph: CephCluster, cache: ImageCache, backend: RbdBackend) -> None:
    """Who comes too late to take a base's name away makes no object of its header by claiming it."""
    cache.ensure_base("img")
    rbd_id = backend.store.id_of("base.img")
    assert rbd_id is not None
    cache.remove_base("img")
    with pytest.raises(NotThereError):
        backend.store.take_away(rbd_id, "base.img")
    with ceph.pool("vms") as ioctx:
        assert [one.key for one in ioctx.list_objects() if rbd_id in one.key] == []


def test_the_sign_of_life_is_looked_after(
    ceph: CephCluster, tmp_path: Path, backend: RbdBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that others took for dead shows itself again when it begins something, for all that it works on."""
    monkeypatch.setattr(_rbd_owner, "LOOK_AGAIN", 0.0)
    writer = backend.stage_base("img", "raw")
    _forget_signs(ceph)
    assert _signs(ceph) == []
    other = backend.stage_base("other", "raw")
    assert len(_signs(ceph)) == 1
    staged = sorted(name for name in pool.names(ceph) if name.startswith("staging."))
    assert len({name.rpartition(".")[2][:8] for name in staged}) == 1
    # between the two steps of publishing nothing but the sign tells that they are alive
    for one in (writer, other):
        one._close()  # type: ignore[attr-defined]  # the rbd backend's writer
    report = _recovered_elsewhere(ceph, tmp_path / "other")
    assert report == {"removed": [], "alive": [f"staging/{name}" for name in staged]}
    for one in (writer, other):
        one.discard()
    backend.close()
    assert _signs(ceph) == []


def test_the_sign_of_life_is_not_looked_at_for_each_disk(cache: ImageCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many disks made at once it is looked at once."""
    looks: list[float] = []
    true_watchers = _rbd_owner.Owner._watchers

    def watchers(self: Any, token: str) -> set[int]:
        looks.append(time.monotonic())
        return true_watchers(self, token)

    monkeypatch.setattr(_rbd_owner.Owner, "_watchers", watchers)
    monkeypatch.setattr(_rbd_owner, "LOOK_AGAIN", 3600.0)
    for number in range(4):
        cache.create_root_disk("img", f"vm-{number}")
    assert looks == []


def test_a_dead_sign_that_another_sweeps_as_well(
    ceph: CephCluster, backend: RbdBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who removes an image has it open meanwhile: that is no sign of life."""
    make(ceph, "staging._owner.0123abcd")
    tries = []
    remove = _rados.remove

    def remove_later(ioctx: Any, name: str) -> None:
        tries.append(name)
        if len(tries) == 1:
            raise BusyError("watchers")
        remove(ioctx, name)

    monkeypatch.setattr(_rados, "remove", remove_later)
    assert backend.recover().alive == ()
    assert tries == ["staging._owner.0123abcd"] * 2
    assert _signs(ceph) == []
    backend.close()


def test_a_writer_that_nobody_ended(ceph: CephCluster, tmp_path: Path) -> None:
    """Closing the backend ends it: the process ends as well, and leaves nothing."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "from harness import rbd as pool\n"
        "backend = pool.from_spec(sys.argv[1])\nwriter = backend.stage_base('img', 'raw')\n"
        "writer.write_at(0, b'x')\nbackend.close()\nwriter.discard()\n"
    )
    assert pool.spawn(code, pool.spec(ceph, tmp_path), timeout=60) == 0
    assert pool.names(ceph) == []
    assert _signs(ceph) == []


def _signs(ceph: CephCluster) -> list[str]:
    _, rbd = bindings()
    with ceph.pool("vms") as ioctx:
        return [name for name in rbd.RBD().list(ioctx) if name.startswith("staging._owner.")]


def _forget_signs(ceph: CephCluster) -> None:
    """Take the signs of life away as a sweeper does that sees no watcher: the watch goes with the object."""
    _, rbd = bindings()
    with ceph.pool("vms") as ioctx:
        for name in _signs(ceph):
            with pool.reading(ioctx, name) as image:
                header = f"rbd_header.{image.id()}"
            ioctx.remove_object(header)
            rbd.RBD().remove(ioctx, name)


def _recovered_elsewhere(ceph: CephCluster, directory: Path) -> dict[str, list[str]]:
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "import json\nfrom harness import rbd as pool\n"
        "backend = pool.from_spec(sys.argv[1])\nreport = backend.recover()\n"
        "print(json.dumps({'removed': report.removed, 'alive': report.alive}))\nbackend.close()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, pool.spec(ceph, directory)], capture_output=True, text=True, check=True
    )
    answer: dict[str, list[str]] = json.loads(done.stdout)
    return answer

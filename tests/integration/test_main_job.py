"""The main job on a real Glance: an image becomes root disks, cold and warm, with both backends and base formats."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from conftest import InChild
from harness import images
from harness.images import MIB, Sample
from harness.rig import KINDS, Rig, check_disk_file
from nova_imagecache import (
    BaseImage,
    DiskExistsError,
    DiskTooSmallError,
    Event,
    FileLocation,
    GlanceSource,
    ImageCache,
    ImageCorruptError,
    ImageNotFoundError,
    RootDisk,
    SourceUnavailableError,
)
from nova_imagecache.testing import FaultPlan, Step
from services import glance as glance_service
from services.glance import ADMIN, GlanceServer
from services.require import require
from unit.images import kernel as kernel_for_x86

pytestmark = pytest.mark.services

GIB = 2**30
TIB = 2**40
SIZE = 64 * MIB
LOCKS_AND_NAMES = ("fs.create", "fs.link", "fs.rename", "fs.mkdir", "fs.write", "exec.run")
"""What a hit has no business with."""

LOUD = {
    *("fcntl.flock", "fcntl.lockf", "subprocess.Popen", "os.fork", "os.posix_spawn"),
    *("socket.connect", "socket.getaddrinfo"),
}
"""The same, as the interpreter's audit events."""


@pytest.fixture(scope="module")
def samples(glance: GlanceServer) -> dict[str, Sample]:
    """A qcow2, a raw image and a kernel in Glance, by their ids."""
    qcow2, raw = images.qcow2("the main job", 8 * MIB), images.raw("the main job, raw", 3 * MIB)
    kernel = Sample(guest=b"", served=kernel_for_x86(), disk_format="aki")
    return {
        glance.upload(qcow2.served, disk_format="qcow2"): qcow2,
        glance.upload(raw.served): raw,
        glance.upload(kernel.served, disk_format="aki", container_format="aki"): kernel,
    }


@pytest.fixture
def qcow2_id(samples: dict[str, Sample]) -> str:
    return next(iter(samples))


@pytest.fixture
def raw_id(samples: dict[str, Sample]) -> str:
    return list(samples)[1]


@pytest.fixture
def kernel_id(samples: dict[str, Sample]) -> str:
    return list(samples)[2]


class GlanceRig(Rig):
    """A cache whose images come from a Glance."""

    def __init__(self, directory: Path, kind: str, samples: dict[str, Sample], url: str) -> None:
        super().__init__(directory, kind, samples)
        self.glance = partial(GlanceSource, endpoint=url, token=ADMIN)

    def open(self, on_event: Callable[[Event], None] | None = None, **config: object) -> ImageCache:
        return self.cache(self.glance(), on_event=on_event, **config)


@pytest.fixture(params=KINDS)
def any_rig(
    request: pytest.FixtureRequest, tmp_path: Path, samples: dict[str, Sample], glance: GlanceServer
) -> GlanceRig:
    return GlanceRig(tmp_path, request.param, samples, glance.url)


@pytest.fixture
def rig(tmp_path: Path, samples: dict[str, Sample], glance: GlanceServer) -> GlanceRig:
    return GlanceRig(tmp_path, "link", samples, glance.url)


def _path(disk: RootDisk | BaseImage) -> Path:
    assert isinstance(disk.location, FileLocation)
    return disk.location.path


def _children(trace: tuple[Step, ...]) -> list[Step]:
    return [step for step in trace if step.name == "exec.run"]


def test_cold_and_warm(any_rig: GlanceRig, glance: GlanceServer, qcow2_id: str, raw_id: str) -> None:
    """The first disk of an image brings it in, later ones do not ask Glance; all read as the image."""
    with any_rig.open() as cache:
        for image_id, sample in ((qcow2_id, any_rig.samples[qcow2_id]), (raw_id, any_rig.samples[raw_id])):
            with glance.recorded() as requests:
                cold = cache.create_root_disk(image_id, f"cold-{image_id}", size=SIZE)
            assert [request.path.rpartition("/")[2] for request in requests] == [image_id, "file"]
            with glance.recorded() as requests:
                warm = cache.create_root_disk(image_id, f"warm-{image_id}", size=2 * SIZE)
                sizeless = cache.create_root_disk(image_id, f"sizeless-{image_id}")
            assert requests == []
            assert [disk.virtual_size for disk in (cold, warm, sizeless)] == [SIZE, 2 * SIZE, len(sample.guest)]
            native = "native" in any_rig.kind and sample.disk_format == "qcow2"
            assert cache.get_base(image_id).format == ("qcow2" if native else "raw")
            assert cache.get_base(image_id).digest == sample.digest, "Glance's sha512"
            wanted = 3 if any_rig.references else 0
            assert len(cache.users(image_id)) == wanted
    any_rig.check("cold and warm")
    any_rig.check_tidy("cold and warm")


def test_a_hit_is_quiet(any_rig: GlanceRig, qcow2_id: str) -> None:
    """ensure_base of a base that is there: no child process, nothing made, named or moved, no lock file touched."""
    any_rig.open().ensure_base(qcow2_id)
    cache = any_rig.open()
    before = _lock_marks(any_rig)
    with FaultPlan() as plan:
        cache.ensure_base(qcow2_id)
        cache.ensure_base(qcow2_id, expect=any_rig.samples[qcow2_id].digest)
    noisy = [step for step in plan.trace if step.name in LOCKS_AND_NAMES]
    assert noisy == []
    assert _lock_marks(any_rig) == before, "a lock file was touched"


def _lock_marks(rig: Rig) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_ctime_ns) for path in (rig.root / "locks").iterdir()}


def _audited(act: Callable[[], object]) -> set[str]:
    """What the interpreter tells of while ``act`` runs, of ``LOUD``; for a process that ends then: a hook stays."""
    told: set[str] = set()
    sys.addaudithook(lambda event, _arguments: told.add(event) if event in LOUD else None)
    act()
    return told


def test_a_hit_locks_starts_and_asks_nothing(any_rig: GlanceRig, qcow2_id: str, raw_id: str, in_child: InChild) -> None:
    """No flock, no child process, no socket: seen by the interpreter's own audit, which sees them all on a miss."""
    any_rig.open().ensure_base(qcow2_id)

    def hits() -> set[str]:
        cache = any_rig.open()
        return _audited(lambda: [cache.ensure_base(qcow2_id), cache.ensure_base(qcow2_id), list(cache.bases())])

    def miss() -> set[str]:
        return _audited(lambda: any_rig.open().ensure_base(raw_id))

    assert in_child(hits) == set()
    assert in_child(miss) >= {"fcntl.flock", "socket.connect"}


def test_a_hit_while_others_hold_every_lock(any_rig: GlanceRig, qcow2_id: str) -> None:
    """A hit waits for nobody: another process holds each lock file and each directory that could be held."""
    cache = any_rig.open()
    cache.ensure_base(qcow2_id)
    for shard in range(256):
        (any_rig.root / "locks" / f"disk.{shard:02x}.lock").touch()
    for name in (f"base.{qcow2_id}.lock", "admission.lock"):
        (any_rig.root / "locks" / name).touch()

    def hold_all() -> None:
        places = [any_rig.root, *any_rig.root.rglob("*")]
        fds = [os.open(place, os.O_RDONLY) for place in places]
        for fd in fds:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held.set()
        done.wait(60)

    fork = multiprocessing.get_context("fork")
    held, done = fork.Event(), fork.Event()
    process = fork.Process(target=hold_all)
    process.start()
    try:
        assert held.wait(20)
        for each in (cache, any_rig.open()):
            assert each.ensure_base(qcow2_id, deadline=5).image_id == qcow2_id
    finally:
        done.set()
        process.join(20)
    assert process.exitcode == 0


def test_a_disk_while_the_bases_lock_is_held(rig: GlanceRig, qcow2_id: str) -> None:
    """A warm disk does not wait for whoever holds the base's lock."""
    cache = rig.open()
    cache.ensure_base(qcow2_id)
    lock = cache._engine.locks.base(qcow2_id)
    assert lock.attempt()
    try:
        cache.create_root_disk(qcow2_id, "vm", size=SIZE, deadline=5)
    finally:
        lock.release()


def test_glance_is_not_needed_for_a_hit(tmp_path: Path) -> None:
    """With Glance stopped: bases are found, disks are made; what is not there cannot be fetched."""
    require(glance_service.missing())
    sample = images.qcow2("found without Glance")
    with GlanceServer(tmp_path / "glance") as server:
        image_id = server.upload(sample.served, disk_format="qcow2")
        other_id = server.upload(b"never fetched" * 100)
        rig = GlanceRig(tmp_path, "link", {image_id: sample}, server.url)
        rig.open().ensure_base(image_id)
    source = rig.glance(retries=1, retry_delay=0.01)
    with rig.cache(source) as cache:
        assert cache.ensure_base(image_id, expect=sample.digest).digest == sample.digest
        cache.create_root_disk(image_id, "vm", size=SIZE)
        with pytest.raises(SourceUnavailableError) as caught:
            cache.ensure_base(other_id)
        assert caught.value.retryable
    rig.check("Glance stopped")
    rig.check_tidy("Glance stopped")


@pytest.mark.parametrize("size", [GIB, 10 * TIB], ids=["1GiB", "10TiB"])
def test_a_warm_disk_takes_one_child(any_rig: GlanceRig, qcow2_id: str, size: int) -> None:
    """A root disk of a base that is there starts one child process at most, however large it is."""
    cache = any_rig.open()
    cache.ensure_base(qcow2_id)
    with FaultPlan() as plan:
        disk = cache.create_root_disk(qcow2_id, "vm", size=size)
    assert disk.virtual_size == size
    assert len(_children(plan.trace)) <= 1, _children(plan.trace)
    with FaultPlan() as plan:
        again = cache.create_root_disk(qcow2_id, "vm", size=size)
    assert again == disk
    assert [step for step in plan.trace if step.name in LOCKS_AND_NAMES] == []
    path = _path(disk)
    assert path.stat().st_blocks * 512 < 16 * MIB, "it is sparse"
    if disk.format == "qcow2":
        images.qemu_img("check", "-q", "-f", "qcow2", str(path))


def test_expected_digests(any_rig: GlanceRig, glance: GlanceServer, qcow2_id: str) -> None:
    """A digest that fits is a hit; one that does not asks Glance, and never gives the base of other bytes."""
    sample, other = any_rig.samples[qcow2_id], images.raw("not these")
    with any_rig.open() as cache:
        cache.ensure_base(qcow2_id, expect=sample.digest)
        with glance.recorded() as requests:
            cache.ensure_base(qcow2_id, expect=sample.digest)
        assert requests == []
        with glance.recorded() as requests, pytest.raises(ImageCorruptError) as caught:
            cache.ensure_base(qcow2_id, expect=other.digest)
        assert caught.value.expected == other.digest
        assert caught.value.actual == sample.digest
        assert len(requests) == 1, "the metadata is enough to know"
        with pytest.raises(ImageCorruptError):
            cache.create_root_disk(qcow2_id, "vm", expect=other.digest)
        assert list(cache.root_disks()) == []
        assert cache.get_base(qcow2_id).digest == sample.digest, "the base that was there stays"


@pytest.mark.parametrize("kind", ["link", "file"])
def test_a_reused_image_id(kind: str, tmp_path: Path) -> None:
    """Glance's database was lost and an id came again with other bytes: old disks keep theirs, new ones get the new."""
    require(glance_service.missing())
    old, new = images.qcow2("before the loss"), images.raw("after the loss")
    with GlanceServer(tmp_path / "glance-1") as server:
        image_id = server.upload(old.served, disk_format="qcow2")
        rig = GlanceRig(tmp_path, kind, {image_id: old}, server.url)
        rig.open().create_root_disk(image_id, "older", size=SIZE, expect=old.digest)
    rig.truth["older"] = old
    with GlanceServer(tmp_path / "glance-2") as server:
        server.upload(new.served, id=image_id)
        rig = GlanceRig(tmp_path, kind, {image_id: new}, server.url)
        rig.truth["older"] = old
        with rig.open() as cache:
            disk = cache.create_root_disk(image_id, "newer", size=SIZE, expect=new.digest)
            assert disk.disk_id == "newer"
            assert cache.get_base(image_id).digest == new.digest
    rig.check("a re-used id")
    rig.check_tidy("a re-used id")


def test_moving_an_instances_directory(rig: GlanceRig, qcow2_id: str) -> None:
    """An instance's directory that is renamed, as Nova does on resize, keeps its disk whole."""
    disk = rig.open().create_root_disk(qcow2_id, "vm", size=SIZE)
    moved = rig.disks / "vm_resize"
    (rig.disks / "vm").rename(moved)
    check_disk_file(moved / "disk", disk.format, rig.samples[qcow2_id].guest, rig.dir, "moved")
    assert len(rig.open().users(qcow2_id)) == 1, "it still counts as a user"


def test_the_base_goes_and_the_disk_stays(rig: GlanceRig, qcow2_id: str) -> None:
    """Whatever takes the cached base away, a disk with a link is whole."""
    disk = rig.open().create_root_disk(qcow2_id, "vm", size=SIZE)
    guest = rig.samples[qcow2_id].guest
    backend = rig.backend()
    base = backend.find_base(qcow2_id)
    assert base is not None
    retired = backend.retire_base(base)
    check_disk_file(_path(disk), disk.format, guest, rig.dir, "retired")
    backend.purge_base(retired)
    check_disk_file(_path(disk), disk.format, guest, rig.dir, "purged")
    shutil.rmtree(rig.root)
    check_disk_file(_path(disk), disk.format, guest, rig.dir, "the whole cache removed")
    assert rig.open().ensure_base(qcow2_id).digest == rig.samples[qcow2_id].digest


def test_a_missing_base_behind_a_path(
    tmp_path: Path, samples: dict[str, Sample], glance: GlanceServer, raw_id: str
) -> None:
    """create_root_disk of a disk whose base is gone brings the base back, and the disk is whole again."""
    rig = GlanceRig(tmp_path, "path", samples, glance.url)
    disk = rig.open().create_root_disk(raw_id, "vm", size=SIZE)
    shutil.rmtree(rig.root / "bases" / raw_id)
    assert rig.open().create_root_disk(raw_id, "vm", size=SIZE) == disk
    rig.check("the base is back")
    rig.check_tidy("the base is back")


def test_kernels_are_copied(any_rig: GlanceRig, kernel_id: str, tmp_path: Path) -> None:
    """copy_base gives a file of exactly the kernel's bytes, independent of the cache; a second one is refused."""
    target = tmp_path / "kernel"
    with any_rig.open() as cache:
        assert cache.copy_base(kernel_id, target) == target
        assert target.read_bytes() == any_rig.samples[kernel_id].served
        assert target.stat().st_nlink == 1
        assert cache.users(kernel_id) == []
        with pytest.raises(DiskExistsError):
            cache.copy_base(kernel_id, target)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("kind", ["link", "path", "link-native", "file"])
def test_a_disk_from_another_host(
    kind: str, tmp_path: Path, samples: dict[str, Sample], glance: GlanceServer, qcow2_id: str
) -> None:
    """A disk and its record, copied to another host, are tied to the base there; what was written stays written."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    source = GlanceRig(here, kind, samples, glance.url)
    target = GlanceRig(there, kind, samples, glance.url)
    disk = source.open().create_root_disk(qcow2_id, "vm", size=SIZE)
    (target.disks / "vm").mkdir(parents=True)
    for name in ("disk", "disk.json"):
        shutil.copy(_path(disk).parent / name, target.disks / "vm" / name)
    shutil.rmtree(here)
    with target.open() as cache:
        attached = cache.attach_root_disk(qcow2_id, "vm")
        assert attached.virtual_size == SIZE
        assert attached.reference == {"file": "none", "path": "path"}.get(kind, "link")
        assert len(cache.users(qcow2_id)) == (1 if target.references else 0)
    target.check("attached")
    target.check_tidy("attached")


def test_a_disk_of_other_bytes_is_not_attached(rig: GlanceRig, qcow2_id: str, raw_id: str) -> None:
    """attach_root_disk compares digests before it ties anything."""
    with rig.open() as cache:
        cache.create_root_disk(qcow2_id, "vm", size=SIZE)
        with pytest.raises(DiskExistsError):
            cache.attach_root_disk(raw_id, "vm")
    rig.check("refused")
    rig.check_tidy("refused")


def test_flatten_and_resize(any_rig: GlanceRig, qcow2_id: str) -> None:
    """A disk grows, stands alone, and outlives its base; it never shrinks."""
    guest = any_rig.samples[qcow2_id].guest
    with any_rig.open() as cache:
        cache.create_root_disk(qcow2_id, "vm", size=SIZE)
        grown = cache.resize_root_disk("vm", size=2 * SIZE)
        assert grown.virtual_size == 2 * SIZE
        assert cache.get_root_disk("vm") == grown
        with pytest.raises(DiskTooSmallError):
            cache.resize_root_disk("vm", size=SIZE)
        flat = cache.flatten_root_disk("vm")
        assert flat.reference == "none"
        assert cache.users(qcow2_id) == []
        cache.remove_base(qcow2_id)
        check_disk_file(_path(flat), flat.format, guest, any_rig.dir, "flat, without a base")
        assert cache.get_root_disk("vm") == flat
        cache.remove_root_disk("vm")
    any_rig.check_tidy("removed")
    assert not (any_rig.disks / "vm").exists()


def test_a_disk_too_small(any_rig: GlanceRig, qcow2_id: str) -> None:
    """A size below the image's is refused, cold and warm, and nothing is made."""
    for _temperature in ("cold", "warm"):
        with any_rig.open() as cache:
            with pytest.raises(DiskTooSmallError) as caught:
                cache.create_root_disk(qcow2_id, "vm", size=MIB)
            assert caught.value.size == MIB
            assert caught.value.virtual_size == len(any_rig.samples[qcow2_id].guest)
            assert list(cache.root_disks()) == []
            cache.ensure_base(qcow2_id)
    any_rig.check_tidy("too small")


def test_events(rig: GlanceRig, qcow2_id: str) -> None:
    """Every change is told, in order, with the ids it is about."""
    events: list[Event] = []
    with rig.open(events.append) as cache:
        cache.create_root_disk(qcow2_id, "vm", size=SIZE)
        cache.create_root_disk(qcow2_id, "other", size=SIZE)
        cache.resize_root_disk("vm", size=2 * SIZE)
        cache.flatten_root_disk("vm")
        cache.attach_root_disk(qcow2_id, "other")
        cache.remove_root_disk("vm")
        cache.remove_root_disk("other")
        cache.cleanup(cache.plan_cleanup(max_idle=0))
    told = [(event.kind, event.image_id, event.disk_id) for event in events]
    assert told == [
        ("published", qcow2_id, None),
        ("usage-changed", qcow2_id, None),
        ("disk-created", qcow2_id, "vm"),
        ("used", qcow2_id, None),
        ("disk-created", qcow2_id, "other"),
        ("disk-resized", qcow2_id, "vm"),
        ("disk-flattened", qcow2_id, "vm"),
        ("used", qcow2_id, None),
        ("disk-attached", qcow2_id, "other"),
        ("disk-removed", None, "vm"),
        ("disk-removed", None, "other"),
        ("removed", qcow2_id, None),
        ("usage-changed", qcow2_id, None),
    ]


def test_one_bad_image_stops_no_other(rig: GlanceRig, glance: GlanceServer, qcow2_id: str, raw_id: str) -> None:
    """ensure_bases brings in what it can, and says of each image what became of it."""
    queued = glance.create()
    unknown = "00000000-0000-0000-0000-000000000000"
    disguised = glance.upload(images.qcow2("in disguise").served, disk_format="raw")
    ids = [unknown, qcow2_id, queued, disguised, raw_id]
    with rig.open() as cache:
        results = cache.ensure_bases(ids)
        assert [result.image_id for result in results] == ids
        errors = [type(result.error).__name__ for result in results]
        assert errors == ["ImageNotFoundError", "NoneType", "ImageNotActiveError", "ImageRejectedError", "NoneType"]
        assert isinstance(results[0].error, ImageNotFoundError)
        assert {base.image_id for base in cache.bases()} == {qcow2_id, raw_id}
    rig.check_tidy("after bad images")


def test_figures_add_up(rig: GlanceRig, qcow2_id: str, raw_id: str) -> None:
    """usage() counts allocated blocks, what could go, and what must be reserved."""
    with rig.open() as cache:
        cache.create_root_disk(qcow2_id, "vm", size=SIZE)
        cache.ensure_base(raw_id)
        usage = cache.usage()
        assert usage.complete
        assert usage.base_count == 2
        assert usage.bases == sum(cache.base_usage(image_id).allocated for image_id in (qcow2_id, raw_id))
        assert usage.reclaimable == cache.base_usage(raw_id).allocated, "the other one has a user"
        assert (usage.staging, usage.trash) < (64 * 1024, 64 * 1024)
        assert cache.reserved_disk_mb(100) == 100 + -(-usage.allocated // MIB)
        cache.pin(raw_id, "someone")
        assert cache.usage().reclaimable == 0

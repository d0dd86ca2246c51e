"""What the cache says of itself to a scheduler: what it takes, what could go, what to reserve."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import InChild
from harness import images, places
from harness.images import MIB
from harness.rig import Rig
from harness.upkeep import Events, assert_counts_as_du, dense, last_used, open_cache
from nova_imagecache import (
    BackendError,
    BaseImage,
    CacheConfig,
    DiskUser,
    ImageCache,
    ImageCorruptError,
    NoSpaceError,
    UserFinder,
)
from nova_imagecache.finders import DiskDirectories, ImagesInUse
from nova_imagecache.testing import FakeSource, FaultPlan, MemoryBackend

SAMPLES = {name: dense(f"counted {name}", MIB) for name in ("a", "b")}


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with places.quick(tmp_path) as directory:
        yield Rig(directory, "link", SAMPLES)


# --- what could go


def test_what_a_driver_uses_is_not_reclaimable(rig: Rig) -> None:
    """Copies have no users that storage could count: the driver's word counts here as it does in the plan."""
    rig.kind, rig.backend_name, rig.options = "file", "file", {}
    cache = open_cache(rig, user_finders=[ImagesInUse(lambda: ["a"])])
    cache.ensure_bases(SAMPLES)
    assert cache.usage().reclaimable == cache.base_usage("b").allocated
    assert cache.usage().reclaimable == cache.plan_cleanup(max_idle=0).freeable


def test_what_a_finder_sees_is_not_reclaimable(rig: Rig) -> None:
    """An overlay that nobody told about."""
    rig.disks.mkdir()
    cache = open_cache(rig, user_finders=[DiskDirectories([rig.disks])])
    cache.ensure_bases(SAMPLES)
    base = str(rig.root / "bases" / "a" / "disk")
    images.qemu_img("create", "-q", "-f", "qcow2", "-F", "raw", "-b", base, str(rig.disks / "strange"))
    assert cache.usage().reclaimable == cache.base_usage("b").allocated


def test_in_doubt_nothing_is_reclaimable(rig: Rig) -> None:
    """The other figures are what they are."""

    def lost() -> list[str]:
        raise ConnectionError("the database is away")

    cache = open_cache(rig, user_finders=[ImagesInUse(lost)])
    cache.ensure_bases(SAMPLES)
    usage = cache.usage()
    assert (usage.reclaimable, usage.complete, usage.base_count) == (0, True, 2)
    assert usage.bases >= 2 * MIB


def test_finders_are_asked_once_for_all_bases(rig: Rig) -> None:
    """Of which nothing else knows a use; and not at all for what a driver reports to its scheduler every minute."""

    class Counting:
        name = "counting"
        looks = 0

        def find(self, bases: Sequence[BaseImage]) -> list[DiskUser]:
            self.looks += 1
            self.asked = {base.image_id for base in bases}
            return []

    finder = Counting()
    assert isinstance(finder, UserFinder)
    cache = open_cache(rig, user_finders=[finder])
    cache.ensure_bases(SAMPLES)
    cache.usage()
    assert (finder.looks, finder.asked) == (1, set(SAMPLES))
    cache.reserved_disk_mb(0)
    assert finder.looks == 1
    first, *others = SAMPLES
    cache.create_root_disk(first, "vm", size=4 * MIB)
    cache.usage()
    assert (finder.looks, finder.asked) == (2, set(others))
    for image_id in others:
        cache.pin(image_id, "someone")
    assert cache.usage().reclaimable == 0
    assert finder.looks == 2


# --- what to reserve


def test_t28_a_cache_on_a_filesystem_of_its_own_reserves_nothing(rig: Rig, tmp_path: Path) -> None:
    """It takes nothing from the instances: what the operator reserves is all, whatever the cache holds."""
    if tmp_path.stat().st_dev == rig.dir.stat().st_dev:
        pytest.skip("there is one filesystem only")
    rig.disks = tmp_path / "instances"
    rig.options = {"reference": "auto"}
    cache = open_cache(rig)
    for when in ("nothing is there", "a base", "a disk that names it by path"):
        for static in (0, 512, 4096):
            assert cache.reserved_disk_mb(static) == static, when
        assert cache.usage().own_filesystem, when
        cache.ensure_base("a")
        cache.create_root_disk("a", "vm", size=4 * MIB)
    assert cache.usage().allocated > MIB


def test_t28_a_cache_that_is_not_on_this_host_reserves_nothing(tmp_path: Path) -> None:
    """The storage of a cluster is not the host's disk: Nova's figure for rbd was wrong, and could exceed the total."""

    class Far(MemoryBackend):
        """Not on this host."""

        properties = replace(MemoryBackend.properties, local=False, shared=True)

    backend = Far()
    sample = images.raw("far away")
    config = CacheConfig(root=tmp_path / "root", disks_dir=tmp_path / "root" / "disks", backend="memory")
    with ImageCache(config, source=FakeSource({"img": sample.fake}), backend=backend) as cache:
        cache.ensure_base("img")
        usage = cache.usage()
        assert not usage.local
        assert usage.base_count == 1
        for static in (0, 512):
            assert cache.reserved_disk_mb(static) == static


def test_a_cache_beside_the_disks_reserves_what_it_takes(rig: Rig) -> None:
    """In MiB, rounded up, beside what is reserved anyway."""
    cache = open_cache(rig)
    cache.ensure_bases(SAMPLES)
    taken = cache.usage().allocated
    assert cache.reserved_disk_mb(100) == 100 + -(-taken // MIB)
    assert cache.reserved_disk_mb(100) - 100 >= 2


def test_figures_that_are_not_whole_are_not_reported(open_path: Path, in_child: InChild) -> None:
    """A smaller figure would promise room that is not there."""
    rig = Rig(open_path, "link", SAMPLES)
    open_path.chmod(0o777)

    def bring_in() -> None:
        open_cache(rig).ensure_bases(SAMPLES)

    in_child(bring_in, unprivileged=True)
    hidden = rig.root / "staging" / "hidden"
    hidden.mkdir()
    hidden.chmod(0)

    def look() -> bool:
        cache = open_cache(rig)
        with pytest.raises(BackendError, match="whole"):
            cache.reserved_disk_mb(10)
        return cache.usage().complete

    assert not in_child(look, unprivileged=True)


def test_what_others_left_in_the_root_is_counted(rig: Rig) -> None:
    """Beside what is ours, and within it: the filesystem has that much less, whoever wrote it."""
    with open_cache(rig) as cache:
        cache.ensure_bases(SAMPLES)
        for place in (rig.root, rig.root / "lost+found", rig.root / "old" / "copies", rig.root / "bases" / "a" / "sub"):
            place.mkdir(parents=True, exist_ok=True)
            (place / "README").write_bytes(bytes(1 + len(place.name)) * 4096)
        (rig.root / "link").symlink_to(rig.root / "bases")
        assert_counts_as_du(rig, cache.usage(), "strangers")


def test_disks_in_the_root_are_no_overhead(tmp_path: Path) -> None:
    """By whatever name."""
    rig = Rig(tmp_path, "file", SAMPLES)
    rig.disks = rig.root / "instances" / "here"
    with open_cache(rig) as cache:
        cache.ensure_base("a")
        before = cache.usage().overhead
        cache.create_root_disk("a", "vm")
        assert cache.usage().overhead - before < MIB


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can close a directory to its cache")
@pytest.mark.parametrize("closed", ["users/a", "pins", "old", "bases/a/sub", "lost+found"])
def test_what_cannot_be_counted_is_said(closed: str, open_path: Path, in_child: InChild) -> None:
    """A figure without it is no figure; but of lost+found, which is closed to everybody and empty."""
    rig = Rig(open_path, "link", SAMPLES)
    open_path.chmod(0o777)
    in_child(lambda: open_cache(rig).ensure_bases(SAMPLES), unprivileged=True)
    (rig.root / closed).mkdir(parents=True, exist_ok=True)
    os.chown(rig.root / closed, 0, 0)
    (rig.root / closed).chmod(0o700)
    assert in_child(lambda: open_cache(rig).usage().complete, unprivileged=True) == (closed == "lost+found")


# --- when to report


def test_a_fetch_that_fails_tells_that_usage_changed(rig: Rig) -> None:
    """While it ran it took room, and bases may have gone for it."""
    events = Events()
    source = rig.source()
    sample = dense("counted a", MIB)
    source.add("torn", replace(sample.fake, data=sample.served[: MIB // 2] + bytes(MIB // 2), digest=sample.digest))
    cache = open_cache(rig, source=source, on_event=events.append)
    with pytest.raises(ImageCorruptError):
        cache.ensure_base("torn")
    assert events.kinds("usage-changed") == ["torn"]
    assert events.kinds("published") == []


def test_a_fetch_that_fails_after_an_eviction_tells_of_both(rig: Rig) -> None:
    """What made room for it is gone all the same."""
    events = Events()
    rig.samples["huge"] = dense("huge", 3 * MIB)
    open_cache(rig).ensure_base("a")
    cache = open_cache(rig, on_event=events.append, max_bytes=int(3.5 * MIB))
    plan = FaultPlan()
    with plan.fail("fs.rename", match="bases/huge", error=OSError(5, "Input/output error")):
        last_used(rig, "a", 0.0)
        with pytest.raises(BackendError):
            cache.ensure_base("huge")
    assert events.kinds("evicted") == ["a"]
    assert events.kinds("usage-changed") == ["a", "huge"]


def _take_over(rig: Rig) -> None:
    """A base with a disk that belongs to a guest's user, as libvirt leaves it."""
    open_cache(rig).create_root_disk("a", "vm")
    os.chown(rig.root / "bases" / "a" / "disk", 65534, 65534)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_repair_tells_that_usage_changed(rig: Rig) -> None:
    """The old bytes stay with the disks that are linked to them."""
    _take_over(rig)
    events = Events()
    assert open_cache(rig, on_event=events.append).repair_base("a")
    assert events.kinds("repaired") == events.kinds("usage-changed") == ["a"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_repair_is_admitted(rig: Rig) -> None:
    """It copies the base: where that does not fit it is refused with the figures, and the base stays as it is."""
    _take_over(rig)
    cache = open_cache(rig, max_bytes=MIB + MIB // 2)
    inode = (rig.root / "bases" / "a" / "disk").stat().st_ino
    with pytest.raises(NoSpaceError) as caught:
        cache.repair_base("a")
    assert caught.value.limit == "max_bytes"
    assert (rig.root / "bases" / "a" / "disk").stat().st_ino == inode
    assert list((rig.root / "staging").iterdir()) == []
    assert open_cache(rig, max_bytes=3 * MIB).repair_base("a")
    assert not open_cache(rig, max_bytes=MIB + MIB // 2).repair_base("a"), "ours by now: nothing is copied"

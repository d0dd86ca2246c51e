"""A storage that is full, in the middle of everything: a clear error, nothing published, no litter, and on it goes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness import images
from harness.images import MIB, Sample
from harness.rig import Rig
from nova_imagecache import (
    BackendError,
    DiskTooSmallError,
    ImageCacheError,
    ImageRejectedError,
    NoSpaceError,
)
from nova_imagecache.testing import FakeSource, FaultPlan
from services.require import require

SIZE = 4 * MIB
ROOM = 10 * MIB
BOMB = 600 * MIB
SAMPLES = {"img": images.raw("one"), "packed": images.qcow2("two"), "foreign": images.vdi("three")}


# --- a filesystem that is really full


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of its own with room for ten MiB."""
    where = tmp_path / "small"
    where.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(where)],
        capture_output=True,
        text=True,
        check=False,
    )
    require(None if mounted.returncode == 0 else f"no filesystem can be mounted: {mounted.stderr.strip()}")
    try:
        yield where
    finally:
        subprocess.run(["umount", str(where)], check=True)


def _rig(small: Path, kind: str, samples: dict[str, Sample]) -> Rig:
    rig = Rig(small, kind, samples)
    rig.scratch = small.parent
    return rig


def _fill(directory: Path) -> Path:
    """Take all the room that is left."""
    filler = directory / "filler"
    fd = os.open(filler, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        for piece in (MIB, 4096):
            with pytest.raises(OSError, match="No space left"):
                _write_on(fd, bytes(piece))
    finally:
        os.close(fd)
    return filler


def _write_on(fd: int, piece: bytes) -> None:
    while True:
        os.write(fd, piece)


def _tell_no_lies(rig: Rig, when: str, *, bases: int, disks: int) -> None:
    """Nothing came of it, and nothing is left of it."""
    assert len(list(rig.cache().bases())) == bases, f"{when}: bases"
    assert len(list(rig.cache().root_disks())) == disks, f"{when}: disks"
    rig.check(when)
    rig.check_tidy(when)


def _full_at(small: Path, step: str, match: str, act: Callable[[], object]) -> ImageCacheError:
    """The error of ``act``, which finds the storage full from that step on; there is room again afterwards."""
    plan = FaultPlan()
    pause = plan.pause(step, match=match)
    with plan, ThreadPoolExecutor(1) as pool:
        acting = pool.submit(act)
        pause.wait()
        filler = _fill(small)
        pause.release()
        error = acting.exception(60)
    filler.unlink()
    assert isinstance(error, ImageCacheError), f"full at {step} {match}: {error!r}"
    return error


@pytest.mark.services
@pytest.mark.parametrize("kind", ["link", "link-native"])
@pytest.mark.parametrize("image_id", ["img", "packed"])
def test_full_during_the_download(kind: str, image_id: str, small: Path) -> None:
    """An image that was not announced as large fills the storage while it comes in."""
    rig = _rig(small, kind, SAMPLES)
    dense = images.raw("dense", MIB).guest[: MIB // 8] * 8 * 12
    fake = SAMPLES[image_id].fake
    data = dense if image_id == "img" else SAMPLES["packed"].served + dense
    source = FakeSource({image_id: replace(fake, data=data, size=None)})
    with pytest.raises(NoSpaceError) as caught:
        rig.cache(source).ensure_base(image_id)
    assert caught.value.image_id == image_id
    _tell_no_lies(rig, "full during the download", bases=0, disks=0)
    rig.cache().ensure_base(image_id)
    _tell_no_lies(rig, "there is room again", bases=1, disks=0)


@pytest.mark.services
@pytest.mark.parametrize(
    ("image_id", "step", "match"),
    [
        ("packed", "fs.write", "/disk"),
        ("packed", "fs.write", "disk.sums"),
        ("packed", "fs.write", "base.json"),
        ("foreign", "fs.create", "download"),
        ("foreign", "exec.run", "qemu-img convert"),
    ],
    ids=["decoding", "sums", "record", "download", "conversion"],
)
def test_full_while_a_base_is_made(image_id: str, step: str, match: str, small: Path) -> None:
    """Whichever step of a fetch finds the storage full, the image is not there and can be fetched later."""
    rig = _rig(small, "link", SAMPLES)
    error = _full_at(small, step, match, lambda: rig.cache().ensure_base(image_id))
    assert isinstance(error, NoSpaceError), f"full at {step} {match}: {error!r}"
    assert error.image_id == image_id
    _tell_no_lies(rig, f"full at {step} {match}", bases=0, disks=0)
    rig.cache().ensure_base(image_id)
    _tell_no_lies(rig, "there is room again", bases=1, disks=0)


@pytest.mark.services
@pytest.mark.parametrize(
    ("kind", "step", "match"),
    [
        ("link", "fs.write", "/vm/#"),  # how the kernel shows a file that has no name
        ("link", "exec.run", "qemu-img create"),
        ("path", "fs.write", "new"),
        ("path", "exec.run", "qemu-img create"),
        ("file", "fs.write", "record"),
        ("file", "fs.copy_range", "disk"),
    ],
    ids=["link-record", "link-overlay", "path-reference", "path-overlay", "copy-record", "copy"],
)
def test_full_while_a_disk_is_made(kind: str, step: str, match: str, small: Path) -> None:
    """Whichever step of making a disk finds the storage full, there is no disk and the base has no user."""
    rig = _rig(small, kind, SAMPLES)
    rig.cache().ensure_base("img")
    error = _full_at(small, step, match, lambda: rig.cache().create_root_disk("img", "vm", size=SIZE))
    assert isinstance(error, NoSpaceError), f"full at {step} {match}: {error!r}"
    assert (error.image_id, error.disk_id) == ("img", "vm")
    _tell_no_lies(rig, f"full at {step} {match}", bases=1, disks=0)
    assert rig.cache().users("img") == []
    rig.cache().create_root_disk("img", "vm", size=SIZE)
    _tell_no_lies(rig, "there is room again", bases=1, disks=1)


@pytest.mark.services
@pytest.mark.parametrize("backend", ["qcow2", "file"])
def test_space_cannot_be_reserved(backend: str, small: Path) -> None:
    """Preallocate = "space" of more than there is: an error, and no disk."""
    rig = _rig(small, "link" if backend == "qcow2" else "file", SAMPLES)
    rig.options = rig.options | {"preallocate": "space"}
    rig.cache().ensure_base("img")
    with pytest.raises(NoSpaceError) as caught:
        rig.cache().create_root_disk("img", "vm", size=64 * MIB)
    assert caught.value.disk_id == "vm"
    _tell_no_lies(rig, "not reserved", bases=1, disks=0)
    rig.cache().create_root_disk("img", "vm", size=SIZE)
    disk = rig.disks / "vm" / "disk"
    assert disk.stat().st_blocks * 512 >= SIZE, "every block is reserved"
    _tell_no_lies(rig, "reserved", bases=1, disks=1)


@pytest.mark.services
@pytest.mark.parametrize(
    "act",
    [
        lambda rig: rig.cache().flatten_root_disk("vm"),
        lambda rig: rig.cache().copy_base("img", rig.dir / "copy"),
        lambda rig: rig.cache().pin("img", "someone"),
    ],
    ids=["flatten", "copy-base", "pin"],
)
def test_full_for_other_things(act: Callable[[Rig], object], small: Path) -> None:
    """Flattening, copying and pinning on a full storage fail clearly and change nothing."""
    rig = _rig(small, "link", SAMPLES)
    rig.cache().create_root_disk("img", "vm", size=SIZE)
    filler = _fill(small)
    with pytest.raises(NoSpaceError):
        act(rig)
    rig.check("full")
    filler.unlink()
    rig.check_tidy("full")
    assert rig.cache().get_root_disk("vm").reference == "link"
    assert not (small / "copy").exists()
    act(rig)
    rig.check("there is room again")
    rig.check_tidy("there is room again")


@pytest.mark.services
def test_hits_and_removals_work_on_a_full_storage(small: Path) -> None:
    """What frees space, or takes none, works when there is none."""
    rig = _rig(small, "link", SAMPLES)
    with rig.cache() as cache:
        cache.create_root_disk("img", "vm", size=SIZE)
        _fill(small)
        cache.ensure_base("img")
        cache.recover()
        cache.remove_root_disk("vm")
        report = cache.cleanup(cache.plan_cleanup(max_idle=0))
        assert report.removed == ("img",)
    rig.check_tidy("full")


@pytest.mark.services
def test_a_root_on_a_full_storage(small: Path) -> None:
    """A cache that cannot even make its root says so, and works when there is room."""
    rig = _rig(small, "link", SAMPLES)
    filler = _fill(small)
    with pytest.raises(NoSpaceError, match=f"the cache root {rig.root} cannot be made: no space left"):
        rig.cache().ensure_base("img")
    filler.unlink()
    rig.cache().ensure_base("img")
    _tell_no_lies(rig, "there is room again", bases=1, disks=0)


@pytest.mark.services
def test_a_storage_that_turned_read_only(small: Path) -> None:
    """After an error the kernel mounts a filesystem read-only: hits go on, the rest is a BackendError."""
    rig = _rig(small, "link", SAMPLES)
    rig.cache().ensure_base("img")
    cache = rig.cache()
    cache.ensure_base("img")
    subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
    try:
        assert cache.ensure_base("img").image_id == "img"
        for act in (
            lambda: cache.create_root_disk("img", "vm", size=SIZE),
            lambda: cache.ensure_base("packed"),
            lambda: cache.pin("img", "someone"),
        ):
            with pytest.raises(BackendError):
                act()
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(small)], check=True)
    cache.create_root_disk("img", "vm", size=SIZE)
    _tell_no_lies(rig, "writable again", bases=1, disks=1)


# --- images that unpack to more than there is


@pytest.mark.services
@pytest.mark.parametrize(
    ("config", "size", "expected"),
    [
        ({"max_virtual_size": 500 * MIB}, None, ImageRejectedError),
        ({}, 500 * MIB, DiskTooSmallError),
        ({}, None, NoSpaceError),
    ],
    ids=["cap", "disk", "space"],
)
def test_a_bomb_is_not_unpacked(
    config: dict[str, Any], size: int | None, expected: type[ImageCacheError], small: Path
) -> None:
    """1 MB that unpacks to 600 MB is refused before qemu-img unpacks it: less than the room of 10 MiB is written."""
    served = images.bomb(BOMB)
    assert len(served) < 2 * MIB
    rig = _rig(small, "link", {"img": Sample(guest=b"", served=served, disk_format="qcow2")})
    with FaultPlan() as plan, pytest.raises(expected) as caught:
        rig.cache(**config).create_root_disk("img", "vm", size=size)
    assert not [step for step in plan.trace if "qemu-img convert" in step.targets]
    if isinstance(caught.value, NoSpaceError):
        assert caught.value.needed is not None
        assert caught.value.needed >= BOMB
        assert caught.value.free is not None
        assert caught.value.free <= ROOM
    _tell_no_lies(rig, f"a bomb and {config}", bases=0, disks=0)


# --- limits


def test_min_free_bytes_is_kept(tmp_path: Path) -> None:
    """What must stay free is not taken; the refusal says how much was needed and how much there was."""
    rig = Rig(tmp_path, "link", SAMPLES)
    source = rig.source()
    with pytest.raises(NoSpaceError) as caught:
        rig.cache(source, min_free_bytes=2**60).ensure_base("img")
    assert (caught.value.needed, caught.value.free, caught.value.limit) == (2 * MIB, 0, "min_free_bytes")
    assert source.opens == 0, "refused before a byte came"
    _tell_no_lies(rig, "min_free_bytes", bases=0, disks=0)


def test_max_bytes_is_kept(tmp_path: Path) -> None:
    """What the cache may take is not exceeded; the refusal says what was needed, what is left and what is taken."""
    rig = Rig(tmp_path, "link", SAMPLES | {"second": images.raw("three")})
    source = rig.source()
    with rig.cache(source, max_bytes=int(2.2 * MIB)) as cache:
        cache.ensure_base("img")
        taken = cache.usage().bases
        with pytest.raises(NoSpaceError) as caught:
            cache.ensure_base("second")
        error = caught.value
        assert (error.needed, error.limit, error.in_use, error.recent) == (2 * MIB, "max_bytes", 0, taken)
        # the refused fetch's own directories in staging are counted as well
        assert error.free is not None
        assert 0 <= int(2.2 * MIB) - taken - error.free <= 4 * 4096
        assert source.opens == 1
        cache.remove_base("img")
        cache.ensure_base("second")
    _tell_no_lies(rig, "max_bytes", bases=1, disks=0)

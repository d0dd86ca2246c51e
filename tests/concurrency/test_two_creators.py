"""Two processes make one disk at once: one wins, and the disk is the winner's whole work."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from harness import images
from harness.children import child
from harness.images import MIB
from harness.rig import Rig, check_disk_file
from harness.waiting import until
from nova_imagecache import DiskExistsError, FileLocation, RootDisk
from nova_imagecache.testing import FaultPlan

ROUNDS = 25
SIZE = 4 * MIB
SAMPLES = {"one": images.raw("first"), "two": images.raw("second")}


def _race(rig: Rig, act: Callable[[str, str], RootDisk], images_of: tuple[str, str]) -> list[list[RootDisk | None]]:
    """What each of two processes got in each round, None: DiskExistsError. They start each round together."""

    def play(me: int) -> list[RootDisk | None]:
        got: list[RootDisk | None] = []
        for number in range(ROUNDS):
            (rig.dir / f"ready-{number}-{me}").touch()
            other = rig.dir / f"ready-{number}-{1 - me}"
            until(other.exists, f"the other in round {number}")
            try:
                got.append(act(images_of[me], f"vm-{number}"))
            except DiskExistsError:
                got.append(None)
        return got

    with child(lambda: play(0)) as first, child(lambda: play(1)) as second:
        return [first.result(), second.result()]


def _check_winners(rig: Rig, got: list[list[RootDisk | None]]) -> None:
    """Every disk reads as the image of whoever got it."""
    for number, pair in enumerate(zip(*got, strict=True)):
        winners = [disk for disk in pair if disk is not None]
        assert winners, f"round {number}: nobody got the disk"
        assert all(disk == winners[0] for disk in winners), f"round {number}: they got different disks"
        disk = rig.cache().get_root_disk(f"vm-{number}")
        assert disk == winners[0], f"round {number}: the disk is not what its maker was told"
        assert isinstance(disk.location, FileLocation)
        guest = rig.samples[disk.image_id].guest
        check_disk_file(disk.location.path, disk.format, guest, rig.dir, f"round {number}: made of {disk.image_id}")


@pytest.mark.parametrize("kind", ["link", "path", "file"])
@pytest.mark.parametrize("images_of", [("one", "one"), ("one", "two")], ids=["same-image", "two-images"])
def test_two_processes_make_one_disk(kind: str, images_of: tuple[str, str], tmp_path: Path) -> None:
    """Of one image both get the disk; of two images one wins and the other is told that it exists."""
    rig = Rig(tmp_path, kind, SAMPLES)
    with rig.cache() as cache:
        cache.ensure_bases(["one", "two"])
    got = _race(rig, lambda image, disk: rig.cache().create_root_disk(image, disk, size=SIZE), images_of)
    refused = [sum(disk is None for disk in pair) for pair in zip(*got, strict=True)]
    assert refused == [int(len(set(images_of)) == 2)] * ROUNDS
    _check_winners(rig, got)
    rig.check_tidy("after all rounds")


@pytest.mark.parametrize("kind", ["link", "path", "file"])
@pytest.mark.parametrize("images_of", [("one", "one"), ("one", "two")], ids=["same-image", "two-images"])
def test_the_backend_needs_no_lock(kind: str, images_of: tuple[str, str], tmp_path: Path) -> None:
    """Without the core's lock, too, exactly one makes the disk and the other is refused."""
    rig = Rig(tmp_path, kind, SAMPLES)
    rig.cache().ensure_bases(["one", "two"])

    def make(image_id: str, disk_id: str) -> RootDisk:
        backend = rig.backend()
        base = backend.find_base(image_id)
        assert base is not None
        return backend.create_root_disk(base, disk_id, "disk", SIZE)

    got = _race(rig, make, images_of)
    assert [sum(disk is None for disk in pair) for pair in zip(*got, strict=True)] == [1] * ROUNDS
    _check_winners(rig, got)
    rig.check_tidy("after all rounds")


@pytest.mark.parametrize("kind", ["link", "path", "file"])
def test_a_disk_that_appears_is_never_overwritten(kind: str, tmp_path: Path) -> None:
    """Somebody who asks no lock puts a disk there in the last moment: it stays, and the maker is refused."""
    rig = Rig(tmp_path, kind, SAMPLES)
    rig.cache().ensure_base("one")
    stranger = rig.disks / "vm" / "disk"

    def make() -> None:
        plan = FaultPlan()
        # an overlay has no name until then; its record gets one before
        step, nth, match = ("fs.link", 2, "/.disk.") if kind == "file" else ("fs.give_name", 2, "/vm/disk")
        pause = plan.pause(step, nth=nth, match=match)
        pause.timeout = 60
        with plan:

            def appear() -> None:
                pause.wait()
                stranger.write_bytes(b"a stranger's disk")
                pause.release()

            other = threading.Thread(target=appear)
            other.start()
            try:
                rig.cache().create_root_disk("one", "vm", size=SIZE)
            finally:
                other.join()

    with pytest.raises(DiskExistsError):
        make()
    assert stranger.read_bytes() == b"a stranger's disk"


def test_two_names_of_one_instance(tmp_path: Path) -> None:
    """Two disks of one instance, made at once, do not disturb each other."""
    rig = Rig(tmp_path, "link", SAMPLES)
    rig.cache().ensure_bases(["one", "two"])

    def make(image_id: str, name: str) -> list[RootDisk]:
        return [rig.cache().create_root_disk(image_id, f"vm-{number}", name=name) for number in range(ROUNDS)]

    with child(lambda: make("one", "disk")) as first, child(lambda: make("two", "disk.rescue")) as other:
        assert len(first.result()) == len(other.result()) == ROUNDS
    rig.check("after both")
    rig.check_tidy("after both")
    assert subprocess.run(["ls", str(rig.disks)], check=True, capture_output=True).stdout.count(b"vm-") == ROUNDS

"""kill -9, a failure, or a recovery at every step of an attach that changes format, reference or image."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from pathlib import Path

import pytest

from conftest import InChild
from harness import images
from harness.children import run_to_death
from harness.deaths import Moment, Operation, beginning, deaths, kill_at_every_step, open_root, under
from harness.images import MIB
from harness.rig import Rig
from nova_imagecache import DiskExistsError, DiskInUseError, ImageCacheError
from nova_imagecache.testing import FaultPlan

SIZE = 4 * MIB
SAMPLE = images.qcow2("packed")

CASES = (
    # another format of the same image's base, as when `base_format` was changed meanwhile
    ("link", "img", "link-native"),
    ("link-native", "img", "link"),
    # another image of the same bytes
    ("link", "twin", "link"),
    ("link", "twin", "path"),
    ("link", "twin", "link-native"),
    ("link", "twin", "path-native"),
    ("path", "twin", "path"),
    ("path", "twin", "link"),
    ("path", "twin", "link-native"),
)
"""Of what kind a disk was, to which image's base it is attached, and of what kind the cache is then."""

FEW = (("path", "twin", "path"), ("path", "twin", "link-native"))
"""Those with the most to settle: references of two images, and two formats."""


def _names(cases: tuple[tuple[str, str, str], ...]) -> list[str]:
    return ["-to-".join(case) for case in cases]


def _operation(former: str, image_id: str, kind: str) -> Operation:
    return Operation(
        act=lambda rig: rig.cache().attach_root_disk(image_id, "vm"),
        prepare=_make_disk_of(former, image_id),
        kinds=(kind,),
        done=_is_attached(image_id),
    )


def _make_disk_of(kind: str, image_id: str) -> Callable[[Rig], None]:
    """A disk of a cache of that kind, and the base that it is to be attached to."""

    def prepare(rig: Rig) -> None:
        open_root(rig)
        former = Rig(rig.dir, kind, rig.samples)
        former.cache().create_root_disk("img", "vm", size=SIZE)
        backend = former.backend()
        base = backend.find_base("img")
        assert base is not None
        retired = backend.retire_base(base)
        rig.samples[image_id] = SAMPLE
        rig.cache().ensure_base(image_id)
        if image_id == "img":
            backend.purge_base(retired)
        else:
            backend.restore_base(retired)

    return prepare


def _is_attached(image_id: str) -> Callable[[Rig, str], None]:
    def done(rig: Rig, when: str) -> None:
        disk = rig.cache().get_root_disk("vm")
        assert disk.image_id == image_id, when
        # from one format to another it goes by way of the path
        allowed = [rig.options["reference"]] if when == "undisturbed" else [rig.options["reference"], "path"]
        assert disk.reference in allowed, when

    return done


def _rig(directory: Path, kind: str) -> Rig:
    return Rig(directory / "rig", kind, {"img": SAMPLE})


def _users(rig: Rig) -> dict[str, int]:
    with rig.cache() as cache:
        return {base.image_id: len(cache.users(base.image_id)) for base in cache.bases()}


@pytest.mark.parametrize(("former", "image_id", "kind"), CASES, ids=_names(CASES))
def test_kill_at_every_step(former: str, image_id: str, kind: str, quick_path: Path) -> None:
    """The disk reads as before or as attached, and after recover() its base has one user and the other one none."""
    operation = _operation(former, image_id, kind)
    kill_at_every_step(operation, _rig(quick_path, kind), f"attach of {former} to {image_id}")


def _each_death(former: str, image_id: str, kind: str, directory: Path) -> Iterator[tuple[Rig, str]]:
    """The cache after each death, and which one that was."""
    operation = _operation(former, image_id, kind)
    start = beginning(operation, _rig(directory, kind))
    for step, moment in deaths(operation, start.again()):
        rig = start.again()
        when = f"attach of {former} with {kind}, killed {moment} step {step}"
        assert run_to_death(partial(under, FaultPlan().kill(step.index, when=moment), operation.act, rig), when), when
        yield rig, when


@pytest.mark.parametrize(("former", "image_id", "kind"), FEW, ids=_names(FEW))
def test_a_removal_after_a_kill_at_every_step(former: str, image_id: str, kind: str, quick_path: Path) -> None:
    """A disk that goes before anybody recovers leaves neither base a user."""
    for rig, when in _each_death(former, image_id, kind, quick_path):
        rig.cache().remove_root_disk("vm")
        assert not list(rig.root.glob("users/*/*")), when
        rig.cache().recover()
        rig.check_tidy(when)
        assert _users(rig) == {"img": 0, "twin": 0}, when


@pytest.mark.parametrize(("former", "image_id", "kind"), FEW, ids=_names(FEW))
def test_a_flatten_after_a_kill_at_every_step(former: str, image_id: str, kind: str, quick_path: Path) -> None:
    """A disk that is made to stand alone before anybody recovers leaves neither base a user."""
    for rig, when in _each_death(former, image_id, kind, quick_path):
        rig.cache().flatten_root_disk("vm")
        rig.cache().recover()
        rig.check_tidy(when)
        rig.check(when)
        assert _users(rig) == {"img": 0, "twin": 0}, when


def test_a_recovery_that_dies_at_every_step_after_an_attach_that_died(quick_path: Path) -> None:
    """Whatever it leaves, the next recovery settles."""
    recovery = Operation(act=lambda rig: rig.cache().recover(), kinds=(), done=lambda rig, when: None)
    for rig, when in islice(_each_death("path", "twin", "link-native", quick_path), 3, None, 4):
        death = Moment(rig, quick_path / "death")
        for step, moment in deaths(recovery, death.again()):
            death.again()
            plan = FaultPlan().kill(step.index, when=moment)
            assert run_to_death(partial(under, plan, recovery.act, rig), when), when
            rig.check(f"{when}, and recover() {moment} {step}")
            assert not rig.cache().recover().failed, when
            rig.check(f"{when}, and recover() {moment} {step}, recovered")
            rig.check_tidy(f"{when}, and recover() {moment} {step}, recovered")


@pytest.mark.parametrize(("former", "image_id", "kind"), FEW, ids=_names(FEW))
def test_a_recovery_beside_an_attach_at_every_step(former: str, image_id: str, kind: str, quick_path: Path) -> None:
    """It takes nothing that a live attach has made or is about to need."""
    operation = _operation(former, image_id, kind)
    start = beginning(operation, _rig(quick_path, kind))
    for step, moment in deaths(operation, start.again()):
        rig = start.again()
        when = f"attach of {former} with {kind}, recovered {moment} step {step}"
        plan = FaultPlan()
        pause = plan.pause(step.index, when=moment)
        with plan, ThreadPoolExecutor(1) as pool:
            attaching = pool.submit(operation.act, rig)
            try:
                pause.wait()
                references = sorted(rig.root.glob("users/*/*"))
                assert not rig.cache().recover().failed, when
                assert sorted(rig.root.glob("users/*/*")) == references, when
            finally:
                pause.release()
            attaching.result()
        operation.done(rig, "undisturbed")
        rig.check(when)
        rig.check_tidy(when)


@pytest.mark.parametrize(("former", "image_id", "kind"), FEW, ids=_names(FEW))
def test_a_failure_at_every_step(former: str, image_id: str, kind: str, quick_path: Path) -> None:
    """The disk reads as before or as attached, and recover() settles the rest."""
    operation = _operation(former, image_id, kind)
    start = beginning(operation, _rig(quick_path, kind))
    steps = [step for step, moment in deaths(operation, start.again()) if moment == "before"]
    for step in steps:
        rig = start.again()
        when = f"attach of {former} with {kind}, failed at step {step}"
        with suppress(ImageCacheError):
            under(FaultPlan().fail(step.index), operation.act, rig)
        rig.check(when)
        assert not rig.cache().recover().failed, when
        rig.check(when)
        rig.check_tidy(when)
        operation.act(rig)
        operation.done(rig, when)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_what_cannot_be_told_stays_until_it_can(quick_path: Path, in_child: InChild) -> None:
    """A disk whose attach died, and whose guest's user owns it by now: both bases stay until its header can be read."""
    rig = _rig(quick_path, "path")
    rig.dir.mkdir()
    os.chown(quick_path, 65534, 65534)
    os.chown(rig.dir, 65534, 65534)
    in_child(partial(_make_disk_of("path", "twin"), rig), unprivileged=True)
    rig.samples["twin"] = SAMPLE
    plan = FaultPlan().kill("fs.unlink", match="users/img")

    def die() -> None:
        assert run_to_death(partial(under, plan, lambda rig: rig.cache().attach_root_disk("twin", "vm"), rig), "")

    in_child(die, unprivileged=True)
    disk = rig.disks / "vm" / "disk"
    owner = disk.stat()
    os.chown(disk, 0, 0)
    for _again in range(2):
        assert not in_child(lambda: rig.cache().recover().failed, unprivileged=True)
        assert sorted(path.parent.name for path in rig.root.glob("users/*/*")) == ["img", "twin"]
    os.chown(disk, owner.st_uid, owner.st_gid)
    in_child(lambda: rig.cache().recover() and None, unprivileged=True)
    rig.check_tidy("it can be read again")
    rig.check("it can be read again")


@contextmanager
def _running(disk: Path) -> Iterator[None]:
    """Somebody has the disk open as a guest's QEMU."""
    argv = ["qemu-io", "-f", "qcow2", str(disk)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        holder.stdin.write(b"length\n")
        holder.stdin.flush()
        holder.stdout.readline()
        try:
            yield
        finally:
            holder.stdin.close()
            holder.wait(20)


@pytest.mark.parametrize(("former", "image_id", "kind"), [case for case in CASES if case != ("link", "twin", "link")])
def test_an_attach_of_a_running_guest_changes_nothing(former: str, image_id: str, kind: str, quick_path: Path) -> None:
    """It is refused, and at the guest's next start the disk reads what it did."""
    rig = _rig(quick_path, kind)
    rig.dir.mkdir()
    _make_disk_of(former, image_id)(rig)
    before, record = _users(rig), (rig.disks / "vm" / "disk.json").read_bytes()
    with _running(rig.disks / "vm" / "disk"), rig.cache() as cache, pytest.raises(DiskInUseError):
        cache.attach_root_disk(image_id, "vm")
    rig.check("attached while the guest ran")
    assert (_users(rig), (rig.disks / "vm" / "disk.json").read_bytes()) == (before, record)
    rig.check_tidy("attached while the guest ran")


def test_another_format_waits_for_who_reads_the_link(quick_path: Path) -> None:
    """A snapshot that reads the link names the format that it has: the link stays, and what the snapshot reads."""
    rig = _rig(quick_path, "link-native")
    rig.dir.mkdir()
    _make_disk_of("link", "img")(rig)
    link = rig.disks / "vm" / "disk.base"
    inode = link.stat().st_ino
    images.qemu_img("create", "-q", "-f", "qcow2", "-F", "raw", "-b", link.name, str(link.with_name("disk.snap")))
    with rig.cache() as cache, pytest.raises(DiskExistsError, match="snap"):
        cache.attach_root_disk("img", "vm")
    assert link.stat().st_ino == inode
    rig.check("refused")

"""kill -9 at every step of every operation: what is there is whole, the operation works again, recover() tidies up."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from harness import images
from harness.children import child, run_to_death
from harness.images import MIB
from harness.rig import KINDS, Rig
from harness.waiting import until
from nova_imagecache import BaseNotFoundError, DiskExistsError, FileLocation, ImageCacheError
from nova_imagecache.testing import FaultPlan, Step
from nova_imagecache.testing._faults import When

SIZE = 4 * MIB
OLD = images.raw("old bytes of the id")
SAMPLES = {"img": images.raw("one"), "packed": images.qcow2("two")}


def _nothing(rig: Rig) -> None:
    """There is not even a root."""


def _open(rig: Rig) -> None:
    """There is an empty cache: the steps that make its root are tried once, not with each operation."""
    rig.cache().recover()


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One thing that a driver does: ``prepare`` makes what it starts from, ``done`` asserts what it came to.

    ``finished`` are the errors that a second call may raise where the first one had done its work; ``mends``: what it
    starts from is not whole.
    """

    act: Callable[[Rig], object]
    kinds: tuple[str, ...]
    done: Callable[[Rig, str], None]
    prepare: Callable[[Rig], object] = field(default=_open)
    finished: tuple[type[ImageCacheError], ...] = ()
    mends: bool = False


# --- the operations


def _ensure(image_id: str) -> Callable[[Rig], object]:
    return lambda rig: rig.cache().ensure_base(image_id)


def _create(image_id: str) -> Callable[[Rig], object]:
    return lambda rig: rig.cache().create_root_disk(image_id, "vm", size=SIZE)


def _make_and_remove_disk(image_id: str) -> Callable[[Rig], object]:
    """The base is there, and what is made with the first of its disks."""

    def prepare(rig: Rig) -> None:
        _create(image_id)(rig)
        rig.cache().remove_root_disk("vm")

    return prepare


def _has_base(image_id: str) -> Callable[[Rig, str], None]:
    def done(rig: Rig, when: str) -> None:
        base = rig.cache().get_base(image_id)
        assert base.digest == rig.samples[image_id].digest, f"{when}: the base is of other bytes"

    return done


def _has_disk(rig: Rig, when: str) -> None:
    disk = rig.cache().get_root_disk("vm")
    assert disk.virtual_size == SIZE, when
    wanted = "none" if not rig.references else rig.options["reference"]
    assert disk.reference == wanted, when


def _has_no_disk(rig: Rig, when: str) -> None:
    with rig.cache() as cache:
        assert list(cache.root_disks()) == [], f"{when}: the disk is still there"
        assert cache.users("img") == [], f"{when}: the base still has users"


def _is_resized(rig: Rig, when: str) -> None:
    assert rig.cache().get_root_disk("vm").virtual_size == 2 * SIZE, when


def _stands_alone(rig: Rig, when: str) -> None:
    with rig.cache() as cache:
        assert cache.get_root_disk("vm").reference == "none", when
        assert cache.users("img") == [], f"{when}: the base still has users"


def _bring_disk_from_elsewhere(rig: Rig) -> None:
    """A disk with its record, copied from another host; the base is not here yet."""
    _open(rig)
    other = Rig(rig.dir / "elsewhere", rig.kind, rig.samples)
    other.dir.mkdir()
    disk = other.cache().create_root_disk("img", "vm", size=SIZE)
    assert isinstance(disk.location, FileLocation)
    directory = rig.disks / "vm"
    directory.mkdir(parents=True)
    for name in ("disk", "disk.json"):
        shutil.copy(disk.location.path.parent / name, directory / name)
    shutil.rmtree(other.dir)


def _renew_base(rig: Rig) -> None:
    """The base was removed and came again: a disk with a link holds the bytes by another inode."""
    _create("img")(rig)
    backend = rig.backend()
    base = backend.find_base("img")
    assert base is not None
    backend.purge_base(backend.retire_base(base))
    _ensure("img")(rig)


def _lose_base(rig: Rig) -> None:
    """The base is gone, and its disks are not."""
    _create("img")(rig)
    backend = rig.backend()
    base = backend.find_base("img")
    assert base is not None
    backend.purge_base(backend.retire_base(base))


def _cleanup(rig: Rig) -> None:
    with rig.cache() as cache:
        cache.recover()  # as a service does when it starts: what was only retired has its name back
        report = cache.cleanup(cache.plan_cleanup(max_idle=0))
        assert not report.failed, report


def _remove_base(rig: Rig) -> None:
    with rig.cache() as cache:
        cache.recover()
        cache.remove_base("img")


def _cut_base_off(rig: Rig) -> None:
    """A base that cannot be read: a damaged filesystem, or a careless hand."""
    _ensure("img")(rig)
    disk = rig.backend().base_path("img")
    disk.chmod(0o644)
    os.truncate(disk, disk.stat().st_size - 512)


def _is_clean(rig: Rig, when: str) -> None:
    assert list(rig.cache().bases()) == [], f"{when}: the base is still there"


def _make_two_bases(rig: Rig) -> None:
    for image_id in rig.samples:
        _ensure(image_id)(rig)


def _cache_old_bytes(rig: Rig) -> None:
    """The id has other bytes in the cache; with links, a disk holds them."""
    new = rig.samples["img"]
    rig.samples["img"] = OLD
    _ensure("img")(rig)
    if "path" not in rig.kind:
        rig.cache().create_root_disk("img", "older", size=SIZE)
        rig.truth["older"] = OLD
    rig.samples["img"] = new


def _replace(rig: Rig) -> None:
    rig.cache().ensure_base("img", expect=rig.samples["img"].digest)


def _is_pinned(rig: Rig, when: str) -> None:
    assert [pin.owner for pin in rig.cache().pins("img")] == ["someone"], when


def _is_copied(rig: Rig, when: str) -> None:
    assert (rig.dir / "kernel").read_bytes() == rig.samples["img"].served, f"{when}: the copy is not whole"


def _damage(rig: Rig) -> None:
    _ensure("img")(rig)
    path = rig.root / "bases" / "img" / "disk"
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.write(b"damage")


def _verify(rig: Rig) -> None:
    with suppress(ImageCacheError):  # it is damaged: the error is the answer
        rig.cache().verify_base("img")


def _under(plan: FaultPlan, act: Callable[[Rig], object], rig: Rig) -> None:
    with plan:
        act(rig)


def _leave_litter(rig: Rig) -> None:
    """What deaths in four operations leave."""
    _ensure("img")(rig)
    plan = FaultPlan().kill("fs.give_name", match="/disk", nth=2)
    assert run_to_death(lambda: _under(plan, _create("img"), rig), "litter of a creation")
    plan = FaultPlan().kill("fs.rename", match="bases/packed")
    assert run_to_death(lambda: _under(plan, _ensure("packed"), rig), "litter of a fetch")
    plan = FaultPlan().kill("fs.rmtree", match="trash")
    rig.cache().remove_root_disk("vm")
    assert run_to_death(lambda: _under(plan, _cleanup, rig), "litter of a cleanup")


def _no(found: object, when: str) -> None:
    assert not found, f"{when}: {found}"


REFERENCES = ("link", "path")
ALL = ("link", "path", "file")

OPERATIONS = {
    "ensure-raw": Operation(act=_ensure("img"), prepare=_nothing, kinds=("link",), done=_has_base("img")),
    "ensure-converted": Operation(act=_ensure("packed"), kinds=("link",), done=_has_base("packed")),
    "ensure-native": Operation(act=_ensure("packed"), kinds=("link-native",), done=_has_base("packed")),
    "create-cold": Operation(act=_create("img"), kinds=("link",), done=_has_disk),
    "create-first": Operation(
        act=_create("packed"), prepare=_ensure("packed"), kinds=("link", "path", "link-native"), done=_has_disk
    ),
    "create-warm": Operation(
        act=_create("packed"),
        prepare=_make_and_remove_disk("packed"),
        kinds=(*ALL, "link-native", "path-native", "file-native"),
        done=_has_disk,
    ),
    "create-again": Operation(act=_create("img"), prepare=_lose_base, kinds=("path",), done=_has_disk, mends=True),
    "remove-disk": Operation(
        act=lambda rig: rig.cache().remove_root_disk("vm"), prepare=_create("img"), kinds=ALL, done=_has_no_disk
    ),
    "resize": Operation(
        act=lambda rig: rig.cache().resize_root_disk("vm", size=2 * SIZE),
        prepare=_create("img"),
        kinds=("link", "file"),
        done=_is_resized,
    ),
    "flatten": Operation(
        act=lambda rig: rig.cache().flatten_root_disk("vm"),
        prepare=_create("img"),
        kinds=REFERENCES,
        done=_stands_alone,
    ),
    "attach-arrived": Operation(
        act=lambda rig: rig.cache().attach_root_disk("img", "vm"),
        prepare=_bring_disk_from_elsewhere,
        kinds=ALL,
        done=_has_disk,
        mends=True,
    ),
    "attach-renewed": Operation(
        act=lambda rig: rig.cache().attach_root_disk("img", "vm"), prepare=_renew_base, kinds=ALL, done=_has_disk
    ),
    "cleanup": Operation(act=_cleanup, prepare=_make_two_bases, kinds=("link",), done=_is_clean),
    "remove-base": Operation(
        act=_remove_base,
        prepare=_ensure("img"),
        kinds=("link",),
        done=_is_clean,
        finished=(BaseNotFoundError,),
    ),
    "remove-unreadable": Operation(
        act=_remove_base,
        prepare=_cut_base_off,
        kinds=("link",),
        done=lambda rig, when: _no(list((rig.root / "bases").iterdir()), when),
        finished=(BaseNotFoundError,),
    ),
    "replace": Operation(act=_replace, prepare=_cache_old_bytes, kinds=ALL, done=_has_base("img")),
    "pin": Operation(act=lambda rig: rig.cache().pin("img", "someone"), kinds=("link",), done=_is_pinned),
    "unpin": Operation(
        act=lambda rig: rig.cache().unpin("img", "someone"),
        prepare=lambda rig: rig.cache().pin("img", "someone"),
        kinds=("link",),
        done=lambda rig, when: _no(rig.cache().pins("img"), when),
    ),
    "copy-base": Operation(
        act=lambda rig: rig.cache().copy_base("img", rig.dir / "kernel"),
        prepare=_ensure("img"),
        kinds=("link",),
        done=_is_copied,
        finished=(DiskExistsError,),
    ),
    "verify-damaged": Operation(act=_verify, prepare=_damage, kinds=("link",), done=_is_clean, mends=True),
    "check": Operation(act=lambda rig: rig.cache().check(), kinds=("link",), done=lambda rig, when: None),
    "recover": Operation(
        act=lambda rig: rig.cache().recover(),
        prepare=_leave_litter,
        kinds=REFERENCES,
        done=lambda rig, when: rig.check_tidy(when),
    ),
}

CASES = [(name, kind) for name, operation in OPERATIONS.items() for kind in operation.kinds]


# --- the test


def _again(operation: Operation, rig: Rig) -> None:
    with suppress(*operation.finished):
        operation.act(rig)


class Moment:
    """A cache as it was at one moment, copied to the same place again and again: paths are in it."""

    def __init__(self, rig: Rig, kept: Path) -> None:
        self._rig = rig
        self._kept = kept
        if kept.exists():
            shutil.rmtree(kept)
        rig.dir.rename(kept)

    def again(self) -> Rig:
        """The cache as it was then."""
        if self._rig.dir.exists():
            shutil.rmtree(self._rig.dir)
        # hard links stay links
        subprocess.run(["cp", "-a", str(self._kept), str(self._rig.dir)], check=True)
        return self._rig


def _beginning(operation: Operation, directory: Path, kind: str) -> Moment:
    """What the operation starts from."""
    rig = Rig(directory / "rig", kind, SAMPLES)
    rig.dir.mkdir()
    operation.prepare(rig)
    return Moment(rig, directory / "beginning")


class Watch(FaultPlan):
    """Sees what a directory holds before each step."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory = directory
        self.states: list[list[tuple[object, ...]]] = []

    def _count(self, module: str, name: str, targets: tuple[str, ...]) -> list[int]:
        self.states.append(_state(self._directory))
        return super()._count(module, name, targets)


def _state(directory: Path) -> list[tuple[object, ...]]:
    """All that a death leaves: what is there, and what it holds."""
    state: list[tuple[object, ...]] = []
    for path in sorted(directory.rglob("*")):
        try:
            found = path.lstat()
            content = path.read_bytes() if path.is_file() else b""
        except FileNotFoundError:  # another thread is at work
            continue
        words = (found.st_ino, found.st_mode, found.st_nlink, found.st_uid, found.st_gid, found.st_size)
        state.append((str(path), *words, found.st_mtime_ns, hashlib.blake2b(content).digest()))
    return state


def _deaths(operation: Operation, rig: Rig) -> list[tuple[Step, When]]:
    """The steps to die at: a death leaves the same before two steps between which nothing has changed."""
    with Watch(rig.dir) as watch:
        operation.act(rig)
    operation.done(rig, "undisturbed")
    rig.check("undisturbed")
    rig.check_tidy("undisturbed")
    assert watch.trace, "the operation takes no step that a plan sees"
    before = [None, *watch.states]
    deaths: list[tuple[Step, When]] = [
        (step, "before") for step, was, state in zip(watch.trace, before, watch.states, strict=False) if was != state
    ]
    return [*deaths, (watch.trace[-1], "after")]


@pytest.mark.parametrize(("name", "kind"), CASES, ids=[f"{name}-{kind}" for name, kind in CASES])
def test_kill_at_every_step(name: str, kind: str, quick_path: Path) -> None:
    """Whatever step a process dies at: all that is there is whole, the same call works, recover() leaves no litter."""
    operation = OPERATIONS[name]
    beginning = _beginning(operation, quick_path, kind)
    for step, moment in _deaths(operation, beginning.again()):
        rig = beginning.again()
        when = f"{name} with {kind}, killed {moment} step {step}"
        plan = FaultPlan().kill(step.index, when=moment)
        killed = run_to_death(partial(_under, plan, operation.act, rig), when)
        assert killed, f"{when}: that step was not reached"
        death = Moment(rig, quick_path / "death")
        for recover_first in (False, True):
            _judge(operation, death.again(), when, recover_first=recover_first)


def _judge(operation: Operation, rig: Rig, when: str, *, recover_first: bool) -> None:
    try:
        if recover_first:
            report = rig.cache().recover()
            assert not report.failed, f"{when}: recover() failed: {report}"
            assert not report.alive, f"{when}: recover() took the dead for alive: {report}"
            when = f"{when}, recovered"
            rig.check_tidy(when, arrived=operation.mends)
        if not operation.mends:
            rig.check(when)
        _again(operation, rig)
        when = f"{when}, called again"
        operation.done(rig, when)
        if not recover_first:
            report = rig.cache().recover()
            assert not report.failed, f"{when}: recover() failed: {report}"
            when = f"{when}, recovered"
        rig.check(when)
        rig.check_tidy(when)
        operation.done(rig, when)
    except ImageCacheError as err:
        err.add_note(when)
        raise


# --- death in the middle of a child process


def _children_of(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def _command(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return []


def test_kill_while_qemu_img_converts(tmp_path: Path) -> None:
    """A process that dies while qemu-img works for it takes qemu-img along, and what was written is swept."""
    guest = b"a" * (256 * MIB)
    source, packed = tmp_path / "raw", tmp_path / "packed"
    source.write_bytes(guest)
    images.qemu_img("convert", "-O", "vmdk", "-o", "subformat=streamOptimized", "-f", "raw", str(source), str(packed))
    sample = images.Sample(guest=guest, served=packed.read_bytes(), disk_format="vmdk")
    rig = Rig(tmp_path, "link", {"img": sample})
    with child(lambda: rig.cache().ensure_base("img") and None) as process:

        def converting() -> int:
            return next((pid for pid in _children_of(process.pid) if "convert" in _command(pid)), 0)

        tool = until(converting, "qemu-img convert")
        until(lambda: any(path.stat().st_blocks > 8 for path in rig.root.glob("staging/*/disk")), "converted bytes")
        process.kill()
    until(lambda: "convert" not in _command(tool), "the end of qemu-img")
    assert rig.cache().recover().failed == {}
    rig.check("killed while qemu-img converts, recovered")
    rig.check_tidy("killed while qemu-img converts, recovered")
    assert list(rig.cache().bases()) == []
    rig.cache().ensure_base("img")
    rig.check("killed while qemu-img converts, called again")


def test_a_forked_child_keeps_nothing_held(tmp_path: Path) -> None:
    """A process that forks while it makes a disk, and dies or goes on, keeps nobody from that disk."""
    rig = Rig(tmp_path, "link", SAMPLES)
    rig.cache().ensure_base("img")
    plan = FaultPlan()
    pause = plan.pause("fs.link", match="disk.base")
    asleep = tmp_path / "asleep"

    def sleep() -> None:
        asleep.touch()
        signal.pause()

    with plan:
        maker = threading.Thread(target=lambda: rig.cache().create_root_disk("img", "vm", size=SIZE))
        maker.start()
        pause.wait()
        with child(sleep) as sleeper:
            until(asleep.exists, "the fork")
            pause.release()
            maker.join()
            with child(lambda: rig.cache().remove_root_disk("vm")) as other:
                other.result()
            assert sleeper.pid != os.getpid()
    rig.check("forked while making a disk")
    rig.check_tidy("forked while making a disk")


def test_kinds_are_all_tried() -> None:
    """Every kind of cache is killed in the making of a disk."""
    assert set(OPERATIONS["create-warm"].kinds) == set(KINDS)

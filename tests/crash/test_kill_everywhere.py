"""kill -9 at every step of every operation: what is there is whole, the operation works again, recover() tidies up."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from harness import images
from harness.children import child, run_to_death
from harness.deaths import Operation, kill_at_every_step, open_root, under
from harness.images import MIB
from harness.rig import KINDS, Rig
from harness.waiting import until
from nova_imagecache import BaseNotFoundError, DiskExistsError, FileLocation, ImageCacheError
from nova_imagecache.testing import FaultPlan

SIZE = 4 * MIB
OLD = images.raw("old bytes of the id")
SAMPLES = {"img": images.raw("one"), "packed": images.qcow2("two")}


def _nothing(rig: Rig) -> None:
    """There is not even a root."""


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
    open_root(rig)
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


def _leave_litter(rig: Rig) -> None:
    """What deaths in four operations leave."""
    _ensure("img")(rig)
    plan = FaultPlan().kill("fs.give_name", match="/disk", nth=2)
    assert run_to_death(lambda: under(plan, _create("img"), rig), "litter of a creation")
    plan = FaultPlan().kill("fs.rename", match="bases/packed")
    assert run_to_death(lambda: under(plan, _ensure("packed"), rig), "litter of a fetch")
    plan = FaultPlan().kill("fs.rmtree", match="trash")
    rig.cache().remove_root_disk("vm")
    assert run_to_death(lambda: under(plan, _cleanup, rig), "litter of a cleanup")


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


@pytest.mark.parametrize(("name", "kind"), CASES, ids=[f"{name}-{kind}" for name, kind in CASES])
def test_kill_at_every_step(name: str, kind: str, quick_path: Path) -> None:
    """Whatever step a process dies at: all that is there is whole, the same call works, recover() leaves no litter."""
    operation = OPERATIONS[name]
    kill_at_every_step(operation, Rig(quick_path / "rig", kind, SAMPLES), name)


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

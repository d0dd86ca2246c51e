"""A storage that is full at each single step of what a driver does: a clear error, all whole, and on it goes."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from harness import images, places
from harness.images import MIB
from harness.rig import Rig
from nova_imagecache import DiskExistsError, ImageCacheError
from nova_imagecache.testing import FaultPlan, Step

SIZE = 4 * MIB
SAMPLES = {"img": images.raw("one"), "packed": images.qcow2("two"), "foreign": images.vdi("three")}
HARMLESS = {"fs.touch", "fs.unlink", "fs.rmtree", "fs.rmdir"}
"""Steps that a lost mark, or litter, may come of: the operation may succeed all the same."""


def _nothing(rig: Rig) -> None:
    """There is not even a root."""


def _ensure(image_id: str) -> Callable[[Rig], object]:
    return lambda rig: rig.cache().ensure_base(image_id)


def _create(rig: Rig) -> object:
    return rig.cache().create_root_disk("img", "vm", size=SIZE)


def _create_and_untie(rig: Rig) -> None:
    """A disk that lies here as it arrives from another host: with its record, and without what ties it to its base."""
    _create(rig)
    (rig.disks / "vm" / "disk.base").unlink(missing_ok=True)
    if (rig.root / "users").exists():
        shutil.rmtree(rig.root / "users")


@dataclass(frozen=True, kw_only=True)
class Act:
    """One thing that a driver does, from what ``prepare`` makes.

    ``finished`` are the errors of a second call where the first one had done its work; ``mends``: what it starts from
    cannot be read; ``done`` asserts what it came to.
    """

    kind: str
    act: Callable[[Rig], object]
    done: Callable[[Rig], bool]
    prepare: Callable[[Rig], object] = field(default=_nothing)
    finished: tuple[type[ImageCacheError], ...] = ()
    mends: bool = False


def _has_base(image_id: str) -> Callable[[Rig], bool]:
    return lambda rig: rig.cache().get_base(image_id).digest == SAMPLES[image_id].digest


def _has_disk(reference: str, size: int = SIZE) -> Callable[[Rig], bool]:
    def done(rig: Rig) -> bool:
        disk = rig.cache().get_root_disk("vm")
        return (disk.reference, disk.virtual_size) == (reference, size)

    return done


def _creating(kind: str, reference: str) -> Act:
    return Act(kind=kind, act=_create, prepare=_ensure("img"), done=_has_disk(reference))


def _resizing(kind: str, reference: str) -> Act:
    return Act(
        kind=kind,
        act=lambda rig: rig.cache().resize_root_disk("vm", size=2 * SIZE),
        prepare=_create,
        done=_has_disk(reference, 2 * SIZE),
    )


def _flattening(kind: str) -> Act:
    return Act(kind=kind, act=lambda rig: rig.cache().flatten_root_disk("vm"), prepare=_create, done=_has_disk("none"))


def _attaching(kind: str, reference: str) -> Act:
    return Act(
        kind=kind,
        act=lambda rig: rig.cache().attach_root_disk("img", "vm"),
        prepare=_create_and_untie,
        done=_has_disk(reference),
        mends=True,
    )


ACTS = {
    "ensure-raw": Act(kind="link", act=_ensure("img"), done=_has_base("img")),
    "ensure-decoded": Act(kind="link", act=_ensure("packed"), done=_has_base("packed")),
    "ensure-converted": Act(kind="link", act=_ensure("foreign"), done=_has_base("foreign")),
    "ensure-native": Act(kind="link-native", act=_ensure("packed"), done=_has_base("packed")),
    "create-link": _creating("link", "link"),
    "create-path": _creating("path", "path"),
    "create-file": _creating("file", "none"),
    "resize-link": _resizing("link", "link"),
    "resize-file": _resizing("file", "none"),
    "flatten-link": _flattening("link"),
    "flatten-path": _flattening("path"),
    "attach-link": _attaching("link", "link"),
    "attach-path": _attaching("path", "path"),
    "copy-base": Act(
        kind="link",
        act=lambda rig: rig.cache().copy_base("img", rig.dir / "kernel"),
        prepare=_ensure("img"),
        done=lambda rig: (rig.dir / "kernel").read_bytes() == SAMPLES["img"].served,
        finished=(DiskExistsError,),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ACTS)
def test_full_at_every_step(name: str, tmp_path: Path) -> None:
    """Whichever step fails for want of space: an error of ours, all is whole, and the same call works again."""
    act = ACTS[name]
    with places.quick(tmp_path) as directory:
        beginning = directory / "beginning"
        rig = Rig(directory / "rig", act.kind, SAMPLES)
        rig.dir.mkdir()
        act.prepare(rig)
        rig.dir.rename(beginning)
        steps = _steps(act, _begin(rig, beginning))
        assert steps, "no step that a plan sees"
        for step in steps:
            _fail_at(act, _begin(rig, beginning), step, f"{name}: full at {step}")


def _begin(rig: Rig, beginning: Path) -> Rig:
    """The cache as it was at the beginning, at the same place: paths are in it."""
    if rig.dir.exists():
        shutil.rmtree(rig.dir)
    # hard links stay links
    subprocess.run(["cp", "-a", str(beginning), str(rig.dir)], check=True)
    return rig


def _steps(act: Act, rig: Rig) -> tuple[Step, ...]:
    with FaultPlan() as plan:
        act.act(rig)
    assert act.done(rig), "undisturbed"
    rig.check("undisturbed")
    rig.check_tidy("undisturbed")
    return plan.trace


def _fail_at(act: Act, rig: Rig, step: Step, when: str) -> None:
    failed = False
    with FaultPlan().fail(step.index):
        try:
            act.act(rig)
        except ImageCacheError:
            failed = True
        except OSError as err:
            raise AssertionError(f"{when}: {err!r} is none of our errors") from err
    assert failed or step.name in HARMLESS, f"{when}: nobody noticed"
    if not act.mends:
        rig.check(when)
    with suppress(*act.finished):
        act.act(rig)
    when = f"{when}, called again"
    assert act.done(rig), when
    report = rig.cache().recover()
    assert not report.failed, f"{when}: {report}"
    rig.check(when)
    rig.check_tidy(when)

"""Path references of disks that were called alike, or are copies, while several make and end them at once."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest

from harness import images
from harness.children import run_to_death
from harness.gates import Gate
from harness.images import MIB
from harness.rig import Rig
from nova_imagecache import ImageCache
from nova_imagecache.backends import _endings, _seen
from nova_imagecache.testing import FaultPlan

SIZE = 4 * MIB


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    rig = Rig(tmp_path, "path", {"img": images.raw("referred to"), "other": images.raw("another")})
    rig.cache().create_root_disk("img", "vm", size=SIZE)
    return rig


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as threads:
        yield threads


def _references(rig: Rig) -> list[str]:
    return sorted(path.name for path in rig.root.glob("users/img/*"))


def _is_kept(rig: Rig) -> bool:
    with rig.cache() as cache:
        cache.recover()
        return not cache.cleanup(cache.plan_cleanup(max_idle=0)).removed


# --- a disk that has another's name by now


def _attach(cache: ImageCache) -> None:
    cache.attach_root_disk("img", "vm_resize")


def _remove(cache: ImageCache) -> None:
    cache.remove_root_disk("vm_resize")


@pytest.mark.parametrize(("act", "step"), [(_attach, "fs.unlink"), (_remove, "fs.rename")], ids=["attach", "remove"])
def test_a_new_disk_of_an_old_name_keeps_its_reference(
    act: Callable[[ImageCache], None], step: str, rig: Rig, pool: ThreadPoolExecutor
) -> None:
    """The old one, in its renamed directory, is about to end or to rename what it finds under its first name."""
    (rig.disks / "vm").rename(rig.disks / "vm_resize")
    plan = FaultPlan()
    changing = plan.pause(step, match="users/img/vm.disk.json")
    with plan:
        changed = pool.submit(act, rig.cache())
        changing.wait()
        made = pool.submit(rig.cache().create_root_disk, "img", "vm", size=SIZE)
        wait([made], 0.5)
        changing.release()
        changed.result(60)
        assert made.result(60).reference == "path"
    for _time in range(2):
        rig.cache().remove_root_disk("vm_resize")
    assert _is_kept(rig)
    assert _references(rig) == ["vm.disk.json"]
    rig.check("the old one is gone")


def test_an_old_reference_may_go_while_it_is_set_aside(rig: Rig, pool: ThreadPoolExecutor) -> None:
    """Its disk is removed just when the new disk of that name has its own."""
    (rig.disks / "vm").rename(rig.disks / "vm_resize")
    plan = FaultPlan()
    setting_aside = plan.pause("fs.rename", match="users/img/vm.disk~", nth=2)
    with plan:
        made = pool.submit(rig.cache().create_root_disk, "img", "vm", size=SIZE)
        setting_aside.wait()
        removed = pool.submit(rig.cache().remove_root_disk, "vm_resize")
        wait([removed], 0.5)
        setting_aside.release()
        made.result(60)
        removed.result(60)
    assert _is_kept(rig)
    assert _references(rig) == ["vm.disk.json"]


def test_a_disk_of_the_same_name_elsewhere_keeps_its_reference(rig: Rig) -> None:
    """Two directories of disks share a root; the other's disk is removed twice, as a driver may."""
    other = Rig(rig.dir, "path", rig.samples)
    other.disks = rig.dir / "more"
    other.cache().create_root_disk("img", "vm", size=SIZE)
    for _time in range(2):
        other.cache().remove_root_disk("vm")
    assert _is_kept(rig)
    rig.check("the other is gone")


# --- copies


@pytest.fixture
def copy(rig: Rig) -> str:
    shutil.copytree(rig.disks / "vm", rig.disks / "copy")
    return "copy"


def _attach_it(cache: ImageCache, disk_id: str) -> None:
    cache.attach_root_disk("img", disk_id)


def _remove_it(cache: ImageCache, disk_id: str) -> None:
    cache.remove_root_disk(disk_id)


@pytest.mark.parametrize("meanwhile", [_attach_it, _remove_it], ids=["attached", "removed"])
def test_a_reference_is_passed_on_to_a_copy_that_needs_it_still(
    meanwhile: Callable[[ImageCache, str], None],
    rig: Rig,
    copy: str,
    pool: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It got a reference of its own, or went, since it was seen: nothing of the first disk's is left."""
    passing = Gate(monkeypatch, _endings.EndingReferences, "_pass_on")
    removed = pool.submit(rig.cache().remove_root_disk, "vm")
    passing.wait()
    meanwhile(rig.cache(), copy)
    passing.open()
    removed.result(60)
    rig.cache().recover()
    assert _references(rig) == (["copy.disk.json"] if meanwhile is _attach_it else [])
    rig.cache().remove_root_disk(copy)
    assert not _is_kept(rig)


def test_a_death_before_it_was_passed_on_leaves_nothing_in_the_end(rig: Rig, copy: str) -> None:
    def die() -> None:
        with FaultPlan().kill("fs.rename", match="users/img/copy.disk"):
            rig.cache().remove_root_disk("vm")

    assert run_to_death(die, "before the reference is passed on")
    rig.cache().remove_root_disk(copy)
    assert not _is_kept(rig)
    assert list(rig.disks.iterdir()) == []
    assert list(rig.root.glob("users/*/*")) == []


def test_the_last_other_reference_may_go_while_a_copy_is_told_apart(
    rig: Rig, copy: str, pool: ThreadPoolExecutor
) -> None:
    """And takes the directory of the image's references along."""
    (rig.root / "users" / "img" / "vm.disk.json").unlink()  # both came from elsewhere
    rig.cache().create_root_disk("img", "neighbour", size=SIZE)
    plan = FaultPlan()
    writing = plan.pause("fs.rename", match="users/img/copy.disk~unfinished.json")
    with plan:
        attached = pool.submit(rig.cache().attach_root_disk, "img", copy)
        writing.wait()
        rig.cache().remove_root_disk("neighbour")
        writing.release()
        assert attached.result(60).reference == "path"
    assert _references(rig) == ["copy.disk.json"]


def test_disks_that_go_meanwhile_are_no_doubt(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a copy is looked for, others' disks are removed, one at every look."""
    for number in range(6):
        rig.cache().create_root_disk("other", f"gone-{number}", size=SIZE)
    going = iter(range(6))
    inner = _seen._named

    def listing(place: Path) -> object:
        found = inner(place)
        if place == rig.disks and (number := next(going, None)) is not None:
            thread = threading.Thread(target=rig.cache().remove_root_disk, args=(f"gone-{number}",))
            thread.start()
            thread.join()
        return found

    monkeypatch.setattr(_seen, "_named", listing)
    rig.cache().remove_root_disk("vm")
    assert _references(rig) == []

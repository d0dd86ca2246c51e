"""One who looks at a base, or judges it, while another has it away for a moment: what he says and does stays right."""

from __future__ import annotations

import os
import stat
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from harness import images
from harness.children import run_to_death
from harness.gates import Gate
from harness.images import MIB
from harness.rig import Rig
from harness.upkeep import Clock, dense, open_cache
from nova_imagecache import (
    BaseCorruptError,
    BaseInUseError,
    BaseNotFoundError,
    CleanupReport,
    NoSpaceError,
    _entries,
    _verify,
)
from nova_imagecache.backends import _looks
from nova_imagecache.backends._disks import FileDisks
from nova_imagecache.backends._trash import Trash
from nova_imagecache.testing import FaultPlan

SIZE = 4 * MIB


def _clean(rig: Rig) -> CleanupReport:
    with rig.cache() as cache:
        return cache.cleanup(cache.plan_cleanup(max_idle=0))


def _is_in(pool: str) -> bool:
    return threading.current_thread().name.startswith(pool)


@pytest.fixture
def pool() -> Any:
    with ThreadPoolExecutor(3) as threads:
        yield threads


class Away:
    """A base that a cleanup has retired, and is about to give back: a disk was linked to it, or named it, meanwhile."""

    def __init__(self, rig: Rig, plan: FaultPlan, pool: ThreadPoolExecutor) -> None:
        self._rig = rig
        self._going = plan.pause("fs.rename", match="bases/img", nth=1)
        self._coming = plan.pause("fs.rename", match="bases/img", nth=2)
        self._pool = pool
        self._cleaning: Future[CleanupReport] | None = None

    def begin(self) -> None:
        self._cleaning = self._pool.submit(_clean, self._rig)
        self._going.wait()
        self._rig.cache().create_root_disk("img", "vm", size=SIZE)

    def retire(self) -> None:
        self._going.release()
        self._coming.wait()

    def end(self) -> None:
        self._coming.release()
        assert self._cleaning is not None
        assert self._cleaning.result(60).removed == ()


# --- who uses it


@pytest.mark.parametrize("replaced", [False, True])
def test_a_reference_that_gets_its_name_meanwhile_counts(
    replaced: bool, tmp_path: Path, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the listing of path references and their reading one is renamed: its disk is made whole just now."""
    rig = Rig(tmp_path, "path", {"img": images.raw("referred to")})
    rig.cache().ensure_base("img")
    creating = rig.cache()
    plan = FaultPlan()
    retiring = plan.pause("fs.rename", match="bases/img")
    finishing = plan.pause("fs.rename", match="users/img/vm.disk.json")
    reading = Gate(monkeypatch, _looks, "_read_bytes", lambda path: path.endswith("~unfinished.json"))
    other = images.raw("other bytes of the same id")
    if replaced:
        rig.samples["img"] = other
    going = rig.cache()
    with plan:
        if replaced:
            removal = pool.submit(lambda: going.ensure_base("img", expect=other.digest) and None)
        else:
            removal = pool.submit(going.remove_base, "img")
        retiring.wait()
        made = pool.submit(creating.create_root_disk, "img", "vm", size=SIZE)
        finishing.wait()
        retiring.release()
        reading.wait()
        finishing.release()
        assert made.result(60).reference == "path"
        reading.open()
        assert isinstance(removal.exception(60), BaseInUseError)
    rig.samples["img"] = images.raw("referred to")
    rig.check("removed beside")


# --- what it takes


def test_a_base_that_is_away_has_no_size(
    tmp_path: Path, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that measured half of it would keep to that figure, and overfill the cache."""
    sizes = {"img": 2 * MIB, "huge": 4 * MIB, "other": 2 * MIB}
    rig = Rig(tmp_path, "link", {name: dense(name, size) for name, size in sizes.items()})
    rig.cache().ensure_base("img")
    with FaultPlan() as plan, rig.cache(max_bytes=3 * MIB) as cache:
        away = Away(rig, plan, pool)
        away.begin()
        listing = Gate(
            monkeypatch,
            os,
            "scandir",
            lambda path: str(path).endswith("bases/img") and _is_in("measuring"),
            after=True,
        )
        measuring = ThreadPoolExecutor(1, "measuring")
        measured = measuring.submit(cache.ensure_base, "huge")
        listing.wait()
        away.retire()
        listing.open()
        away.end()
        assert isinstance(measured.exception(60), NoSpaceError)
        measuring.shutdown()
        with pytest.raises(NoSpaceError):
            cache.ensure_base("other")
    assert len(list(rig.cache().bases())) == 1


def test_a_base_that_comes_back_meanwhile_is_counted(
    tmp_path: Path, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is in the trash when the bases are counted, and back when the trash is."""
    rig = Rig(tmp_path, "link", {"img": dense("counted", 3 * MIB)})
    rig.cache().ensure_base("img")
    whole = rig.cache().reserved_disk_mb(0)
    with FaultPlan() as plan:
        away = Away(rig, plan, pool)
        away.begin()
        away.retire()
        counted = Gate(monkeypatch, _looks.Looks, "_names", after=True)
        # `iter_bases` and `survey` are generators: the listing is their first step
        figure = pool.submit(rig.cache().reserved_disk_mb, 0)
        counted.wait()
        away.end()
        counted.open()
        assert figure.result(60) >= whole


# --- whether it is whole


def test_a_sound_base_is_not_damaged_because_it_was_away(
    tmp_path: Path, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checksums were not where they were looked for, and are there again when its lock is free."""
    rig = Rig(tmp_path, "link", {"img": images.qcow2("verified")})
    rig.cache().ensure_base("img")
    with FaultPlan() as plan:
        away = Away(rig, plan, pool)
        verifying = Gate(monkeypatch, _verify, "damage")
        verdict = pool.submit(rig.cache().verify_base, "img")
        verifying.wait()
        away.begin()
        away.retire()
        looked = Gate(monkeypatch, _verify, "damage_of", after=True)
        verifying.open()
        looked.wait()
        looked.open()
        away.end()
        assert verdict.result(60).image_id == "img"
    assert not list((rig.root / "quarantine").glob("*"))
    rig.check("verified")


@pytest.mark.parametrize("sample", [images.qcow2("decoded"), images.raw("stored")], ids=["qcow2", "raw"])
def test_a_base_that_is_removed_while_it_is_verified_is_not_found(
    sample: images.Sample, tmp_path: Path, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(tmp_path, "link", {"img": sample})
    rig.cache().ensure_base("img")
    events: list[str] = []
    verifying = Gate(monkeypatch, _verify, "damage")
    verdict = pool.submit(rig.cache(on_event=lambda event: events.append(event.kind)).verify_base, "img")
    verifying.wait()
    rig.cache().remove_base("img")
    verifying.open()
    assert isinstance(verdict.exception(60), BaseNotFoundError)
    assert events == []


def test_a_damaged_base_that_gets_a_disk_just_now_stays(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    """Between the look for readers and the rename a disk names it by its path: without it the disk would not open."""
    rig = Rig(tmp_path, "path", {"img": images.raw("damaged")})
    rig.cache().ensure_base("img")
    disk = rig.root / "bases" / "img" / "disk"
    disk.chmod(0o644)
    with disk.open("r+b") as file:
        file.write(b"damage")
    plan = FaultPlan()
    going = plan.pause("fs.rename", match="quarantine/img")
    with plan:
        verdict = pool.submit(rig.cache().verify_base, "img")
        going.wait()
        assert rig.cache().create_root_disk("img", "vm", size=SIZE).reference == "path"
        going.release()
        error = verdict.exception(60)
    assert isinstance(error, BaseCorruptError)
    assert "It stays" in str(error)
    assert disk.exists()


def test_a_copy_has_the_bytes_that_were_asked_for(
    tmp_path: Path, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base is replaced after it was found, and before it is opened."""
    old, new = images.raw("old", 2 * MIB), images.raw("new", 4 * MIB)
    rig = Rig(tmp_path, "link", {"img": old})
    copying = rig.cache()
    copying.ensure_base("img")
    rig.samples["img"] = new
    opening = Gate(monkeypatch, _verify, "copy_out")
    copied = pool.submit(copying.copy_base, "img", tmp_path / "kernel", expect=old.digest)
    opening.wait()
    rig.cache().ensure_base("img", expect=new.digest)
    opening.open()
    copied.result(60)
    assert (tmp_path / "kernel").read_bytes() == old.served


# --- which one it is


@pytest.mark.parametrize("look", ["alone", "in a pass"])
def test_a_base_that_takes_anothers_place_is_found(
    look: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its record was read when it was the other one's: it is not cut off for that, nor gone."""
    rig = Rig(tmp_path, "link", {"img": images.raw("old", 2 * MIB)})
    looking = rig.cache()
    looking.ensure_base("img")
    new = rig.samples["img"] = images.raw("new", 4 * MIB)
    # a pass lists it: between two of its files
    owner, step = (_looks.Looks, "_record") if look == "alone" else (stat, "S_ISDIR")
    read = Gate(monkeypatch, owner, step, lambda *_: _is_in("looking"), after=True)

    def look_at() -> list[str]:
        if look == "alone":
            return [looking.get_base("img").image_id]
        return [item.image_id for item in looking.plan_cleanup(max_idle=0).items]

    with ThreadPoolExecutor(1, "looking") as threads:
        found = threads.submit(look_at)
        read.wait()
        rig.cache().ensure_base("img", expect=new.digest)
        read.open()
        assert found.result(60) == ["img"]
    assert "left alone" not in caplog.text


def test_a_disk_that_takes_anothers_name_is_told_as_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record was the first one's, the header the second one's."""
    rig = Rig(tmp_path, "link", {name: images.raw(name) for name in ("one", "two")})
    cache = rig.cache()
    cache.create_root_disk("one", "vm", size=SIZE)
    loaded = Gate(monkeypatch, FileDisks, "_load", lambda *_: _is_in("telling"), after=True)
    with ThreadPoolExecutor(1, "telling") as threads:
        told = threads.submit(rig.cache().get_root_disk, "vm")
        loaded.wait()
        cache.remove_root_disk("vm")
        cache.create_root_disk("two", "vm", size=2 * SIZE)
        loaded.open()
        disk = told.result(60)
    assert (disk.image_id, disk.virtual_size) == ("two", 2 * SIZE)


def test_an_older_base_of_that_name_does_not_come_between(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    """What a replacement that died had retired stays away while the new one is, and may come back."""
    rig = Rig(tmp_path, "path", {"img": images.raw("old")})
    _replaced_by_one_that_died(rig, images.raw("new"))
    with FaultPlan() as plan:
        away = Away(rig, plan, pool)
        away.begin()
        away.retire()
        report = rig.cache().recover()
        assert report.restored == ()
        assert len([name for name in report.alive if name.startswith("trash/img.")]) == 2
        away.end()
    rig.check("given back")
    rig.cache().recover()
    assert list((rig.root / "trash").iterdir()) == []
    rig.check("recovered")


def _replaced_by_one_that_died(rig: Rig, new: images.Sample) -> None:
    """The image's base is of ``new``; the older one lies in the trash, and nobody holds it."""
    rig.cache().ensure_base("img")
    rig.samples["img"] = new

    def die() -> None:
        with FaultPlan().kill("fs.rename", match="trash/.img"):
            rig.cache().ensure_base("img", expect=new.digest)

    assert run_to_death(die, "between the old base's going and the new one's coming")
    rig.cache().ensure_base("img", expect=new.digest)


def test_a_name_that_is_taken_stays_so_while_recover_settles_another(
    tmp_path: Path, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between recover's look at the name and its rename a cleanup would take the new base away: its disk, whose user is
    found at the second look, would read the older one's bytes."""
    rig = Rig(tmp_path, "path", {"img": images.raw("old")})
    _replaced_by_one_that_died(rig, images.raw("new"))
    judged = Gate(monkeypatch, Trash, "_is_another_going", after=True)
    retiring, restoring = Gate(monkeypatch, Trash, "retire"), Gate(monkeypatch, Trash, "restore")
    recovered = pool.submit(rig.cache().recover)
    judged.wait()
    cleaned = pool.submit(_clean, rig)
    retiring.wait()
    rig.cache().create_root_disk("img", "vm", size=SIZE)
    retiring.open()
    time.sleep(0.3)  # by now it is retired, if nothing keeps it
    judged.open()
    assert recovered.result(60).restored == ()
    restoring.open()
    assert cleaned.result(60).removed == ()
    assert list((rig.root / "trash").iterdir()) == []
    rig.check("settled")


def test_what_is_removed_just_after_recover_gave_it_back_is_gone(
    tmp_path: Path, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another recover would take it for a dead process's, if the first one still held it when it went again."""
    rig = Rig(tmp_path, "link", {"img": images.raw("removed")})
    rig.cache().ensure_base("img")

    def die() -> None:
        with FaultPlan().kill("fs.rename", match="trash/.img"):
            rig.cache().remove_base("img")

    assert run_to_death(die, "when it was retired")
    given_back, purging = Gate(monkeypatch, Trash, "_give_back", after=True), Gate(monkeypatch, Trash, "purge")
    recovered = pool.submit(rig.cache().recover)
    given_back.wait()
    removed = pool.submit(rig.cache().remove_base, "img")
    time.sleep(0.3)  # by now it is retired again, if nothing keeps it
    given_back.open()
    assert len(recovered.result(60).restored) == 1
    purging.wait()
    assert rig.cache().recover().restored == ()
    purging.open()
    removed.result(60)
    assert list(rig.cache().bases()) == []


# --- what it is marked as


def test_an_old_plan_marks_no_base_that_is_used(tmp_path: Path) -> None:
    """It got a disk since the plan: when that goes, the base has its whole time before it."""
    rig, clock = Rig(tmp_path, "link", {"img": images.raw("marked")}), Clock()
    with open_cache(rig, clock) as cache:
        cache.ensure_base("img")
        plan = cache.plan_cleanup(max_idle=3600)
        assert [item.verdict for item in plan.items] == ["mark"]
        cache.create_root_disk("img", "vm", size=SIZE)
        report = cache.cleanup(plan)
        assert report.marked == ()
        assert "depend on it" in report.kept["img"]
        clock.move(7200)
        cache.remove_root_disk("vm")
        assert [item.verdict for item in cache.plan_cleanup(max_idle=3600).items] == ["mark"]


def test_what_another_gives_back_was_not_removed(
    tmp_path: Path, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trash was listed when it was there."""
    rig = Rig(tmp_path, "link", {"img": images.raw("given back")})
    rig.cache().ensure_base("img")
    with FaultPlan() as plan:
        away = Away(rig, plan, pool)
        away.begin()
        away.retire()
        with monkeypatch.context() as patch:
            listed = Gate(patch, _entries, "names", lambda path: path.name == "trash", after=True)
            report = pool.submit(rig.cache().recover)
            listed.wait()
            away.end()
            listed.open()
            assert [name for name in report.result(60).removed if name.startswith("trash/")] == []
    rig.check("given back")

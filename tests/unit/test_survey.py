"""One look at every base: what it tells where something cannot be read."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import places
from harness.images import MIB
from harness.rig import Rig
from harness.upkeep import dense
from nova_imagecache.backends import BackendPaths, BaseRecord, Survey
from nova_imagecache.backends.qcow2 import Qcow2Backend

IMAGES = {name: dense(f"surveyed {name}", 64 * 1024) for name in ("a", "b")}


@pytest.fixture(params=["link", "path"])
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    with places.quick(tmp_path) as directory:
        rig = Rig(directory, request.param, IMAGES)
        for image_id in IMAGES:
            rig.cache().create_root_disk(image_id, f"vm-{image_id}", size=MIB)
        yield rig


def surveyed(rig: Rig) -> dict[str, Survey]:
    backend = Qcow2Backend({}, BackendPaths(root=rig.root, disks_dir=rig.disks))
    return {survey.base.image_id: survey for survey in backend.survey()}


def test_users_and_bytes_come_with_the_base(rig: Rig) -> None:
    backend = Qcow2Backend({}, BackendPaths(root=rig.root, disks_dir=rig.disks))
    for survey in surveyed(rig).values():
        assert survey.users == tuple(backend.iter_users(survey.base))
        assert len(survey.users) == 1
        assert survey.allocated == backend.usage(survey.base).allocated > 0


def test_what_cannot_be_told_of_one_base_is_left_to_be_asked(rig: Rig) -> None:
    """The base is there all the same, and the other's figures with it."""
    users = rig.root / "users" / "b"
    users.parent.mkdir(exist_ok=True)
    if users.is_dir():
        users.rename(rig.root / "aside")
    users.write_text("no directory")
    found = surveyed(rig)
    assert (found["b"].users, found["b"].allocated) == (None, None)
    assert (len(found["a"].users or ()), found["a"].allocated) == (1, found["a"].allocated)
    [doubted] = [item for item in rig.cache().plan_cleanup().items if item.image_id == "b"]
    assert (doubted.verdict, doubted.users) == ("keep", None)
    assert "unknown" in doubted.reason


def test_references_that_cannot_be_listed_are_doubt_for_every_base(rig: Rig) -> None:
    users = rig.root / "users"
    if users.is_dir():
        users.rename(rig.root / "aside")
    users.write_text("no directory")
    assert [survey.users for survey in surveyed(rig).values()] == [None, None]
    assert {item.users for item in rig.cache().plan_cleanup().items} == {None}


def test_a_base_that_is_half_there_is_left_out(rig: Rig) -> None:
    (rig.root / "bases" / "b" / "base.json").unlink()
    (rig.root / "bases" / "c").mkdir()
    (rig.root / "bases" / "d").write_text("no directory")
    assert list(surveyed(rig)) == ["a"]


def test_what_others_removed_is_forgotten(rig: Rig) -> None:
    """A driver runs for months, and the passes of a timer remove what it once used: its memory does not grow."""
    backend = Qcow2Backend({}, BackendPaths(root=rig.root, disks_dir=rig.disks))
    before = _records_in_memory()
    assert len(list(backend.survey())) == 2
    assert _records_in_memory() == before + 2
    (rig.root / "bases" / "b").rename(rig.root / "aside")
    assert len(list(backend.survey())) == 1
    assert _records_in_memory() == before + 1


def _records_in_memory() -> int:
    gc.collect()
    return sum(isinstance(each, BaseRecord) for each in gc.get_objects())

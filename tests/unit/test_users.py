"""Users of a base, joined from all who know: each disk once, by its right name, and never nobody where there is one."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import images, places
from harness.images import MIB
from harness.rig import Rig
from harness.upkeep import open_cache
from nova_imagecache import BaseImage, BaseInUseError, DiskUser
from nova_imagecache._users import count
from nova_imagecache.exceptions import BackendUnavailableError, DiskNotFoundError, UsersUnknownError
from nova_imagecache.finders import DiskDirectories, ImagesInUse

SIZE = 4 * MIB


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with places.quick(tmp_path) as directory:
        yield Rig(directory, "link", {"img": images.raw("used")})


def _user(known_by: str, disk_id: str | None = None, name: str | None = None) -> DiskUser:
    return DiskUser(image_id="img", known_by=known_by, disk_id=disk_id, name=name)


LINK = _user("link")
NAMED = [_user("finder", f"vm-{number}", "disk") for number in range(3)]
PATHS = [_user("path", f"vm-{number}", "disk") for number in range(3)]


@pytest.mark.parametrize(
    ("stored", "found", "expected"),
    [
        ([], [], 0),
        ([LINK], [], 1),
        ([LINK, LINK], NAMED[:1], 2),
        ([LINK], NAMED[:2], 2),
        ([LINK], NAMED[:1] * 2, 1),
        (PATHS[:2], NAMED[:2], 2),
        (PATHS[:2], NAMED[1:], 3),
        ([*PATHS[:1], LINK], NAMED[:2], 2),
        ([], [_user("driver")], 1),
        ([LINK], [_user("driver")], 1),
        ([], [_user("driver"), *NAMED], 3),
    ],
)
def test_each_disk_counts_once(stored: list[DiskUser], found: list[DiskUser], expected: int) -> None:
    """However many know of it."""
    assert count(stored, found) == expected


USERS = st.lists(st.sampled_from([LINK, _user("driver"), *NAMED, *PATHS]), max_size=6)


@given(USERS, USERS)
def test_where_there_is_a_user_the_count_is_not_zero(stored: list[DiskUser], found: list[DiskUser]) -> None:
    """And it is never more than all that were told of."""
    counted = count(stored, found)
    assert (counted == 0) == (not stored and not found)
    assert counted <= len(stored) + len(found)


# --- names


def test_other_bytes_under_the_same_id(rig: Rig) -> None:
    """A disk of the bytes that an id had before holds those: it is no user of the new ones, by any name."""
    cache = open_cache(rig)
    cache.create_root_disk("img", "old", size=SIZE)
    rig.samples["img"] = images.raw("used anew")
    with open_cache(rig) as anew:
        anew.ensure_base("img", expect=rig.samples["img"].digest)
        assert anew.users("img") == []
        anew.create_root_disk("img", "young", size=SIZE)
        assert [(user.disk_id, user.known_by) for user in anew.users("img")] == [("young", "link")]
        with pytest.raises(BaseInUseError) as caught:
            anew.remove_base("img")
        assert [user.disk_id for user in caught.value.users] == ["young"]


def test_a_link_that_no_disk_explains_stays_without_a_name(rig: Rig) -> None:
    """Somebody made it, and it counts."""
    cache = open_cache(rig)
    cache.create_root_disk("img", "vm", size=SIZE)
    (rig.dir / "mine").hardlink_to(rig.root / "bases" / "img" / "disk")
    assert {user.disk_id for user in cache.users("img")} == {"vm", None}


def test_a_plan_counts_a_disk_once(rig: Rig) -> None:
    """By link, by path and by header, and a snapshot of it as one more."""
    finder = DiskDirectories([rig.disks])
    cache = open_cache(rig, user_finders=[finder, ImagesInUse(lambda: ["img"])])
    cache.create_root_disk("img", "vm", size=SIZE)
    rig.options = {"reference": "path"}
    open_cache(rig).create_root_disk("img", "vm-2", size=SIZE)
    [item] = cache.plan_cleanup().items
    assert item.users == 2
    images.qemu_img(
        *("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(rig.disks / "vm" / "disk")),
        str(rig.disks / "vm" / "disk.snap"),
    )
    [item] = cache.plan_cleanup().items
    assert item.users == 3


class _Failing:
    """A finder that tells of nobody, and from its second look on raises an error."""

    name = "failing"

    def __init__(self, error: Exception) -> None:
        self._error = error
        self._looks = 0

    def find(self, _bases: Sequence[BaseImage]) -> list[DiskUser]:
        self._looks += 1
        if self._looks > 1:
            raise self._error
        return []


FAILURES = [
    BackendUnavailableError("the pool does not answer"),
    DiskNotFoundError(disk_id="vm"),
    OSError(errno.ENOSPC, "no room for a temporary file"),
    OSError("the pipe broke"),
]


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: str(error)[:20])
def test_a_finder_that_fails_cannot_tell(rig: Rig, error: Exception) -> None:
    """Whatever it raises: a base that is retired already comes back, and the report names the finder."""
    cache = open_cache(rig, user_finders=[_Failing(error)])
    cache.ensure_base("img")
    report = cache.cleanup(cache.plan_cleanup(max_idle=0))
    assert "finder failing cannot tell: " in report.kept["img"]
    assert cache.get_base("img")
    assert list((rig.root / "trash").iterdir()) == []
    with pytest.raises(UsersUnknownError, match="finder failing"):
        cache.remove_base("img")


def test_a_finder_without_a_name_is_called_by_its_class(rig: Rig) -> None:
    """One that a driver wrote in a hurry."""

    class Hasty:
        def find(self, _bases: Sequence[BaseImage]) -> list[DiskUser]:
            raise OSError("broken")

    cache = open_cache(rig, user_finders=[Hasty()])  # type: ignore[list-item]  # that is the point
    cache.ensure_base("img")
    [item] = cache.plan_cleanup(max_idle=0).items
    assert "finder Hasty cannot tell: OSError: broken" in item.reason


def test_a_late_user_is_counted_at_the_second_look(rig: Rig) -> None:
    """One that a finder sees only when the base is retired brings it back, and the report says so."""

    class Late:
        name = "late"
        looks = 0

        def find(self, bases: Sequence[BaseImage]) -> Iterator[DiskUser]:
            self.looks += 1
            if self.looks > 1:
                yield DiskUser(image_id="img", known_by=self.name, disk_id="vm", name="disk")

    cache = open_cache(rig, user_finders=[Late()])
    cache.ensure_base("img")
    report = cache.cleanup(cache.plan_cleanup(max_idle=0))
    assert report.removed == ()
    assert "1 root disk" in report.kept["img"]
    assert cache.get_base("img")
    shutil.rmtree(rig.root / "trash")

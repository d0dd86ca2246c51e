"""What stands in a base's place and cannot be read: it is told by its name, and goes as a base goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from conftest import InChild
from harness import places
from harness.images import MIB
from harness.rig import Rig
from harness.upkeep import Events, assert_counts_as_du, dense, names
from nova_imagecache import (
    BackendError,
    BaseCorruptError,
    BaseImage,
    BaseInUseError,
    BaseNotFoundError,
    BasePinnedError,
    DiskUser,
    ImageCache,
    UsersUnknownError,
)
from unit import test_left_alone as spoil

SAMPLES = {name: dense(f"unreadable {name}", MIB) for name in ("a", "b")}
DAMAGED = [spoil._cut_off, spoil._rubbish, spoil._no_record, spoil._no_disk]
NOBODYS = [spoil._of_a_later_release, spoil._a_file]
UNSEEN = [spoil._a_record_that_cannot_be_read, spoil._a_loop]
Spoil = Callable[[Rig], None]


@pytest.fixture(params=["link", "path"])
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    with places.quick(tmp_path) as directory:
        rig = Rig(directory, request.param, SAMPLES)
        rig.cache().ensure_bases(["a", "b"])
        yield rig


def _ids(spoil: Spoil) -> str:
    return spoil.__name__.strip("_")


def _left(rig: Rig) -> set[str]:
    return {path.name for path in (rig.root / "bases").iterdir()}


class Finder:
    """One that answers as it is told, one answer a look."""

    name = "told"

    def __init__(self, *answers: Sequence[DiskUser] | UsersUnknownError) -> None:
        self._answers = list(answers)
        self.asked: list[Path] = []

    def find(self, bases: Sequence[BaseImage]) -> Sequence[DiskUser]:
        self.asked += [base.location.path for base in bases]  # type: ignore[union-attr]  # files
        answer = self._answers.pop(0)
        if isinstance(answer, UsersUnknownError):
            raise answer
        return answer


# --- told


@pytest.mark.parametrize("damage", [*DAMAGED, *NOBODYS], ids=_ids)
def test_it_is_told_of_by_its_name(damage: Spoil, rig: Rig) -> None:
    """Whoever asks for it hears that something is there, why it is no base, and what to do; nothing is changed."""
    damage(rig)
    cache = rig.cache()
    calls: list[tuple[Callable[[str], object], type[Exception]]] = [
        (cache.get_base, BaseNotFoundError),
        (cache.users, BaseNotFoundError),
        (cache.base_usage, BaseNotFoundError),
        (cache.repair_base, BaseCorruptError),
        (cache.verify_base, BaseCorruptError),
    ]
    for call, error in calls:
        with pytest.raises(error, match=r"what stands in the base's place cannot be read: it.*ensure; or remove it"):
            call("b")
    assert _left(rig) == {"a", "b"}


def test_what_is_not_there_is_not_there(rig: Rig) -> None:
    """Without a word on anything else; also after something was there."""
    spoil._cut_off(rig)
    cache = rig.cache()
    assert names(cache) == {"a"}
    for path in sorted((rig.root / "bases" / "b").iterdir()):
        path.unlink()
    (rig.root / "bases" / "b").rmdir()
    for call in (cache.get_base, cache.verify_base, cache.remove_base):
        with pytest.raises(BaseNotFoundError, match="the cache has no base of this image"):
            call("b")


# --- removed


@pytest.mark.parametrize("damage", DAMAGED, ids=_ids)
def test_it_is_removed(damage: Spoil, rig: Rig) -> None:
    """Its room is free, the event is told, and the others stay; the next call says that nothing is there."""
    damage(rig)
    events = Events()
    cache = rig.cache(on_event=events.append)
    cache.remove_base("b")
    assert _left(rig) == {"a"}
    assert list((rig.root / "trash").iterdir()) == []
    assert ("removed", "b") in {(event.kind, event.image_id) for event in events}
    assert_counts_as_du(rig, cache.usage(), damage.__name__)
    assert cache._engine.backend.capacity().left_alone == {}
    with pytest.raises(BaseNotFoundError):
        cache.remove_base("b")
    cache.ensure_base("b")
    rig.check("brought in anew")


@pytest.mark.parametrize("damage", [spoil._cut_off, spoil._rubbish, spoil._no_record], ids=_ids)
def test_it_stays_for_its_disks(damage: Spoil, rig: Rig) -> None:
    """The storage is asked by the image's id: a disk that reads it keeps it, and is named."""
    rig.cache().create_root_disk("b", "vm-1")
    damage(rig)
    cache = rig.cache()
    with pytest.raises(BaseInUseError, match="vm-1/disk"):
        cache.remove_base("b")
    assert _left(rig) == {"a", "b"}
    cache.remove_root_disk("vm-1")
    cache.remove_base("b")
    assert _left(rig) == {"a"}


def test_without_bytes_it_stays_for_who_names_it(rig: Rig) -> None:
    """A disk that names it by path would have it again when the image is brought in; one with a link has its own."""
    rig.cache().create_root_disk("b", "vm-1")
    spoil._no_disk(rig)
    if rig.kind == "path":
        with pytest.raises(BaseInUseError, match="vm-1/disk"):
            rig.cache().remove_base("b")
    else:
        rig.cache().remove_base("b")
        rig.check("after it went")


def test_it_stays_while_it_is_pinned(rig: Rig) -> None:
    """As any base."""
    spoil._cut_off(rig)
    cache = rig.cache()
    cache.pin("b", "somebody")
    with pytest.raises(BasePinnedError):
        cache.remove_base("b")
    cache.unpin("b", "somebody")
    cache.remove_base("b")


def test_finders_are_asked_twice(rig: Rig) -> None:
    """A user that appears while it goes brings it back, damaged as it is; doubt keeps it; nobody lets it go."""
    spoil._cut_off(rig)
    user = DiskUser(image_id="b", known_by="told", disk_id="vm-9", name="disk")
    there, gone = rig.root / "bases" / "b" / "disk", rig.root / "trash"
    for answers, error in (
        ([[user]], BaseInUseError),
        ([[], [user]], BaseInUseError),
        ([UsersUnknownError("asleep")], UsersUnknownError),
        ([[], UsersUnknownError("asleep")], UsersUnknownError),
    ):
        finder = Finder(*answers)
        with pytest.raises(error):
            rig.cache(user_finders=[finder]).remove_base("b")
        assert _left(rig) == {"a", "b"}
        assert finder.asked[0] == there
        assert all(path.is_relative_to(gone) for path in finder.asked[2:])
    rig.cache(user_finders=[Finder([], [])]).remove_base("b")
    assert _left(rig) == {"a"}


# --- what stays


@pytest.mark.parametrize("damage", NOBODYS, ids=_ids)
def test_what_may_have_unknown_users_stays(damage: Spoil, rig: Rig) -> None:
    """A later release may count them elsewhere, and what is no directory is not ours."""
    damage(rig)
    with pytest.raises(UsersUnknownError, match=r"nobody can say who uses it: .*or by hand.*check"):
        rig.cache().remove_base("b")
    assert _left(rig) == {"a", "b"}


@pytest.mark.parametrize("damage", UNSEEN, ids=_ids)
def test_what_cannot_be_seen_stays(damage: Spoil, rig: Rig) -> None:
    """An error by the operating system is no damage; its words are told."""
    damage(rig)
    cache = rig.cache()
    for call in (cache.remove_base, cache.verify_base):
        with pytest.raises(BackendError, match=r"Is a directory|Too many levels of symbolic links"):
            call("b")
    assert _left(rig) == {"a", "b"}


def test_who_dies_while_it_goes_leaves_it(rig: Rig, in_child: InChild) -> None:
    """It has its name back after a recovery: only one of the two looks was taken."""
    spoil._cut_off(rig)

    def die() -> None:
        backend = rig.backend()
        left = backend.find_unreadable("b")
        assert left is not None
        assert left.base is not None
        backend.retire_base(left.base)

    in_child(die)
    assert _left(rig) == {"a"}
    cache: ImageCache = rig.cache()
    [restored] = cache.recover().restored
    assert restored.startswith("b.")
    assert _left(rig) == {"a", "b"}
    cache.remove_base("b")
    assert _left(rig) == {"a"}

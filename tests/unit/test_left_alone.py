"""What stands in the place of bases and is none: counted, told once, replaced, and in nobody's way."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conftest import InChild
from harness import places
from harness.images import MIB
from harness.rig import Rig
from harness.upkeep import assert_counts_as_du, counted, dense, names, open_cache
from nova_imagecache import BaseImage, DiskUsage, NoSpaceError

SAMPLES = {name: dense(f"left alone {name}", MIB) for name in ("a", "b", "c")}
TIGHT = 256 * 1024


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with places.quick(tmp_path) as directory:
        rig = Rig(directory, "link", SAMPLES)
        rig.cache().ensure_bases(["a", "b"])
        yield rig


def _record(rig: Rig, data: bytes) -> None:
    path = rig.root / "bases" / "b" / "base.json"
    path.unlink()
    path.write_bytes(data)


def _cut_off(rig: Rig) -> None:
    disk = rig.root / "bases" / "b" / "disk"
    disk.chmod(0o644)
    with disk.open("r+b") as file:
        file.truncate(MIB - 512)


def _of_a_later_release(rig: Rig) -> None:
    values = json.loads((rig.root / "bases" / "b" / "base.json").read_bytes())
    _record(rig, json.dumps(values | {"version": values["version"] + 1}).encode())


def _rubbish(rig: Rig) -> None:
    _record(rig, b"\xff{")


def _no_record(rig: Rig) -> None:
    (rig.root / "bases" / "b" / "base.json").unlink()


def _no_disk(rig: Rig) -> None:
    (rig.root / "bases" / "b" / "disk").unlink()


def _a_file(rig: Rig) -> None:
    _no_record(rig)
    (rig.root / "bases" / "b").rename(rig.root / "staging" / "aside")
    (rig.root / "bases" / "b").write_bytes(b"x" * MIB)


def _a_record_that_cannot_be_read(rig: Rig) -> None:
    """As on a failing disk: an error by the operating system."""
    path = rig.root / "bases" / "b" / "base.json"
    path.unlink()
    path.mkdir()


def _a_loop(rig: Rig) -> None:
    (rig.root / "bases" / "b").rename(rig.root / "staging" / "aside")
    (rig.root / "bases" / "b").symlink_to("b")


REPLACED = [_cut_off, _of_a_later_release, _rubbish, _no_record, _no_disk, _a_file]
SPOILED = [*REPLACED, _a_record_that_cannot_be_read, _a_loop]


def _ids(spoil: Callable[[Rig], None]) -> str:
    return spoil.__name__.strip("_")


@pytest.mark.parametrize("spoil", SPOILED, ids=_ids)
def test_its_bytes_are_counted(spoil: Callable[[Rig], None], rig: Rig) -> None:
    """Beside the bases, to the byte, by a cache that was there before and by one that comes later."""
    before = rig.cache()
    assert before.usage().base_count == 2
    spoil(rig)
    for cache in (before, rig.cache()):
        usage = cache.usage()
        assert usage.base_count == 1
        assert_counts_as_du(rig, usage, spoil.__name__)
        assert cache.reserved_disk_mb(0) == -(-usage.allocated // MIB)


@pytest.mark.parametrize("spoil", SPOILED, ids=_ids)
def test_it_stops_no_pass(spoil: Callable[[Rig], None], rig: Rig) -> None:
    """The others are listed, planned and removed, and room is made of them."""
    spoil(rig)
    cache = open_cache(rig, max_bytes=8 * MIB)
    assert names(cache) == {"a"}
    cache.ensure_base("c")
    assert cache.cleanup(cache.plan_cleanup(max_idle=0)).removed == ("a", "c")
    assert cache.recover().failed == {}
    assert cache.check().facts


@pytest.mark.parametrize("spoil", [_cut_off, _of_a_later_release], ids=_ids)
def test_it_counts_within_max_bytes(spoil: Callable[[Rig], None], rig: Rig) -> None:
    """Where no base may go for it, a third image has no room beside two, one of which is damaged."""
    spoil(rig)
    cache = open_cache(rig, max_bytes=2 * MIB + TIGHT, remove_unused=False)
    with pytest.raises(NoSpaceError) as caught:
        cache.ensure_base("c")
    error = caught.value
    assert error.limit == "max_bytes"
    assert error.left_alone is not None
    assert MIB - 512 <= error.left_alone < MIB + TIGHT
    assert f"in bases that cannot be read {error.left_alone}" in str(error)
    assert "nova-imagecache check" in str(error.todo)
    assert "--max-idle 0" in str(error.todo)
    assert counted(rig) < 2 * MIB + TIGHT


@pytest.mark.parametrize("spoil", REPLACED, ids=_ids)
def test_ensure_replaces_it(spoil: Callable[[Rig], None], rig: Rig) -> None:
    """Also where there is no room for both: the old one is in quarantine afterwards."""
    spoil(rig)
    cache = open_cache(rig, max_bytes=2 * MIB + TIGHT)
    cache.ensure_base("b")
    assert names(cache) == {"a", "b"}
    assert len(list((rig.root / "quarantine").iterdir())) == 1
    assert "bases that cannot be read" not in {fact.name for fact in cache.check().facts}
    rig.check("replaced")


def test_it_is_said_once(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """With what to do, however often one looks; and again when it happens again."""
    _cut_off(rig)
    cache = rig.cache()
    with caplog.at_level(logging.WARNING):
        for _time in range(3):
            cache.usage()
            assert names(cache) == {"a"}
        cache.ensure_base("b")
        [said] = [record.getMessage() for record in caplog.records if "left alone" in record.getMessage()]
        assert f"base b is left alone: it has {MIB - 512} bytes of {MIB}" in said
        assert "check" in said
        _cut_off(rig)
        cache.usage()
    assert len([record for record in caplog.records if "left alone" in record.getMessage()]) == 2


def test_check_tells_of_all_such(rig: Rig) -> None:
    """Their number, their ids, why, and what to do; nothing where there is none."""
    name = "bases that cannot be read"
    assert name not in {fact.name for fact in rig.cache().check().facts}
    _cut_off(rig)
    for number in range(20):
        (rig.root / "bases" / f"stray-{number:02}").mkdir()
    [fact] = [fact for fact in rig.cache().check().facts if fact.name == name]
    assert fact.value == "21"
    assert fact.problem is not None
    assert f"b: it has {MIB - 512} bytes of {MIB}; stray-00: it has no base.json; " in fact.problem
    assert "and 11 more" in fact.problem
    assert str(rig.root / "bases") in fact.problem


def test_what_is_removed_by_hand_is_forgotten(rig: Rig) -> None:
    """The figures are those of what is there."""
    (rig.root / "bases" / "stray").mkdir()
    cache = rig.cache()
    assert_counts_as_du(rig, cache.usage(), "with it")
    (rig.root / "bases" / "stray").rmdir()
    assert_counts_as_du(rig, cache.usage(), "without it")
    assert cache._engine.backend.capacity().left_alone == {}


def test_what_is_another_users_is_left_alone(open_path: Path, in_child: InChild) -> None:
    """A directory that cannot be entered: what it takes is not known, and everything else goes on."""
    rig = Rig(open_path, "link", SAMPLES)
    open_path.chmod(0o777)
    in_child(lambda: rig.cache().ensure_bases(["a", "b"]) and None, unprivileged=True)
    (rig.root / "bases" / "lost+found").mkdir()
    (rig.root / "bases" / "lost+found").chmod(0o700)

    def look() -> tuple[set[str], bool, tuple[str, ...]]:
        cache = open_cache(rig, max_bytes=8 * MIB)
        cache.ensure_base("c")
        complete = cache.usage().complete
        return names(cache), complete, cache.cleanup(cache.plan_cleanup(max_idle=0)).removed

    assert in_child(look, unprivileged=True) == ({"a", "b", "c"}, False, ("a", "b", "c"))


def test_a_base_that_cannot_be_measured_stops_no_fetch(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """It counts as many bytes as it may have."""
    cache = open_cache(rig, max_bytes=2 * MIB + TIGHT, remove_unused=False)
    backend = cache._engine.backend
    measure = backend._inner.usage

    with pytest.MonkeyPatch.context() as patch:

        def usage(base: BaseImage) -> DiskUsage:
            if base.image_id == "b":
                raise PermissionError(13, "not ours to list")
            return measure(base)

        patch.setattr(backend._inner, "usage", usage)
        with caplog.at_level(logging.WARNING), pytest.raises(NoSpaceError):
            cache.ensure_base("c")
    assert "base b counts as 1048576 bytes" in caplog.text

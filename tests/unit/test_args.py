"""Ids, names, sizes and times that callers hand in are judged before they become paths."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from nova_imagecache import CacheConfig, ImageCache, _args
from nova_imagecache.exceptions import InvalidRequestError
from nova_imagecache.finders import ImagesInUse
from nova_imagecache.testing import FakeImage, FakeSource, MemoryBackend

BAD_IDS: list[Any] = [
    "",
    ".",
    "..",
    "../x",
    "a/b",
    "a\0b",
    "\0",
    "x" * 1024,
    "x" * 128,
    "bild-ä",
    "\uff11\uff12",
    "\u0663",
    ".hidden",
    "-rf",
    "_x",
    "a b",
    "a\n",
    "a\\b",
    "a:b",
    "a%2eb",
    "a@b",
    "*",
    None,
    b"bytes",
    7,
    True,
    ["a"],
]
GOOD_IDS = ["a", "7", "x" * 127, "A.b_c-D", "a..b", "9f8e7d6c-0000-4000-8000-000000000000", "a.base", "base.a"]
GIB = 1 << 30


@pytest.mark.parametrize("judge", [_args.image_id, _args.disk_id, _args.owner])
@pytest.mark.parametrize("value", BAD_IDS, ids=lambda value: repr(value)[:20])
def test_ids_that_are_no_path_parts_are_refused(judge: Callable[[Any], str], value: Any) -> None:
    """Nothing that climbs, splits, hides, ends a string early or is too long becomes a file name."""
    with pytest.raises(InvalidRequestError) as caught:
        judge(value)
    assert caught.value.exit_code == 2
    assert caught.value.stage == "arguments"
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("judge", [_args.image_id, _args.disk_id, _args.owner])
@pytest.mark.parametrize("value", GOOD_IDS)
def test_ids_in_the_grammar_are_taken_as_they_are(judge: Callable[[str], str], value: str) -> None:
    """No id is changed on its way to a path."""
    assert judge(value) == value


@pytest.mark.parametrize(
    "value",
    [
        "",
        ".x",
        "-x",
        "Disk",
        "disk_1",
        "a/b",
        "..",
        "a\0",
        "x" * 33,
        "ä",
        "disk.base",
        "disk.json",
        "a.b.json",
        None,
        1,
    ],
    ids=repr,
)
def test_disk_names_outside_the_grammar_are_refused(value: Any) -> None:
    """A name must not be another disk's reference or record either."""
    with pytest.raises(InvalidRequestError):
        _args.disk_name(value)


@pytest.mark.parametrize(
    "value", ["disk", "disk.rescue", "a", "0", "x" * 32, "base", "json", "a.base.x", "disk.config"]
)
def test_disk_names_in_the_grammar_are_taken(value: str) -> None:
    """What drivers call disks."""
    assert _args.disk_name(value) == value


@pytest.mark.parametrize(
    ("value", "expected"), [(1, 512), (511, 512), (512, 512), (513, 1024), (GIB, GIB), (GIB - 1, GIB)]
)
def test_sizes_are_rounded_up_to_sectors(value: int, expected: int) -> None:
    """A guest sees whole sectors."""
    assert _args.size(value) == expected


@pytest.mark.parametrize("value", [0, -1, -512, True, False, "512", "20G", 1.5, 512.0, None, math.inf, 1 << 63])
def test_values_that_are_no_sizes_are_refused(value: Any) -> None:
    """Nothing is guessed from text or truth values."""
    with pytest.raises(InvalidRequestError):
        _args.size(value)


def test_the_largest_size_is_what_an_offset_can_hold() -> None:
    """Rounding never leaves the range of off_t."""
    largest = (1 << 63) - 512
    assert _args.size(largest) == largest
    with pytest.raises(InvalidRequestError):
        _args.size(largest + 1)


@pytest.mark.parametrize(("value", "expected"), [(0, 0.0), (1.5, 1.5), (timedelta(hours=1), 3600.0)])
def test_durations_become_seconds(value: Any, expected: float) -> None:
    """A timedelta or a number."""
    assert _args.seconds(value) == expected


@pytest.mark.parametrize("value", [-1, -0.5, timedelta(seconds=-1), math.nan, True, "24h", None])
def test_values_that_are_no_durations_are_refused(value: Any) -> None:
    """Below zero, or no number."""
    with pytest.raises(InvalidRequestError):
        _args.seconds(value)


def test_points_in_time_are_aware_or_posix() -> None:
    """The same moment, however it is said; None stays None."""
    assert _args.moment(datetime(2030, 1, 1, tzinfo=UTC)) == 1893456000.0
    assert _args.moment(datetime(2030, 1, 1, 2, tzinfo=timezone(timedelta(hours=2)))) == 1893456000.0
    assert _args.moment(1893456000.0) == 1893456000.0
    assert _args.moment(None) is None


@pytest.mark.parametrize("value", [datetime(2030, 1, 1), "2030-01-01", True, math.nan], ids=repr)  # noqa: DTZ001 - naive on purpose
def test_values_that_are_no_points_in_time_are_refused(value: Any) -> None:
    """A time without its zone means another moment on another host; NaN would never end and never hold."""
    with pytest.raises(InvalidRequestError):
        _args.moment(value)


# --- the same through every public method -----------------------------------------------------------------------------

BAD_NAMES: list[Any] = ["", "../x", "a/b", "a\0", "Disk", "x" * 1024, "ä", "disk.base", "disk.json", None]
BAD_SIZES: list[Any] = [0, -512, True, "20G", 1.5, 1 << 63]
BAD_TIMES: list[Any] = ["soon", True, math.nan, math.inf, 1.9e12, 10**400]
BAD_LISTS: list[Any] = ["md", b"md", "", 7]
BAD_DURATIONS: list[Any] = [-1, math.nan, "24h", True, 10**400]
BAD: dict[str, list[Any]] = {
    "image_id": BAD_IDS,
    "disk_id": BAD_IDS,
    "owner": BAD_IDS,
    "name": BAD_NAMES,
    # where None is allowed it says: as large as the image, as configured, for ever
    "size": BAD_SIZES,
    "until": BAD_TIMES,
    "max_idle": BAD_DURATIONS,
    "in_use": [*([bad] for bad in BAD_IDS), *BAD_LISTS],
    "image_ids": BAD_LISTS,
    "expect": ["abc", "sha256:" + "0" * 64, b"abc", {"sha256": "0" * 64}],
    "deadline": ["10m", "10", -1, -0.001, math.nan, True, [1], datetime.now(UTC), 10**400],
    "path": ["kernel", "../kernel", "", "/nowhere/kernel", "/tmp/a\0b", "/", 7, None],
    "cancel": [True, 1, "now", lambda: True],
    "progress": [5, "yes"],
    "plan": ["plan", 1, []],
    "static_mb": ["5", 1.5, True, None, -1],
}
"""What may not be handed in, by the parameter's name."""

OTHERWISE = {"source"}
"""Parameters with tests of their own elsewhere."""

GOOD: dict[str, Any] = {
    "image_id": "img",
    "image_ids": ["img"],
    "disk_id": "vm",
    "name": "disk",
    "owner": "someone",
    "size": 512,
    "path": "/tmp/kernel",
    "static_mb": 0,
}


def _methods() -> Iterator[tuple[str, inspect.Signature]]:
    for name, method in inspect.getmembers(ImageCache, inspect.isfunction):
        if not name.startswith("_"):
            yield name, inspect.signature(method)


CALLS = [(name, parameter) for name, signature in _methods() for parameter in signature.parameters if parameter in BAD]


def test_every_parameter_is_tried_or_excused() -> None:
    """A new method, or a new word of an old one, cannot be forgotten here."""
    known = {"self", *BAD, *OTHERWISE}
    assert {word for _, signature in _methods() for word in signature.parameters} == known
    assert {name for name, _ in CALLS} >= {"ensure_base", "create_root_disk", "pin", "remove_base", "copy_base"}


@pytest.mark.parametrize(("method", "parameter"), CALLS, ids=[f"{name}-{parameter}" for name, parameter in CALLS])
def test_every_public_method_judges_what_it_is_given(method: str, parameter: str, tmp_path: Path) -> None:
    """Whatever is wrong with an id, a name, a size or a time: an InvalidRequestError, before anything is asked."""
    source = FakeSource({"img": FakeImage(data=bytes(512))})
    backend = MemoryBackend({}, None)
    cache = ImageCache(CacheConfig(root=tmp_path / "root", backend="memory"), source=source, backend=backend)
    needed = dict(inspect.signature(getattr(ImageCache, method)).parameters)
    arguments = {name: GOOD[name] for name, word in needed.items() if name != "self" and word.default is word.empty}
    for bad in BAD[parameter]:
        with pytest.raises(InvalidRequestError):
            # what gives an iterator judges when that begins
            iter(getattr(cache, method)(**{**arguments, parameter: bad}) or ())
    assert source.gets == 0, "it was asked for an image"
    assert list(backend.iter_bases()) == []
    assert [path.name for path in tmp_path.rglob("*") if path.parent.name == "locks" or "kernel" in path.name] == []


@pytest.mark.parametrize("finders", [ImagesInUse(lambda: ["md"]), "finders", None], ids=["one", "text", "none"])
def test_finders_are_a_list(finders: Any, tmp_path: Path) -> None:
    """Also one alone; whoever forgets it is told what to give."""
    config = CacheConfig(root=tmp_path, source="directory", source_options={"path": str(tmp_path)})
    with pytest.raises(InvalidRequestError, match=r"user_finders .* is no list .*Give a list"):
        ImageCache.from_config(config, user_finders=finders)


@pytest.mark.parametrize("value", BAD_IDS, ids=lambda value: repr(value)[:20])
def test_one_bad_id_of_many_is_that_ones_error(value: Any, tmp_path: Path) -> None:
    """ensure_bases says of each id what became of it."""
    source = FakeSource({"img": FakeImage(data=bytes(512))})
    cache = ImageCache(CacheConfig(root=tmp_path), source=source, backend=MemoryBackend({}, None))
    bad, good = cache.ensure_bases([value, "img"])
    assert isinstance(bad.error, InvalidRequestError)
    assert bad.base is None
    assert good.error is None

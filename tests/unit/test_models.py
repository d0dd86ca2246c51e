"""The values that cross the seams: frozen, checked, with the figures that follow from them."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest

from nova_imagecache import _models
from nova_imagecache._models import (
    BaseImage,
    BaseRecord,
    CacheUsage,
    CheckReport,
    CleanupItem,
    CleanupPlan,
    Digest,
    Fact,
    FileLocation,
)
from nova_imagecache.exceptions import InvalidRequestError

SHA512 = hashlib.sha512(b"").hexdigest()
CLASSES = [
    cls for _, cls in inspect.getmembers(_models, dataclasses.is_dataclass) if cls.__module__ == _models.__name__
]
RECORD = BaseRecord(
    image_id="img",
    format="raw",
    virtual_size=4096,
    size=4000,
    source_format="raw",
    source_size=4000,
    source_digest=Digest("sha512", SHA512),
    evidence="os_hash",
    made_by="stored",
    source="fake",
    fetched_at=1.5,
)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: str(cls.__name__))
def test_every_value_is_frozen_slotted_and_documented(cls: Any) -> None:
    """A value that crossed a seam is never changed behind its owner's back."""
    assert cls.__dataclass_params__.frozen
    assert "__slots__" in vars(cls)
    assert cls.__doc__
    assert not cls.__doc__.startswith(f"{cls.__name__}(")
    assert cls is Digest or all(field.kw_only for field in dataclasses.fields(cls))


def test_a_frozen_value_refuses_changes() -> None:
    """As Python says it."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        RECORD.size = 1  # type: ignore[misc]  # that is the point


@pytest.mark.parametrize("algorithm", _models.DIGEST_ALGORITHMS)
def test_digests_of_every_algorithm_are_taken_in_either_case(algorithm: str) -> None:
    """Image services write hexadecimal in lower or upper case."""
    value = hashlib.new(algorithm, b"x", usedforsecurity=False).hexdigest()
    digest = Digest(algorithm, value.upper())
    assert digest == Digest(algorithm, value)
    assert digest.value == value
    assert str(digest) == f"{algorithm}:{value}"


@pytest.mark.parametrize(
    ("algorithm", "value"),
    [
        ("sha512", ""),
        ("sha512", SHA512[:-1]),
        ("sha512", SHA512 + "0"),
        ("sha512", "g" * 128),
        ("sha512", " " + SHA512[1:]),
        ("md5", SHA512),
        ("SHA512", SHA512),
        ("crc32", "00000000"),
        ("shake_128", ""),
        ("", ""),
        (None, SHA512),
        ("sha512", None),
        ("sha512", 7),
        ("sha512", b"0" * 128),
    ],
)
def test_digests_that_say_nothing_are_refused(algorithm: Any, value: Any) -> None:
    """A wrong length, other letters, an algorithm that image services do not use."""
    with pytest.raises(InvalidRequestError):
        Digest(algorithm, value)


def test_a_base_says_what_its_record_says() -> None:
    """Format, virtual size and digest come from one place."""
    base = BaseImage(image_id="img", location=FileLocation(path=Path("/x")), record=RECORD)
    assert (base.format, base.virtual_size, base.digest) == ("raw", 4096, RECORD.source_digest)
    assert pickle.loads(pickle.dumps(base)) == base


def test_a_plan_adds_up_what_it_removes() -> None:
    """Kept and marked bases free nothing."""
    items = [
        CleanupItem(image_id="a", verdict="remove", reason="", allocated=5),
        CleanupItem(image_id="b", verdict="keep", reason="", allocated=50),
        CleanupItem(image_id="c", verdict="mark", reason="", allocated=500),
        CleanupItem(image_id="d", verdict="remove", reason="", allocated=2),
    ]
    assert CleanupPlan(items=tuple(items), max_idle=1).freeable == 7


def test_usage_is_the_sum_of_its_places() -> None:
    """Bases, staging and trash are disjoint."""
    usage = CacheUsage(
        base_count=1,
        bases=100,
        staging=20,
        trash=3,
        reclaimable=100,
        total=1000,
        free=500,
        own_filesystem=False,
        local=True,
        complete=True,
    )
    assert usage.allocated == 123


def test_a_check_is_ok_without_problems() -> None:
    """Facts alone are none."""
    fact, problem = Fact(name="a", value="1"), Fact(name="b", value="2", problem="mend it")
    assert CheckReport(facts=(fact,)).ok
    report = CheckReport(facts=(fact, problem))
    assert not report.ok
    assert report.problems == (problem,)

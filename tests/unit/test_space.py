"""Whether a fetch may take what it needs."""

from __future__ import annotations

import pytest

from nova_imagecache._models import Capacity
from nova_imagecache._space import SpacePolicy, admit
from nova_imagecache.exceptions import NoSpaceError

CAPACITY = Capacity(total=1000, free=300)


def ask(needed: int, *, taken: int = 0, max_bytes: int | None = None, min_free: int = 0) -> None:
    policy = SpacePolicy(max_bytes=max_bytes, min_free_bytes=min_free)
    admit(needed, capacity=CAPACITY, taken=taken, policy=policy, image_id="img", stage="admission")


def refused(needed: int, *, taken: int = 0, max_bytes: int | None = None, min_free: int = 0) -> NoSpaceError:
    with pytest.raises(NoSpaceError) as caught:
        ask(needed, taken=taken, max_bytes=max_bytes, min_free=min_free)
    assert (caught.value.needed, caught.value.image_id, caught.value.stage) == (needed, "img", "admission")
    return caught.value


def test_what_fits_is_let_in() -> None:
    """Up to the last byte of each limit."""
    ask(0)
    ask(300)
    ask(200, min_free=100)
    ask(50, taken=50, max_bytes=100)


def test_a_full_storage_is_told_with_figures() -> None:
    """What is needed and what is free; no limit of ours stands in the way."""
    error = refused(301)
    assert (error.free, error.limit) == (300, None)


def test_space_that_must_stay_free_is_not_given() -> None:
    """The error names the limit, since the storage itself has room."""
    error = refused(201, min_free=100)
    assert (error.free, error.limit) == (200, "min_free_bytes")
    assert refused(301, min_free=100).limit is None
    assert refused(1, min_free=5000).free == 0


def test_the_caches_share_is_not_exceeded() -> None:
    """What all bases take counts, and the error says how much that is."""
    error = refused(51, taken=50, max_bytes=100)
    assert (error.free, error.in_use, error.limit) == (50, 50, "max_bytes")
    assert refused(1, taken=150, max_bytes=100).free == 0


def test_nothing_needed_is_refused_where_the_share_is_exceeded_already() -> None:
    """A limit that was lowered stops fetches until something went."""
    refused(0, taken=101, max_bytes=100)

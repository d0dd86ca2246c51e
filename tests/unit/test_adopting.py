"""Images that lie in the storage already: whom they are refused, as any other image, and what is never compared."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from nova_imagecache import (
    CacheConfig,
    Digest,
    DiskTooSmallError,
    ImageCache,
    ImageRejectedError,
)
from nova_imagecache.testing import FakeImage, FakeSource, MemoryBackend

MIB = 1 << 20
DATA = b"adopted!" * (2 * MIB // 8)


def make_cache(directory: Path, image: FakeImage, **config: Any) -> tuple[ImageCache, FakeSource]:
    """A cache whose storage has the image already, and the source, which tells what was downloaded."""
    backend = MemoryBackend()
    backend.offer("img", image.data)
    source = FakeSource({"img": image})
    made = CacheConfig(root=directory / "root", backend="memory", **config)
    return ImageCache(made, source=source, backend=backend), source


def test_an_image_without_a_digest_is_adopted(tmp_path: Path) -> None:
    """Its bytes stay the image service's own: there is no download that could be anything else."""
    cache, source = make_cache(tmp_path, FakeImage(data=DATA, digest=None))
    assert not cache.ensure_base("img").managed
    assert source.bytes_served == 0


def test_a_disk_below_min_disk_is_refused(tmp_path: Path) -> None:
    """As of an image that is brought in; for a disk that is large enough it is adopted."""
    cache, _source = make_cache(tmp_path, FakeImage(data=DATA, min_disk=8 * MIB))
    with pytest.raises(DiskTooSmallError):
        cache.create_root_disk("img", "vm", size=4 * MIB)
    assert list(cache.bases()) == []
    cache.create_root_disk("img", "vm", size=8 * MIB)
    assert not cache.get_base("img").managed


@pytest.mark.parametrize(
    ("image", "reason"),
    [(FakeImage(data=DATA), "max_virtual_size"), (FakeImage(data=b""), "no data")],
    ids=["too large", "empty"],
)
def test_what_nobody_may_have_is_not_adopted(tmp_path: Path, image: FakeImage, reason: str) -> None:
    """Wherever its bytes lie."""
    cache, _source = make_cache(tmp_path, image, max_virtual_size=MIB)
    with pytest.raises(ImageRejectedError, match=reason):
        cache.ensure_base("img")
    assert list(cache.bases()) == []


def test_a_size_that_nobody_announced_is_held_against_the_cap(tmp_path: Path) -> None:
    """When it is adopted, and whenever it is found again; nobody gets a disk of it."""
    cache, source = make_cache(tmp_path, FakeImage(data=DATA, size=None), max_virtual_size=MIB)
    for _attempt in range(2):
        with pytest.raises(ImageRejectedError, match=f"virtual size {len(DATA)} is above max_virtual_size {MIB}"):
            cache.create_root_disk("img", "vm", size=4 * MIB)
    assert list(cache.root_disks()) == []
    assert source.bytes_served == 0


def test_adopted_bytes_are_not_downloaded_to_be_compared(tmp_path: Path) -> None:
    """A base without a digest stands where other bytes were to go: that is told before the first of them comes."""
    cache, source = make_cache(tmp_path, FakeImage(data=DATA, digest=None))
    cache.ensure_base("img")
    with pytest.raises(ImageRejectedError, match="adopted") as caught:
        cache.ensure_base("img", expect=Digest("sha256", hashlib.sha256(DATA).hexdigest()))
    assert "Leave expect out" in str(caught.value)
    assert source.bytes_served == 0
    assert not cache.get_base("img").managed

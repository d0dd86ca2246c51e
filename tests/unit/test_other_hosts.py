"""What another host does to a shared storage while this one brings an image in."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nova_imagecache import BaseInUseError, CacheConfig, Digest, ImageCache, ImageInfo
from nova_imagecache.testing import FakeSource, MemoryBackend, MemoryStorage

MIB = 1 << 20
DATA = b"of many hosts..." * 65536
DIGEST = Digest("sha512", hashlib.sha512(DATA).hexdigest())


class Slow(FakeSource):
    """Something is done before it first answers."""

    def __init__(self, meanwhile: Callable[[], object]) -> None:
        super().__init__({"img": DATA})
        self._meanwhile = [meanwhile]

    def get(self, image_id: str) -> ImageInfo:
        image = super().get(image_id)
        while self._meanwhile:
            self._meanwhile.pop()()
        return image


class Hosts:
    """Caches of one storage, each of a host of its own."""

    def __init__(self, directory: Path) -> None:
        self.storage = MemoryStorage()
        self._directory = directory

    def cache(self, name: str, source: FakeSource, clock: Callable[[], float] = time.time) -> ImageCache:
        config = CacheConfig(root=self._directory / name, backend="memory")
        return ImageCache(config, source=source, backend=MemoryBackend(storage=self.storage, clock=clock))


@pytest.fixture
def hosts(tmp_path: Path) -> Hosts:
    return Hosts(tmp_path)


@pytest.mark.parametrize("expect", [None, DIGEST], ids=["any bytes", "these bytes"])
def test_another_host_is_faster(hosts: Hosts, expect: Digest | None) -> None:
    """What it published, and uses already, is taken as it is."""
    theirs = hosts.cache("theirs", FakeSource({"img": DATA}))
    source = Slow(lambda: theirs.create_root_disk("img", "vm-1"))
    ours = hosts.cache("ours", source)
    ours.create_root_disk("img", "vm-2", expect=expect)
    assert source.opens == 0
    assert {user.disk_id for user in ours.users("img")} == {"vm-1", "vm-2"}


def test_another_host_adopts_it_first(hosts: Hosts) -> None:
    """Its base is taken, also where this host would find nothing to adopt."""

    def adopt() -> None:
        backend = MemoryBackend(storage=hosts.storage)
        backend.offer("img", DATA)
        hosts.cache("theirs", FakeSource({"img": DATA})).ensure_base("img")
        hosts.storage.offers.clear()

    ours = hosts.cache("ours", Slow(adopt))
    assert not ours.ensure_base("img").managed


def test_the_use_of_what_another_host_published_is_noted(hosts: Hosts) -> None:
    """As that of a hit: it is not the one that has been idle for longest."""
    clock = [0.0]
    theirs = hosts.cache("theirs", FakeSource({"img": DATA}))

    def publish() -> None:
        theirs.ensure_base("img")
        clock[0] = time.time() + 100.0

    hosts.cache("ours", Slow(publish), lambda: clock[0]).ensure_base("img")
    assert theirs.get_base("img").last_used == clock[0]


# --- other bytes of the same id, which this host replaces


def _opening(meanwhile: Callable[[], object]) -> FakeSource:
    """A source of which something is done before it first serves bytes."""
    todo = [meanwhile]

    class Opening(FakeSource):
        @contextmanager
        def open(self, image: ImageInfo, offset: int = 0) -> Iterator[Iterator[bytes]]:
            while todo:
                todo.pop()()
            with super().open(image, offset) as chunks:
                yield chunks

    return Opening({"img": DATA})


def test_another_host_removes_the_other_bytes_first(hosts: Hosts) -> None:
    """What was to be replaced is gone: that is all that was wanted."""
    theirs = hosts.cache("theirs", FakeSource({"img": b"x" * MIB}))
    theirs.ensure_base("img")
    ours = hosts.cache("ours", _opening(lambda: theirs.remove_base("img")))
    assert ours.ensure_base("img", expect=DIGEST).digest == DIGEST


def test_another_host_publishes_other_bytes_meanwhile(hosts: Hosts) -> None:
    """What stands there when ours come is replaced, and they need not be fetched again."""
    theirs = hosts.cache("theirs", FakeSource({"img": b"x" * MIB}))
    source = _opening(lambda: theirs.ensure_base("img"))
    ours = hosts.cache("ours", source)
    assert ours.ensure_base("img", expect=DIGEST).digest == DIGEST
    assert source.opens == 1


def test_other_bytes_that_get_a_disk_meanwhile_stay(hosts: Hosts) -> None:
    """As those that had one before the fetch began."""
    theirs = hosts.cache("theirs", FakeSource({"img": b"x" * MIB}))
    ours = hosts.cache("ours", _opening(lambda: theirs.create_root_disk("img", "vm")))
    with pytest.raises(BaseInUseError):
        ours.ensure_base("img", expect=DIGEST)
    assert [user.disk_id for user in theirs.users("img")] == ["vm"]

"""SourceContract notices a source that leaves something open, or writes to what it reads from."""

from __future__ import annotations

import json
import os
import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

import pytest

from contract.test_sources import DirectoryHarness, FakeHarness
from nova_imagecache import DirectorySource
from nova_imagecache.testing import SourceContract
from nova_imagecache.testing import _source_traces as traces

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from nova_imagecache import ImageInfo
    from nova_imagecache.testing._source_contract import SourceHarness


class NeverCloses(DirectorySource):
    """Its descriptors stay open for good."""

    @contextmanager
    def open(self, image: ImageInfo, offset: int = 0) -> Iterator[Iterator[bytes]]:
        self.get(image.image_id)
        descriptor = os.open(self._path / f"{image.image_id}.img", os.O_RDONLY)
        os.lseek(descriptor, offset, os.SEEK_SET)
        yield self._chunks(descriptor)

    def _chunks(self, descriptor: int) -> Iterator[bytes]:
        while chunk := os.read(descriptor, 2**20):
            yield chunk


class ClosesAtTheEnd(NeverCloses):
    """A file is closed by whoever reads to its end, and by nobody else."""

    def _chunks(self, descriptor: int) -> Iterator[bytes]:
        yield from super()._chunks(descriptor)
        os.close(descriptor)


class ForgetsFiles(DirectorySource):
    """A file is open for as long as somebody knows of the stream."""

    @contextmanager
    def open(self, image: ImageInfo, offset: int = 0) -> Iterator[Iterator[bytes]]:
        self.get(image.image_id)
        file = (self._path / f"{image.image_id}.img").open("rb", buffering=0)
        file.seek(offset)
        yield iter(lambda: file.read(2**20), b"")


class KeepsConnections(DirectorySource):
    """Each request has a connection of its own, which nobody ends."""

    connections: ClassVar[list[socket.socket]] = []

    def get(self, image_id: str) -> ImageInfo:
        ends = socket.socketpair()
        self.connections.append(ends[0])
        ends[1].close()
        return super().get(image_id)


class OpensTooEarly(DirectorySource):
    """What it opened stays open when it then refuses."""

    @contextmanager
    def open(self, image: ImageInfo, offset: int = 0) -> Iterator[Iterator[bytes]]:
        directory = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY)
        with super().open(image, offset) as chunks:
            os.close(directory)
            yield chunks


class NotesUse(DirectorySource):
    """It writes to the image's properties when it was asked for."""

    def get(self, image_id: str) -> ImageInfo:
        image = super().get(image_id)
        path = self._path / f"{image_id}.json"
        path.write_text(json.dumps(json.loads(path.read_bytes()) | {"asked": "yes"}))
        return image


class WorksBeside(DirectorySource):
    """It copies an image beside itself while it is read."""

    @contextmanager
    def open(self, image: ImageInfo, offset: int = 0) -> Iterator[Iterator[bytes]]:
        with super().open(image, offset) as chunks:
            copy = self._path / f"{image.image_id}.tmp"
            copy.write_bytes(b"x")
            yield chunks
            copy.unlink()


class WritesAtOnce(DirectorySource):
    """It makes an index when it is constructed."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        (path / "index").write_text("{}")


OPEN = [
    (NeverCloses, "whole", "a stream that was read whole closes"),
    (NeverCloses, "early", "a stream early closes"),
    (NeverCloses, "unread", "a stream that was not read closes"),
    (ClosesAtTheEnd, "early", "a stream early closes"),
    (ForgetsFiles, "early", "a stream early closes"),
    (ClosesAtTheEnd, "unread", "a stream that was not read closes"),
    (KeepsConnections, "get", "`get` leaves nothing open"),
    (OpensTooEarly, "gone", "an image that is gone leaves nothing open"),
]


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # what nobody closed is closed by being forgotten
@pytest.mark.parametrize(("broken", "way", "words"), OPEN)
def test_what_stays_open_is_noticed(broken: type[DirectorySource], way: str, words: str, tmp_path: Path) -> None:
    """By the way in which it was left, with what it leads to."""
    leads = "socket:" if broken is KeepsConnections else str(tmp_path)
    before = set(traces.descriptors())
    try:
        with pytest.raises(
            AssertionError, match=f"broken promise: .*{words}.*: 8 more descriptors .*{leads}"
        ) as caught:
            _contract(broken).test_streams_are_closed(_harness(broken, tmp_path), way)
        assert "docs/reference/contracts.md#image-source" in caught.value.__notes__[0]
    finally:
        for connection in KeepsConnections.connections:
            connection.close()
        KeepsConnections.connections.clear()
        del caught
        for number in set(traces.descriptors()) - before:
            os.close(int(number))


def test_a_source_that_closes_passes(tmp_path: Path) -> None:
    """The same source reads to the end, and leaves nothing then."""
    _contract(ClosesAtTheEnd).test_streams_are_closed(_harness(ClosesAtTheEnd, tmp_path), "whole")


def test_a_pool_of_connections_passes(tmp_path: Path) -> None:
    """What is opened once, and used again, is not left open."""

    class Pooled(DirectorySource):
        pool: ClassVar[list[socket.socket]] = []

        def get(self, image_id: str) -> ImageInfo:
            if not self.pool:
                self.pool.extend(socket.socketpair())
            return super().get(image_id)

    try:
        for way in traces.WAYS:
            _contract(Pooled).test_streams_are_closed(_harness(Pooled, tmp_path), way)
    finally:
        for connection in Pooled.pool:
            connection.close()


def test_what_cannot_be_counted_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system does not tell what is open, nobody says that nothing is."""
    monkeypatch.setattr(traces, "_DESCRIPTORS", tmp_path / "proc")
    with pytest.raises(pytest.skip.Exception, match="cannot be counted"):
        _contract(DirectorySource).test_streams_are_closed(_harness(DirectorySource, tmp_path), "whole")


@pytest.mark.parametrize(
    ("broken", "words"),
    [(NotesUse, r"`get` changed \S+\.json"), (WorksBeside, r"`whole` changed \.")],
)
def test_writing_is_noticed(broken: type[DirectorySource], words: str, tmp_path: Path) -> None:
    """Also what is gone again afterwards; the words say what was asked, and which file is another now."""
    with pytest.raises(AssertionError, match=f"broken promise: a source never writes, and {words}"):
        _contract(broken).test_never_writes(_harness(broken, tmp_path), tmp_path)


def test_a_constructor_that_writes_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the harness itself puts there is not the source's."""
    with pytest.raises(AssertionError, match=r"the constructor writes nothing, and it changed .*index"):
        _contract(WritesAtOnce).test_constructor_writes_nothing(tmp_path, monkeypatch)


def test_what_is_not_below_the_directory_is_skipped(tmp_path: Path) -> None:
    """With the name of what to override."""

    class Elsewhere(SourceContract):
        def make_harness(self, tmp_path: Path) -> SourceHarness:
            del tmp_path
            return FakeHarness()

    with pytest.raises(pytest.skip.Exception, match="override `kept`"):
        Elsewhere().test_never_writes(FakeHarness(), tmp_path)


def test_a_source_that_is_made_elsewhere_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its constructor did not run, so nothing is known of it."""

    class Shared(SourceContract):
        shared = FakeHarness()

        def make_harness(self, tmp_path: Path) -> SourceHarness:
            del tmp_path
            return self.shared

    with pytest.raises(pytest.skip.Exception, match="FakeSource has no constructor that runs"):
        Shared().test_constructor_writes_nothing(tmp_path, monkeypatch)


def _harness(broken: type[DirectorySource], directory: Path) -> DirectoryHarness:
    harness = DirectoryHarness(directory)
    harness.source = broken(directory)
    return harness


def _contract(broken: type[DirectorySource]) -> SourceContract:
    class Local(SourceContract):
        def make_harness(self, tmp_path: Path) -> SourceHarness:
            (tmp_path / "made by the harness").touch()
            return _harness(broken, tmp_path)

    return Local()

"""A source's bytes come whole, hashed and in large pieces, in bounded memory, and end at the first trouble."""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from harness.waiting import until
from nova_imagecache._guard_source import GuardedSource
from nova_imagecache._models import ImageInfo
from nova_imagecache._stream import _RING, MIB, PIECE, Stream
from nova_imagecache.exceptions import SourceUnavailableError
from nova_imagecache.testing import FakeImage, FakeSource

DATA = random.Random(4).randbytes(9 * MIB + 12345)


def no(_part: memoryview | None = None) -> None:
    """Nothing to look at, nothing to say."""


def stream(source: FakeSource, **changes: object) -> Stream:
    known: dict[str, object] = {"algorithms": ["sha256", "md5"], "look": no, "check": no}
    return Stream(GuardedSource(source), source.get("img"), **(known | changes))  # type: ignore[arg-type]  # test data


def source(data: bytes = DATA, chunk: int = MIB, **changes: object) -> FakeSource:
    made = FakeSource(chunk_size=chunk)
    made.add("img", FakeImage(data=data, **changes))  # type: ignore[arg-type]  # test data
    return made


@pytest.mark.parametrize("chunk", [4000, 65536, MIB, MIB + 1, PIECE, 64 * MIB])
def test_pieces_are_full_but_for_the_last(chunk: int) -> None:
    """Whatever the source's chunks are; every digest is of all bytes."""
    with stream(source(chunk=chunk)) as pieces:
        found = [bytes(piece) for piece in pieces]
        assert b"".join(found) == DATA
        assert [len(piece) for piece in found[:-1]] == [PIECE] * (len(found) - 1)
        assert pieces.digest("sha256") == hashlib.sha256(DATA).hexdigest()
        assert pieces.digest("md5") == hashlib.md5(DATA, usedforsecurity=False).hexdigest()


def test_nothing_is_no_piece() -> None:
    """An empty image has none."""
    with stream(source(b"", size=0)) as pieces:
        assert list(pieces) == []


def test_bytes_are_looked_at_as_they_come() -> None:
    """Before a piece is full, at most 1 MiB at a time; what is raised then ends the reading at once."""
    served = source()
    seen: list[int] = []

    def look(part: memoryview) -> None:
        seen.append(len(part))
        if sum(seen) > MIB:
            raise ValueError("bad")

    with stream(served, look=look) as pieces, pytest.raises(ValueError, match="bad"):
        list(pieces)
    assert max(seen) <= MIB
    assert served.bytes_served <= 3 * MIB


@pytest.mark.slow
def test_a_slow_caller_holds_the_source_up() -> None:
    """Of a long stream no more is read than the ring holds, and the digests are right all the same."""
    data = DATA * 8
    served = source(data)
    with stream(served) as pieces:
        iterator = iter(pieces)
        next(iterator)
        time.sleep(0.3)
        assert served.bytes_served <= (_RING + 1) * PIECE
        for _piece in iterator:
            pass
        assert pieces.digest("sha256") == hashlib.sha256(data).hexdigest()


def test_a_piece_that_is_held_stays_as_it_is() -> None:
    """While others come and go in the rest of the ring; when all are held none comes before one is let go."""
    data = DATA * 8
    pieces_of = [data[at : at + PIECE] for at in range(0, len(data), PIECE)]
    with stream(source(data)) as pieces:
        iterator = iter(pieces)
        kept = [(next(iterator), pieces.hold()) for _ in range(_RING - 1)]
        assert bytes(next(iterator)) == pieces_of[_RING - 1]
        assert bytes(next(iterator)) == pieces_of[_RING], "in the only one that is free"
        assert [bytes(piece) for piece, _ in kept] == pieces_of[: _RING - 1]
        also = pieces.hold()
        threading.Timer(0.3, kept[0][1]).start()
        begun = time.monotonic()
        assert bytes(next(iterator)) == pieces_of[_RING + 1]
        assert time.monotonic() - begun > 0.2, "there was none"
        for _piece, let_go in kept[1:]:
            let_go()
        also()
        assert [bytes(piece) for piece in iterator] == pieces_of[_RING + 2 :]


def test_only_a_piece_can_be_held() -> None:
    """Before the first and after the last there is none."""
    with stream(source()) as pieces:
        with pytest.raises(RuntimeError, match="no piece"):
            pieces.hold()
        for _piece in pieces:
            pass
        with pytest.raises(RuntimeError, match="no piece"):
            pieces.hold()


class SlowHash:
    """Hashes nothing before it is let."""

    def __init__(self, let: threading.Event) -> None:
        self._let = let
        self._inner = hashlib.sha256()

    def update(self, data: memoryview) -> None:
        assert self._let.wait(30)
        self._inner.update(data)

    def hexdigest(self) -> str:
        return self._inner.hexdigest()


@pytest.fixture
def let_hash(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """No hash goes on before this is set."""
    let = threading.Event()
    monkeypatch.setattr(hashlib, "new", lambda *_, **__: SlowHash(let))
    yield let
    let.set()


def test_pieces_come_before_they_are_hashed(let_hash: threading.Event) -> None:
    """The digest is waited for."""
    with stream(source(), algorithms=["sha256"]) as pieces:
        assert b"".join(bytes(piece) for piece in pieces) == DATA
        threading.Timer(0.3, let_hash.set).start()
        assert pieces.digest("sha256") == hashlib.sha256(DATA).hexdigest()


def test_a_slow_hash_holds_the_source_up(let_hash: threading.Event) -> None:
    """No more is read than the ring holds, and nothing that is not hashed yet is written over."""
    data = DATA * 8
    served = source(data)
    with stream(served, algorithms=["sha256"]) as pieces:
        found, iterator = b"", iter(pieces)
        for _ in range(5):
            found += bytes(next(iterator))
        time.sleep(0.3)
        assert served.bytes_served <= (_RING + 1) * PIECE
        let_hash.set()
        assert found + b"".join(bytes(piece) for piece in iterator) == data
        assert pieces.digest("sha256") == hashlib.sha256(data).hexdigest()


def test_waiting_for_the_digest_is_checked(let_hash: threading.Event) -> None:
    """A deadline or a cancel is seen although the hash takes long."""
    enough = threading.Event()

    def check() -> None:
        if enough.is_set():
            raise TimeoutError("enough")

    with stream(source(), algorithms=["sha256"], check=check) as pieces:
        list(pieces)
        enough.set()
        with pytest.raises(TimeoutError):
            pieces.digest("sha256")
        let_hash.set()


def test_there_is_no_digest_of_a_stream_that_broke() -> None:
    with stream(source(break_after=5 * MIB), algorithms=["sha256"]) as pieces:
        with pytest.raises(SourceUnavailableError):
            list(pieces)
        with pytest.raises(SourceUnavailableError, match="hashing thread"):
            pieces.digest("sha256")


def test_a_stream_that_breaks_says_so() -> None:
    """After the pieces that came."""
    with stream(source(break_after=5 * MIB)) as pieces, pytest.raises(SourceUnavailableError):
        list(pieces)


@pytest.mark.slow
def test_leaving_early_ends_the_threads() -> None:
    """None is left behind, whether it reads, hashes or waits for room."""
    before = set(threading.enumerate())
    for taken in (0, 1, 3):
        with stream(source(DATA * 8)) as pieces:
            for _number, _piece in zip(range(taken), pieces, strict=False):
                pass
        until(lambda: set(threading.enumerate()) <= before, "the threads to end")


def test_nothing_is_looked_at_once_the_stream_was_left() -> None:
    """A reader that waits in its source then ends with the next bytes: what it would look at may belong to another."""
    release = threading.Event()
    seen: list[int] = []

    class Pausing(FakeSource):
        @contextmanager
        def open(self, image: ImageInfo, offset: int = 0) -> Iterator[Iterator[bytes]]:
            def chunks() -> Iterator[bytes]:
                yield DATA[:PIECE]
                release.wait(30)
                yield from (DATA[PIECE : 2 * PIECE], DATA[2 * PIECE :])

            yield chunks()

    pausing = Pausing()
    pausing.add("img", FakeImage(data=DATA))
    before = set(threading.enumerate())
    try:
        with stream(pausing, look=lambda part: seen.append(len(part))) as pieces:
            next(iter(pieces))
    finally:
        release.set()
    until(lambda: set(threading.enumerate()) <= before, "the threads to end")
    assert sum(seen) == PIECE


def test_waiting_is_checked_while_nothing_comes() -> None:
    """A deadline or a cancel is seen although the source hangs."""
    release = threading.Event()

    class Hanging(FakeSource):
        @contextmanager
        def open(self, image: ImageInfo, offset: int = 0) -> Iterator[Iterator[bytes]]:
            release.wait(30)
            yield iter(())

    hanging = Hanging()
    hanging.add("img", FakeImage(data=DATA))
    until_ = time.monotonic() + 0.3

    def check() -> None:
        if time.monotonic() > until_:
            raise TimeoutError("enough")

    try:
        with stream(hanging, check=check) as pieces, pytest.raises(TimeoutError):
            list(pieces)
    finally:
        release.set()


def test_a_source_of_empty_chunks_is_left() -> None:
    """Its thread ends with the stream, although no byte ever comes."""
    given = threading.Event()

    class Empty(FakeSource):
        @contextmanager
        def open(self, image: ImageInfo, offset: int = 0) -> Iterator[Iterator[bytes]]:
            def chunks() -> Iterator[bytes]:
                while not given.wait(0.001):
                    yield b""

            yield chunks()

    empty = Empty()
    empty.add("img", FakeImage(data=DATA))
    before = set(threading.enumerate())
    try:
        with stream(empty):
            pass
        until(lambda: set(threading.enumerate()) <= before, "the threads to end")
    finally:
        given.set()

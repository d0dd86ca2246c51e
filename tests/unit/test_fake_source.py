"""FakeSource fails as it is told to, and counts."""

from __future__ import annotations

import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from nova_imagecache import Digest, SourceForbiddenError, SourceUnavailableError
from nova_imagecache.testing import FakeImage, FakeSource

DATA = bytes(range(256)) * 1000


def read(source: FakeSource, image_id: str = "img", offset: int = 0) -> bytes:
    with source.open(source.get(image_id), offset) as chunks:
        return b"".join(chunks)


def test_counts() -> None:
    """Calls and bytes are counted over all threads."""
    source = FakeSource({"img": DATA})
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: read(source), range(32))) == [DATA] * 32
    assert (source.gets, source.opens, source.bytes_served) == (32, 32, 32 * len(DATA))


def test_truth_is_the_default() -> None:
    """Size and digest are the data's unless told otherwise."""
    image = FakeSource({"img": DATA}).get("img")
    assert image.size == len(DATA)
    assert image.digest == Digest("sha512", hashlib.sha512(DATA).hexdigest())


def test_lies() -> None:
    """Any size, digest and status can be announced."""
    digest = Digest("md5", "0" * 32)
    source = FakeSource({"img": FakeImage(data=DATA, size=1, digest=digest), "bare": FakeImage(size=None, digest=None)})
    assert (source.get("img").size, source.get("img").digest) == (1, digest)
    assert (source.get("bare").size, source.get("bare").digest_evidence) == (None, "unverified")


def test_breaks() -> None:
    """A stream breaks after exactly so many bytes; one from there on does not."""
    source = FakeSource({"img": FakeImage(data=DATA, break_after=1000)}, chunk_size=300)
    got: list[bytes] = []
    with pytest.raises(SourceUnavailableError), source.open(source.get("img")) as chunks:
        got.extend(chunks)
    assert b"".join(got) == DATA[:1000]
    assert read(source, offset=1000) == DATA[1000:]


@pytest.mark.parametrize("after", [0, 1000, len(DATA)])
def test_stalls(after: int) -> None:
    """A stream waits for its event after exactly so many bytes."""
    release, waiting = threading.Event(), threading.Event()
    source = FakeSource({"img": FakeImage(data=DATA, stall=release, stall_after=after)})
    got: list[bytes] = []

    def fetch() -> None:
        with source.open(source.get("img")) as chunks:
            for chunk in chunks:
                got.append(chunk)
                if sum(map(len, got)) == after:
                    waiting.set()

    thread = threading.Thread(target=fetch)
    thread.start()
    assert after == 0 or waiting.wait(10)
    thread.join(0.05)
    assert thread.is_alive()
    assert b"".join(got) == DATA[:after]
    release.set()
    thread.join(10)
    assert b"".join(got) == DATA


def test_errors() -> None:
    """Get and open raise what they are told to."""
    error = SourceForbiddenError("no", image_id="img")
    source = FakeSource({"img": FakeImage(get_error=error), "two": FakeImage(open_error=error)})
    with pytest.raises(SourceForbiddenError):
        source.get("img")
    with pytest.raises(SourceForbiddenError):
        read(source, "two")

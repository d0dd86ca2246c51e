"""SourceContract: every promise of ImageSource as a test that any source can be put to."""

from __future__ import annotations

import hashlib
import random
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import cycle
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import pytest

from nova_imagecache._models import Digest, ImageInfo
from nova_imagecache.exceptions import ImageNotActiveError, ImageNotFoundError
from nova_imagecache.sources import DirectChunks, ImageSource
from nova_imagecache.testing._promises import CONTRACT_VERSION, chapter, promise, refused, same
from nova_imagecache.testing._source_traces import WAYS, WORDS, below, changed, descriptors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

GIB = 2**30
ROUNDS = 8
"""How often something is done to see whether each time leaves something behind."""

ODD_IDS = ("../up", "a/b", "..", "", ".hidden", "a\0b", "%2e%2e%2fup", "a?b=c", "/etc/passwd")
MISSING = "00000000-0000-4000-8000-00000000dead"

# No header of any format, and longer than one chunk of most sources.
DATA = random.Random(20).randbytes(3 * 2**20 + 12345)  # noqa: S311  # test data
OTHER = random.Random(21).randbytes(2**20 + 99)  # noqa: S311  # test data


class SourceHarness(Protocol):
    """What a source's author writes so that SourceContract can test it: the source, and a way to put images in."""

    @property
    def source(self) -> ImageSource:
        """The source under test, the same object every time."""

    def add_image(self, data: bytes | None, *, disk_format: str = "raw", min_disk: int = 0) -> str:
        """Put an image where the source finds it, and return its id.

        ``data`` None: an image that exists and has no data yet, so that its status is not active. ``min_disk`` is
        bytes, whole GiB. Skip the test (``pytest.skip``) for what this source cannot have.
        """

    def remove_image(self, image_id: str) -> None:
        """Take the image away from where the source finds it."""


@chapter("image-source", "sources.ImageSource", "sources.ImageInfo")
class SourceContract:
    """The contract of ImageSource as tests: subclass it where pytest looks, and give it a harness.

    Each failure says which promise is broken. The whole of it::

        class TestMySource(SourceContract):
            def make_harness(self, tmp_path):
                return MyHarness(tmp_path)
    """

    contract_version: ClassVar[int] = CONTRACT_VERSION

    def make_harness(self, tmp_path: Path) -> SourceHarness:
        """A harness with a source of its own; called at least once for each test, each time with an empty directory."""
        raise NotImplementedError("a subclass of SourceContract returns its harness from make_harness(tmp_path)")

    def kept(self, harness: SourceHarness, tmp_path: Path) -> dict[str, object]:  # noqa: ARG002 - for who overrides it
        """What the source reads from, by name, in such a way that every change shows.

        The default: all that is below the directory that ``make_harness`` was given. Where that is nothing, the test
        that a source never writes is skipped.
        """
        return below(tmp_path) if any(tmp_path.iterdir()) else {}

    @pytest.fixture
    def harness(self, tmp_path: Path) -> SourceHarness:
        """The subclass's harness."""
        return self.make_harness(tmp_path)

    def test_is_an_image_source(self, harness: SourceHarness) -> None:
        """A source has name, get and open; its name is a text for the base's record."""
        promise(isinstance(harness.source, ImageSource), "a source has `name`, `get` and `open`")
        name = harness.source.name
        promise(isinstance(name, str) and name.strip(), "`name` is a text that is not empty")
        same(harness.source.name, name, "`name` stays the same")

    def test_get_tells_what_is_known(self, harness: SourceHarness) -> None:
        """Get returns id, format, status, size and min_disk, in bytes."""
        image_id = harness.add_image(DATA, disk_format="raw", min_disk=2 * GIB)
        image = harness.source.get(image_id)
        promise(isinstance(image, ImageInfo), "`get` returns an ImageInfo")
        same(image.image_id, image_id, "`get` returns the image that was asked for")
        same(image.disk_format, "raw", "`get` gives the image's disk_format")
        same(image.status, "active", "`get` gives status `active` for an image that has its data")
        promise(image.size in {None, len(DATA)}, "`size` is the number of bytes that will be served, or None")
        same(image.min_disk, 2 * GIB, "`min_disk` is bytes")

    def test_digest_is_of_the_bytes(self, harness: SourceHarness) -> None:
        """The announced digest is the data's, and its evidence says whether there is one."""
        image = harness.source.get(harness.add_image(DATA))
        promise(
            (image.digest is None) == (image.digest_evidence == "unverified"),
            "`digest_evidence` is `unverified` exactly where there is no digest",
        )
        if image.digest is not None:
            promise(image.digest_evidence in {"os_hash", "checksum"}, "a source's evidence is `os_hash` or `checksum`")
            value = hashlib.new(image.digest.algorithm, DATA, usedforsecurity=False).hexdigest()
            same(image.digest, Digest(image.digest.algorithm, value), "`digest` is the digest of the data")

    def test_get_is_repeatable(self, harness: SourceHarness) -> None:
        """Reading an image changes nothing."""
        image_id = harness.add_image(DATA)
        before = harness.source.get(image_id)
        read(harness.source, before)
        same(harness.source.get(image_id), before, "reading an image does not change what `get` says")

    def test_missing_image(self, harness: SourceHarness) -> None:
        """An unknown id is ImageNotFoundError, and the error names the id and the stage."""
        call = partial(harness.source.get, MISSING)
        error = refused(ImageNotFoundError, call, "`get` of an unknown id is ImageNotFoundError")
        same(error.image_id, MISSING, "an error's `image_id` is the image that was asked for")
        promise(MISSING in str(error), "an error's message names the image")
        promise(error.stage, "an error names the stage that failed")

    @pytest.mark.parametrize("image_id", ODD_IDS)
    def test_odd_ids_find_nothing(self, harness: SourceHarness, image_id: str) -> None:
        """An id that is no plain name leads nowhere else."""
        harness.add_image(DATA)
        call = partial(harness.source.get, image_id)
        refused(ImageNotFoundError, call, f"`get` of the id {image_id!r} is ImageNotFoundError")

    def test_open_missing_image(self, harness: SourceHarness) -> None:
        """An image that went away after get is ImageNotFoundError, on entering or while iterating."""
        image_id = harness.add_image(DATA)
        image = harness.source.get(image_id)
        harness.remove_image(image_id)
        call = partial(read, harness.source, image)
        refused(ImageNotFoundError, call, "`open` of an image that is gone is ImageNotFoundError")

    def test_inactive_image_has_its_status(self, harness: SourceHarness) -> None:
        """Get returns an image without data with its status, and does not raise."""
        image = harness.source.get(harness.add_image(None))
        promise(image.status and image.status != "active", "an image without data has a status, which is not `active`")

    def test_open_inactive_image(self, harness: SourceHarness) -> None:
        """Opening an image without data is ImageNotActiveError with its status."""
        image = harness.source.get(harness.add_image(None))
        call = partial(read, harness.source, image)
        error = refused(ImageNotActiveError, call, "`open` of an image without data is ImageNotActiveError")
        same(error.status, image.status, "ImageNotActiveError.status is the image's status")

    def test_open_gives_the_bytes(self, harness: SourceHarness) -> None:
        """The chunks are bytes, none empty, and together the image."""
        image = harness.source.get(harness.add_image(DATA))
        with harness.source.open(image) as chunks:
            parts = list(chunks)
        promise(all(isinstance(part, bytes) for part in parts), "chunks are `bytes`")
        promise(all(parts), "no chunk is empty")
        same(b"".join(parts), DATA, "the chunks together are the image, in order")

    def test_read_into_buffers(self, harness: SourceHarness) -> None:
        """Chunks that can be read into buffers, of any size, give the same bytes; nothing comes behind the last."""
        image = harness.source.get(harness.add_image(DATA))
        with harness.source.open(image) as chunks:
            first = next(chunks)
            found = first + _read_into(chunks)
            promise(next(chunks, None) is None, "at the end there is no chunk more")
        same(found, DATA, "`readinto` goes on where iterating came to, and fills the buffer from its front")

    @pytest.mark.parametrize("offset", [1, 4096, 2**20, 2**20 + 1, len(DATA) - 1])
    def test_open_from_an_offset(self, harness: SourceHarness, offset: int) -> None:
        """From an offset come the bytes behind it."""
        image = harness.source.get(harness.add_image(DATA))
        same(read(harness.source, image, offset), DATA[offset:], f"`open(image, {offset})` begins at byte {offset}")

    def test_open_at_the_end(self, harness: SourceHarness) -> None:
        """From the image's very end comes nothing."""
        image = harness.source.get(harness.add_image(DATA))
        same(read(harness.source, image, len(DATA)), b"", "nothing lies behind the last byte, and that is no error")

    def test_one_byte(self, harness: SourceHarness) -> None:
        """The smallest image is served like any other."""
        image = harness.source.get(harness.add_image(b"x"))
        same(read(harness.source, image), b"x", "an image of one byte is served")

    def test_leaving_early(self, harness: SourceHarness) -> None:
        """A reader may leave after any chunk, and come back."""
        image = harness.source.get(harness.add_image(DATA))
        for _ in range(3):
            with harness.source.open(image) as chunks:
                first = next(chunks)
            promise(DATA.startswith(first), "each `open` begins anew")
        with harness.source.open(image):
            pass
        same(read(harness.source, image), DATA, "leaving a stream early does not spoil the next")

    def test_the_readers_error_goes_through(self, harness: SourceHarness) -> None:
        """What the reader raises leaves the context as it is."""
        image = harness.source.get(harness.add_image(DATA))
        error = OSError("the reader's own")

        def fail() -> None:
            with harness.source.open(image) as chunks:
                next(chunks)
                raise error

        promise(refused(OSError, fail, "a reader's error is not hidden") is error, "a reader's error is not changed")

    def test_two_streams_at_once(self, harness: SourceHarness) -> None:
        """Streams that are read by turns do not mix."""
        one, two = (harness.source.get(harness.add_image(data)) for data in (DATA, OTHER))
        with harness.source.open(one) as ones, harness.source.open(two) as twos:
            parts: tuple[list[bytes], list[bytes]] = ([next(ones)], [next(twos)])
            parts[0].extend(ones)
            parts[1].extend(twos)
        same(b"".join(parts[0]), DATA, "a stream is its own image's, whatever else is open")
        same(b"".join(parts[1]), OTHER, "a stream is its own image's, whatever else is open")

    def test_many_threads(self, harness: SourceHarness) -> None:
        """One source serves many threads at once."""
        ids = [harness.add_image(data) for data in (DATA, OTHER)] * 4

        def fetch(image_id: str) -> bytes:
            return read(harness.source, harness.source.get(image_id))

        with ThreadPoolExecutor(len(ids)) as pool:
            results = list(pool.map(fetch, ids))
        promise(results == [DATA, OTHER] * 4, "each of many threads gets the image that it asked for")

    @pytest.mark.parametrize("way", ["get", "whole", "early", "unread", "gone"])
    def test_streams_are_closed(self, harness: SourceHarness, way: str) -> None:
        """Leaving a stream closes what was opened for it, also where it was not read to its end, or refused.

        Connections that are kept for the next request, and used for it, are none of those.
        """
        held: list[object] = []
        image = harness.source.get(harness.add_image(DATA))
        if way == "gone":
            harness.remove_image(image.image_id)
        WAYS[way](harness.source, image, held)
        before = descriptors()
        for _ in range(ROUNDS):
            WAYS[way](harness.source, image, held)
        after = descriptors()
        left = sorted(after[number] for number in after.keys() - before.keys())
        words = f"{WORDS[way]}: {len(left)} more descriptors are open after {ROUNDS} times: {', '.join(left)}"
        promise(len(after) - len(before) <= ROUNDS // 2, words)

    def test_never_writes(self, harness: SourceHarness, tmp_path: Path) -> None:
        """A source reads, and changes nothing of what it reads from."""
        image_id, gone = harness.add_image(DATA), harness.add_image(OTHER)
        image, missing = harness.source.get(image_id), harness.source.get(gone)
        harness.remove_image(gone)
        before = self.kept(harness, tmp_path)
        if not before:
            pytest.skip("the images are not below the directory of make_harness: override `kept` to say where they are")
        for way, subject in (*((way, image) for way in WAYS if way != "gone"), ("gone", missing)):
            WAYS[way](harness.source, subject, [])
            differs = changed(before, self.kept(harness, tmp_path))
            promise(not differs, f"a source never writes, and `{way}` changed {', '.join(differs)}")

    def test_constructor_writes_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Making a source leaves its surroundings as they are."""
        directories = [tmp_path / name for name in ("one", "two")]
        for directory in directories:
            directory.mkdir()
        if type(self).make_harness is SourceContract.make_harness:
            pytest.skip("the harness does not come from make_harness: nothing shows what a constructor does")
        cls = type(self.make_harness(directories[0]).source)
        construct: Callable[..., None] = cls.__init__
        differs: list[list[str]] = []

        def watched(made: ImageSource, *args: Any, **kwargs: Any) -> None:
            before = below(directories[1])
            construct(made, *args, **kwargs)
            differs.append(changed(before, below(directories[1])))

        if construct is not object.__init__:
            monkeypatch.setattr(cls, "__init__", watched)
        _ = self.make_harness(directories[1]).source
        if not differs:
            pytest.skip(f"{cls.__name__} has no constructor that runs for each harness")
        promise(not any(differs), f"the constructor writes nothing, and it changed {differs}")


def _read_into(chunks: Iterator[bytes]) -> bytes:
    """All bytes that are left, by ``readinto`` into buffers of all sizes where there is one."""
    if not isinstance(chunks, DirectChunks):
        return b"".join(chunks)
    found, sizes = bytearray(), cycle((1, 4096, 2**20 + 1, 77))
    while True:
        buffer = bytearray(next(sizes))
        count = chunks.readinto(memoryview(buffer))
        promise(0 <= count <= len(buffer), "`readinto` says how many bytes it put into the buffer")
        if not count:
            return bytes(found)
        found += buffer[:count]


def read(source: ImageSource, image: ImageInfo, offset: int = 0) -> bytes:
    """All bytes from ``offset`` on."""
    with source.open(image, offset) as chunks:
        return b"".join(chunks)

"""Whatever a plug-in raises comes out as one of our errors that names the plug-in, the call and the image."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nova_imagecache import BackendPaths, CacheConfig, ImageCache
from nova_imagecache._guard import GuardedBackend, GuardedWriter
from nova_imagecache._guard_source import GuardedSource
from nova_imagecache._models import BaseImage, BaseRecord, FileLocation, ImageInfo, Retired
from nova_imagecache.backends import Backend, BackendProperties, BaseWriter
from nova_imagecache.backends.file import FileBackend
from nova_imagecache.exceptions import (
    BackendError,
    BackendUnavailableError,
    BaseNotFoundError,
    ImageCacheError,
    ImageNotFoundError,
    ImageRejectedError,
    NoSpaceError,
    SourceError,
)
from nova_imagecache.sources import DirectChunks

RECORD = BaseRecord(
    image_id="img",
    format="raw",
    virtual_size=512,
    size=512,
    source_format="raw",
    source_size=512,
    source_digest=None,
    evidence="none",
    made_by="stored",
    source="fake",
    fetched_at=0.0,
)
BASE = BaseImage(image_id="img", location=FileLocation(path=Path("/base")), record=RECORD)
RETIRED = Retired(base=BASE, token="t")
IMAGE = ImageInfo(image_id="img", disk_format="raw")

CALLS: dict[str, tuple[Any, ...]] = {
    "check": (),
    "close": (),
    "find_base": ("img",),
    "iter_bases": (),
    "find_unreadable": ("img",),
    "survey": (),
    "stage_base": ("img", "raw"),
    "touch_base": (BASE,),
    "mark_unused": (BASE, 1.0),
    "mark_inspected": (BASE, 1),
    "iter_users": (BASE,),
    "retire_base": (BASE,),
    "restore_base": (RETIRED,),
    "purge_base": (RETIRED,),
    "quarantine_base": (BASE,),
    "read_base": (BASE,),
    "read_sums": (BASE,),
    "usage": (BASE,),
    "capacity": (),
    "reown_base": (BASE, lambda _base: None),
    "wanted_store": (IMAGE,),
    "claim_import": ("img",),
    "adopt_base": (IMAGE,),
    "create_root_disk": (BASE, "vm", "disk", 512),
    "get_root_disk": ("vm", "disk"),
    "iter_root_disks": (),
    "remove_root_disk": ("vm", "disk"),
    "resize_root_disk": ("vm", "disk", 1024),
    "flatten_root_disk": ("vm", "disk"),
    "attach_root_disk": (BASE, "vm", "disk"),
    "recover": (),
}
WRITES: dict[str, tuple[Any, ...]] = {
    "set_size": (1,),
    "write_at": (0, b"x"),
    "read_at": (0, 1),
    "write_sums": (b"",),
    "sync": (),
    "publish": (RECORD,),
    "discard": (),
}
RAISED = [
    RuntimeError("words of its own"),
    ValueError(),
    KeyError("key"),
    OSError(errno.EIO, "Input/output error"),
    StopIteration(),
    AssertionError("no"),
    RecursionError("deep"),
    MemoryError(),
    NotImplementedError(),
    UnicodeDecodeError("ascii", b"\xff", 0, 1, "no"),
    TimeoutError("late"),
]


class Failing:
    """Raises whatever it is told to from every method."""

    properties = BackendProperties(base_formats=("raw",), disk_kind="copy", storage="fake")
    path = None

    def __init__(self, error: BaseException, *, late: bool = False) -> None:
        self.error = error
        self.late = late

    def __getattr__(self, name: str) -> Any:
        def method(*_args: Any) -> Any:
            return self._lazily() if self.late else self._fail()

        if name == "wanted_base_format":
            self._fail()
        return method

    def _fail(self) -> Any:
        raise self.error

    def _lazily(self) -> Iterator[Any]:
        yield 1
        raise self.error


def guarded(error: BaseException, *, late: bool = False) -> GuardedBackend:
    return GuardedBackend("mine", Failing(error, late=late))  # type: ignore[arg-type]  # a double without the base class


def consume(answer: Any) -> Any:
    """What is lazy runs now."""
    return list(answer) if hasattr(answer, "__next__") else answer


def abstract_names(cls: type) -> set[str]:
    return {name for name in vars(cls) if not name.startswith("_")} - {
        "api_version",
        "properties",
        "path",
        "wanted_base_format",
    }


def test_every_method_of_the_contracts_is_tried_here() -> None:
    """A new one cannot be forgotten."""
    assert set(CALLS) == abstract_names(Backend)
    assert set(WRITES) == abstract_names(BaseWriter)


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
def test_anything_from_any_method_is_a_backend_error(error: Exception) -> None:
    """It names plug-in, call, image and disk, and carries the cause and its words."""
    for name, arguments in CALLS.items():
        with pytest.raises(BackendError) as caught:
            consume(getattr(guarded(error), name)(*arguments))
        found = caught.value
        assert type(found) is BackendError, name
        assert (found.backend, found.stage) == ("mine", name)
        assert f"backend mine failed in {name}: {type(error).__name__}" in str(found)
        assert str(error) in str(found)
        # a StopIteration that leaves a generator becomes a RuntimeError in Python itself
        assert found.__cause__ is error or isinstance(error, StopIteration)
        if {"img", BASE, RETIRED, IMAGE} & {a for a in arguments if not isinstance(a, list)}:
            assert found.image_id == "img", name
        if "vm" in arguments:
            assert found.disk_id == "vm", name


@pytest.mark.parametrize("name", ["iter_bases", "iter_users", "read_base", "iter_root_disks"])
def test_what_breaks_while_it_is_iterated_is_a_backend_error(name: str) -> None:
    """Not only the call: the first items arrive."""
    answer = getattr(guarded(RuntimeError("late"), late=True), name)(*CALLS[name])
    assert next(answer) == 1
    with pytest.raises(BackendError, match=f"mine failed in {name}: RuntimeError: late"):
        next(answer)


def test_a_property_that_raises_is_a_backend_error() -> None:
    """It is a call like any other."""
    with pytest.raises(BackendError, match="wanted_base_format"):
        _ = guarded(RuntimeError("x")).wanted_base_format


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
def test_anything_from_a_writer_is_a_backend_error(error: Exception) -> None:
    """With the image's id."""
    writer = GuardedWriter("mine", "img", Failing(error))  # type: ignore[arg-type]  # a double without the base class
    for name, arguments in WRITES.items():
        with pytest.raises(BackendError) as caught:
            getattr(writer, name)(*arguments)
        assert (caught.value.backend, caught.value.image_id, caught.value.stage) == ("mine", "img", name)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_storage_is_no_space_error(code: int) -> None:
    """From any call, whoever noticed."""
    for name, arguments in CALLS.items():
        with pytest.raises(NoSpaceError) as caught:
            consume(getattr(guarded(OSError(code, "full")), name)(*arguments))
        assert (caught.value.backend, caught.value.stage) == ("mine", name)


@pytest.mark.parametrize("error", [BaseNotFoundError(), BackendUnavailableError("gone"), ImageNotFoundError()])
def test_our_errors_pass_and_get_what_they_lack(error: ImageCacheError) -> None:
    """A plug-in need not repeat what the core knows."""
    with pytest.raises(type(error)) as caught:
        guarded(error).create_root_disk(BASE, "vm", "disk", 512)
    assert caught.value is error
    assert (error.image_id, error.disk_id, error.stage) == ("img", "vm", "create_root_disk")
    if isinstance(error, BackendError):
        assert error.backend == "mine"


def test_what_an_error_says_already_is_left_alone() -> None:
    """The plug-in knows better."""
    error = BackendError("x", backend="other", image_id="another", stage="deep inside")
    with pytest.raises(BackendError):
        guarded(error).usage(BASE)
    assert (error.backend, error.image_id, error.stage) == ("other", "another", "deep inside")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), GeneratorExit()])
def test_what_ends_a_process_passes(error: BaseException) -> None:
    """Nobody turns Ctrl-C into a backend's failure."""
    with pytest.raises(type(error)) as caught:
        guarded(error).find_base("img")
    assert caught.value is error


def test_leaving_an_iteration_early_is_no_error() -> None:
    """One user is enough to know that there is one."""
    answer = guarded(RuntimeError("never reached"), late=True).iter_users(BASE)
    assert next(answer) is not None
    assert hasattr(answer, "close")
    answer.close()


def test_a_writer_that_is_staged_is_guarded() -> None:
    """All of what a plug-in hands out."""

    class Plain(Failing):
        def stage_base(self, _image_id: str, _format: str) -> Failing:
            return Failing(RuntimeError("in the writer"))

    backend = GuardedBackend("mine", Plain(RuntimeError()))  # type: ignore[arg-type]  # a double without the base class
    with pytest.raises(BackendError, match="mine failed in sync"):
        backend.stage_base("img", "raw").sync()


# --- sources ---------------------------------------------------------------------------------------------------------


class Source:
    """Raises at the moment it is told to."""

    name = "mine"

    def __init__(self, error: BaseException | None, moment: str) -> None:
        self.error = error
        self.moment = moment
        self.closed = threading.Event()

    def _at(self, moment: str) -> None:
        if self.error is not None and moment == self.moment:
            raise self.error

    def get(self, _image_id: str) -> ImageInfo:
        self._at("get")
        return IMAGE

    def open(self, _image: ImageInfo, _offset: int = 0) -> Any:
        self._at("open call")
        return self._context()

    @contextmanager
    def _context(self) -> Iterator[Iterator[bytes]]:
        self._at("open")
        try:
            yield self._chunks()
        finally:
            self.closed.set()
        self._at("close")

    def _chunks(self) -> Iterator[bytes]:
        yield b"a"
        self._at("read")
        yield b"b"


def read(source: GuardedSource, then: Callable[[], None] = lambda: None) -> list[bytes]:
    with source.open(source.get("img")) as chunks:
        found = list(chunks)
        then()
        return found


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("moment", ["get", "open call", "open", "read", "close"])
def test_anything_at_any_moment_is_a_source_error(error: Exception, moment: str) -> None:
    """It names source, call and image."""
    with pytest.raises(SourceError) as caught:
        read(GuardedSource(Source(error, moment)))
    assert type(caught.value) is SourceError
    assert caught.value.image_id == "img"
    assert caught.value.stage == moment.partition(" ")[0]
    assert f"source mine failed in {moment.partition(' ')[0]}" in str(caught.value)


def test_a_sources_own_errors_pass() -> None:
    """With what they lack."""
    error = ImageNotFoundError()
    with pytest.raises(ImageNotFoundError) as caught:
        GuardedSource(Source(error, "get")).get("img")
    assert caught.value is error
    assert (error.image_id, error.stage) == ("img", "get")


def test_what_the_reader_raises_is_its_own() -> None:
    """It is not laid at the source's door; the stream is closed all the same."""
    source = Source(None, "")

    def mine() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        read(GuardedSource(source), mine)
    assert source.closed.is_set()


@pytest.mark.parametrize("verdict", [ImageRejectedError("hostile"), KeyError("mine"), KeyboardInterrupt()], ids=repr)
def test_a_close_that_fails_hides_no_verdict(verdict: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    """What ended the reading is told; what closing raised is logged."""

    class Reset(Source):
        @contextmanager
        def _context(self) -> Iterator[Iterator[bytes]]:
            try:
                yield self._chunks()
            finally:
                raise ConnectionResetError("reset at close")

    def refuse() -> None:
        raise verdict

    with pytest.raises(type(verdict)) as caught:
        read(GuardedSource(Reset(None, "")), refuse)
    assert caught.value is verdict
    [record] = caplog.records
    assert "source mine failed in close: ConnectionResetError: reset at close" in record.getMessage()


class Answering(Source):
    """Answers what it is told to."""

    def __init__(self, answer: object, chunks: object = ()) -> None:
        super().__init__(None, "")
        self._answer: Any = answer
        self._served: Any = chunks

    def get(self, _image_id: str) -> ImageInfo:
        return self._answer  # type: ignore[no-any-return]  # that is the point

    def with_locations(self, _image: ImageInfo) -> ImageInfo:
        return self.get("img")

    def copy_to_store(self, _image: ImageInfo, _store: str, _check: Callable[[], None]) -> ImageInfo:
        return self.get("img")

    def _chunks(self) -> Iterator[bytes]:
        yield from self._served


WRONG: list[tuple[object, str]] = [
    (None, "a NoneType, not an ImageInfo"),
    ({"image_id": "img"}, "a dict, not an ImageInfo"),
    (replace(IMAGE, image_id="../../x"), "another image, '../../x'"),
    (replace(IMAGE, image_id="IMG"), "another image, 'IMG'"),
    (replace(IMAGE, size="4096"), "whose size cannot"),  # type: ignore[arg-type]  # as are those that follow
    (replace(IMAGE, size=-1, min_disk=None), "whose size, min_disk cannot"),  # type: ignore[arg-type]
    (replace(IMAGE, digest="sha512:00"), "whose digest cannot"),  # type: ignore[arg-type]
    (replace(IMAGE, disk_format=None), "whose disk_format cannot"),  # type: ignore[arg-type]
    (replace(IMAGE, locations="rbd://f/p/i/s"), "whose locations cannot"),  # type: ignore[arg-type]
    (replace(IMAGE, stores=None), "whose stores cannot"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("answer", "words"), WRONG, ids=[words for _answer, words in WRONG])
def test_an_answer_that_cannot_be_used_is_a_source_error(answer: object, words: str) -> None:
    """Whichever call it is to; it names the source."""
    source = GuardedSource(Answering(answer))
    calls: dict[str, Callable[[], object]] = {
        "get": lambda: source.get("img"),
        "with_locations": lambda: source.with_locations(IMAGE),
        "copy_to_store": lambda: source.copy_to_store(IMAGE, "store", lambda: None),
    }
    for stage, call in calls.items():
        with pytest.raises(SourceError, match="source mine answered with") as caught:
            call()
        assert words in caught.value.detail
        assert (caught.value.image_id, caught.value.stage) == ("img", stage)


@pytest.mark.parametrize("chunk", ["text", None, 4096], ids=str)
def test_chunks_that_are_no_bytes_are_a_source_error(chunk: object) -> None:
    """They are not laid at the storage's door."""
    with pytest.raises(SourceError, match=f"source mine gave a {type(chunk).__name__} for bytes"):
        read(GuardedSource(Answering(IMAGE, [b"a", chunk])))


class Direct:
    """Chunks that are read into buffers, which answers and raises what it is told to."""

    def __init__(self, answer: object) -> None:
        self._answer = answer

    def __iter__(self) -> Iterator[bytes]:
        return iter([b"abcd"])

    def __next__(self) -> bytes:
        return b"abcd"

    def readinto(self, buffer: memoryview, /) -> int:
        if isinstance(self._answer, BaseException):
            raise self._answer
        buffer[:2] = b"ab"
        return self._answer  # type: ignore[return-value]  # that is the point


def _read_into(answer: object) -> bytes:
    source = Answering(IMAGE)
    source._chunks = lambda: Direct(answer)  # type: ignore[method-assign]  # a double
    buffer = bytearray(4)
    with GuardedSource(source).open(IMAGE) as chunks:
        assert isinstance(chunks, DirectChunks)
        return bytes(buffer[: chunks.readinto(memoryview(buffer))])


def test_chunks_are_read_into_buffers() -> None:
    """Or taken one by one."""
    assert _read_into(2) == b"ab"
    source = Answering(IMAGE)
    source._chunks = lambda: Direct(2)  # type: ignore[method-assign]  # a double
    assert read(GuardedSource(source)) == [b"abcd"]
    with GuardedSource(source).open(IMAGE) as chunks:
        assert next(chunks) == b"abcd"


@pytest.mark.parametrize("answer", [5, -1, None, "2", KeyError("mine")], ids=repr)
def test_a_buffer_that_is_not_filled_as_told_is_a_source_error(answer: object) -> None:
    """More bytes than there is room for would be another piece's."""
    with pytest.raises(SourceError, match=r"source mine (read|failed in read)") as caught:
        _read_into(answer)
    assert (caught.value.image_id, caught.value.stage) == ("img", "read")


def test_another_image_leaves_nothing_behind(tmp_path: Path) -> None:
    """Neither under the id that was asked for nor under the other, which might lead out of the root."""
    cache = ImageCache(
        CacheConfig(root=tmp_path / "a" / "root", backend="file"),
        source=Answering(replace(IMAGE, image_id="../../x", size=512), [bytes(512)]),
        backend=FileBackend({}, BackendPaths(root=tmp_path / "a" / "root", disks_dir=tmp_path / "a" / "disks")),
    )
    with pytest.raises(SourceError, match="another image"):
        cache.create_root_disk("img", "vm")
    assert list(cache.bases()) == []
    assert not list(tmp_path.rglob("*x"))
    assert list(cache.root_disks()) == []


def test_a_good_source_is_only_read() -> None:
    """All of its bytes, and it is closed."""
    source = Source(None, "")
    assert read(GuardedSource(source)) == [b"a", b"b"]
    assert source.closed.is_set()


def test_a_source_without_a_name_is_called_by_its_class() -> None:
    """For the base's record."""

    class Nameless:
        pass

    assert GuardedSource(Nameless()).name == "Nameless"  # type: ignore[arg-type]  # a source that forgot its name

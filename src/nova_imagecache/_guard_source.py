"""Stands around sources: their errors made ours, as _guard does for backends; their answers looked at before use."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING

from nova_imagecache._guard import translated
from nova_imagecache._models import Digest, ImageInfo
from nova_imagecache.exceptions import ImageCacheError, SourceError
from nova_imagecache.sources import DirectChunks, LocationFinder, StoreCopier

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from nova_imagecache.sources import ImageSource

_MEND = "Have the source mended: it does not keep to the contract of ImageSource"
_log = logging.getLogger(__name__)


class GuardedSource:
    """A plug-in's source whose errors are ours."""

    def __init__(self, inner: ImageSource) -> None:
        self.inner = inner

    @property
    def name(self) -> str:
        """The source's own name, or its class's."""
        return str(getattr(self.inner, "name", type(self.inner).__name__))

    @contextmanager
    def _call(self, operation: str, image_id: str) -> Iterator[None]:
        def make(text: str) -> ImageCacheError:
            return SourceError(f"source {self.name} failed in {operation}: {text}", image_id=image_id, stage=operation)

        try:
            with translated(make):
                yield
        except ImageCacheError as err:
            err.image_id = err.image_id or image_id
            err.stage = err.stage or operation
            raise

    def _answer(self, image: ImageInfo, image_id: str) -> ImageInfo:
        """What the source answered, if that can be used: its id becomes a path part, and the name of the base."""
        if (problem := _problem(image, image_id)) is not None:
            raise SourceError(f"source {self.name} answered with {problem}", image_id=image_id, todo=_MEND)
        return image

    def get(self, image_id: str) -> ImageInfo:
        """As ImageSource.get."""
        with self._call("get", image_id):
            return self._answer(self.inner.get(image_id), image_id)

    def with_locations(self, image: ImageInfo) -> ImageInfo:
        """As LocationFinder.with_locations; the image as it is where the source is none."""
        if not isinstance(self.inner, LocationFinder):
            return image
        with self._call("with_locations", image.image_id):
            return self._answer(self.inner.with_locations(image), image.image_id)

    def copy_to_store(self, image: ImageInfo, store: str, check: Callable[[], None]) -> ImageInfo | None:
        """As StoreCopier.copy_to_store; None where the source is none."""
        if not isinstance(self.inner, StoreCopier):
            return None
        with self._call("copy_to_store", image.image_id):
            return self._answer(self.inner.copy_to_store(image, store, check), image.image_id)

    def open(self, image: ImageInfo, offset: int = 0) -> AbstractContextManager[Iterator[bytes]]:
        """As ImageSource.open."""
        return self._open(image, offset)

    @contextmanager
    def _open(self, image: ImageInfo, offset: int) -> Iterator[Iterator[bytes]]:
        # what the consumer raises inside the block is its own and passes by the guard
        with self._call("open", image.image_id):
            context = self.inner.open(image, offset)
            chunks = context.__enter__()
        try:
            plain = self._iterate(image, chunks)
            yield _GuardedChunks(self, image, plain, chunks) if isinstance(chunks, DirectChunks) else plain
        except BaseException as err:
            try:
                with self._call("close", image.image_id):
                    context.__exit__(type(err), err, err.__traceback__)
            except ImageCacheError as late:
                if err not in (late, late.__cause__):  # what ended the stream is what the caller must hear
                    _log.warning("%s", late)
            raise
        with self._call("close", image.image_id):
            context.__exit__(None, None, None)

    def _iterate(self, image: ImageInfo, chunks: Iterator[bytes]) -> Iterator[bytes]:
        with self._call("read", image.image_id):
            for chunk in chunks:
                if not _are_bytes(chunk):
                    text = f"source {self.name} gave a {type(chunk).__name__} for bytes"
                    raise SourceError(text, image_id=image.image_id, todo=_MEND)
                yield chunk

    def read_into(self, image: ImageInfo, chunks: DirectChunks, buffer: memoryview) -> int:
        """As DirectChunks.readinto."""
        # thousands of calls for an image: the guard is entered only with what is to be translated
        try:
            count = chunks.readinto(buffer)
        except Exception:
            with self._call("read", image.image_id):
                raise
        if not _is_size(count) or count > len(buffer):
            text = f"source {self.name} read {count!r} bytes into a buffer of {len(buffer)}"
            raise SourceError(text, image_id=image.image_id, stage="read", todo=_MEND)
        return count


class _GuardedChunks:
    """A plug-in's DirectChunks whose errors are ours."""

    def __init__(self, source: GuardedSource, image: ImageInfo, plain: Iterator[bytes], inner: DirectChunks) -> None:
        self._source = source
        self._image = image
        self._plain = plain
        self._inner = inner

    def __iter__(self) -> Iterator[bytes]:
        return self._plain

    def __next__(self) -> bytes:
        return next(self._plain)

    def readinto(self, buffer: memoryview, /) -> int:
        return self._source.read_into(self._image, self._inner, buffer)


def _problem(image: object, image_id: str) -> str | None:
    """What is wrong with a source's answer: its types are as good as its author's tests."""
    if not isinstance(image, ImageInfo):
        return f"a {type(image).__name__}, not an ImageInfo"
    if image.image_id != image_id:
        return f"another image, {image.image_id!r}"
    fits = {
        "disk_format": isinstance(image.disk_format, str),
        "status": isinstance(image.status, str),
        "size": image.size is None or _is_size(image.size),
        "min_disk": _is_size(image.min_disk),
        "digest": image.digest is None or isinstance(image.digest, Digest),
        "digest_evidence": isinstance(image.digest_evidence, str),
        "locations": _are_texts(image.locations),
        "stores": _are_texts(image.stores),
    }
    # names alone: a location may hold a password
    wrong = [name for name, right in fits.items() if not right]
    return f"an ImageInfo whose {', '.join(wrong)} cannot be used" if wrong else None


def _are_bytes(chunk: object) -> bool:
    return isinstance(chunk, bytes | bytearray | memoryview)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and value >= 0


def _are_texts(value: object) -> bool:
    return isinstance(value, tuple | list) and all(isinstance(each, str) for each in value)

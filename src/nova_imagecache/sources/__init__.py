"""The contract of an image source: where image bytes come from. All an author of one needs is on this page.

A source is found by the name of its entry point in the group ``nova_imagecache.sources``; the class it names has
``from_options(options)``. A source reads and never writes; it keeps nothing on disk, takes no locks, and is called from
many threads at once. It raises the errors named below; anything else it raises reaches the caller as ``SourceError``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

from nova_imagecache._models import Digest, ImageInfo
from nova_imagecache.exceptions import (
    ConfigError,
    ImageCorruptError,
    ImageNotActiveError,
    ImageNotFoundError,
    SourceError,
    SourceForbiddenError,
    SourceUnavailableError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from contextlib import AbstractContextManager

__all__ = [
    "ConfigError",
    "CopyFailedError",
    "CopyRefusedError",
    "Digest",
    "DirectChunks",
    "ImageCorruptError",
    "ImageInfo",
    "ImageNotActiveError",
    "ImageNotFoundError",
    "ImageSource",
    "LoadableSource",
    "LocationFinder",
    "SourceError",
    "SourceForbiddenError",
    "SourceUnavailableError",
    "StoreCopier",
]


@runtime_checkable
class ImageSource(Protocol):
    """Where image bytes come from."""

    @property
    def name(self) -> str:
        """What the base's record names as its source; never a secret."""

    def get(self, image_id: str) -> ImageInfo:
        """What is known of the image before reading it: one request, no data.

        An image that exists but is not active is returned with its status; the caller refuses it. Its ``image_id`` is
        the one that was asked for.

        Raises:
            ImageNotFoundError: there is no such image for this caller.
            SourceForbiddenError: the credentials were refused.
            SourceUnavailableError: no answer, after the source's own retries.
        """

    def open(self, image: ImageInfo, offset: int = 0) -> AbstractContextManager[Iterator[bytes]]:
        """The image's bytes from ``offset`` to its end, in order, in chunks of any size above 0.

        A source that cannot start in the middle reads from the start and drops what comes before ``offset``. Time-outs
        are on progress (no byte for a while), never on the whole. Leaving the context closes the file or connection,
        wherever the reader was.

        Raises, on entering and while iterating:
            ImageNotFoundError, ImageNotActiveError, SourceForbiddenError: as the image's state is now.
            SourceUnavailableError: the stream broke, and could not be continued.
        """


@runtime_checkable
class DirectChunks(Protocol):
    """What ``open`` may give instead of a plain iterator: chunks that need not be copied to where they are wanted."""

    def __iter__(self) -> Iterator[bytes]:
        """The chunks, as ``open`` describes them."""

    def __next__(self) -> bytes:
        """The next chunk."""

    def readinto(self, buffer: memoryview, /) -> int:
        """The next bytes, into the front of ``buffer``, which has room for one at least: how many; 0 at the end.

        Raises what iterating raises; what ``buffer`` holds then counts as not read.
        """


@runtime_checkable
class LocationFinder(Protocol):
    """A source that may know more places of an image than its metadata show, at the price of one more request."""

    def with_locations(self, image: ImageInfo) -> ImageInfo:
        """The image with all locations that can be had; as it was where there are no more."""


class CopyRefusedError(SourceError):
    """The service does not take a copy on: it has no such store, copies nothing, or is over quota."""

    default_todo = (
        "Look at the image service's words, and whether the store has this name and the service copies images"
    )


class CopyFailedError(SourceError):
    """The service began a copy into a store, and says that it failed, or nothing more."""

    default_todo = "Look at the image service's log, and whether the store has room and is reachable; then call again"


@runtime_checkable
class StoreCopier(Protocol):
    """A source whose service can copy an image into another of its stores, so that a backend can adopt it there."""

    def copy_to_store(self, image: ImageInfo, store: str, check: Callable[[], None]) -> ImageInfo:
        """The image as it is when it lies in ``store``; asks for the copy, or waits for one that is under way.

        ``check`` is called at least ten times a second; what it raises ends the waiting.

        Raises:
            CopyRefusedError: the service does not take it on.
            CopyFailedError: the service says that it failed.
            SourceUnavailableError: it is not done within the source's own limit.
            ImageNotFoundError, SourceForbiddenError: as for ``get``.
        """


class LoadableSource(ImageSource, Protocol):
    """A source that can be named in a configuration: what an entry point of ``nova_imagecache.sources`` points to."""

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """A source made from the configuration's ``source_options``; does no I/O.

        Raises:
            ConfigError: with all problems of the options at once.
        """

"""FakeSource: images from memory, which break, stall and lie as a test wants."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from nova_imagecache._models import Digest, ImageInfo
from nova_imagecache.exceptions import (
    ImageCacheError,
    ImageNotActiveError,
    ImageNotFoundError,
    InvalidRequestError,
    SourceUnavailableError,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeImage:
    """An image of a FakeSource: its bytes, what is announced of them, and what goes wrong.

    Attributes:
        data: what is served.
        disk_format, status, min_disk, locations, stores: as in ImageInfo.
        size: announced size; "true": of ``data``; None: not announced.
        digest: announced digest; "true": sha512 of ``data``; None: none.
        break_after: bytes of the image after which a stream breaks with SourceUnavailableError; one that starts at or
            behind this offset goes on to the end.
        stall: an event that streams wait for, after ``stall_after`` bytes of the image.
        get_error, open_error: raised by ``get``, and on entering ``open``.
    """

    data: bytes = b""
    disk_format: str = "raw"
    status: str = "active"
    size: int | Literal["true"] | None = "true"
    min_disk: int = 0
    digest: Digest | Literal["true"] | None = "true"
    locations: tuple[str, ...] = ()
    stores: tuple[str, ...] = ()
    break_after: int | None = None
    stall: threading.Event | None = None
    stall_after: int = 0
    get_error: ImageCacheError | None = None
    open_error: ImageCacheError | None = None

    def info(self, image_id: str) -> ImageInfo:
        """What ``get`` says of it; an image that is not active has neither size nor digest, unless they are given."""
        active = self.status == "active"
        size = self.size if self.size != "true" else len(self.data) if active else None
        digest = self.digest
        if digest == "true":
            digest = Digest("sha512", hashlib.sha512(self.data).hexdigest()) if active else None
        return ImageInfo(
            image_id=image_id,
            disk_format=self.disk_format,
            status=self.status,
            size=size,
            min_disk=self.min_disk,
            digest=digest,
            digest_evidence="unverified" if digest is None else "os_hash",
            locations=self.locations,
            stores=self.stores,
        )


class FakeSource:
    """A source of images from memory: ``FakeSource({"img": b"...", "other": FakeImage(data=..., break_after=10)})``.

    ``images`` may be changed at any time. ``gets`` and ``opens`` count calls, ``bytes_served`` the bytes handed out,
    over all threads. ``chunk_size`` is in bytes.
    """

    def __init__(self, images: Mapping[str, bytes | FakeImage] | None = None, *, chunk_size: int = 65536) -> None:
        self.images: dict[str, FakeImage] = {}
        self.chunk_size = chunk_size
        self.gets = 0
        self.opens = 0
        self.bytes_served = 0
        self._counting = threading.Lock()
        for image_id, image in (images or {}).items():
            self.add(image_id, image)

    def __repr__(self) -> str:
        return f"<FakeSource with {len(self.images)} image(s)>"

    @property
    def name(self) -> str:
        """``fake``."""
        return "fake"

    def add(self, image_id: str, image: bytes | FakeImage) -> None:
        """Take the image in, in the place of an earlier one by the same id."""
        self.images[image_id] = image if isinstance(image, FakeImage) else FakeImage(data=image)

    def get(self, image_id: str) -> ImageInfo:
        """What is announced of the image.

        Raises:
            ImageNotFoundError: no such image.
            the image's ``get_error``.
        """
        with self._counting:
            self.gets += 1
        image = self._find(image_id, "metadata")
        if image.get_error is not None:
            raise image.get_error
        return image.info(image_id)

    @contextmanager
    def open(self, image: ImageInfo, offset: int = 0) -> Iterator[Iterator[bytes]]:
        """The image's bytes from ``offset`` on.

        Raises, on entering and while iterating:
            ImageNotFoundError, ImageNotActiveError: as the image is now.
            SourceUnavailableError: at its ``break_after``.
            InvalidRequestError: ``offset`` is negative.
            the image's ``open_error``.
        """
        with self._counting:
            self.opens += 1
        if offset < 0:
            raise InvalidRequestError(f"no byte {offset}", image_id=image.image_id, stage="fetch")
        found = self._find(image.image_id, "fetch")
        if found.open_error is not None:
            raise found.open_error
        if found.status != "active":
            raise ImageNotActiveError(found.status, image_id=image.image_id, stage="fetch")
        yield self._chunks(image.image_id, found, offset)

    def _find(self, image_id: str, stage: str) -> FakeImage:
        try:
            return self.images[image_id]
        except KeyError:
            raise ImageNotFoundError(image_id=image_id, stage=stage) from None

    def _chunks(self, image_id: str, image: FakeImage, offset: int) -> Iterator[bytes]:
        break_at = image.break_after if image.break_after is not None and offset < image.break_after else None
        stop = min(len(image.data), break_at if break_at is not None else len(image.data))
        stalled = image.stall is None or offset > image.stall_after
        while offset < stop or not stalled:
            if not stalled and offset >= min(image.stall_after, stop):
                assert image.stall is not None  # noqa: S101  # for the type checker
                image.stall.wait()
                stalled = True
                continue
            end = min(offset + self.chunk_size, stop, stop if stalled else image.stall_after)
            chunk = image.data[offset:end]
            offset = end
            with self._counting:
                self.bytes_served += len(chunk)
            yield chunk
        if break_at is not None:
            raise SourceUnavailableError(
                f"the stream broke after {offset} bytes, as it was told to", image_id=image_id, stage="fetch"
            )

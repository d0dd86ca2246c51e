"""One image's bytes from Glance, put together from as many answers as it takes."""

from __future__ import annotations

import re
from http import HTTPStatus
from http.client import HTTPException, HTTPResponse
from typing import TYPE_CHECKING, Self

from nova_imagecache.exceptions import ImageCorruptError, ImageNotActiveError, SourceError, SourceUnavailableError
from nova_imagecache.sources._glance_errors import Attempts, TryAgainError, failure

if TYPE_CHECKING:
    from collections.abc import Callable

    import requests

    from nova_imagecache._models import ImageInfo
    from nova_imagecache.sources._glance_http import Transport

_PIECE = 2**18
"""Bytes of a chunk."""

_LEAST = 2**14
"""Bytes waited for at once when an answer begins, twice as many each time: a break loses what was waited for."""

_STAGE = "fetch"

# Glance's RBD store answers 400 to every range, and some proxies send another part than they are asked for.
_NO_RANGES = frozenset({HTTPStatus.PARTIAL_CONTENT, HTTPStatus.BAD_REQUEST, HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE})
_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)")


class _OtherLengthError(TryAgainError):
    """The answer is complete in itself, but for ``length`` bytes where the image has another size."""

    def __init__(self, length: int, size: int) -> None:
        super().__init__(f"the answer is for {length} bytes, the image has {size}")
        self.length = length


class ImageStream:
    """The bytes of ``image`` from ``offset`` on. ``connect`` first, then read, then ``close``.

    ``look_again`` gives the image as it is now; it is asked only when the service has refused the data.
    """

    def __init__(
        self, transport: Transport, image: ImageInfo, offset: int, look_again: Callable[[], ImageInfo]
    ) -> None:
        self._transport = transport
        self._image = image
        self._look_again = look_again
        self._attempts = Attempts(transport.options, image_id=image.image_id, stage=_STAGE)
        self._position = offset  # of the next byte that the reader is owed
        self._skip = 0  # bytes of the present answer that come before it
        self._at_once = _LEAST
        self._end = image.size  # what the answer says where the image does not
        self._ranges = True  # until the server shows that it knows none
        self._closed = False
        self._response: requests.Response | None = None
        self._take: Callable[[memoryview], int]  # of the present answer

    def connect(self) -> None:
        """Get an answer that begins at, or before, the position; none if nothing lies behind it.

        Raises:
            ImageNotFoundError, ImageNotActiveError, SourceForbiddenError, SourceUnavailableError: see ImageSource.open.
            ImageCorruptError: every answer is for an image of another length than announced.
            SourceError: the service says that the image is active, and has no data.
        """
        if self._position and self._end is not None and self._position >= self._end:
            return
        while True:
            try:
                if self._request():
                    return
            except TryAgainError as err:
                self._failed(err)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> bytes:
        """As ``readinto``, some 256 KiB at a time."""
        buffer = bytearray(_PIECE)
        count = self.readinto(memoryview(buffer))
        if not count:
            raise StopIteration
        return bytes(memoryview(buffer)[:count])

    def readinto(self, buffer: memoryview, /) -> int:
        """The next bytes, into the front of ``buffer``: how many, 0 at the end. Goes on with another answer where one
        breaks off; what the buffer had got of it is read again.

        Raises:
            the same as ``connect``.
        """
        while self._response is not None:
            try:
                count = self._read(self._response, buffer)
            except TryAgainError as err:
                self._failed(err)
                self.connect()
            else:
                if count:
                    self._attempts.progressed()
                    return count
                self._drop()
        self._refuse_closed()
        return 0

    def close(self) -> None:
        """Close the connection, in the middle of an answer too; nothing more is read."""
        self._closed = True
        self._drop()

    def _drop(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None

    def _refuse_closed(self) -> None:
        # what outlives its context must not begin another download, nor look like the image's end
        if self._closed:
            raise SourceUnavailableError("the stream was closed", image_id=self._image.image_id, stage=_STAGE)

    def _failed(self, err: TryAgainError) -> None:
        self._drop()
        self._refuse_closed()
        try:
            self._attempts.failed(err)
        except SourceUnavailableError as last:
            if isinstance(err, _OtherLengthError):
                raise ImageCorruptError(
                    self._image.size, err.length, image_id=self._image.image_id, stage=_STAGE
                ) from last
            raise

    def _request(self) -> bool:
        """Ask once. False: the server knows no ranges, and has to be asked for the whole."""
        start = self._position if self._ranges else 0
        response = self._response = self._transport.get(
            f"/v2/images/{self._image.image_id}/file",
            endpoint=self._attempts.endpoint,
            image_id=self._image.image_id,
            stage=_STAGE,
            headers={"Range": f"bytes={start}-"} if start else None,
            stream=True,
        )
        self._take = _reader(response)
        first, total = _extent(response)
        match response.status_code:
            case HTTPStatus.OK:
                self._begin(0, total)
            case HTTPStatus.PARTIAL_CONTENT if start and first == start:
                self._begin(start, total)
            case HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE if start and total == start and self._end is None:
                # the size was not announced, and nothing lies behind the offset
                self._drop()
            case status if start and status in _NO_RANGES:
                self._drop()
                self._ranges = False
                return False
            case HTTPStatus.NO_CONTENT if self._image.size == 0:
                self._drop()
            case _:
                raise self._refusal(response.status_code)
        return True

    def _begin(self, start: int, total: int | None) -> None:
        """Take the answer: it begins at ``start``, of an image of ``total`` bytes (None: the answer does not say)."""
        size = self._image.size
        if total == 0 and size != 0 and not self._position:
            raise self._refusal(HTTPStatus.NO_CONTENT)
        if total is not None and size is not None and total != size:
            raise _OtherLengthError(total, size)
        self._end = size if size is not None else total
        self._skip = self._position - start
        self._at_once = _LEAST

    def _read(self, response: requests.Response, buffer: memoryview) -> int:
        """The answer's next bytes that the reader has not: how many, 0 at the image's end.

        Raises:
            TryAgainError: it broke off.
        """
        from urllib3.exceptions import HTTPError

        broken: Exception | None = None
        try:
            while self._skip:
                count = self._take(buffer[: self._skip])
                if not count:
                    break
                self._skip -= count
            else:
                if count := self._take(buffer[: self._at_once]):
                    self._at_once = min(2 * self._at_once, _PIECE)
                    self._position += count
                    return count
        except (OSError, HTTPException, HTTPError) as err:
            broken = err
        self._judge_end(broken)
        if broken is None:
            response.raw.release_conn()  # for the next request
        return 0

    def _judge_end(self, broken: Exception | None) -> None:
        """Return if the image is whole."""
        whole = not self._skip and self._end is not None and self._position >= self._end
        if broken is not None and not whole:
            raise TryAgainError(f"the stream broke after {self._position} bytes: {broken}") from broken
        if self._skip or (self._end is not None and not whole):
            raise TryAgainError(f"the stream ended after {self._position} of {self._end} bytes")
        if not self._position and self._image.size != 0:
            raise self._refusal(HTTPStatus.NO_CONTENT)

    def _refusal(self, status: int) -> Exception:
        self._drop()
        image_id = self._image.image_id
        if status == HTTPStatus.PARTIAL_CONTENT:
            return TryAgainError("a part was sent where the whole was asked for")
        if status in {HTTPStatus.NO_CONTENT, HTTPStatus.FORBIDDEN}:
            # 204: no data yet, or none any more; 403: deactivated, or not for this token. The image itself tells.
            now = self._look_again()
            if now.status != "active":
                return ImageNotActiveError(now.status, image_id=image_id, stage=_STAGE)
            if status == HTTPStatus.NO_CONTENT:
                return SourceError(
                    "the image is active, but its store has no data",
                    image_id=image_id,
                    stage=_STAGE,
                    todo="Look whether the image's data are still in the image service's store",
                )
        return failure(status, image_id=image_id, stage=_STAGE)


def _reader(response: requests.Response) -> Callable[[memoryview], int]:
    """What reads bytes of the answer's body into the front of a buffer, and tells how many: 0 at its end."""
    # below urllib3, which makes bytes of what it reads; by urllib3 where they must be decoded
    body = getattr(response.raw, "_fp", None)
    if isinstance(body, HTTPResponse) and _is_plain(response):
        return body.readinto

    def decoded(buffer: memoryview) -> int:
        piece: bytes = response.raw.read1(len(buffer), decode_content=True)
        buffer[: len(piece)] = piece
        return len(piece)

    return decoded


def _is_plain(response: requests.Response) -> bool:
    return response.headers.get("Content-Encoding", "identity") == "identity"


def _extent(response: requests.Response) -> tuple[int | None, int | None]:
    """The answer's first byte and the whole's length, as far as its headers say; of an encoded answer, nothing."""
    if not _is_plain(response):
        return None, None
    if response.status_code == HTTPStatus.OK:
        length = response.headers.get("Content-Length", "")
        return 0, int(length) if length.isdecimal() else None
    match = _CONTENT_RANGE.match(response.headers.get("Content-Range", ""))
    if match is None:
        return None, None
    return int(match[1]) if match[1] else None, int(match[2]) if match[2] != "*" else None

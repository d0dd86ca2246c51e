"""Images from Glance, over its v2 API."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Self

from nova_imagecache._models import ImageInfo
from nova_imagecache.exceptions import ImageNotFoundError, InvalidRequestError, SourceError
from nova_imagecache.sources._glance_copy import STAGE as COPY_STAGE
from nova_imagecache.sources._glance_copy import StoreCopy
from nova_imagecache.sources._glance_errors import Attempts, TryAgainError, failure
from nova_imagecache.sources._glance_http import Transport
from nova_imagecache.sources._glance_options import GlanceOptions, parse_options
from nova_imagecache.sources._glance_stream import ImageStream
from nova_imagecache.sources._metadata import GIB, announced_digest, is_plain_id

if TYPE_CHECKING:
    from keystoneauth1.session import Session

_STAGE = "metadata"

_log = logging.getLogger(__name__)


class GlanceSource:
    """The images that a token may see in Glance.

    Three ways to reach it: a keystoneauth ``session`` of the caller's (its catalogue names the service, unless
    ``endpoint`` does); ``endpoint`` with a ``token``; or neither: then ``cloud``, or the OS_* environment, as for every
    OpenStack client. A session renews its tokens by itself, in the middle of a long fetch too; a bare token is sent as
    it is. ``endpoint`` may be a list: requests begin at a random one and go on with the next where one fails.

    Time-outs (seconds) are on progress, never on the whole: ``connect_timeout`` for a connection, ``read_timeout``
    without a byte. ``retries`` tries in a row without progress, after waiting up to ``retry_delay``, doubled each time,
    end in SourceUnavailableError; a stream goes on where it broke. A copy into another store is waited for
    ``copy_timeout`` seconds. Safe for many threads at once. A caller's session
    must not be used on both sides of a fork.

    Raises:
        ConfigError: with all problems of the arguments. Nothing is read or connected to here.
    """

    def __init__(
        self,
        *,
        session: Session | None = None,
        endpoint: str | Sequence[str] | None = None,
        token: str | None = None,
        cloud: str | None = None,
        region_name: str | None = None,
        interface: str | None = None,
        cafile: str | None = None,
        insecure: bool = False,
        read_timeout: float = 60.0,
        connect_timeout: float = 10.0,
        retries: int = 3,
        retry_delay: float = 0.5,
        copy_timeout: float = 600.0,
    ) -> None:
        given = {
            "endpoint": endpoint,
            "token": token,
            "cloud": cloud,
            "region_name": region_name,
            "interface": interface,
            "cafile": cafile,
            "insecure": insecure,
            "read_timeout": read_timeout,
            "connect_timeout": connect_timeout,
            "retries": retries,
            "retry_delay": retry_delay,
            "copy_timeout": copy_timeout,
        }
        options = parse_options(
            {name: value for name, value in given.items() if value is not None}, with_session=session is not None
        )
        self._set_up(options, session)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """A source made from ``source_options``: the constructor's arguments but ``session``, and ``endpoints``.

        Raises:
            ConfigError: with all problems of the options at once.
        """
        source = cls.__new__(cls)
        source._set_up(parse_options(options), None)  # noqa: SLF001  # this class's own
        return source

    def _set_up(self, options: GlanceOptions, session: Session | None) -> None:
        self._options = options
        self._has_session = session is not None
        self._transport = Transport(options, session)

    def __repr__(self) -> str:
        options = self._options
        if self._has_session:
            how = "session"
        elif options.token is not None:
            how = "token"
        else:
            how = f"cloud={options.cloud!r}" if options.cloud else "environment"
        where = f" at {', '.join(options.endpoints)}" if options.endpoints else ""
        return f"<GlanceSource by {how}{where}>"

    @property
    def name(self) -> str:
        """``glance``."""
        return "glance"

    def get(self, image_id: str) -> ImageInfo:
        """The image's properties, by one request; more only where it fails and may succeed later.

        Raises:
            ImageNotFoundError: there is no such image for this token.
            SourceForbiddenError: the credentials were refused.
            SourceUnavailableError: no answer from any endpoint, for all retries.
            SourceError: the answer is not the image's properties.
            ConfigError: there are no credentials to work with.
        """
        return self._look(image_id)[0]

    def _look(self, image_id: str) -> tuple[ImageInfo, Mapping[str, Any]]:
        """What ``get`` gives, and all that Glance says."""
        if not is_plain_id(image_id):
            raise ImageNotFoundError(f"no image has the id {image_id!r}", image_id=image_id, stage=_STAGE)
        attempts = Attempts(self._options, image_id=image_id, stage=_STAGE)
        while True:
            try:
                return self._look_once(image_id, attempts.endpoint)
            except TryAgainError as err:
                attempts.failed(err)

    def _look_once(self, image_id: str, endpoint: str | None) -> tuple[ImageInfo, Mapping[str, Any]]:
        response = self._transport.get(f"/v2/images/{image_id}", endpoint=endpoint, image_id=image_id, stage=_STAGE)
        if response.status_code != HTTPStatus.OK:
            raise failure(response.status_code, image_id=image_id, stage=_STAGE)
        try:
            properties = json.loads(response.content)
            return _image_info(image_id, properties), properties
        except (ValueError, TypeError, AttributeError) as err:
            raise SourceError(
                f"the answer is not an image's properties: {err}",
                image_id=image_id,
                stage=_STAGE,
                todo="Check that the endpoint is the image service's",
            ) from err

    @contextmanager
    def open(self, image: ImageInfo, offset: int = 0) -> Iterator[Iterator[bytes]]:
        """The image's bytes from ``offset`` to its end, in chunks of 256 KiB, by one request if it does not break.

        Where the stream breaks it goes on by a Range request, or, where the store knows no ranges (Glance's RBD store),
        from the start, dropping what the reader has.

        Raises, on entering and while iterating:
            ImageNotFoundError: the image is gone.
            ImageNotActiveError: it has no data yet, or was deactivated.
            SourceForbiddenError: the credentials were refused.
            SourceUnavailableError: ``retries`` tries in a row brought nothing.
            ImageCorruptError: the service serves another length than ``image.size``.
            SourceError: the service says that the image is active, and has no data.
            InvalidRequestError: ``offset`` is negative.
        """
        if offset < 0:
            raise InvalidRequestError(f"no byte {offset}", image_id=image.image_id, stage="fetch")
        if not is_plain_id(image.image_id):
            raise ImageNotFoundError(image_id=image.image_id, stage="fetch")
        stream = ImageStream(self._transport, image, offset, lambda: self.get(image.image_id))
        try:
            stream.connect()
            yield stream
        finally:
            stream.close()

    def with_locations(self, image: ImageInfo) -> ImageInfo:
        """The image with the locations that Glance's location API names, where it has one and this token may ask.

        Glance since API 2.17; services with the role ``service`` may. Anything else than an answer leaves the image as
        it is: a location is a shortcut, never needed.
        """
        if not is_plain_id(image.image_id):
            return image
        attempts = Attempts(self._options, image_id=image.image_id, stage=_STAGE)
        path = f"/v2/images/{image.image_id}/locations"
        try:
            response = self._transport.get(path, endpoint=attempts.endpoint, image_id=image.image_id, stage=_STAGE)
            places = json.loads(response.content) if response.status_code == HTTPStatus.OK else []
            urls = [place["url"] for place in places]
        except (TryAgainError, SourceError, ValueError, TypeError, KeyError) as err:
            _log.info("image %s: no locations: %s", image.image_id, err)
            return image
        found = tuple(url for url in urls if isinstance(url, str))
        return replace(image, locations=tuple(dict.fromkeys((*image.locations, *found))))

    def copy_to_store(self, image: ImageInfo, store: str, check: Callable[[], None]) -> ImageInfo:
        """The image as it is when it lies in ``store``: Glance copies it (copy-image), once, whoever asks for it.

        ``check`` is called at least ten times a second; what it raises ends the waiting, and Glance goes on copying.

        Raises:
            ImageNotFoundError: the image is gone.
            ImageNotActiveError: it has no data to copy, or was deactivated.
            SourceForbiddenError: this user may not have it copied, or the credentials were refused.
            SourceUnavailableError: it is not there within ``copy_timeout``, or there is no answer.
            CopyRefusedError, CopyFailedError: the service does not take the copy on, or says that it failed.
        """
        if not is_plain_id(image.image_id):
            raise ImageNotFoundError(image_id=image.image_id, stage=COPY_STAGE)
        return StoreCopy(self._transport, image.image_id, store, lambda: self._look(image.image_id), check).run()


def _image_info(image_id: str, properties: Mapping[str, Any]) -> ImageInfo:
    """What Glance's JSON says; ValueError, TypeError or AttributeError if it is no image."""
    if properties.get("id") != image_id:
        raise ValueError(f"it names the image {properties.get('id')!r}")
    status, disk_format = properties.get("status"), properties.get("disk_format")
    if not isinstance(status, str) or not status:
        raise ValueError("it has no status")
    if disk_format is None and status == "active":
        raise ValueError("it is active and has no disk_format")
    digest, evidence = announced_digest(
        properties.get("os_hash_algo"), properties.get("os_hash_value"), properties.get("checksum")
    )
    if digest is not None and evidence == "checksum" and properties.get("os_hash_value"):
        _log.warning("image %s: os_hash_algo %r is unknown here", image_id, properties.get("os_hash_algo"))
    urls = [properties.get("direct_url"), *(place.get("url") for place in properties.get("locations") or ())]
    size = properties.get("size")
    return ImageInfo(
        image_id=image_id,
        disk_format=disk_format or "",
        status=status,
        size=None if size is None else int(size),
        min_disk=int(properties.get("min_disk") or 0) * GIB,
        digest=digest,
        digest_evidence=evidence,
        locations=tuple(dict.fromkeys(url for url in urls if url)),
        stores=tuple(store.strip() for store in (properties.get("stores") or "").split(",") if store.strip()),
    )

"""What the image service's failures mean, and how long to go on trying."""

from __future__ import annotations

import json
import logging
import random
import re
import time
from http import HTTPStatus
from typing import TYPE_CHECKING

from nova_imagecache.exceptions import (
    ImageNotFoundError,
    SourceError,
    SourceForbiddenError,
    SourceUnavailableError,
)

if TYPE_CHECKING:
    from nova_imagecache.sources._glance_options import GlanceOptions

MAX_DELAY = 30.0

_BUSY = frozenset({HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS})

_HEADINGS = re.compile(r"<(head|title|h1)\b.*?</\1>", re.DOTALL | re.IGNORECASE)
_TAGS = re.compile(r"<[^>]*>")

_log = logging.getLogger(__name__)


class TryAgainError(Exception):
    """A try failed in a way that another may not. Never leaves the glance source."""


def failure(status: int, *, image_id: str, stage: str) -> SourceError | TryAgainError:
    """The error for an HTTP status that is no answer; a TryAgainError where trying again may help."""
    if status == HTTPStatus.NOT_FOUND:
        return ImageNotFoundError(image_id=image_id, stage=stage)
    if status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
        what = "the token" if status == HTTPStatus.UNAUTHORIZED else "access"
        return SourceForbiddenError(f"the image service refused {what} (HTTP {status})", image_id=image_id, stage=stage)
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR or status in _BUSY:
        return TryAgainError(f"HTTP {status}")
    return SourceError(f"unexpected answer: HTTP {status}", image_id=image_id, stage=stage)


def words(page: bytes) -> str:
    """What Glance's error page says, be it JSON or HTML."""
    text = page.decode(errors="replace")
    try:
        text = str(json.loads(text)["message"])
    except (ValueError, TypeError, KeyError):
        text = _HEADINGS.sub(" ", text)
    return " ".join(_TAGS.sub(" ", text).split())[:300]


class Attempts:
    """One task's tries: over the endpoints in random order, with a growing, jittered delay in between.

    ``endpoint`` is the one to use now, None where the catalogue names it.
    """

    def __init__(self, options: GlanceOptions, *, image_id: str, stage: str) -> None:
        self._retries = options.retries
        self._delay = options.retry_delay
        self._endpoints: list[str | None] = [*options.endpoints] or [None]
        # hosts that start together must not all begin at the same server
        random.shuffle(self._endpoints)
        self._turn = 0
        self._failures = 0
        self._image_id = image_id
        self._stage = stage

    @property
    def endpoint(self) -> str | None:
        """The endpoint for the next request."""
        return self._endpoints[self._turn % len(self._endpoints)]

    def progressed(self) -> None:
        """Start the count again: what was tried has brought something."""
        self._failures = 0

    def failed(self, error: TryAgainError) -> None:
        """Wait, then go on with the next endpoint.

        Raises:
            SourceUnavailableError: this was the last try.
        """
        self._failures += 1
        if self._failures > self._retries:
            raise SourceUnavailableError(
                f"the image service does not deliver, given up after {self._failures} tries: {error}",
                image_id=self._image_id,
                stage=self._stage,
            ) from error
        self._turn += 1
        # full jitter: servers that come back are not met by everyone at once
        delay = random.uniform(0, min(MAX_DELAY, self._delay * 2 ** (self._failures - 1)))  # noqa: S311  # no secret
        _log.warning("image %s: %s: %s; trying again in %.2f s", self._image_id, self._stage, error, delay)
        time.sleep(delay)

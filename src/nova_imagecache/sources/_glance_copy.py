"""A copy of an image in another store of Glance's: asked for once, and waited for whoever asked.

Glance takes one import of an image at a time: it answers 409 while any is under way and for a store that it does not
have, 400 for an image that is in the store already. So what it refuses is judged by what the image then shows.
"""

from __future__ import annotations

import logging
import time
from enum import Enum
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from nova_imagecache._ahead import attended
from nova_imagecache.exceptions import ImageNotActiveError, SourceError, SourceForbiddenError, SourceUnavailableError
from nova_imagecache.sources import CopyFailedError, CopyRefusedError
from nova_imagecache.sources._glance_errors import Attempts, TryAgainError, failure, words

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import requests

    from nova_imagecache._models import ImageInfo
    from nova_imagecache.sources._glance_http import Transport

FIRST_PAUSE = 0.5
MAX_PAUSE = 10.0
STAGE = "copy to store"

_REFUSALS = 2
"""Times that Glance refuses with no import under way: the first may have been for one that ended in between."""
_IDLE_LOOKS = 3
"""Looks in a row that show neither an import nor its result; a Glance that shows no import task begins a bit later."""
_TICK = 0.05
_NOT_TAKEN = frozenset({HTTPStatus.BAD_REQUEST, HTTPStatus.CONFLICT})
_State = Enum("_State", "THERE COMING BUSY FAILED IDLE")  # BUSY: an import that may be for other stores
_log = logging.getLogger(__name__)


class StoreCopy:
    """One image's copy in ``store``. ``look`` gives the image as it is now, and all its properties."""

    def __init__(
        self,
        transport: Transport,
        image_id: str,
        store: str,
        look: Callable[[], tuple[ImageInfo, Mapping[str, Any]]],
        check: Callable[[], None],
    ) -> None:
        self._transport = transport
        self._image_id = image_id
        self._store = store
        self._look = look
        self._check_caller = check
        self._what = f"copy into store {store}"
        self._until = time.monotonic() + transport.options.copy_timeout
        self._task = ""  # of Glance's, that holds the image

    def run(self) -> ImageInfo:
        """As StoreCopier.copy_to_store."""
        refusal = attended(self._ask, self._check)
        ours = refusal is None  # asked for here, or seen on its way: its end is ours to judge
        idle = 0
        for pause in pauses():
            image, properties = attended(self._look, self._check)
            if image.status != "active":
                raise ImageNotActiveError(image.status, image_id=self._image_id, stage=STAGE)
            self._task = str(properties.get("os_glance_import_task") or "")
            state = self._state(image, properties)
            if state is _State.THERE:
                return image
            ours = ours or state is _State.COMING
            idle = 0 if state in (_State.COMING, _State.BUSY) else idle + 1
            if ours and state is _State.FAILED:
                raise self._failed("the service says that it failed")
            if ours and idle == _IDLE_LOOKS:
                raise self._failed("the service has ended it and says nothing of the result")
            if not ours and idle == _REFUSALS:
                raise self._refused(refusal)
            self._wait(pause)
            if idle and not ours:
                refusal = attended(self._ask, self._check)
                ours = refusal is None
        raise AssertionError

    def _ask(self) -> str | None:
        """Ask for the copy; what Glance says where it does not take the request now."""
        body = {"method": {"name": "copy-image"}, "stores": [self._store], "all_stores_must_succeed": True}
        path = f"/v2/images/{self._image_id}/import"
        attempts = Attempts(self._transport.options, image_id=self._image_id, stage=STAGE)
        while True:
            try:
                return self._judge(
                    self._transport.post(path, body, endpoint=attempts.endpoint, image_id=self._image_id, stage=STAGE)
                )
            except TryAgainError as err:
                attempts.failed(err)

    def _judge(self, response: requests.Response) -> str | None:
        status = response.status_code
        if status < HTTPStatus.MULTIPLE_CHOICES:
            return None
        answer = f"HTTP {status}: {words(response.content)}"
        if status in _NOT_TAKEN:
            _log.info("image %s: no new copy in store %s: %s", self._image_id, self._store, answer)
            return answer
        if status == HTTPStatus.FORBIDDEN:
            todo = "Grant this user copy_image in the image service's policy; by default it is the administrators'"
            raise SourceForbiddenError(f"{self._what}: {answer}", image_id=self._image_id, stage=STAGE, todo=todo)
        error = failure(status, image_id=self._image_id, stage=STAGE)
        raise self._refused(answer) if type(error) is SourceError else error

    def _state(self, image: ImageInfo, properties: Mapping[str, Any]) -> _State:
        if self._store in _names(properties, "os_glance_importing_to_stores"):
            return _State.COMING
        if self._store in image.stores:
            return _State.THERE
        # failures of an earlier import stay listed until the next one has begun
        if self._task:
            return _State.BUSY
        return _State.FAILED if self._store in _names(properties, "os_glance_failed_import") else _State.IDLE

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._check()
            time.sleep(_TICK)

    def _check(self) -> None:
        self._check_caller()
        if time.monotonic() > self._until:
            detail = f"it is not there after {self._transport.options.copy_timeout:g} s"
            if self._task:
                detail += f"; the service's import task {self._task} holds the image"
            raise SourceUnavailableError(f"{self._what}: {detail}", image_id=self._image_id, stage=STAGE)

    def _failed(self, detail: str) -> CopyFailedError:
        return CopyFailedError(f"{self._what}: {detail}", image_id=self._image_id, stage=STAGE)

    def _refused(self, answer: str | None) -> CopyRefusedError:
        detail = f"{self._what}: the service refuses it: {answer}"
        return CopyRefusedError(detail, image_id=self._image_id, stage=STAGE)


def pauses() -> Iterator[float]:
    """Seconds between one look and the next, without end."""
    pause = FIRST_PAUSE
    while True:
        yield pause
        pause = min(MAX_PAUSE, pause * 2)


def _names(properties: Mapping[str, Any], key: str) -> list[str]:
    return [name.strip() for name in str(properties.get(key) or "").split(",")]

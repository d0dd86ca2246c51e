"""The miss path: from the image service's metadata to a published base. The caller holds the base's lock."""

from __future__ import annotations

import logging
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nova_imagecache import _admission, _entries, _ingest, _twins, _users
from nova_imagecache._ahead import attended
from nova_imagecache._guard import translated
from nova_imagecache.exceptions import (
    BackendError,
    BaseInUseError,
    BaseNotFoundError,
    ImageCorruptError,
    ImageRejectedError,
    LockTimeoutError,
    NoSpaceError,
)

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from nova_imagecache._config import CacheConfig
    from nova_imagecache._flight import Leader
    from nova_imagecache._guard import GuardedBackend
    from nova_imagecache._guard_source import GuardedSource
    from nova_imagecache._keeper import Keeper
    from nova_imagecache._layout import Root
    from nova_imagecache._models import BaseImage, Digest, ImageInfo
    from nova_imagecache._watch import Watch

_log = logging.getLogger(__name__)
_SLOT_POLL = 0.05
_CLAIM_POLL = 0.2
_CLAIM_POLL_MOST = 2.0
_CLAIM_BACK_OFF = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetcher:
    """What every fetch of one cache needs. ``slots`` bounds how many run at once in this process."""

    config: CacheConfig
    backend: GuardedBackend
    finders: Sequence[_users.UserFinder]
    root: Root
    keeper: Keeper
    clock: Callable[[], float]
    slots: threading.BoundedSemaphore

    def fetch(
        self,
        image_id: str,
        *,
        source: GuardedSource,
        expect: Digest | None,
        disk_size: int | None,
        find: Callable[[], BaseImage | None],
        watch: Watch,
        leader: Leader,
    ) -> BaseImage:
        """The base, published by us or by whoever was first. ``find`` looks for it as for a hit, and notes its use.

        Raises:
            SourceError and its kin: the image cannot be had, or is refused.
            BaseInUseError: other bytes are cached under this id and have users that a replacement would harm.
            DiskTooSmallError, NoSpaceError, BackendError, CancelledError, DeadlineError.
        """

        def failed(text: str) -> BackendError:
            return BackendError(f"the image cannot be brought in: {text}", image_id=image_id, stage="fetch")

        with translated(failed), self._slot(watch):
            image = attended(lambda: source.get(image_id), lambda: watch.check("metadata"))
            _refuse_other(image, expect)
            if (found := find()) is not None:  # another host had it before the source answered
                return found
            replaced = self._replaced(image_id, expect)
            limits = _admission.Limits(disk_size=disk_size, max_virtual_size=self.config.max_virtual_size)
            _admission.judge_metadata(image, limits)
            if (adopted := self._adopt(image, source, expect, find, watch)) is not None:
                _admission.judge_size(adopted.virtual_size, image_id, limits)  # nobody may have announced it
                return adopted
            if replaced is not None:
                _refuse_adopted(replaced)

            def tell(stage: str, done: int, total: int | None, /) -> None:
                watch.report(stage, done, total)
                leader.note(done, total)

            def attempt() -> BaseImage:
                # translated here too: a full storage under our own files is met below, as under the backend's
                with translated(failed), _entries.entry(self.root.staging, image.image_id, 0o700) as scratch:
                    request = self._request(image, disk_size, expect, scratch, watch)
                    _admission.admit_metadata(image, request)
                    ingest = _ingest.Ingest(image, source, request, watch, tell)
                    return self._bring_in(ingest, request, scratch, watch)

            with self._claim(image_id, find, watch) as theirs:
                if theirs is not None:
                    return theirs
                try:
                    return attempt()
                except NoSpaceError as err:
                    # refused by figures: nothing more can go. Full in the middle: others write to the storage as well
                    if err.needed is not None or not self.keeper.make_room(
                        image.size or 1, lambda: watch.check("making room")
                    ):
                        raise
                    _log.warning("image %s: the storage ran full; room was made, trying once more", image_id)
                    return attempt()

    def _adopt(
        self,
        image: ImageInfo,
        source: GuardedSource,
        expect: Digest | None,
        find: Callable[[], BaseImage | None],
        watch: Watch,
    ) -> BaseImage | None:
        """The image where it already lies, or where its service copies it to; None: it must be brought in."""
        if expect is not None and image.digest != expect:  # adopted bytes are never looked at
            return None
        if image.locations and (adopted := self._adopt_as_shown(image)) is not None:
            return adopted
        image = self._located(image, source, watch)
        if (adopted := self.backend.adopt_base(image)) is not None:
            return adopted
        if image.status != "active" or self.backend.wanted_store(image) is None:
            return None
        return self._copied(image, source, find, watch)

    def _copied(
        self, image: ImageInfo, source: GuardedSource, find: Callable[[], BaseImage | None], watch: Watch
    ) -> BaseImage | None:
        """The image where its service has copied it to. Of all hosts one asks for that at a time.

        Glance looks whether it has a copy before it locks the image: of two who ask at once it may take the second when
        the first's copy is there, finds that in its way, and deletes it.
        """
        with self._claim(image.image_id, find, watch) as theirs:
            if theirs is not None:
                return theirs
            now = attended(lambda: source.get(image.image_id), lambda: watch.check("metadata"))
            now = self._located(now, source, watch)
            if (adopted := self.backend.adopt_base(now)) is not None:
                return adopted
            store = self.backend.wanted_store(now)
            if store is None or now.status != "active":
                return None
            _log.info("image %s: asking for a copy in store %s", image.image_id, store)
            copied = source.copy_to_store(now, store, lambda: watch.check("copy to store"))
            # a service that shows no places shows none of a copy either
            return None if copied is None else self.backend.adopt_base(self._located(copied, source, watch))

    def _adopt_as_shown(self, image: ImageInfo) -> BaseImage | None:
        try:
            return self.backend.adopt_base(image)
        except ImageRejectedError:  # said again, unless a place that is not shown will do
            return None

    def _located(self, image: ImageInfo, source: GuardedSource, watch: Watch) -> ImageInfo:
        """The image with all its places, where a backend may use one."""
        if image.status != "active" or self.backend.properties.disk_kind != "clone":
            return image
        return attended(lambda: source.with_locations(image), lambda: watch.check("locations"))

    @contextmanager
    def _claim(self, image_id: str, find: Callable[[], BaseImage | None], watch: Watch) -> Iterator[BaseImage | None]:
        """The right to bring the image in, while the block runs; or the base, once another host has published it.

        Raises:
            LockTimeoutError: another host has the right for longer than ``lock_timeout``.
        """
        began = time.monotonic()
        pause = _CLAIM_POLL
        while (claim := self.backend.claim_import(image_id)) is None:
            watch.check("wait for another host")
            if (base := find()) is not None:
                yield base
                return
            waited = time.monotonic() - began
            if waited > self.config.lock_timeout.total_seconds():
                timeout = LockTimeoutError(f"another host's import of image {image_id}", waited, image_id=image_id)
                timeout.detail = f"waited {waited:.1f} s for {timeout.path}, whose progress cannot be seen from here"
                timeout.todo = "See what the other hosts are at, or raise lock_timeout"
                raise timeout
            self._sleep(pause, watch)
            pause = min(pause * _CLAIM_BACK_OFF, _CLAIM_POLL_MOST)
        try:
            yield find()
        finally:
            claim.release()

    def _sleep(self, seconds: float, watch: Watch) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            watch.check("wait for another host")
            time.sleep(_SLOT_POLL)

    def _bring_in(self, ingest: _ingest.Ingest, request: _admission.Request, scratch: Path, watch: Watch) -> BaseImage:
        image = ingest.image
        _log.info("image %s: fetching %s bytes of %s", image.image_id, image.size, image.disk_format)
        writer = self.backend.stage_base(image.image_id, request.base_format)
        try:
            record = _twins.copied(
                self.backend, image, request, writer, self.clock(), check=lambda: watch.check("copy")
            ) or ingest.run(writer, scratch, self.clock())
            watch.check("publish")
            self._make_way(image.image_id, request.expect)
            watch.report("publish", record.source_size, record.source_size)
            self.keeper.release(scratch)  # or it would count beside the base until we tidy up
            base = writer.publish(record)
        finally:
            writer.discard()
        _log.info("image %s: published, %d bytes virtual, %s", image.image_id, base.virtual_size, record.made_by)
        return base

    def _request(
        self, image: ImageInfo, disk_size: int | None, expect: Digest | None, scratch: Path, watch: Watch
    ) -> _admission.Request:
        def check() -> None:
            watch.check("making room")

        def admit(needed: int, stage: str, placed: int) -> None:
            self.keeper.reserve(image.image_id, scratch, needed, stage, check, placed=placed)

        def admit_free(needed: int, stage: str, placed: int) -> bool:
            return self.keeper.reserve_free(image.image_id, scratch, needed, stage, check, placed=placed)

        formats = self.backend.properties.base_formats
        return _admission.Request(
            base_format=_admission.base_format(image.disk_format, self.backend.wanted_base_format, formats),
            disk_size=disk_size,
            max_virtual_size=self.config.max_virtual_size,
            expect=expect,
            allow_unverified=self.config.allow_unverified,
            admit=admit,
            admit_free=admit_free,
        )

    def _replaced(self, image_id: str, expect: Digest | None) -> BaseImage | None:
        """The base of this id that is not what the caller expects, if it can be replaced."""
        old = self.backend.find_base(image_id)
        if old is None or expect in (None, old.digest):
            return None
        self._refuse_readers(old)
        return old

    def _make_way(self, image_id: str, expect: Digest | None) -> None:
        """Take away what stands there now and holds other bytes, by two looks at who reads them.

        It may have come since the fetch began, and may go at any time.
        """
        old = self._replaced(image_id, expect)
        if old is None:
            return
        _refuse_adopted(old)
        # the same id, other bytes: their disks hold them by links, new ones get the new bytes
        _log.warning("image %s: other bytes were cached under this id; they are replaced", image_id)
        try:
            retired = self.backend.retire_base(old)
        except BaseNotFoundError:
            return
        try:
            self._refuse_readers(old, retired.base)
        except BaseException:
            self.backend.restore_base(retired)
            raise
        self.backend.purge_base(retired)

    def _refuse_readers(self, *names: BaseImage) -> None:
        # a link keeps its disk's bytes whatever takes the name; a path or a clone would read the new ones
        if users := _users.readers_by_name(self.backend, self.finders, names):
            raise BaseInUseError(users, image_id=names[0].image_id, stage="replacing other bytes of the same id")

    @contextmanager
    def _slot(self, watch: Watch) -> Iterator[None]:
        while not self.slots.acquire(timeout=_SLOT_POLL):
            watch.check("wait")
        try:
            yield
        finally:
            self.slots.release()


def _refuse_adopted(old: BaseImage) -> None:
    if not old.managed:
        reason = "its base is adopted, and adopted bytes are never compared with a digest"
        todo = "Leave expect out, or have the image service announce this digest"
        raise ImageRejectedError(reason, image_id=old.image_id, stage="metadata", todo=todo)


def _refuse_other(image: ImageInfo, expect: Digest | None) -> None:
    announced = image.digest
    if expect is None or announced is None or announced.algorithm != expect.algorithm:
        return
    if expect != announced:
        raise ImageCorruptError(expect, announced, image_id=image.image_id, stage="metadata")

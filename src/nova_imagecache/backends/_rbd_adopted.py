"""Images that Glance keeps in the same cluster, used where they lie: ``<root>/adopted/<image-id>.json``.

The file holds the base's record and where the snapshot is, so that the base is found again without Glance. It goes when
the snapshot no longer opens: Glance has deleted the image. Disks that were cloned from it go on, since Glance moves an
image that has clones to its pool's trash.
"""

from __future__ import annotations

import json
import logging
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from nova_imagecache import _entries, _fs, _records
from nova_imagecache._models import round_up
from nova_imagecache.backends import BackendError, BaseImage, BaseRecord, ImageInfo, _rbd_look
from nova_imagecache.backends._rados_errors import NoPoolError, NotThereError
from nova_imagecache.backends._rbd_locations import Place, UnusableError, in_cluster, parse, shown
from nova_imagecache.exceptions import ImageRejectedError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from nova_imagecache.backends._rbd_store import Store

TOUCH_INTERVAL = 60.0
"""Seconds for which one note of a base's use is as good as the next.

Well below the five minutes after a use in which the core evicts no base, and which begin with the note.
"""

_CLONABLE = ("raw", "iso")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """What the file of one adopted image says; ``rbd_id`` is the image's id in its pool."""

    place: Place
    rbd_id: str
    record: BaseRecord
    last_used: float


class Adopted:
    """The adopted bases of one root."""

    def __init__(self, store: Store, root: Path) -> None:
        self._store = store
        self._directory = root / "adopted"
        self._staging = root / "staging"
        self._said: set[tuple[str, str]] = set()

    def _path(self, image_id: str) -> Path:
        return self._directory / f"{image_id}.json"

    # --- finding

    def find(self, image_id: str) -> BaseImage | None:
        """The base, if the image was adopted and its snapshot still opens."""
        known = self._read(image_id)
        if known is None:
            return None
        try:
            in_cluster(known.place, self._store.connection.fsid())
            self._look(known.place, known.rbd_id)
        except UnusableError as err:
            _log.info("image %s: adopted no longer: %s", image_id, err)
            self.forget(image_id)
            return None
        except BackendError as err:
            if err.retryable:
                raise
            # capabilities may come back, for one; until then it is no use
            self._say(image_id, str(known.place), err.detail)
            return None
        return self._base(image_id, known)

    def is_clone(self, base: BaseImage, parent_id: str) -> bool:
        """Whether a clone of the image with this id is one of the base; asks nobody."""
        known = self._read(base.image_id)
        return known is not None and known.record == base.record and known.rbd_id == parent_id

    def _read(self, image_id: str) -> _Known | None:
        path = self._path(image_id)
        try:
            values = json.loads(path.read_bytes())
            return _Known(
                place=Place(**values["place"]),
                rbd_id=values["rbd_id"],
                record=_records.load_base(json.dumps(values["record"]).encode()),
                last_used=path.stat().st_mtime,
            )
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError) as err:
            _log.warning("image %s: what is written of its adoption cannot be read: %s", image_id, err)
            return None

    def iter_bases(self) -> Iterator[BaseImage]:
        """Every adopted base."""
        for entry in _entries.names(self._directory):
            if entry.endswith(".json") and (base := self.find(entry.removesuffix(".json"))) is not None:
                yield base

    def _base(self, image_id: str, known: _Known) -> BaseImage:
        location = self._store.location(known.place.image, known.place.snapshot, pool=known.place.pool)
        return BaseImage(
            image_id=image_id, location=location, record=known.record, managed=False, last_used=known.last_used
        )

    def _look(self, place: Place, wanted: str | None = None) -> tuple[str, int]:
        """(id, bytes) of the image if a disk can be cloned from it, and it is the one of id ``wanted``."""
        try:
            ioctx = self._store.connection.pool(place.pool)
            with _rbd_look.opened(ioctx, place.image, snapshot=place.snapshot) as image:
                if self._store.clones_need_protection() and not _rbd_look.is_protected(image, place.snapshot):
                    raise UnusableError("its snapshot is not protected, and clones are of format 1 here")
                if wanted not in (None, image.id()):
                    raise UnusableError("another image has its name")
                return image.id(), image.size()
        except NoPoolError:
            raise UnusableError(f"pool {place.pool} is not there") from None
        except NotThereError:
            raise UnusableError(f"{place.pool}/{place.image}@{place.snapshot} is not there") from None

    # --- adopting

    def adopt(self, image: ImageInfo) -> BaseImage | None:
        """The image as a base where it lies, None: it must be copied by Glance or brought in.

        Raises:
            ImageRejectedError: it must be brought in, and ``when_not_clonable`` is "refuse".
        """
        if image.status != "active":  # the core refuses it, in its own words
            return None
        reasons = []
        if image.disk_format not in _CLONABLE:
            reasons.append(f"its format is {image.disk_format}, and only raw and iso can be cloned")
        elif not image.locations:
            reasons.append("Glance shows no location of it to this user")
        else:
            for url in image.locations:
                try:
                    return self._adopt(image, url)
                except UnusableError as err:
                    reasons.append(f"{shown(url)}: {err}")
                except BackendError as err:
                    if err.retryable:  # it may be just what is wanted
                        raise
                    reasons.append(f"{shown(url)}: {err.detail}")
        for reason in reasons:
            # no news for whoever has no Glance in this cluster; a location that fails is
            self._say(image.image_id, reason, reason, logging.WARNING if "rbd://" in reason else logging.INFO)
        if self._store.options.when_not_clonable == "refuse" and self.wanted_store(image) is None:
            refused = ImageRejectedError(
                f"it cannot be cloned where it lies ({'; '.join(reasons)}), and when_not_clonable is refuse",
                image_id=image.image_id,
                stage="adoption",
            )
            refused.todo = "Upload it raw into this cluster's Glance store, or set when_not_clonable = import"
            raise refused
        return None

    def wanted_store(self, image: ImageInfo) -> str | None:
        """The Glance store that the image must be copied into to be adopted; None: no copy would help."""
        store = self._store.options.glance_store
        # whoever is shown no location now is shown none of a copy either
        if image.disk_format not in _CLONABLE or store in image.stores or not image.locations:
            return None
        return store

    def _adopt(self, image: ImageInfo, url: str) -> BaseImage:
        place = parse(url)
        in_cluster(place, self._store.connection.fsid())
        rbd_id, size = self._look(place)
        now = time.time()
        record = BaseRecord(
            image_id=image.image_id,
            format="raw",
            virtual_size=round_up(size),
            size=size,
            source_format=image.disk_format,
            source_size=size,
            source_digest=image.digest,
            evidence="none",
            made_by="stored",
            source=url,
            fetched_at=now,
        )
        values = {"place": asdict(place), "rbd_id": rbd_id, "record": asdict(record)}
        for directory in (self._directory, self._staging):
            _fs.make_dirs(directory, 0o755 if directory is self._directory else 0o700)
        data = (json.dumps(values, indent=1, sort_keys=True) + "\n").encode()
        _entries.replace_file(self._path(image.image_id), data, 0o644, staging=self._staging)
        _log.info("image %s: used where it lies, %s", image.image_id, url)
        known = _Known(place=place, rbd_id=rbd_id, record=record, last_used=self._path(image.image_id).stat().st_mtime)
        return self._base(image.image_id, known)

    def touch(self, base: BaseImage) -> None:
        """Note that the base is used."""
        if base.last_used is not None and time.time() - base.last_used < TOUCH_INTERVAL:
            return
        with suppress(OSError):  # dropped meanwhile, or another user's; the disk is made all the same
            os.utime(self._path(base.image_id))

    def forget(self, image_id: str) -> None:
        """Take the adoption back; the image itself is Glance's."""
        _fs.unlink(self._path(image_id))

    def _say(self, image_id: str, key: str, reason: str, level: int = logging.WARNING) -> None:
        if (image_id, key) not in self._said:
            self._said.add((image_id, key))
            _log.log(level, "image %s cannot be cloned where it lies: %s (said once)", image_id, reason)

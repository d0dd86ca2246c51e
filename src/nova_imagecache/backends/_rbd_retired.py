"""Bases that go: who uses them, and how their names are taken away, given back, or their space is freed."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from nova_imagecache import _records
from nova_imagecache.backends import (
    Backend,
    BackendError,
    BackendPaths,
    BaseImage,
    BaseNotFoundError,
    DiskUser,
    RbdLocation,
    Retired,
    UsersUnknownError,
    _rados,
    _rbd_look,
)
from nova_imagecache.backends._rados_errors import BusyError, ForbiddenError, NotThereError, SnapshotsError
from nova_imagecache.backends._rbd_adopted import Adopted
from nova_imagecache.backends._rbd_names import (
    DAMAGED,
    LAST_USED,
    RECORD,
    RETIRED,
    SNAPSHOT,
    base_name,
    split_disk_name,
)
from nova_imagecache.backends._rbd_options import RbdOptions
from nova_imagecache.backends._rbd_owner import STAGING
from nova_imagecache.backends._rbd_store import Store
from nova_imagecache.exceptions import BaseInUseError, NoSpaceError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from nova_imagecache.backends._rados import Ioctx

TRASH = "trash."
"""What the name of a retired base's location begins with; its id follows."""

_NOBODYS = "0" * 16
_LOOKS = 5
_PAUSE = 0.05


class RetirableBases(Backend):
    """The first part of the bases' half: who uses a base, and its going."""

    busy_patience: ClassVar[float] = 35.0
    """Seconds for which something in use is tried again: longer than Ceph takes a dead client for a live one."""

    def __init__(self, options: Mapping[str, Any], paths: BackendPaths) -> None:
        self.options = RbdOptions.parse(options)
        self.paths = paths
        self.store = Store(self.options, self.busy_patience)
        self.adopted = Adopted(self.store, paths.root)
        self._leaving: dict[str, str] = {}
        """The marks of what this process has retired, by RBD id."""

    def close(self) -> None:
        self.store.close()

    def _whereabouts(self, base: BaseImage) -> tuple[Ioctx, str]:
        if not isinstance(base.location, RbdLocation):
            raise BackendError("not a base of this backend", image_id=base.image_id)
        return self.store.connection.pool(base.location.pool), base.location.name

    def _id_of(self, base: BaseImage, stage: str, wanted: str | None = None) -> str:
        """The id of the image that has the base's name.

        Raises:
            BaseNotFoundError: nobody has it, or another base; or its id is not the one that is wanted.
        """
        rbd_id = self.store.id_of(base_name(base.image_id))
        if rbd_id is None:
            raise BaseNotFoundError(image_id=base.image_id, stage=stage)
        if wanted not in (None, rbd_id) or not is_record(_rbd_look.metadata_of(self.store.io, rbd_id, RECORD), base):
            raise BaseNotFoundError("another base has its name by now", image_id=base.image_id, stage=stage)
        return rbd_id

    # --- users

    def iter_users(self, base: BaseImage) -> Iterator[DiskUser]:
        ioctx, name = self._whereabouts(base)
        retired = name.startswith(TRASH)
        opened = (
            partial(_rbd_look.opened_by_id, ioctx, name.removeprefix(TRASH))
            if retired
            else partial(_rbd_look.opened, ioctx, name)
        )
        for _look in range(_LOOKS):
            try:
                with opened() as image:
                    found = _children(image)
            except NotThereError as err:
                if retired:  # purged, which takes that there were none
                    return
                raise UsersUnknownError("the base is gone or retired", image_id=base.image_id, stage="users") from err
            except ForbiddenError as err:
                detail = f"client.{self.options.user} may not see the clones in all pools: {err.detail}"
                raise UsersUnknownError(detail, image_id=base.image_id, stage="users") from err
            if found is not None:
                break
            time.sleep(_PAUSE)
        else:
            detail = "a clone of it is neither among the pool's images nor in its trash"
            raise UsersUnknownError(detail, image_id=base.image_id, stage="users")
        for child in found:
            yield self._user(base.image_id, child)

    def _user(self, image_id: str, child: _rbd_look.Child) -> DiskUser:
        detail = f"{child.pool}/{child.name}" + (" (in the trash)" if child.trash else "")
        ours = child.pool == self.options.pool and not child.trash
        names = split_disk_name(child.name) if ours else None
        disk_id, name = names or (None, None)
        return DiskUser(image_id=image_id, known_by="clone", disk_id=disk_id, name=name, detail=detail)

    # --- going

    def retire_base(self, base: BaseImage) -> Retired:
        if not base.managed:
            todo = "Delete the image in the image service instead"
            raise BackendError("the base is adopted, and Glance's to remove", image_id=base.image_id, todo=todo)
        return self._retire(base)

    def _retire(self, base: BaseImage, **marks: str) -> Retired:
        """Take the name away, marked with who has still to look whether the base must have it back."""
        rbd_id = self._id_of(base, "retire")
        mark = self._mark(base.image_id)
        try:
            with self.store.claimed(rbd_id, "taking the name away"):
                self._id_of(base, "retire", rbd_id)
                _rados.set_metadata(self.store.io, rbd_id, {RETIRED: mark, **marks})
                self.store.take_away(rbd_id, base_name(base.image_id))
            # a use that was noted meanwhile is told: whoever noted it may have found the base still there
            last_used = seconds(_rbd_look.metadata_of(self.store.io, rbd_id, LAST_USED))
        except BaseException as err:
            self.store.owner.done(mark)
            if isinstance(err, NotThereError):
                raise BaseNotFoundError(image_id=base.image_id, stage="retire") from err
            raise
        self._leaving[rbd_id] = mark
        location = self.store.location(TRASH + rbd_id, SNAPSHOT)
        return Retired(base=replace(base, location=location, last_used=last_used), token=rbd_id)

    def _mark(self, image_id: str) -> str:
        """Something unfinished of this process."""
        try:
            with self.store.room():
                return self.store.owner.new_name(image_id, wait=False)
        except (NoSpaceError, BusyError):  # no sign of life yet; without one recover gives the name back
            return f"{STAGING}{image_id}.{_NOBODYS}"

    def restore_base(self, retired: Retired) -> None:
        try:
            # where a new base has the name, both stay; a recover beside us may have restored or purged it
            self.store.give_back(retired.token, base_name(retired.base.image_id))
        finally:
            self._let_go(retired.token)

    def purge_base(self, retired: Retired) -> None:
        try:
            self.store.patiently(lambda: self.purge(retired, self._leaving.get(retired.token)))
        finally:
            self._let_go(retired.token)

    def _let_go(self, rbd_id: str) -> None:
        if (mark := self._leaving.pop(rbd_id, None)) is not None:
            self.store.owner.done(mark)

    def purge(self, retired: Retired, mark: str | None = None) -> None:
        """As ``purge_base``, once; where a ``mark`` is given, not if the base was retired with another since.

        Raises:
            BusyError: somebody has it open, or a ``restore_base`` died half-way.
        """
        rbd_id = retired.token
        try:
            with self.store.claimed(rbd_id, "freeing it"):
                entry = _rbd_look.trash_entry(self.store.io, rbd_id)
                if entry is None or entry.name != base_name(retired.base.image_id):
                    return  # restored or purged by somebody else
                if mark is not None:
                    if _rbd_look.metadata_of(self.store.io, rbd_id, RETIRED) not in (None, mark):
                        return
                    # both looks are done: whoever finds it now may end this
                    _rados.set_metadata(self.store.io, rbd_id, {RETIRED: None})
                self._free(retired)
        except NotThereError:
            return

    def _free(self, retired: Retired) -> None:
        # clones of format 2 do not stop Ceph from removing the snapshot
        if users := list(self.iter_users(retired.base)):
            raise BaseInUseError(users, image_id=retired.base.image_id, stage="purge")
        try:
            # the snapshot goes first of all: who reads the base meanwhile, or finds it half gone, looks for that
            self.store.strip(retired.token)
            self.store.empty(retired.token, base_name(retired.base.image_id))
        except (BusyError, SnapshotsError) as err:
            # a clone came between the look and the removal; its maker finds the base gone and drops it
            users = list(self.iter_users(retired.base))
            if not users:
                raise
            raise BaseInUseError(users, image_id=retired.base.image_id, stage="purge") from err

    def quarantine_base(self, base: BaseImage) -> None:
        if not base.managed:
            self.adopted.forget(base.image_id)
            return
        # with users it stays in the trash for them, and is not given its name back
        with suppress(BaseNotFoundError, BaseInUseError):
            self.purge_base(self._retire(base, **{DAMAGED: "yes"}))


def _children(image: _rados.Image) -> list[_rbd_look.Child] | None:
    """The image's clones; None: one of them was on its way into the trash or out of it, seen in neither place."""
    try:
        return _rbd_look.children(image)
    except NotThereError:
        return None


def is_record(text: str | None, base: BaseImage) -> bool:
    """Whether this is the base's record, as it is written in an image's metadata."""
    try:
        return text is not None and _records.load_base(text.encode()) == base.record
    except _records.RecordError:
        return False


def seconds(text: str | None) -> float | None:
    """The number that was written, None: there is none."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return None

"""Removal by two looks: users, retire, users again; then purge or restore. Each side writes before it reads."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nova_imagecache import _users
from nova_imagecache._locks import Lock, Locks, Patience
from nova_imagecache.exceptions import (
    BaseInUseError,
    BasePinnedError,
    ImageCacheError,
    InvalidRequestError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from nova_imagecache._guard import GuardedBackend
    from nova_imagecache._layout import Root
    from nova_imagecache._models import BaseImage, DiskUser, Retired
    from nova_imagecache.backends import Survey

_log = logging.getLogger(__name__)


class BaseBusyError(ImageCacheError):
    """Somebody works on the base now, or it is no longer what the plan says; never leaves the library."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Remover:
    """What removes the bases of one cache."""

    backend: GuardedBackend
    finders: Sequence[_users.UserFinder]
    root: Root
    locks: Locks
    clock: Callable[[], float]

    # --- one base

    def retire(self, base: BaseImage) -> Retired:
        """The base, out of sight and without users; the caller holds its lock and purges after giving it back.

        Raises:
            BaseInUseError, BasePinnedError, UsersUnknownError: it stays, or is back again.
            BaseNotFoundError: it is gone already.
        """
        if not base.managed:
            todo = "Delete the image in the image service instead"
            raise InvalidRequestError(
                "the base is adopted, not the cache's to remove", image_id=base.image_id, todo=todo
            )
        self.refuse(base, self._found(base))
        retired = self.backend.retire_base(base)
        try:
            self.refuse(retired.base, self._found(base, retired.base))
        except BaseException:
            self.backend.restore_base(retired)
            raise
        return retired

    def _found(self, *names: BaseImage) -> list[DiskUser]:
        """What the finders know of a base, by all the names it has or had."""
        return _users.from_finders(self.finders, names).get(names[0].image_id, [])

    def refuse(self, base: BaseImage, found: Sequence[DiskUser]) -> None:
        """Come back if the storage counts no user, ``found`` (the finders') is empty, and no pin holds.

        Raises:
            BaseInUseError, BasePinnedError, UsersUnknownError.
        """
        if users := [*self.backend.iter_users(base), *found]:
            disks = (disk for disk in self.backend.iter_root_disks() if disk.image_id == base.image_id)
            raise BaseInUseError(_users.with_names(users, disks, base), image_id=base.image_id, stage="removal")
        if pins := self.root.pins(base.image_id, self.clock()):
            raise BasePinnedError([pin.owner for pin in pins], image_id=base.image_id, stage="removal")

    def attempt_lock(self, image_id: str) -> Lock:
        """The base's lock, held.

        Raises:
            BaseBusyError: somebody else holds it.
        """
        lock = self.locks.base(image_id)
        if not lock.attempt():
            raise BaseBusyError("somebody works on it now", image_id=image_id)
        return lock

    @contextmanager
    def wait_lock(self, image_id: str, check: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Hold the base's lock while the block runs. What ``check`` raises ends the wait for it.

        Raises:
            LockTimeoutError: whoever holds it makes no progress.
        """
        lock = self.locks.base(image_id)
        patience = Patience(lock, self.locks.timeout, image_id)
        while not lock.attempt():
            check()
            patience.wait()
        try:
            yield
        finally:
            lock.release()

    def has_users(self, survey: Survey) -> bool:
        """Whether the storage knows a user; doubt counts as one."""
        base = survey.base
        try:
            return any(True for _user in self.backend.iter_users(base)) if survey.users is None else bool(survey.users)
        except ImageCacheError as err:
            _log.warning("base %s counts as used: %s", base.image_id, err)
            return True

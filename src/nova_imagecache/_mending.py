"""Bases in doubt: those that are damaged, whose owner is another, or in whose place something stands that is none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nova_imagecache import _entries, _users, _verify
from nova_imagecache._watch import Watch
from nova_imagecache.exceptions import (
    BackendError,
    BaseCorruptError,
    BaseInUseError,
    BaseNotFoundError,
    ConfigError,
    UsersUnknownError,
)

if TYPE_CHECKING:
    import os
    import threading
    from collections.abc import Callable, Sequence

    from nova_imagecache._guard import GuardedBackend
    from nova_imagecache._keeper import Keeper
    from nova_imagecache._layout import Root
    from nova_imagecache._models import BaseImage
    from nova_imagecache._removal import Remover

_CANNOT_BE_READ = "what stands in the base's place cannot be read"
_READ = "It stays, since root disks read it, or may: stop and rebuild them, then remove it"
_GONE = "It is gone already; the next ensure fetches a new one"
_REPLACED = "Another has taken its place meanwhile: verify that one"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mender:
    """What finds out about such bases of one cache, and takes them out of the way or mends them.

    ``emit`` tells the driver of a change (Engine.emit), ``tell_evicted`` of bases that made room; outside locks.
    """

    backend: GuardedBackend
    finders: Sequence[_users.UserFinder]
    root: Root
    remover: Remover
    keeper: Keeper
    emit: Callable[..., None]
    tell_evicted: Callable[[], None]

    def quarantine(self, base: BaseImage, file: os.stat_result | None) -> str | None:
        """Take a base that must not be used out of the way, unless disks read it by name, or may.

        ``file`` is what ``file_of`` said of it before its bytes were read. What to do next where it is not done; None:
        it is in quarantine.
        """
        try:
            if _users.readers_by_name(self.backend, self.finders, [base]):
                return _READ
        except UsersUnknownError:
            return _READ
        there = self.backend.find_base(base.image_id)
        if there is None:
            return _GONE
        # its marks are not compared: others go on using it. A base that was re-owned has its record, in another file
        if there.record != base.record or not _verify.is_file(there, file):
            return _REPLACED
        try:
            self.backend.quarantine_base(there)
        except (BaseInUseError, UsersUnknownError):
            return _READ
        return None

    def missing(
        self, image_id: str, unreadable: type[BaseNotFoundError | BaseCorruptError] = BaseNotFoundError
    ) -> BaseNotFoundError | BaseCorruptError:
        """The error for a base that is not found; where something stands in its place, an ``unreadable`` that tells."""
        left = self.backend.find_unreadable(image_id)
        if left is None:
            return BaseNotFoundError(image_id=image_id)
        todo = "Bring in a new one, which takes its place: ensure; or remove it"
        return unreadable(f"{_CANNOT_BE_READ}: {left.reason}", image_id=image_id, todo=todo)

    def removable(self, image_id: str) -> BaseImage:
        """The base, or what stands in its place and cannot be read, to be retired once nobody uses it.

        Raises:
            BaseNotFoundError: nothing is there.
            UsersUnknownError: nobody can say who uses what is there.
        """
        base = self.backend.find_base(image_id)
        if base is not None:
            return base
        left = self.backend.find_unreadable(image_id)
        if left is None:
            raise BaseNotFoundError(image_id=image_id)
        if left.base is None:
            raise UsersUnknownError(
                f"{_CANNOT_BE_READ}, and nobody can say who uses it: {left.reason}",
                image_id=image_id,
                stage="removal",
                todo="Remove it with the release that made it, or by hand: `nova-imagecache check` says where it is",
            )
        return left.base

    def verify(self, base: BaseImage, cancel: threading.Event | None) -> BaseImage:
        """As ImageCache.verify_base, of a base that was found."""
        image_id = base.image_id
        with Watch(image_id, cancel=cancel) as watch:
            if (problem := self._damage(base, watch)) is None:
                return base
            try:
                self.root.prepare()
            except ConfigError as err:  # we may look, and no more
                todo: str | None = f"It stays in its place. {err.todo}"
            else:
                # what is there now, once more: while somebody has it retired, nothing is where it is looked for
                with self.remover.wait_lock(image_id, lambda: watch.check("verify")):
                    there = self.backend.find_base(image_id)
                    if there is None:
                        raise self.missing(image_id, BaseCorruptError)
                    file = _verify.file_of(there)
                    if (problem := self._damage(there, watch)) is None:
                        return there
                    todo = self.quarantine(there, file)
                self.emit("damaged", image_id, problem=problem)
        raise BaseCorruptError(f"the base is damaged: {problem}", image_id=image_id, stage="verify", todo=todo)

    def _damage(self, base: BaseImage, watch: Watch) -> str | None:
        """What is wrong with the base's bytes, None: nothing. That they cannot be read, only where it is not there."""
        try:
            return _verify.damage(self.backend, base, lambda: watch.check("verify"))
        except (BackendError, BaseNotFoundError) as err:
            if self.backend.find_base(base.image_id) is not None:
                raise
            return err.detail

    def repair(self, image_id: str, cancel: threading.Event | None) -> bool:
        """As ImageCache.repair_base."""
        self.root.prepare()
        with Watch(image_id, cancel=cancel) as watch, self.remover.wait_lock(image_id, lambda: watch.check("repair")):
            base = self.backend.find_base(image_id)
            if base is None:
                raise self.missing(image_id, BaseCorruptError)

            def damage(copy: BaseImage) -> str | None:
                return _verify.damage(self.backend, copy, lambda: watch.check("repair"))

            try:
                with _entries.entry(self.root.staging, image_id, 0o700) as scratch:
                    if not _verify.is_ours(base):
                        needed = self.backend.usage(base).allocated
                        self.keeper.reserve(image_id, scratch, needed, "repair", lambda: watch.check("repair"))
                    repaired = self.backend.reown_base(base, damage)
            finally:
                self.tell_evicted()
        if repaired:
            self.emit("repaired", image_id)
        return repaired

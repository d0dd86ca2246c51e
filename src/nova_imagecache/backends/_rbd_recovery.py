"""What dead processes left in the pool, and how it is told from what live ones work on.

An unfinished thing is dead when its maker gives no sign of life and nobody has it open. Ceph takes a dead client for a
live one for ``osd_client_watch_timeout`` (30 s by default), and until then it is left alone.
"""

from __future__ import annotations

import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from nova_imagecache.backends import (
    BackendError,
    RecoveryReport,
    Retired,
    UsersUnknownError,
    _rados,
    _rbd_going,
    _rbd_look,
)
from nova_imagecache.backends._rados_errors import BusyError, ExistsError, NotThereError
from nova_imagecache.backends._rbd_attach import AttachableDisks
from nova_imagecache.backends._rbd_look import Trashed
from nova_imagecache.backends._rbd_names import BASE, DAMAGED, FINAL, GOING, RECORD, RETIRED, SNAPSHOT, split_disk_name
from nova_imagecache.backends._rbd_owner import is_sign, is_unfinished
from nova_imagecache.backends._rbd_retired import TRASH
from nova_imagecache.backends._rbd_store import DELAY
from nova_imagecache.exceptions import BaseInUseError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from nova_imagecache.backends._rados import Image

_PROMPT = 600.0
"""Seconds within which a disk that is being removed comes to the trash; who moves it there later has another reason."""


@dataclass(slots=True)
class _Notes:
    """The report in the making."""

    removed: list[str] = field(default_factory=list)
    restored: list[str] = field(default_factory=list)
    alive: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


class RecoverableRbd(AttachableDisks):
    """The last part of the backend: ``recover``."""

    def recover(self) -> RecoveryReport:
        notes = _Notes()
        trash, names = _rbd_look.trash(self.store.io), _rbd_look.names(self.store.io)
        self.store.left.close_ended()  # nobody may have open what is swept
        # disks and what is unfinished first: they are clones, which retired bases wait for
        for entry in trash:
            if not entry.name.startswith(BASE):
                settle = self._settle_unfinished if is_unfinished(entry.name) else self._settle_disk
                self._try(f"trash/{entry.name}", notes, partial(self._settle, settle, entry, notes))
        for name in filter(is_unfinished, names):
            self._try(f"staging/{name}", notes, partial(self._sweep_named, name, notes))
        for entry in trash:
            if entry.name.startswith(BASE):
                self._try(f"trash/{entry.name}", notes, partial(self._settle, self._settle_retired, entry, notes))
        for name in self.useless_bases(names):
            self._try(f"bases/{name}", notes, partial(self._sweep_useless, name, notes))
        # who has no sign of life any more has nothing unfinished any more
        for name in filter(is_sign, names):
            self._try(f"staging/{name}", notes, partial(self._sweep_owner, name))
        return RecoveryReport(
            removed=tuple(notes.removed),
            restored=tuple(notes.restored),
            alive=tuple(notes.alive),
            failed=notes.failed,
        )

    def _try(self, what: str, notes: _Notes, sweep: Callable[[], None]) -> None:
        try:
            sweep()
        except (NotThereError, ExistsError):  # somebody else was at it
            return
        except BusyError:
            notes.alive.append(what)
        except BackendError as err:
            if err.retryable:
                raise
            notes.failed[what] = str(err)  # one that cannot be swept stops no other

    # --- in the trash

    def _settle(self, settle: Callable[[Trashed, _Notes], None], entry: Trashed, notes: _Notes) -> None:
        """Settle what was listed, if it still lies there as it did then: minutes may have passed over others."""
        with ExitStack() as claim:
            if self._is_ours(entry):
                with suppress(NotThereError):
                    claim.enter_context(self.store.claimed(entry.image_id, "sweeping it"))
            if _rbd_look.trash_entry(self.store.io, entry.image_id) == entry:
                settle(entry, notes)

    def _is_ours(self, entry: Trashed) -> bool:
        key = RECORD if entry.name.startswith(BASE) else GOING
        return is_unfinished(entry.name) or _rbd_look.metadata_of(self.store.io, entry.image_id, key) is not None

    def _settle_unfinished(self, entry: Trashed, notes: _Notes) -> None:
        """Something that died between its two steps of publishing: finish the second, or drop it."""
        if self.store.owner.is_alive(entry.name) or _rbd_look.is_watched(self.store.io, entry.image_id):
            notes.alive.append(f"trash/{entry.name}")
        elif self.store.drop(entry.image_id, entry.name, self._note(entry.image_id, FINAL)):
            notes.removed.append(f"trash/{entry.name}")
        else:
            notes.restored.append(f"trash/{entry.name}")

    def _settle_retired(self, entry: Trashed, notes: _Notes) -> None:
        """A base whose removal did not come to its end: finish it, or give the name back, for its users or a look."""
        if self._headless(entry):
            self.store.empty(entry.image_id, entry.name)
            notes.removed.append(f"trash/{entry.name}")
            return
        base = self._retired(entry)
        if base is None:
            return
        # only retired, and not looked at for the second time
        if (mark := self._note(entry.image_id, RETIRED)) is not None and self._restorable(entry):
            if self.store.owner.is_alive(mark):
                notes.alive.append(f"trash/{entry.name}")
            else:
                self.store.restore(entry.image_id, entry.name)
                notes.restored.append(f"trash/{entry.name}")
            return
        if self.store.id_of(entry.name) == entry.image_id:
            # half-way into the trash or out of it; the way out is safe to finish from either
            _rados.trash_move(self.store.io, entry.name, DELAY)
        try:
            self.purge(base)
        except BusyError:
            # its way out of the trash died half-way: that is finished, and taken back
            _rados.trash_restore(self.store.io, entry.image_id, entry.name)
            _rados.trash_move(self.store.io, entry.name, DELAY)
            self.store.empty(entry.image_id, entry.name)
        except UsersUnknownError:
            return
        except BaseInUseError:
            if self._restorable(entry):
                self.store.restore(entry.image_id, entry.name)
                notes.restored.append(f"trash/{entry.name}")
            return
        notes.removed.append(f"trash/{entry.name}")

    def _retired(self, entry: Trashed) -> Retired | None:
        image_id = entry.name.removeprefix(BASE)
        location = self.store.location(TRASH + entry.image_id, SNAPSHOT)
        values = _rbd_look.all_metadata(self.store.io, entry.image_id)
        if RECORD not in values:  # somebody else's
            return None
        base = self._base(image_id, values, location)
        return None if base is None else Retired(base=base, token=entry.image_id)

    def _restorable(self, entry: Trashed) -> bool:
        useless = _is_useless(_rbd_look.opened_by_id(self.store.io, entry.image_id))
        return not useless and self.store.id_of(entry.name) in (None, entry.image_id)

    def _settle_disk(self, entry: Trashed, notes: _Notes) -> None:
        """A disk on its way out: finish that; one whose successor never came gets its place back."""
        if split_disk_name(entry.name) is None:
            return
        mark = self._note(entry.image_id, GOING)
        if mark is None:
            if self._headless(entry):  # else somebody else moved it there, and may want it back
                self._empty_disk(entry, notes)
            return
        going = _rbd_going.load(mark)
        if entry.moved_at - going.at > _PROMPT:
            return
        named = self.store.id_of(entry.name)
        coming = going.by != named and _rbd_going.is_coming(self.store, going)
        if coming or _rbd_look.is_watched(self.store.io, entry.image_id):
            notes.alive.append(f"trash/{entry.name}")
            return
        if going.why == "replaced" and not self._has_had(entry.name, going.by):
            if named in (None, entry.image_id):
                self._put_back(entry.image_id, entry.name)
                notes.restored.append(f"trash/{entry.name}")
                return
            if named != going.by:
                raise _usurped(entry)
        if named == entry.image_id:
            _rados.trash_move(self.store.io, entry.name, 0)
        self._empty_disk(entry, notes)

    def _has_had(self, name: str, successor: str | None) -> bool:
        """Whether the successor of a replaced disk has had its name, and is on its way out itself."""
        found = None if successor is None else _rbd_look.trash_entry(self.store.io, successor)
        return found is not None and found.name == name

    def _empty_disk(self, entry: Trashed, notes: _Notes) -> None:
        try:
            self.store.empty(entry.image_id, entry.name)
        except BusyError:
            # it was on its way back, since somebody had it open
            self._put_back(entry.image_id, entry.name)
            notes.restored.append(f"trash/{entry.name}")
        else:
            notes.removed.append(f"trash/{entry.name}")

    def _headless(self, entry: Trashed) -> bool:
        """Whether nothing is left of the image but its entry: its removal had all but ended."""
        try:
            with _rbd_look.opened_by_id(self.store.io, entry.image_id):
                return False
        except NotThereError:
            return True

    # --- under a staging name

    def _sweep_named(self, name: str, notes: _Notes) -> None:
        if self.store.owner.is_alive(name) or self.store.owner.signs(name):
            notes.alive.append(f"staging/{name}")
            return
        rbd_id = self.store.id_of(name)
        final = None if rbd_id is None else self._note(rbd_id, FINAL)
        if self.store.drop(rbd_id, name, final):
            notes.removed.append(f"staging/{name}")

    def _sweep_owner(self, name: str) -> None:
        def sweep() -> None:
            if not self.store.owner.is_own(name) and not self.store.owner.signs(name):
                _rados.remove(self.store.io, name)

        # another who sweeps has it open for a moment
        self.store.patiently(sweep)

    # --- under a base's name

    def _sweep_useless(self, name: str, notes: _Notes) -> None:
        """A base of ours that nothing may be cloned from keeps its image from being brought in: out of its way."""
        rbd_id = self.store.id_of(name)
        if rbd_id is None or self._note(rbd_id, RECORD) is None:  # somebody else's; check tells of it
            return
        with self.store.claimed(rbd_id, "sweeping it"):
            # another than was looked at may have the name
            if not _is_useless(_rbd_look.opened_by_id(self.store.io, rbd_id)):
                return
            self.store.take_away(rbd_id, name)
            notes.removed.append(f"bases/{name}")
            # what depends on it keeps it, in the trash
            with suppress(BaseInUseError, UsersUnknownError):
                if (base := self._retired(Trashed(image_id=rbd_id, name=name, moved_at=time.time()))) is not None:
                    self.purge(base)

    # --- looking

    def useless_bases(self, names: list[str]) -> Iterator[str]:
        """Those of the names that are a base's and lead to an image that is damaged, or has nothing to be cloned."""
        for name in names:
            if name.startswith(BASE):
                try:
                    useless = _is_useless(_rbd_look.opened(self.store.io, name))
                except NotThereError:  # removed meanwhile
                    continue
                if useless:
                    yield name

    def _note(self, rbd_id: str, key: str) -> str | None:
        try:
            with _rbd_look.opened_by_id(self.store.io, rbd_id) as image:
                return _rbd_look.metadata(image, key)
        except NotThereError:
            return None


def _is_useless(opened: AbstractContextManager[Image]) -> bool:
    """Whether an image is no base that disks may be made of: damaged, without its snapshot, not to be opened."""
    try:
        with opened as image:
            return SNAPSHOT not in _rbd_look.snapshots(image) or _rbd_look.metadata(image, DAMAGED) is not None
    except NotThereError:
        raise
    except BackendError as err:
        if err.retryable:
            raise
        return True


def _usurped(entry: Trashed) -> BackendError:
    """A disk was to be replaced, and what has its name is not known to hold its data."""
    return BackendError(
        f"attaching this root disk did not end, and the name {entry.name} leads to another disk: both are kept",
        todo=f"Compare the two: rbd trash restore {entry.image_id} --image <a free name> gives this one a name; remove"
        " the one that is not needed",
    )

"""What is in the pool, and how a thing there becomes visible in one step or goes without a trace.

Publishing is trash_move of the staging name, then trash_restore under the final one: of several exactly one wins, the
others are told that the name exists, and a redo completes every half state that a crash leaves. ``rename`` does not.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from nova_imagecache.backends import RbdLocation, _rados, _rados_claims, _rbd_look, _rbd_room
from nova_imagecache.backends._rados_errors import BusyError, ExistsError, NotThereError, UnfinishedError
from nova_imagecache.backends._rbd_connection import Address, Connection, hold, release
from nova_imagecache.backends._rbd_left import LeftImages
from nova_imagecache.backends._rbd_names import BASE, FINAL, SUMS
from nova_imagecache.backends._rbd_options import FEATURES, LAYERING, RbdOptions
from nova_imagecache.backends._rbd_owner import Owner, is_unfinished
from nova_imagecache.exceptions import BackendError, BackendUnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nova_imagecache.backends._rados import Ioctx

_T = TypeVar("_T")

DELAY = 86400
"""Seconds for which a purge of the pool's trash by somebody else leaves alone what passes through it."""

_CLAIM_SECONDS = 10
_ASK_AGAIN = 60.0
"""Seconds for which the monitors' answer is good that tells the format of clones."""


class Store:
    """The pool of one backend. Thread-safe; connects when first used."""

    def __init__(self, options: RbdOptions, patience: float) -> None:
        self.options = options
        self.patience = patience
        self._address = Address(conf=options.conf, user=options.user)
        self._lock = threading.Lock()
        self._held: Connection | None = None
        self._closed = False
        self.endings: set[Callable[[], None]] = set()
        """Called by ``close``: librbd waits for ever for an image to close whose connection is gone, and a claim that
        nobody ends would be renewed for ever."""
        self.left = LeftImages()
        self._features: int | None = None
        self._protection: tuple[float, bool] | None = None
        self.protected: set[tuple[str, str]] = set()
        """Snapshots, and their images' ids, of which clones of format 1 can be made."""
        self._claims = threading.local()

    @property
    def connection(self) -> Connection:
        """The process's connection to the cluster.

        Raises:
            BackendError: the backend is closed; a connection that a thread of it made now would never be given back.
        """
        with self._lock:
            if self._closed:
                raise BackendError("the backend has been closed", todo="Make another one")
            if self._held is None:
                self._held = hold(self._address, self.options.connect_timeout)
            return self._held

    @property
    def longest(self) -> float:
        """Seconds after which a write that neither ends nor fails is given up. It makes several operations."""
        return 4 * self.options.connect_timeout

    @property
    def io(self) -> Ioctx:
        """The pool, open."""
        return self.connection.pool(self.options.pool)

    def room(self) -> contextlib.AbstractContextManager[None]:
        """Run a block; where writing hangs since the pool is full, that comes out as NoSpaceError."""
        return _rbd_room.told(self.connection, self.options.pool)

    @property
    def owner(self) -> Owner:
        """The process's sign of life in the pool."""
        connection, pool = self.connection, self.options.pool
        connection.pool(pool)
        owner: Owner = connection.shared(Owner, pool, lambda: Owner(connection, pool))
        return owner

    def close(self) -> None:
        """Give the connection back; what still hangs on to it is ended before."""
        with self._lock:
            held = self._held
        if held is not None and held.is_anothers:
            return
        for call in list(self.endings):
            call()
        self.left.close_ended()
        with self._lock:
            held, self._held, self._closed = self._held, None, True
        if held is not None:
            release(held)

    # --- names

    def location(self, name: str, snapshot: str | None = None, *, pool: str | None = None) -> RbdLocation:
        """Where an image is, as a hypervisor needs to know it."""
        return RbdLocation(
            pool=pool or self.options.pool,
            name=name,
            snapshot=snapshot,
            hosts=self.connection.monitors(),
            user=self.options.user,
            secret_uuid=self.options.secret_uuid,
        )

    # --- facts of the cluster

    def features(self) -> int:
        """Features of new images: the option's, or the cluster's default. Layering always: without it is no clone."""
        if self._features is None:
            bits = self.options.feature_bits
            if bits is None:
                told = self.connection.config("rbd_default_features")
                words = {word.strip() for word in told.split(",")}
                bits = int(told) if told.isdigit() else sum(FEATURES.get(word, 0) for word in words)
            self._features = bits | LAYERING
        return self._features

    def clones_need_protection(self) -> bool:
        """Whether clones made here are of format 1, whose parents must be protected."""
        asked = self.connection.config("rbd_default_clone_format")
        if asked in ("1", "2"):
            return asked == "1"
        # "auto" is format 2 once the cluster refuses clients that are older than it
        known = self._protection
        if known is None or time.monotonic() - known[0] > _ASK_AGAIN:
            answer = str(self.connection.command("osd get-require-min-compat-client"))
            known = self._protection = (time.monotonic(), answer < "mimic" or answer == "unknown")
        return known[1]

    # --- finding

    def id_of(self, name: str) -> str | None:
        """The id of the image of that name, None: there is none, or half of one."""
        rbd_id = _rbd_look.named(self.io, name)
        return rbd_id if rbd_id is not None and _rbd_look.has_header(self.io, rbd_id) else None

    def names(self) -> list[str]:
        """The images of the pool, trash left out. What is found by its name is listed, at every moment.

        Costs one operation more for each image that is being published.
        """
        # coming out of the trash, an image has its name first, is listed then, and leaves the trash last
        coming = self.coming()
        return sorted({*_rbd_look.names(self.io), *coming.values()})

    def coming(self) -> dict[str, str]:
        """What the trash still lists though its name leads to it already, since it is being published: ids and names.

        A death leaves it like that until ``recover``.
        """
        found = {}
        for entry in _rbd_look.trash(self.io):
            unfinished = is_unfinished(entry.name)
            if unfinished or entry.name.startswith(BASE):
                name = _rbd_look.metadata_of(self.io, entry.image_id, FINAL) if unfinished else entry.name
                if name is not None and _rbd_look.named(self.io, name) == entry.image_id:
                    found[entry.image_id] = name
        return found

    # --- changing

    @contextlib.contextmanager
    def staging(self, stem: str) -> Iterator[str]:
        """A staging name for the time of the block. What is there by that name afterwards is for ``recover``."""
        owner = self.owner
        name = owner.new_name(stem)
        try:
            yield name
        finally:
            owner.done(name)

    def publish(self, rbd_id: str, staging: str, final: str) -> None:
        """Give a finished image, closed, its final name.

        Raises:
            ExistsError: somebody was first; this one is in the trash, to be dropped.
        """
        _rados.trash_move(self.io, staging, DELAY)
        try:
            _rados.trash_restore(self.io, rbd_id, final)
        except BackendUnavailableError:
            # it may have taken effect all the same
            if self.id_of(final) != rbd_id:
                raise

    def take_away(self, rbd_id: str, name: str) -> None:
        """Move the image of that id and name to the trash; exactly one of several that try does.

        Raises:
            NotThereError: the name is gone, or another image's.
        """
        # trash_move alone tells all of them that it worked
        with self.claimed(rbd_id, "taking the name away"):
            if self.id_of(name) != rbd_id:
                raise NotThereError(f"{name} is gone, or another image")
            before = self._trashed(name)
            _rados.trash_move(self.io, name, DELAY)
            # a claim ends under who is slow: the name may have come to lead to another image
            moved = self._trashed(name)
            strangers = moved - before - {rbd_id}
            for other in strangers:
                self.give_back(other, name)
            if strangers or rbd_id not in moved:
                raise NotThereError(f"{name} is another image by now")

    def _trashed(self, name: str) -> set[str]:
        """The ids of what lies in the trash and had this name."""
        return {entry.image_id for entry in _rbd_look.trash(self.io) if entry.name == name}

    def give_back(self, rbd_id: str, name: str) -> None:
        """Give an image in the trash its last name back, unless it is gone or another image has the name."""
        with contextlib.suppress(ExistsError, NotThereError), self.claimed(rbd_id, "giving its name back"):
            self.restore(rbd_id, name)

    @contextlib.contextmanager
    def claimed(self, rbd_id: str, why: str) -> Iterator[None]:
        """Run a block of a few steps that nobody else runs for this image at the time; blocks in it are part of it."""
        held: set[str] = self._claims.__dict__.setdefault("held", set())
        if rbd_id in held:
            yield
            return
        cookie = secrets.token_hex(8)
        key = self.patiently(lambda: _rados_claims.claim_image(self.io, rbd_id, cookie, _CLAIM_SECONDS, why))
        held.add(rbd_id)
        try:
            yield
        finally:
            held.discard(rbd_id)
            _rados_claims.disclaim(self.io, key, cookie)

    def drop(self, rbd_id: str | None, staging: str, final: str | None) -> bool:
        """Remove an unfinished image, wherever it is; False: it had been published after all, and is whole.

        What opens under the final name is never removed: ids are compared first. Nor is what lies in the trash under
        another name than ``staging``: it was published, and whoever moved it there sees to it.
        """
        entry = None if rbd_id is None else _rbd_look.trash_entry(self.io, rbd_id)
        if entry is not None and entry.name != staging:
            return False
        if rbd_id is not None and final is not None and self.id_of(final) == rbd_id:
            if entry is not None:
                _rados.trash_restore(self.io, rbd_id, final)
            return False
        if rbd_id is not None and entry is not None:
            if self.id_of(staging) == rbd_id:  # a move that died half-way
                _rados.trash_move(self.io, staging, DELAY)
            self.strip(rbd_id)
            self._remove_trashed(rbd_id, staging)
            return True
        with contextlib.suppress(NotThereError):
            if rbd_id is not None:
                self.strip(rbd_id)
            _rados.remove(self.io, staging)
        return True

    def _remove_trashed(self, rbd_id: str, staging: str) -> None:
        try:
            self.empty(rbd_id, staging)
        except NotThereError:
            return
        except BusyError:
            # in the middle of being restored: Ceph wants that finished first
            _rados.trash_restore(self.io, rbd_id, staging)
            _rados.remove(self.io, staging)

    def empty(self, rbd_id: str, name: str) -> None:
        """Free what an image in the trash takes, also one whose move there died half-way."""
        try:
            _rados.trash_remove(self.io, rbd_id)
        except UnfinishedError:
            self._finish_move(rbd_id, name)
            _rados.trash_remove(self.io, rbd_id)

    def restore(self, rbd_id: str, name: str) -> None:
        """Give an image in the trash its last name back, also one whose move there died half-way."""
        try:
            _rados.trash_restore(self.io, rbd_id, name)
        except BusyError:
            self._finish_move(rbd_id, name)
            _rados.trash_restore(self.io, rbd_id, name)

    def _finish_move(self, rbd_id: str, name: str) -> None:
        if self.id_of(name) in (None, rbd_id):  # the name is not another image's by now
            _rados.trash_move(self.io, name, DELAY)

    def strip(self, rbd_id: str) -> None:
        """Take the image's snapshots and its checksums away; an image without a header has none.

        Raises:
            BusyError: a clone of format 1 depends on a snapshot.
        """
        with contextlib.suppress(NotThereError), _rados.changing(self.io, image_id=rbd_id) as image:
            for snapshot in _rbd_look.snapshots(image):
                if _rbd_look.is_protected(image, snapshot):
                    _rados.unprotect(image, snapshot)
                _rados.remove_snapshot(image, snapshot)
        # before the image itself: so nothing is left that has no image any more
        _rados.remove_object(self.io, SUMS + rbd_id)

    def patiently(self, call: Callable[[], _T]) -> _T:
        """What the call answers; while somebody is in its way it is made again, for ``patience`` seconds."""
        end = time.monotonic() + self.patience
        pause = 0.05
        while True:
            try:
                return call()
            except BusyError:
                if time.monotonic() + pause > end:
                    raise
            time.sleep(pause)
            pause = min(pause * 2, 2.0)

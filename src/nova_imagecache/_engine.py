"""The engine behind ImageCache: one cache's parts, the hit rule and the way in on a miss."""

from __future__ import annotations

import logging
import os
import queue
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nova_imagecache import _admission, _args, _entries, _turns, _users, _verify
from nova_imagecache._fetch import Fetcher
from nova_imagecache._flight import Flights, Leader
from nova_imagecache._guard import GuardedBackend
from nova_imagecache._guard_source import GuardedSource
from nova_imagecache._inspect import INSPECTOR_VERSION, inspect_file
from nova_imagecache._keeper import Keeper
from nova_imagecache._layout import Root
from nova_imagecache._locks import Locks
from nova_imagecache._mending import Mender
from nova_imagecache._models import BlockLocation, Event, FileLocation
from nova_imagecache._passes import Passes
from nova_imagecache._removal import Remover
from nova_imagecache._space import SpacePolicy
from nova_imagecache._watch import Watch, call_safely
from nova_imagecache.backends import BackendPaths
from nova_imagecache.exceptions import BackendError, ImageRejectedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from nova_imagecache._config import CacheConfig
    from nova_imagecache._models import BaseImage, Digest, Progress
    from nova_imagecache._users import UserFinder
    from nova_imagecache.backends import Backend
    from nova_imagecache.sources import ImageSource

ATTEMPTS = 3
"""How often a base may vanish between finding it and using it before the caller hears of it."""

_CHANGE_USAGE = frozenset({"published", "removed", "evicted", "damaged", "recovered", "repaired"})

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What one call that may bring an image in was told; ImageCache says what each means.

    Raises:
        InvalidRequestError: ``expect``, ``deadline``, ``cancel`` or ``progress`` cannot be used.
    """

    source: ImageSource | None
    expect: Digest | None
    deadline: float | None
    cancel: threading.Event | None
    progress: Callable[[Progress], None] | None

    def __post_init__(self) -> None:
        _args.expect(self.expect)
        _args.deadline(self.deadline)
        _args.cancel(self.cancel)
        _args.progress(self.progress)

    def watch(self, image_id: str) -> Watch:
        """The call's deadline, cancel and progress, from now on."""
        return Watch(image_id, deadline=self.deadline, cancel=self.cancel, progress=self.progress)


class Engine:
    """One cache's parts, put together without any I/O."""

    def __init__(
        self,
        config: CacheConfig,
        source: ImageSource,
        backend: Backend,
        *,
        finders: Sequence[UserFinder],
        clock: Callable[[], float],
        on_event: Callable[[Event], None] | None,
    ) -> None:
        self.config = config
        self.source = GuardedSource(source)
        self.backend = GuardedBackend(config.backend, backend)
        self.finders = (*_args.several(finders, "user_finders"), *_users.configured(config))
        self.clock = clock
        self.paths = paths(config)
        self.root = Root(config.root, backend.properties.storage, group=config.group)
        self.locks = Locks(self.root.locks, config.lock_timeout.total_seconds())
        self.remover = Remover(
            backend=self.backend, finders=self.finders, root=self.root, locks=self.locks, clock=clock
        )
        self.passes = Passes(self.remover)
        self.keeper = Keeper(
            backend=self.backend,
            root=self.root,
            locks=self.locks,
            passes=self.passes,
            policy=SpacePolicy(max_bytes=config.max_bytes, min_free_bytes=config.min_free_bytes),
            may_evict=config.remove_unused,
        )
        self.mender = Mender(
            backend=self.backend,
            finders=self.finders,
            root=self.root,
            remover=self.remover,
            keeper=self.keeper,
            emit=self.emit,
            tell_evicted=self._tell_evicted,
        )
        self._on_event = on_event
        self._start()

    def _start(self) -> None:
        """What belongs to this process alone: a forked child has none of the threads that would end these."""
        self._flights = Flights(self.locks)
        self._fetcher = Fetcher(
            config=self.config,
            backend=self.backend,
            finders=self.finders,
            root=self.root,
            keeper=self.keeper,
            clock=self.clock,
            slots=threading.BoundedSemaphore(self.config.max_concurrent_fetches),
        )
        self._pid = os.getpid()  # last: another thread of the child goes on when it sees it

    def ensure(self, image_id: str, call: Call, watch: Watch, *, disk_size: int | None = None) -> BaseImage:
        """The base: a hit, or what this or another thread or process brings in."""
        self.root.prepare()
        if os.getpid() != self._pid:
            self._start()
        source = self.source if call.source is None else GuardedSource(call.source)
        fetched, failed = threading.Event(), threading.Event()
        found: BaseImage | None = None

        def find() -> BaseImage | None:
            nonlocal found
            found = self._hit(image_id, call.expect)
            return found

        def accepts(base: BaseImage) -> bool:
            return call.expect in (None, base.digest)

        def fetch(leader: Leader) -> BaseImage:
            try:
                base = self._fetcher.fetch(
                    image_id,
                    source=source,
                    expect=call.expect,
                    disk_size=disk_size,
                    find=find,
                    watch=watch,
                    leader=leader,
                )
            except BaseException:
                failed.set()
                raise
            fetched.set()
            return base

        for _attempt in range(ATTEMPTS):
            base = find()
            if base is None:
                watch.check("wait")
                request = (id(source.inner), call.expect)
                try:
                    with _turns.given_up():
                        base = self._flights.join(
                            image_id, request, find=find, accepts=accepts, fetch=fetch, watch=watch
                        )
                finally:
                    self._tell_evicted()
                    if failed.is_set():  # what it had written is gone again, and what made room for it stays gone
                        self._tell_usage(image_id)
            if accepts(base):
                self._tell_use(base, new=fetched.is_set() and base is not found)  # another host's is found
                return base
        todo = "Find out who re-uses the image id, or removes what is just used"
        raise BackendError("others keep replacing or removing the base", image_id=image_id, stage="publish", todo=todo)

    def _hit(self, image_id: str, expect: Digest | None) -> BaseImage | None:
        """The base that a caller gets, its use noted; None: there is none, or it was removed before that."""
        base = self._find(image_id, expect)
        if base is None:
            return None
        self._touch(base)
        return base if _is_there(base) else None

    def _tell_use(self, base: BaseImage, *, new: bool) -> None:
        if new:
            self.emit("published", base.image_id, size=base.record.size, made_by=base.record.made_by)
        else:
            self.emit("used", base.image_id)

    def _tell_evicted(self) -> None:
        with suppress(queue.Empty):
            while True:
                self.emit("evicted", self.keeper.evicted.get_nowait())

    def _find(self, image_id: str, expect: Digest | None) -> BaseImage | None:
        """The hit rule: the base is there, holds the expected bytes, and today's inspector has nothing against it."""
        base = self.backend.find_base(image_id)
        if base is None or (expect is not None and base.digest != expect):
            return None
        if not base.managed:  # nothing keeps the image service's own from being found, however large it is
            limits = _admission.Limits(disk_size=None, max_virtual_size=self.config.max_virtual_size)
            _admission.judge_size(base.virtual_size, image_id, limits)
        if base.format != "raw" and base.inspected < INSPECTOR_VERSION:
            self._inspect_again(base)
        return base

    def _inspect_again(self, base: BaseImage) -> None:
        if not isinstance(base.location, FileLocation):
            return
        file = _verify.file_of(base)
        try:
            inspect_file(base.location.path, base.format, image_id=base.image_id)
        except ImageRejectedError:
            self.mender.quarantine(base, file)
            raise
        except FileNotFoundError:  # removed while we looked; whoever uses it finds out
            return
        self.backend.mark_inspected(base, INSPECTOR_VERSION)

    def _touch(self, base: BaseImage) -> None:
        try:
            self.backend.touch_base(base)
        except BackendError as err:  # a lost touch is harmless, a lost hit is not
            _log.warning("base %s: its use could not be noted: %s", base.image_id, err)

    @contextmanager
    def disk_lock(self, disk_id: str, name: str, watch: Watch | None = None) -> Iterator[None]:
        """Keep others from the same root disk while the block runs."""
        self.root.prepare()
        check = None if watch is None else watch.check
        with self.locks.disk(disk_id, name, check), self.patience(watch):
            yield

    def patience(self, watch: Watch | None) -> AbstractContextManager[None]:
        """In the block, a backend that waits for another disk of the same instance does so as this call wants to."""
        return _entries.patience(self.locks.timeout, None if watch is None else watch.check)

    def emit(
        self,
        kind: str,
        image_id: str | None,
        disk_id: str | None = None,
        name: str | None = None,
        **details: str | float,
    ) -> None:
        """Tell the driver of a change. Called outside locks."""
        if self._on_event is None:
            return
        self._send(kind, image_id, disk_id, name, details)
        if kind in _CHANGE_USAGE:
            self._tell_usage(image_id)

    def _tell_usage(self, image_id: str | None) -> None:
        """What a driver reports to a scheduler is no longer true."""
        self._send("usage-changed", image_id, None, None, {})

    def _send(
        self, kind: str, image_id: str | None, disk_id: str | None, name: str | None, details: dict[str, str | float]
    ) -> None:
        if self._on_event is not None:
            event = Event(
                kind=kind, time=self.clock(), image_id=image_id, disk_id=disk_id, name=name, details=dict(details)
            )
            with _turns.given_up():
                call_safely(self._on_event, event)


def _is_there(base: BaseImage) -> bool:
    """Whether a base that was just touched still has its name; one stat.

    Whoever removes it takes the name away and then looks whether it was used meanwhile: one of us sees the other. On
    storage that is no file, whoever makes a disk finds out.
    """
    if not isinstance(base.location, FileLocation | BlockLocation):
        return True
    return os.path.lexists(base.location.path)


def paths(config: CacheConfig) -> BackendPaths:
    """Where a backend of this configuration keeps files."""
    disks_dir = config.disks_dir or config.root / "disks"
    return BackendPaths(root=config.root, disks_dir=disks_dir, group=config.group, qemu_user=config.qemu_user)

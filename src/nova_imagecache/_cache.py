"""ImageCache: what a virt driver calls. The only orchestrator: every way through the rooms starts here."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Self

from nova_imagecache import _accounting, _args, _plugins, _users
from nova_imagecache._engine import Call, Engine, paths
from nova_imagecache._guard import translated
from nova_imagecache._models import EnsureResult, Pin
from nova_imagecache._root_disks import RootDisks
from nova_imagecache.exceptions import (
    BackendError,
    BaseCorruptError,
    ConfigError,
    ImageCacheError,
    InvalidRequestError,
)

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from datetime import datetime, timedelta
    from pathlib import Path
    from types import TracebackType

    from nova_imagecache._config import CacheConfig
    from nova_imagecache._models import (
        BaseImage,
        CacheUsage,
        CheckReport,
        CleanupPlan,
        CleanupReport,
        Digest,
        DiskUsage,
        DiskUser,
        Event,
        Progress,
        RecoveryReport,
        RootDisk,
    )
    from nova_imagecache.backends import Backend
    from nova_imagecache.sources import ImageSource


class ImageCache:
    """The image cache of one host, over one root.

    Thread-safe; one per process is enough. Construction does no I/O; the root is made and checked on first use: its
    owner changes it, and the superuser may only look at another user's (``ConfigError``). Calls that bring an image in
    take ``source`` (another source for this call: the user's token), ``expect`` (a Digest the image must have, also on
    a hit), ``deadline`` (seconds from now), ``cancel`` (a threading.Event) and ``progress`` (called with a Progress ten
    times a second, from a thread of its own).

    ``user_finders`` are asked for users of bases, and with them those that ``config`` names (``libvirt_uri``,
    ``disk_dirs``): none of either makes another needless.

    ``on_event`` is called with an Event after every change, outside locks. What callbacks raise is logged and dropped.

    Raises:
        ConfigError: ``config`` names libvirt, and its Python module cannot be imported.
        InvalidRequestError: ``user_finders`` is no list.
    """

    def __init__(
        self,
        config: CacheConfig,
        *,
        source: ImageSource,
        backend: Backend,
        user_finders: Sequence[_users.UserFinder] = (),
        clock: Callable[[], float] = time.time,
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        self._engine = Engine(config, source, backend, finders=user_finders, clock=clock, on_event=on_event)
        self._disks = RootDisks(self._engine)

    @classmethod
    def from_config(
        cls,
        config: CacheConfig,
        *,
        user_finders: Sequence[_users.UserFinder] = (),
        on_event: Callable[[Event], None] | None = None,
    ) -> Self:
        """A cache whose backend and source are loaded by the names in ``config``.

        Raises:
            BackendNotFoundError: no plug-in of that name; lists those that are there.
            ConfigError: plug-ins refuse their options, or libvirt's Python module cannot be imported and is needed;
                ``problems`` lists all that is wrong.
            BackendError, SourceError: a plug-in cannot be loaded.
            InvalidRequestError: ``user_finders`` is no list.
        """
        problems: list[str] = []
        backend = _plugins.unless_refused(
            "backend_options",
            config.backend_options,
            lambda: _plugins.load_backend(config.backend, config.backend_options, paths(config)),
            problems,
        )
        source = _plugins.unless_refused(
            "source_options",
            config.source_options,
            lambda: _plugins.load_source(config.source, config.source_options),
            problems,
        )
        finders = _plugins.unless_refused("libvirt_uri", {}, lambda: _users.configured(config), problems)
        if backend is None or source is None or finders is None:
            raise ConfigError(problems)
        return cls(config, source=source, backend=backend, user_finders=user_finders, on_event=on_event)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<ImageCache {self._engine.config.backend} at {self._engine.config.root}>"

    def close(self) -> None:
        """Give connections back. The cache is not used afterwards."""
        self._engine.backend.close()

    # --- bases come in

    def ensure_base(
        self,
        image_id: str,
        *,
        source: ImageSource | None = None,
        expect: Digest | None = None,
        deadline: float | None = None,
        cancel: threading.Event | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> BaseImage:
        """The base of an image: found, waited for, adopted, or fetched, verified and published.

        A hit costs a few stats: no lock, no child process, no network, and asks nobody for permission. Of all who miss
        at once, on this host, one fetches.

        Raises:
            InvalidRequestError: the id, ``expect`` or ``deadline`` cannot be used.
            ImageNotFoundError, ImageNotActiveError, ImageRejectedError, ImageCorruptError, SourceForbiddenError,
            SourceUnavailableError: the image cannot be had, or is refused. Nothing is left behind.
            NoSpaceError, BackendError, LockTimeoutError, DeadlineError, CancelledError.
        """
        _args.image_id(image_id)
        call = Call(source=source, expect=expect, deadline=deadline, cancel=cancel, progress=progress)
        with call.watch(image_id) as watch:
            return self._engine.ensure(image_id, call, watch)

    def ensure_bases(
        self,
        image_ids: Iterable[str],
        *,
        source: ImageSource | None = None,
        deadline: float | None = None,
        cancel: threading.Event | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> list[EnsureResult]:
        """The outcome for every image, in the order given; one failure stops no other.

        ``max_concurrent_fetches`` are brought in at once. ``deadline`` is that of the whole call: what would have to be
        brought in afterwards fails with it. ``progress`` tells images apart by their id.

        Raises:
            InvalidRequestError: ``image_ids`` is a single text or no iterable at all, or ``deadline``, ``cancel`` or
                ``progress`` cannot be used.
        """
        # judged here once for all
        Call(source=source, expect=None, deadline=deadline, cancel=cancel, progress=progress)
        wanted = _args.several(image_ids, "image_ids")
        start = time.monotonic()

        def one(image_id: str) -> EnsureResult:
            left = None if deadline is None else max(deadline - (time.monotonic() - start), 0.0)
            try:
                base = self.ensure_base(image_id, source=source, deadline=left, cancel=cancel, progress=progress)
            except ImageCacheError as err:
                return EnsureResult(image_id=image_id, error=err)
            return EnsureResult(image_id=image_id, base=base)

        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(self._engine.config.max_concurrent_fetches, "ensure") as pool:
            return list(pool.map(one, wanted))

    # --- root disks

    def create_root_disk(
        self,
        image_id: str,
        disk_id: str,
        *,
        name: str = "disk",
        size: int | None = None,
        source: ImageSource | None = None,
        expect: Digest | None = None,
        deadline: float | None = None,
        cancel: threading.Event | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> RootDisk:
        """The writable root disk of an instance, made from the image's base, which is brought in if it is not there.

        ``size`` is bytes, rounded up to 512; None: the image's virtual size. A disk that exists, of the same image id
        and size, is returned untouched, whatever ``expect`` says; one that names its base by path is tied to it anew
        where that is not as it was. The image's ``min_disk`` is asked for on a miss alone: a base does not keep it, and
        a hit asks nobody. A caller for whom it is a rule compares it itself, as Nova's API does.

        Raises:
            DiskExistsError: a disk of that id and name exists, of another image or size; or the base that it names by
                path has other bytes now.
            DiskTooSmallError: the image does not fit ``size``; nothing was made.
            whatever ``ensure_base`` raises.
        """
        call = Call(source=source, expect=expect, deadline=deadline, cancel=cancel, progress=progress)
        return self._disks.create(image_id, disk_id, name, size, call)

    def get_root_disk(self, disk_id: str, *, name: str = "disk") -> RootDisk:
        """The root disk as it is now.

        Raises:
            DiskNotFoundError: there is none.
        """
        return self._disks.get(disk_id, name)

    def root_disks(self) -> Iterator[RootDisk]:
        """Every root disk that this cache made and can still see, in any order."""
        self._engine.root.look()
        yield from self._engine.backend.iter_root_disks()

    def remove_root_disk(self, disk_id: str, *, name: str = "disk") -> None:
        """Remove the disk and what ties it to its base. A disk that is not there is no error.

        Raises:
            DiskInUseError: the storage refuses while somebody has it open.
        """
        self._disks.remove(disk_id, name)

    def resize_root_disk(self, disk_id: str, *, name: str = "disk", size: int) -> RootDisk:
        """The disk, grown to ``size`` bytes (rounded up to 512). File systems inside it are the guest's.

        Raises:
            DiskTooSmallError: ``size`` is below the disk's size; disks never shrink.
            DiskNotFoundError, DiskInUseError, NoSpaceError.
        """
        return self._disks.resize(disk_id, name, size)

    def flatten_root_disk(self, disk_id: str, *, name: str = "disk") -> RootDisk:
        """The disk, standing alone: it no longer needs its base. One that stands alone already is returned as it is.

        Raises:
            DiskNotFoundError, DiskInUseError, NoSpaceError.
        """
        return self._disks.flatten(disk_id, name)

    def attach_root_disk(
        self,
        image_id: str,
        disk_id: str,
        *,
        name: str = "disk",
        source: ImageSource | None = None,
        expect: Digest | None = None,
        deadline: float | None = None,
        cancel: threading.Event | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> RootDisk:
        """A disk that arrived from elsewhere with its record ``<name>.json``, tied to its base again.

        The base is brought in if it is not there, and its digest compared with the record's.

        Raises:
            DiskNotFoundError: there is no disk, or no record.
            DiskExistsError: the disk was made of other bytes.
            DiskInUseError: somebody has it open, or it has snapshots, where it has to be made anew for that.
            whatever ``ensure_base`` raises.
        """
        call = Call(source=source, expect=expect, deadline=deadline, cancel=cancel, progress=progress)
        return self._disks.attach(image_id, disk_id, name, call)

    def copy_base(
        self,
        image_id: str,
        path: str | Path,
        *,
        source: ImageSource | None = None,
        expect: Digest | None = None,
        deadline: float | None = None,
        cancel: threading.Event | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> Path:
        """A plain file of its own at absolute ``path`` with the base's bytes: kernels, ramdisks. Durable and whole.

        Raises:
            DiskExistsError: there is a file of that name; it is untouched.
            whatever ``ensure_base`` raises.
        """
        call = Call(source=source, expect=expect, deadline=deadline, cancel=cancel, progress=progress)
        return self._disks.copy_base(image_id, path, call)

    # --- looking at bases

    def bases(self) -> Iterator[BaseImage]:
        """Every base, in any order."""
        self._engine.root.look()
        yield from self._engine.backend.iter_bases()

    def get_base(self, image_id: str) -> BaseImage:
        """The base, if it is there; nothing is fetched and its use is not noted.

        Raises:
            BaseNotFoundError: it is not there, or what stands in its place cannot be read.
        """
        base = self._find(image_id)
        if base is None:
            raise self._engine.mender.missing(image_id)
        return base

    def _find(self, image_id: str) -> BaseImage | None:
        _args.image_id(image_id)
        self._engine.root.look()
        return self._engine.backend.find_base(image_id)

    def users(self, image_id: str) -> list[DiskUser]:
        """The root disks that depend on the base, and how each is known. Reads the records of all root disks.

        Raises:
            BaseNotFoundError: the base is not there.
            UsersUnknownError: somebody who would know cannot be asked.
        """
        base = self.get_base(image_id)
        users = _users.users_of(self._engine.backend, self._engine.finders, base)
        disks = (disk for disk in self._engine.backend.iter_root_disks() if disk.image_id == image_id)
        return _users.with_names(users, disks, base)

    def pins(self, image_id: str) -> tuple[Pin, ...]:
        """The pins that hold the base now."""
        _args.image_id(image_id)
        self._engine.root.look()
        return self._engine.root.pins(image_id, self._engine.clock())

    def base_usage(self, image_id: str) -> DiskUsage:
        """The base's virtual and allocated bytes.

        Raises:
            BaseNotFoundError: it is not there.
        """
        return self._engine.backend.usage(self.get_base(image_id))

    def verify_base(self, image_id: str, *, cancel: threading.Event | None = None) -> BaseImage:
        """The base, if every byte of it is still what was published. Reads all of it; once more, while nobody else may
        take it away or replace it, where something is wrong.

        A damaged base goes to quarantine, so that the next ``ensure_base`` fetches a new one; disks that are linked to
        it keep it. One that disks read by its own name, or may, stays: they would not open without it.

        Raises:
            BaseNotFoundError: it is not there.
            BaseCorruptError: says what is wrong; also that what stands in its place cannot be read, and stays.
            BackendError: the backend keeps no checksums, and its bytes are not the source's: nothing proves them.
        """
        _args.cancel(cancel)
        base = self._find(image_id)
        if base is None:
            raise self._engine.mender.missing(image_id, BaseCorruptError)
        return self._engine.mender.verify(base, cancel)

    def repair_base(self, image_id: str, *, cancel: threading.Event | None = None) -> bool:
        """Make a base that a hypervisor took over this user's again, so that disks can link it; whether it was needed.

        The copy is verified before it takes the base's place. Disks linked to the old bytes keep them, also those of
        running guests. Needs room for a copy, where the filesystem cannot share blocks.

        Raises:
            BaseNotFoundError: it is not there.
            BaseCorruptError: its bytes are not what was published; it is untouched.
        """
        _args.image_id(image_id)
        _args.cancel(cancel)
        return self._engine.mender.repair(image_id, cancel)

    # --- bases go

    def remove_base(self, image_id: str) -> None:
        """Remove the base now, whatever its idle time; or what stands in its place and cannot be read.

        Raises:
            BaseNotFoundError, BaseInUseError, BasePinnedError, UsersUnknownError: it is not there, or stays.
        """
        _args.image_id(image_id)
        self._engine.root.prepare()
        base = self._engine.mender.removable(image_id)
        with self._engine.remover.wait_lock(image_id):
            retired = self._engine.remover.retire(base)
        self._engine.backend.purge_base(retired)
        self._engine.emit("removed", image_id)

    def pin(self, image_id: str, owner: str, *, until: datetime | float | None = None) -> None:
        """Keep the base of an image, also one that is not there yet, until ``until`` (None: until it is unpinned).

        ``until`` is an aware datetime or POSIX seconds. A second pin of the same owner takes the first one's place.

        Raises:
            InvalidRequestError: ``until`` is over; a pin that the owner has stays as it is.
        """
        pin = Pin(image_id=_args.image_id(image_id), owner=_args.owner(owner), until=_args.moment(until))
        if pin.until is not None and pin.until <= self._engine.clock():
            todo = "Give a time that is to come, or unpin"
            raise InvalidRequestError("the pin would be over already", image_id=image_id, stage="arguments", todo=todo)
        self._engine.root.prepare()
        with translated(lambda text: BackendError(f"the pin cannot be written: {text}", image_id=image_id)):
            self._engine.root.pin(pin)

    def unpin(self, image_id: str, owner: str) -> None:
        """Take an owner's pin away. One that is not there is no error."""
        _args.image_id(image_id)
        _args.owner(owner)
        self._engine.root.prepare()
        with translated(lambda text: BackendError(f"the pin cannot be removed: {text}", image_id=image_id)):
            self._engine.root.unpin(image_id, owner)

    def plan_cleanup(self, *, max_idle: timedelta | float | None = None, in_use: Iterable[str] = ()) -> CleanupPlan:
        """What ``cleanup`` would do now, and why, for every base; changes nothing.

        ``max_idle`` is a timedelta or seconds (None: the configuration's); ``in_use`` are image ids to keep.

        Raises:
            InvalidRequestError: ``in_use`` is a single text or no iterable at all, or holds what is no image id.
        """
        kept = frozenset(_args.image_id(one) for one in _args.several(in_use, "in_use"))
        self._engine.root.look()
        seconds = _args.seconds(self._engine.config.max_idle if max_idle is None else max_idle)
        return self._engine.passes.plan(max_idle=seconds, in_use=kept)

    def cleanup(self, plan: CleanupPlan | None = None) -> CleanupReport:
        """Carry out a plan (None: one made now). Every base is looked at again before it goes.

        A base that is busy, or got a user or pin meanwhile, stays; one that cannot be removed stops no other. What
        dead processes left is swept as by ``recover``. With ``remove_unused`` off nothing is changed.
        """
        _args.plan(plan)
        self._engine.root.prepare()
        plan = self.plan_cleanup() if plan is None else plan
        observe = not self._engine.config.remove_unused
        report = self._engine.passes.carry_out(plan, observe=observe)
        for image_id in report.removed:
            self._engine.emit("removed", image_id)
        if observe:
            return report
        try:
            swept = self.recover()
        except ImageCacheError as err:  # what went is told all the same
            return replace(report, failed={**report.failed, "left-overs": str(err)})
        return replace(report, swept=(*swept.removed, *swept.restored), failed={**report.failed, **swept.failed})

    # --- figures, checks, recovery

    def usage(self) -> CacheUsage:
        """What the cache takes, in allocated bytes. A few stats a base."""
        self._engine.root.look()
        return _accounting.usage(self._engine.backend, self._engine.remover, self._engine.paths)

    def reserved_disk_mb(self, static_mb: int) -> int:
        """MiB to report to the scheduler as reserved: ``static_mb`` plus the cache's, rounded up.

        The cache's part is 0 where it is on a filesystem of its own, or not on this host.

        Raises:
            BackendError: the cache could not be counted whole; the last figure is better than a wrong one.
        """
        _args.static_mb(static_mb)
        self._engine.root.look()
        return _accounting.reserved_disk_mb(self._engine.backend, self._engine.paths, self._engine.root, static_mb)

    def check(self) -> CheckReport:
        """Facts and problems of the cache's surroundings. Makes and removes a few small files.

        Every finder is asked once, about all bases; one that cannot tell is a problem, since no base goes meanwhile.
        """
        self._engine.root.look()
        engine = self._engine
        return _accounting.check(engine.backend, engine.source, engine.config, engine.finders)

    def recover(self) -> RecoveryReport:
        """Sweep what dead processes left behind. What a live one works on stays. Safe at any time."""
        self._engine.root.prepare()
        report = _accounting.recover(self._engine.backend, self._engine.root, self._engine.clock())
        if report.removed or report.restored:
            self._engine.emit("recovered", None, removed=len(report.removed), restored=len(report.restored))
        return report

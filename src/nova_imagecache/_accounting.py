"""Figures and facts about the whole cache: usage, what to reserve, checks, recovery."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from typing import TYPE_CHECKING

from nova_imagecache import _entries, _users
from nova_imagecache._models import CacheUsage, CheckReport, Fact, RecoveryReport
from nova_imagecache.backends import Survey
from nova_imagecache.exceptions import BackendError, BaseNotFoundError, ImageCacheError, UsersUnknownError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from nova_imagecache._config import CacheConfig
    from nova_imagecache._guard import GuardedBackend
    from nova_imagecache._guard_source import GuardedSource
    from nova_imagecache._layout import Root
    from nova_imagecache._removal import Remover
    from nova_imagecache.backends import BackendPaths

_MIB = 1 << 20
_log = logging.getLogger(__name__)


def usage(backend: GuardedBackend, remover: Remover, paths: BackendPaths) -> CacheUsage:
    """What the cache takes now, and what of it could go. The finders are asked at most once; doubt frees nothing."""
    figures, counted = _counted(backend, paths, remover.root)
    return replace(figures, reclaimable=_reclaimable(counted, remover))


def reserved_disk_mb(backend: GuardedBackend, paths: BackendPaths, root: Root, static_mb: int) -> int:
    """MiB to reserve: ``static_mb`` and the cache's part.

    Raises:
        BackendError: the figures are not complete.
    """
    if not backend.properties.local or _own_filesystem(paths):
        return static_mb
    figures, _counts = _counted(backend, paths, root)
    if not figures.complete:
        todo = "Report the last complete figure, and look at the log for what could not be counted"
        raise BackendError("the cache could not be counted whole", stage="usage", todo=todo)
    return static_mb + -(-figures.allocated // _MIB)


def _counted(backend: GuardedBackend, paths: BackendPaths, root: Root) -> tuple[CacheUsage, list[tuple[Survey, int]]]:
    """The figures, nothing reclaimable, and each base with its bytes.

    Things move from staging to bases to trash, and are counted in that order: one that moves meanwhile is counted twice
    rather than missed. One may also come back from the trash: so where bases came or went meanwhile, they are listed
    again.
    """
    changed = root.bases_changed()
    before = backend.capacity()
    counted, complete = _count(backend, backend.survey())
    after = backend.capacity()
    if changed is None or changed != root.bases_changed():
        known = {survey.base.image_id for survey, _allocated in counted}
        back = (Survey(base=base) for base in backend.iter_bases() if base.image_id not in known)
        more, whole = _count(backend, back)
        counted, complete = [*counted, *more], complete and whole
    figures = CacheUsage(
        base_count=len(counted),
        bases=sum(allocated for _survey, allocated in counted),
        staging=before.staging,
        trash=after.trash,
        reclaimable=0,
        overhead=after.overhead + sum(after.left_alone.values()),
        total=after.total,
        free=after.free,
        own_filesystem=_own_filesystem(paths),
        local=backend.properties.local,
        complete=before.complete and complete and after.complete,
    )
    return figures, counted


def _count(backend: GuardedBackend, surveys: Iterable[Survey]) -> tuple[list[tuple[Survey, int]], bool]:
    """Each base that is the cache's own with its bytes; whether all of them could be counted."""
    complete = True
    counted = []
    for survey in surveys:
        base, allocated = survey.base, survey.allocated
        if not base.managed:
            continue
        try:
            counted.append((survey, backend.usage(base).allocated if allocated is None else allocated))
        except BaseNotFoundError:  # retired meanwhile: the trash is counted after the bases
            continue
        except ImageCacheError as err:
            _log.warning("base %s cannot be counted: %s", base.image_id, err)
            complete = False
    return counted, complete


def _reclaimable(counted: Sequence[tuple[Survey, int]], remover: Remover) -> int:
    """The bytes of the bases that have neither users nor pins, as far as anybody can tell."""
    pinned = remover.root.pinned()
    now = remover.clock()
    alone = [
        (survey.base, allocated)
        for survey, allocated in counted
        if not remover.has_users(survey)
        and not ((pinned is None or survey.base.image_id in pinned) and remover.root.pins(survey.base.image_id, now))
    ]
    try:
        # only of those: a finder looks at every disk, and nearly always nearly every base has a user that storage knows
        found = _users.from_finders(remover.finders, [base for base, _allocated in alone])
    except UsersUnknownError as err:
        _log.warning("no base counts as reclaimable: %s", err)
        return 0
    return sum(allocated for base, allocated in alone if base.image_id not in found)


def check(
    backend: GuardedBackend, source: GuardedSource, config: CacheConfig, finders: Sequence[_users.UserFinder]
) -> CheckReport:
    """Facts and problems: the core's, the backend's, and who is asked for users."""
    facts = [
        Fact(name="root", value=str(config.root)),
        Fact(name="backend", value=backend.name),
        Fact(name="source", value=source.name),
    ]
    if config.nova_base_dir is not None:
        there = config.nova_base_dir.is_dir()
        problem = None if there else "the directory is not there; correct nova_base_dir"
        facts.append(Fact(name="nova_base_dir", value=str(config.nova_base_dir), problem=problem))
    return CheckReport(facts=(*facts, *backend.check(), *_finders(backend, finders)))


def _finders(backend: GuardedBackend, finders: Sequence[_users.UserFinder]) -> Iterator[Fact]:
    """Whether each finder can tell now, also where there are no bases yet."""
    if not finders:
        yield Fact(name="finders", value="none: users are known by the storage alone")
        return
    try:
        bases = list(backend.iter_bases())
    except ImageCacheError:  # the backend's own facts say so
        bases = []
    for finder in finders:
        problem = None
        try:
            _users.ask(finder, bases, {})
        except ImageCacheError as err:
            problem = f"every base is kept: {err}"
        yield Fact(name=f"users by {finder.name}", value=str(finder), problem=problem)


def recover(backend: GuardedBackend, root: Root, now: float) -> RecoveryReport:
    """Sweep the core's scratch and the pins that are over, and let the backend sweep its own."""
    report = backend.recover()
    stuck: dict[str, str] = {}
    removed, alive = _entries.sweep(root.staging, stuck)
    ended, unmoved = root.sweep_pins(now)
    return RecoveryReport(
        removed=(*report.removed, *(f"staging/{name}" for name in removed), *(f"pins/{name}" for name in ended)),
        restored=report.restored,
        alive=tuple(dict.fromkeys([*report.alive, *(f"staging/{name}" for name in alive)])),
        failed={
            **report.failed,
            **{f"staging/{name}": reason for name, reason in stuck.items()},
            **{f"pins/{name}": reason for name, reason in unmoved.items()},
        },
    )


def _own_filesystem(paths: BackendPaths) -> bool:
    disks = paths.disks_dir
    while not disks.exists() and disks != disks.parent:
        disks = disks.parent
    return _device(paths.root) != _device(disks)


def _device(path: Path) -> int:
    return os.stat(path).st_dev  # noqa: PTH116 - one call

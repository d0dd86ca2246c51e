"""Figures and facts about the whole cache: usage, what to reserve, checks, recovery."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from nova_imagecache import _entries
from nova_imagecache._models import CacheUsage, CheckReport, Fact, RecoveryReport
from nova_imagecache.exceptions import BackendError, BaseNotFoundError, ImageCacheError

if TYPE_CHECKING:
    from pathlib import Path

    from nova_imagecache._config import CacheConfig
    from nova_imagecache._guard import GuardedBackend, GuardedSource
    from nova_imagecache._layout import Root
    from nova_imagecache._removal import Remover
    from nova_imagecache.backends import BackendPaths

_MIB = 1 << 20
_log = logging.getLogger(__name__)


def usage(backend: GuardedBackend, remover: Remover, paths: BackendPaths) -> CacheUsage:
    """What the cache takes now. Things move from staging to bases to trash, and are counted in that order, so that one
    that moves meanwhile is counted twice rather than missed."""
    before = backend.capacity()
    count = bases = reclaimable = 0
    complete = before.complete
    for base in backend.iter_bases():
        if not base.managed:
            continue
        try:
            allocated = backend.usage(base).allocated
            free_to_go = not (remover.has_users(base) or remover.root.pins(base.image_id, remover.clock()))
        except BaseNotFoundError:  # retired meanwhile: the trash is counted after the bases
            continue
        except ImageCacheError as err:
            _log.warning("base %s cannot be counted: %s", base.image_id, err)
            complete = False
            continue
        count += 1
        bases += allocated
        reclaimable += allocated if free_to_go else 0
    after = backend.capacity()
    return CacheUsage(
        base_count=count,
        bases=bases,
        staging=before.staging,
        trash=after.trash,
        reclaimable=reclaimable,
        overhead=after.overhead,
        total=after.total,
        free=after.free,
        own_filesystem=_own_filesystem(paths),
        local=backend.properties.local,
        complete=complete and after.complete,
    )


def reserved_disk_mb(figures: CacheUsage, static_mb: int) -> int:
    """MiB to reserve: ``static_mb`` and the cache's part.

    Raises:
        BackendError: the figures are not complete.
    """
    if figures.own_filesystem or not figures.local:
        return static_mb
    if not figures.complete:
        todo = "Report the last complete figure, and look at the log for what could not be counted"
        raise BackendError("the cache could not be counted whole", stage="usage", todo=todo)
    return static_mb + -(-figures.allocated // _MIB)


def check(backend: GuardedBackend, source: GuardedSource, config: CacheConfig) -> CheckReport:
    """Facts and problems: the core's and the backend's."""
    facts = [
        Fact(name="root", value=str(config.root)),
        Fact(name="backend", value=backend.name),
        Fact(name="source", value=source.name),
    ]
    if config.nova_base_dir is not None:
        there = config.nova_base_dir.is_dir()
        problem = None if there else "the directory is not there; correct nova_base_dir"
        facts.append(Fact(name="nova_base_dir", value=str(config.nova_base_dir), problem=problem))
    return CheckReport(facts=(*facts, *backend.check()))


def recover(backend: GuardedBackend, root: Root) -> RecoveryReport:
    """Sweep the core's scratch and let the backend sweep its own."""
    report = backend.recover()
    stuck: dict[str, str] = {}
    removed, alive = _entries.sweep(root.staging, stuck)
    return RecoveryReport(
        removed=(*report.removed, *(f"staging/{name}" for name in removed)),
        restored=report.restored,
        alive=tuple(dict.fromkeys([*report.alive, *(f"staging/{name}" for name in alive)])),
        failed={**report.failed, **{f"staging/{name}": reason for name, reason in stuck.items()}},
    )


def _own_filesystem(paths: BackendPaths) -> bool:
    disks = paths.disks_dir
    while not disks.exists() and disks != disks.parent:
        disks = disks.parent
    return _device(paths.root) != _device(disks)


def _device(path: Path) -> int:
    return os.stat(path).st_dev  # noqa: PTH116 - one call

"""Commands about the cache as a whole: usage, cleanup, recover, check, backends."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nova_imagecache import ConfigError, available_backends, available_sources
from nova_imagecache.cli._base import FactsCommand, RowsCommand
from nova_imagecache.cli._cells import Cell, Duration, Number, Size, count_argument, duration_argument, human_size

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Iterator

    from nova_imagecache import CacheConfig, CleanupItem, CleanupReport
    from nova_imagecache.cli._base import Row

_USAGE_SIZES = ("allocated", "bases", "staging", "trash", "overhead", "reclaimable", "total", "free")
_USAGE_FLAGS = ("own_filesystem", "local", "complete")


class Usage(FactsCommand):
    """Show what the cache takes, and what a cleanup could give back."""

    columns = ("base_count", *_USAGE_SIZES, *_USAGE_FLAGS, "reserved_disk_mb")

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """The command's arguments."""
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "--static-mb",
            metavar="N",
            type=count_argument,
            help="show as reserved_disk_mb what Nova's option of that name must be, when N MiB are reserved already",
        )
        return parser

    def facts(self, parsed_args: argparse.Namespace) -> Row:
        """The sizes, in allocated bytes; ``reserved_disk_mb`` in MiB, where it was asked for."""
        static = parsed_args.static_mb
        with self.open_cache() as cache:
            usage = cache.usage()
            reserved = None if static is None else cache.reserved_disk_mb(static)
        if not usage.complete:
            self.app.warn("not everything could be counted: every size is a lower bound")
        return {
            "base_count": usage.base_count,
            **{name: Size(getattr(usage, name)) for name in _USAGE_SIZES},
            **{name: Cell(getattr(usage, name)) for name in _USAGE_FLAGS},
            "reserved_disk_mb": Number(reserved),
        }


class Cleanup(RowsCommand):
    """Remove the bases that nobody has used for a while.

    A first pass marks a base that has no users, a later one removes it. Run it again and again, say every 40 minutes.
    ``idle`` is the time that is compared with the one that is granted: null until a first pass has marked the base.
    What dead processes left is swept as well: rows with an ``entry`` instead of an image. The exit code is 1 where
    something failed.
    """

    columns = ("image_id", "verdict", "outcome", "reason", "allocated", "users", "idle", "entry")
    detail = ("entry",)
    nothing = "the cache holds no bases"

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """The command's arguments."""
        parser = super().get_parser(prog_name)
        parser.add_argument("--dry-run", action="store_true", help="show what would be done, and why, and do nothing")
        parser.add_argument(
            "--max-idle",
            metavar="DURATION",
            type=duration_argument,
            help='how long an unused base stays: seconds, or text such as "24h" (default: as configured)',
        )
        parser.add_argument(
            "--in-use",
            metavar="IMAGE",
            nargs="+",
            action="extend",
            default=[],
            help="image ids that are in use, whatever the cache knows of them",
        )
        return parser

    def rows(self, parsed_args: argparse.Namespace) -> Iterable[Row]:
        """One row for each base: the plan's verdict, and what became of it unless it is a dry run; then left-overs."""
        with self.open_cache() as cache:
            plan = cache.plan_cleanup(max_idle=parsed_args.max_idle, in_use=parsed_args.in_use)
            report = None if parsed_args.dry_run else cache.cleanup(plan)
        if report is None:
            self.app.say(f"would free {human_size(plan.freeable)}")
        else:
            self.app.say(f"freed {human_size(report.freed)}")
            self.exit_code = 1 if report.failed else 0
        rows = [_cleanup_row(item, report) for item in plan.items]
        return rows if report is None else [*rows, *_left_overs(report, {item.image_id for item in plan.items})]


def _cleanup_row(item: CleanupItem, report: CleanupReport | None) -> Row:
    outcome, reason = None, item.reason
    if report is not None:
        outcome, reason = _outcome(item, report)
    return {
        "image_id": Cell(item.image_id),
        "verdict": item.verdict,
        "outcome": Cell(outcome),
        "reason": reason,
        "allocated": Size(item.allocated),
        "users": Number(item.users),
        "idle": Duration(None if item.idle is None else int(item.idle)),
        "entry": Cell(None),
    }


def _left_overs(report: CleanupReport, bases: set[str]) -> Iterator[Row]:
    """A row for each left-over of a dead process that was swept, or could not be."""
    found = [(entry, "swept", "left by a process that is dead") for entry in report.swept]
    found += [(entry, "failed", why) for entry, why in report.failed.items() if entry not in bases]
    for entry, outcome, reason in found:
        yield {
            "image_id": Cell(None),
            "verdict": "sweep",
            "outcome": Cell(outcome),
            "reason": f"{entry}: {reason}",
            "allocated": Size(None),
            "users": Number(None),
            "idle": Duration(None),
            "entry": Cell(entry),
        }


def _outcome(item: CleanupItem, report: CleanupReport) -> tuple[str, str]:
    if item.image_id in report.failed:
        return "failed", report.failed[item.image_id]
    if item.image_id in report.removed:
        return "removed", item.reason
    if item.image_id in report.marked:
        return ("unmarked" if item.verdict == "unmark" else "marked"), item.reason
    # what was found out under the lock is newer than the plan
    return "kept", report.kept.get(item.image_id, item.reason)


class Recover(RowsCommand):
    """Sweep what processes left that ended in the middle of something.

    The exit code is 1 where something could not be swept.
    """

    columns = ("entry", "outcome", "reason")
    nothing = "nothing was left behind"

    def rows(self, parsed_args: argparse.Namespace) -> Iterable[Row]:
        """One row for each entry that was found."""
        del parsed_args
        with self.open_cache() as cache:
            report = cache.recover()
        self.exit_code = 1 if report.failed else 0
        found = (("removed", report.removed), ("restored", report.restored), ("alive", report.alive))
        rows = [{"entry": entry, "outcome": how, "reason": Cell(None)} for how, entries in found for entry in entries]
        failed = [{"entry": entry, "outcome": "failed", "reason": Cell(why)} for entry, why in report.failed.items()]
        return rows + failed


class Check(RowsCommand):
    """Look at the cache's surroundings: tools, storage, permissions, who knows users.

    The exit code is 1 where there is a problem.
    """

    columns = ("name", "value", "ok", "problem")

    def rows(self, parsed_args: argparse.Namespace) -> Iterable[Row]:
        """One row for each fact."""
        del parsed_args
        with self.open_cache() as cache:
            report = cache.check()
        self.exit_code = 0 if report.ok else 1
        return [
            {"name": fact.name, "value": fact.value, "ok": Cell(fact.problem is None), "problem": Cell(fact.problem)}
            for fact in report.facts
        ]


class Backends(RowsCommand):
    """List the backends and sources that are installed, and which of them are configured."""

    columns = ("kind", "name", "configured")

    def rows(self, parsed_args: argparse.Namespace) -> Iterable[Row]:
        """One row for each plug-in; ``configured`` is None where no configuration can be read."""
        del parsed_args
        config = self._readable_config()
        found = {"backend": available_backends(), "source": available_sources()}
        chosen = {kind: getattr(config, kind, None) for kind in found}
        return [
            {"kind": kind, "name": name, "configured": Cell(None if config is None else chosen[kind] == name)}
            for kind, names in found.items()
            for name in names
        ]

    def _readable_config(self) -> CacheConfig | None:
        try:
            return self.app.config()
        except ConfigError as err:
            # asked for by name: then it is an error; otherwise this command is what to begin with, before there is one
            if self.app.options.config:
                raise
            self.app.say(f"no configuration: {err}")
            return None

"""Commands about root disks: disks, remove-disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nova_imagecache import DiskNotFoundError
from nova_imagecache.cli._base import FactsCommand, RowsCommand
from nova_imagecache.cli._cells import Cell
from nova_imagecache.cli._facts import DISK_COLUMNS, disk_facts

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable

    from nova_imagecache.cli._base import Row


class Disks(RowsCommand):
    """List the root disks that were made here."""

    columns = DISK_COLUMNS
    detail = ("location", "location_type")
    nothing = "there are no root disks"

    def rows(self, parsed_args: argparse.Namespace) -> Iterable[Row]:
        """One row for each root disk, by id and name."""
        del parsed_args
        with self.open_cache() as cache:
            disks = sorted(cache.root_disks(), key=lambda disk: (disk.disk_id, disk.name))
        return [disk_facts(disk) for disk in disks]


class RemoveDisk(FactsCommand):
    """Remove the root disk of an instance."""

    columns = ("disk_id", "name", "removed")

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """The command's arguments."""
        parser = super().get_parser(prog_name)
        parser.add_argument("disk_id", metavar="DISK_ID", help="what the disk belongs to: the instance's id")
        parser.add_argument("--name", default="disk", help="which of its disks (default: disk)")
        return parser

    def facts(self, parsed_args: argparse.Namespace) -> Row:
        """Which disk was removed. For the library a disk that is not there is removed; a person mistyped its id."""
        disk_id, name = parsed_args.disk_id, parsed_args.name
        with self.open_cache() as cache:
            try:
                cache.get_root_disk(disk_id, name=name)
            except DiskNotFoundError:
                # parts of a disk that was never finished may still lie there
                cache.remove_root_disk(disk_id, name=name)
                raise
            cache.remove_root_disk(disk_id, name=name)
        return {"disk_id": disk_id, "name": name, "removed": Cell(value=True)}

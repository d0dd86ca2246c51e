"""Commands that bring images in: ensure, precache, create-disk."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nova_imagecache import CancelledError, InvalidRequestError
from nova_imagecache.cli._base import FactsCommand, RowsCommand
from nova_imagecache.cli._cells import Cell, Size, duration_argument, size_argument
from nova_imagecache.cli._facts import DISK_COLUMNS, RECORD_COLUMNS, disk_facts, error_facts, record_facts
from nova_imagecache.cli._progress import Interrupt, progress_bars

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable
    from datetime import timedelta

    from nova_imagecache import EnsureResult
    from nova_imagecache.cli._base import Row

_RESULT_COLUMNS = ("format", "virtual_size", "size", "digest", "location")


class _EnsureMany(RowsCommand):
    columns = ("image_id", "result", *_RESULT_COLUMNS, "error_type", "error")
    detail = ("size", "digest", "location", "error")
    nothing = "no images were asked for"

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        _add_deadline(parser)
        return parser

    def images(self, parsed_args: argparse.Namespace) -> list[str]:
        """The image ids that were asked for."""
        return list(parsed_args.images)

    def rows(self, parsed_args: argparse.Namespace) -> Iterable[Row]:
        """One row for each image, in the order in which they were given."""
        # an image that is named twice is one answer
        images = list(dict.fromkeys(self.images(parsed_args)))
        with (
            Interrupt() as interrupt,
            progress_bars(interrupt, quiet=self.app.quiet) as shown,
            self.open_cache(on_event=shown.on_event) as cache,
        ):
            results = cache.ensure_bases(
                images, deadline=_seconds(parsed_args.deadline), cancel=interrupt.event, progress=shown.progress
            )
        self._note_failures(results, interrupt)
        return [_result_row(result) for result in results]

    def _note_failures(self, results: list[EnsureResult], interrupt: Interrupt) -> None:
        # the exit code is that of the first image that failed, in the order in which they were given
        for result in results:
            if result.error is None or (interrupt.exit_code and isinstance(result.error, CancelledError)):
                continue
            self.app.complain(result.error)
            self.exit_code = self.exit_code or result.error.exit_code
        self.exit_code = interrupt.exit_code or self.exit_code


class Ensure(_EnsureMany):
    """Bring images into the cache where they are not there yet.

    One image that fails stops no other. The exit code is that of the first one that failed.
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """The command's arguments."""
        parser = super().get_parser(prog_name)
        parser.add_argument("images", metavar="IMAGE", nargs="+", help="image id")
        return parser


class Precache(_EnsureMany):
    """Bring a list of images into the cache, from the arguments or a file.

    One image that fails stops no other. The answer keeps the order of the list.
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """The command's arguments."""
        parser = super().get_parser(prog_name)
        parser.add_argument("images", metavar="IMAGE", nargs="*", help="image id")
        parser.add_argument(
            "--file", metavar="LIST", help="read image ids from this file, one a line, # begins a comment; -: stdin"
        )
        return parser

    def images(self, parsed_args: argparse.Namespace) -> list[str]:
        """The image ids of the arguments, then those of the file."""
        if not parsed_args.images and parsed_args.file is None:
            raise InvalidRequestError("no image was given", todo="Name images, or give --file LIST")
        return [*parsed_args.images, *(_read_list(parsed_args.file) if parsed_args.file is not None else ())]


class CreateDisk(FactsCommand):
    """Create the root disk of an instance, and bring its image in first where that is needed.

    A disk that exists already, of the same image and size, is shown and left untouched.
    """

    columns = DISK_COLUMNS

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """The command's arguments."""
        parser = super().get_parser(prog_name)
        parser.add_argument("image", metavar="IMAGE", help="image id")
        parser.add_argument("disk_id", metavar="DISK_ID", help="what the disk belongs to: the instance's id")
        parser.add_argument("--name", default="disk", help="which of its disks (default: disk)")
        parser.add_argument(
            "--size", type=size_argument, help='bytes, or text such as "20G" (default: as large as the image)'
        )
        _add_deadline(parser)
        return parser

    def facts(self, parsed_args: argparse.Namespace) -> Row:
        """The disk's facts."""
        with (
            Interrupt() as interrupt,
            progress_bars(interrupt, quiet=self.app.quiet) as shown,
            self.open_cache(on_event=shown.on_event) as cache,
        ):
            disk = cache.create_root_disk(
                parsed_args.image,
                parsed_args.disk_id,
                name=parsed_args.name,
                size=parsed_args.size,
                deadline=_seconds(parsed_args.deadline),
                cancel=interrupt.event,
                progress=shown.progress,
            )
        return disk_facts(disk)


def _seconds(duration: timedelta | None) -> float | None:
    return None if duration is None else duration.total_seconds()


def _add_deadline(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--deadline",
        metavar="DURATION",
        type=duration_argument,
        help='give up after this time: seconds, or text such as "10m"',
    )


def _read_list(name: str) -> list[str]:
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise InvalidRequestError(f"cannot read the list of images: {err}") from err
    return [image for line in text.splitlines() if (image := line.partition("#")[0].strip())]


def _result_row(result: EnsureResult) -> Row:
    known = record_facts(result.base) if result.base is not None else dict.fromkeys(RECORD_COLUMNS, Cell(None))
    row = {column: known[column] for column in _RESULT_COLUMNS}
    # alignment goes by the first row's types, whether it failed or not
    if result.base is None:
        row |= {"virtual_size": Size(None), "size": Size(None)}
    outcome = "failed" if result.base is None else "ready"
    return {"image_id": result.image_id, "result": outcome, **row, **error_facts(result.error)}

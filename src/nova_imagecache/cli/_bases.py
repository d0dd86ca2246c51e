"""Commands about bases: list, show, verify, remove, pin, unpin."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from nova_imagecache import (
    BaseCorruptError,
    BaseNotFoundError,
    CancelledError,
    ImageCacheError,
    InvalidRequestError,
)
from nova_imagecache.cli._base import FactsCommand, RowsCommand
from nova_imagecache.cli._cells import Cell, Duration, Size, UserCount, duration_argument, iso, time_argument
from nova_imagecache.cli._facts import (
    RECORD_COLUMNS,
    error_facts,
    idle_seconds,
    known_users,
    pin_facts,
    record_facts,
    user_facts,
)
from nova_imagecache.cli._progress import Interrupt

if TYPE_CHECKING:
    import argparse
    import threading
    from collections.abc import Iterable

    from nova_imagecache import BaseImage, ImageCache
    from nova_imagecache.cli._base import Row


class List(RowsCommand):
    """List the bases: their sizes, how many root disks use them, and since when nobody does.

    ``idle`` is the time since the mark of a cleanup or the last use, whichever is later; null where a base has users,
    or nobody can say. A cleanup removes no base that it has not marked first (``unused_since``), however long it is
    idle, unless no idle time is granted.
    """

    columns = (
        "image_id", "format", "virtual_size", "allocated", "users", "idle", "pinned", "managed", "last_used",
        "unused_since",
    )  # fmt: skip
    detail = ("managed", "last_used", "unused_since")
    nothing = "the cache holds no bases"

    def rows(self, parsed_args: argparse.Namespace) -> Iterable[Row]:
        """One row for each base, by image id."""
        del parsed_args
        with self.open_cache() as cache:
            # a plan counts the users of all bases in one go; naming them, base by base, reads every disk's record
            counted = {item.image_id: item.users for item in cache.plan_cleanup().items}
            bases = sorted(cache.bases(), key=lambda base: base.image_id)
            rows = [_list_row(cache, base, counted.get(base.image_id)) for base in bases]
        return [row for row in rows if row is not None]


def _list_row(cache: ImageCache, base: BaseImage, users: int | None) -> Row | None:
    try:
        allocated = cache.base_usage(base.image_id).allocated
    except BaseNotFoundError:
        # removed by somebody else while this command was counting
        return None
    return {
        **record_facts(base),
        "allocated": Size(allocated),
        "users": UserCount(users),
        "idle": Duration(idle_seconds(base, users)),
        "pinned": Cell(bool(cache.pins(base.image_id))),
    }


class Show(FactsCommand):
    """Show everything that is known of a base.

    ``idle`` is told as in ``list``.
    """

    columns = (*RECORD_COLUMNS, "allocated", "idle", "users", "pins")

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """The command's arguments."""
        return _with_image(super().get_parser(prog_name))

    def facts(self, parsed_args: argparse.Namespace) -> Row:
        """The base's record, marks, users and pins."""
        with self.open_cache() as cache:
            base = cache.get_base(parsed_args.image)
            users = known_users(cache, base.image_id)
            allocated = cache.base_usage(base.image_id).allocated
            pins = cache.pins(base.image_id)
        return {
            **record_facts(base),
            "allocated": Size(allocated),
            "idle": Duration(idle_seconds(base, None if users is None else len(users))),
            "users": user_facts(users),
            "pins": pin_facts(pins),
        }


class Verify(RowsCommand):
    """Read bases again and compare them with what was published.

    The exit code is 1 where one is damaged; a damaged base is taken out of use. What stands in a base's place and
    cannot be read as one is told of where its image is given; ``check`` tells of all such.
    """

    columns = ("image_id", "result", "error_type", "error")
    detail = ("error",)
    nothing = "the cache holds no bases"

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """The command's arguments."""
        parser = super().get_parser(prog_name)
        parser.add_argument("images", metavar="IMAGE", nargs="*", help="image id (default: all bases)")
        parser.add_argument(
            "--repair",
            action="store_true",
            help="also take back bases whose file a hypervisor made its own: libvirt changes owners",
        )
        return parser

    def rows(self, parsed_args: argparse.Namespace) -> Iterable[Row]:
        """One row for each base, in the order in which they were given."""
        errors: dict[str, ImageCacheError | None] = {}
        with self.open_cache() as cache, Interrupt() as interrupt:
            for image_id in dict.fromkeys(parsed_args.images) or sorted(base.image_id for base in cache.bases()):
                self.app.say(f"verifying {image_id}")
                errors[image_id] = _verify(cache, image_id, interrupt.event, repair=parsed_args.repair)
        failures = [error for error in errors.values() if error is not None]
        for error in failures:
            self.app.complain(error)
        if failures:
            damaged = any(isinstance(error, BaseCorruptError) for error in failures)
            self.exit_code = BaseCorruptError.exit_code if damaged else failures[0].exit_code
        return [
            {"image_id": image_id, "result": _verdict(error), **error_facts(error)}
            for image_id, error in errors.items()
        ]


def _verify(cache: ImageCache, image_id: str, cancel: threading.Event, *, repair: bool) -> ImageCacheError | None:
    try:
        if repair:
            cache.repair_base(image_id, cancel=cancel)
        cache.verify_base(image_id, cancel=cancel)
    except CancelledError:
        # the signal that set the event ends the command; there is no answer to give
        raise
    except ImageCacheError as err:
        return err
    return None


def _verdict(error: ImageCacheError | None) -> str:
    if error is None:
        return "whole"
    return "damaged" if isinstance(error, BaseCorruptError) else "failed"


class Remove(FactsCommand):
    """Remove a base that nobody uses and nobody has pinned.

    What stands in a base's place and cannot be read as one is removed in the same way.
    """

    columns = ("image_id", "removed")

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """The command's arguments."""
        return _with_image(super().get_parser(prog_name))

    def facts(self, parsed_args: argparse.Namespace) -> Row:
        """Which base was removed."""
        with self.open_cache() as cache:
            cache.remove_base(parsed_args.image)
        return {"image_id": parsed_args.image, "removed": Cell(value=True)}


class MakePin(FactsCommand):
    """Pin a base: it stays until its owner unpins it, or until a time."""

    columns = ("image_id", "owner", "until")

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """The command's arguments."""
        parser = _with_owner(super().get_parser(prog_name))
        end = parser.add_mutually_exclusive_group()
        end.add_argument(
            "--until",
            metavar="TIME",
            type=time_argument,
            help="ISO 8601, in UTC unless it names a zone (default: for good)",
        )
        end.add_argument(
            "--for", metavar="DURATION", dest="duration", type=duration_argument, help='seconds, or text such as "7d"'
        )
        return parser

    def facts(self, parsed_args: argparse.Namespace) -> Row:
        """The pin."""
        until = parsed_args.until
        if parsed_args.duration is not None:
            try:
                until = datetime.now(UTC) + parsed_args.duration
            except OverflowError as err:
                raise InvalidRequestError(f"a pin cannot last {parsed_args.duration}") from err
        with self.open_cache() as cache:
            cache.pin(parsed_args.image, parsed_args.owner, until=until)
            if not _is_there(cache, parsed_args.image):
                self.app.say("the base is not there yet: the pin holds it once it is")
        end = None if until is None else iso(until.timestamp())
        return {"image_id": parsed_args.image, "owner": parsed_args.owner, "until": Cell(end)}


def _is_there(cache: ImageCache, image_id: str) -> bool:
    try:
        cache.get_base(image_id)
    except BaseNotFoundError:
        return False
    return True


class Unpin(FactsCommand):
    """Take an owner's pin away."""

    columns = ("image_id", "owner", "pinned")

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """The command's arguments."""
        return _with_owner(super().get_parser(prog_name))

    def facts(self, parsed_args: argparse.Namespace) -> Row:
        """Which pin is gone, and whether other owners still hold the base."""
        with self.open_cache() as cache:
            cache.unpin(parsed_args.image, parsed_args.owner)
            pinned = bool(cache.pins(parsed_args.image))
        return {"image_id": parsed_args.image, "owner": parsed_args.owner, "pinned": Cell(pinned)}


def _with_image(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("image", metavar="IMAGE", help="image id")
    return parser


def _with_owner(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    _with_image(parser)
    parser.add_argument("owner", metavar="OWNER", help="who wants the base to stay")
    return parser

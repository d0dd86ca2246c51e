"""What all commands share: formats, columns, and how an error becomes a line and an exit code."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cliff.command import Command
from cliff.formatters.commaseparated import CSVLister
from cliff.formatters.json_format import JSONFormatter
from cliff.formatters.shell import ShellFormatter
from cliff.formatters.table import TableFormatter
from cliff.formatters.value import ValueFormatter
from cliff.formatters.yaml_format import YAMLFormatter
from cliff.lister import Lister
from cliff.show import ShowOne

from nova_imagecache import ImageCache, ImageCacheError, InvalidRequestError
from nova_imagecache.cli._cells import Duration, Number, Size, UserCount, plain

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from nova_imagecache import Event, UserFinder
    from nova_imagecache.cli._app import CacheApp

Row = dict[str, Any]


class _Table(TableFormatter):
    """cliff's table, with numbers to the right."""

    # an attribute of the instance for cliff; keyed by the type of the first row's value
    ALIGNMENTS: dict[Any, Literal["l", "c", "r"]] = {  # noqa: RUF012  # cliff declares it so
        **TableFormatter.ALIGNMENTS,
        Number: "r",
        UserCount: "r",
        Size: "r",
        Duration: "r",
    }


class _Value(ValueFormatter):
    """cliff's bare values, in JSON's words: a row has the same number of them whatever is known."""

    def emit_list(self, names: Sequence[str], data: Iterable[Any], stdout: Any, parsed_args: Any) -> None:
        super().emit_list(names, ([plain(cell, "null") for cell in row] for row in data), stdout, parsed_args)

    def emit_one(self, names: Sequence[str], data: Sequence[Any], stdout: Any, parsed_args: Any) -> None:
        super().emit_one(names, [plain(cell, "null") for cell in data], stdout, parsed_args)


class _Csv(CSVLister):
    """cliff's CSV, with nothing where nothing is known."""

    def emit_list(self, names: Sequence[str], data: Iterable[Any], stdout: Any, parsed_args: Any) -> None:
        super().emit_list(names, ([plain(cell, "") for cell in row] for row in data), stdout, parsed_args)


class _Shell(ShellFormatter):
    """cliff's variables for a shell, empty where nothing is known."""

    def emit_one(self, names: Sequence[str], data: Sequence[Any], stdout: Any, parsed_args: Any) -> None:
        super().emit_one(names, [plain(cell, "") for cell in data], stdout, parsed_args)


class _Plugin:
    """A formatter in the shape in which stevedore hands it to cliff."""

    def __init__(self, obj: Any) -> None:
        self.obj = obj


class _Formatters:
    """cliff's formatters by name, without the scan of all installed entry points that its own lookup costs."""

    def __init__(self, **extra: Any) -> None:
        plain = {"json": JSONFormatter(), "table": _Table(), "value": _Value(), "yaml": YAMLFormatter()}
        self._plugins = {name: _Plugin(formatter) for name, formatter in {**plain, **extra}.items()}

    def names(self) -> list[str]:
        return list(self._plugins)

    def __getitem__(self, name: str) -> _Plugin:
        return self._plugins[name]

    def __iter__(self) -> Iterator[_Plugin]:
        return iter(self._plugins.values())


class CacheCommand(Command):
    """A command whose errors become one line on stderr and the exception's exit code."""

    app: CacheApp
    columns: tuple[str, ...] = ()
    exit_code = 0

    # cliff asks the signature whether to hand over the command's name, and with it loads extensions of the command
    # from entry points: a scan that nobody here needs
    def __init__(self, app: CacheApp, app_args: argparse.Namespace | None) -> None:
        super().__init__(app, app_args)

    def get_epilog(self) -> str:
        """What follows the options in the help."""
        # cliff's own looks up which distribution brings the command, by reading the metadata of all
        return self._epilog or ""

    def open_cache(self, *, on_event: Callable[[Event], None] | None = None) -> ImageCache:
        """The cache of the configuration, to be used as a context manager. Options add to whom it asks for users."""
        config, options = self.app.config(), self.app.options
        more: list[UserFinder] = []
        uri = config.libvirt_uri or options.libvirt or None
        if uri is not None:
            from nova_imagecache.domains import LibvirtDomains, log_libvirt_errors

            log_libvirt_errors()
            if options.libvirt and options.libvirt != uri:
                more.append(LibvirtDomains(options.libvirt))
        directories = [*config.disk_dirs, *(Path(directory).absolute() for directory in options.disks)]
        # what was named must be there; on a new host this one may not be yet, and then no disks are
        if config.disks_dir is not None and config.disks_dir.is_dir():
            directories.append(config.disks_dir)
        config = replace(config, libvirt_uri=uri, disk_dirs=tuple(directories))
        return ImageCache.from_config(config, user_finders=more, on_event=on_event)

    def run(self, parsed_args: argparse.Namespace) -> int:
        """The exit code: 0, what the command noted in ``exit_code``, or the error's."""
        try:
            # before the command does anything: cliff would notice a wrong name only after it
            if hasattr(parsed_args, "columns"):
                parsed_args.columns = self._known_columns(parsed_args.columns)
            super().run(parsed_args)
        except ImageCacheError as err:
            self.app.complain(err)
            return err.exit_code
        return self.exit_code

    def _known_columns(self, wanted: Iterable[str]) -> list[str]:
        names = [_name(column) for column in wanted]
        if unknown := sorted(set(names) - set(self.columns)):
            raise InvalidRequestError(f"no column named {', '.join(unknown)}; columns: {', '.join(self.columns)}")
        return names


class RowsCommand(CacheCommand, Lister):
    """A command that answers with rows. ``detail`` names the columns that a table shows only when asked (-c)."""

    detail: tuple[str, ...] = ()
    nothing = "nothing to show"

    def _load_formatter_plugins(self) -> Any:
        return _Formatters(csv=_Csv())

    def rows(self, parsed_args: argparse.Namespace) -> Iterable[Row]:
        """The rows, each with a value for every column."""
        raise NotImplementedError

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Sequence[str], Iterable[Any]]:
        """The columns and the rows, as cliff wants them."""
        rows = [tuple(row[column] for column in self.columns) for row in self.rows(parsed_args)]
        return self.columns, rows

    def produce_output(
        self, parsed_args: argparse.Namespace, column_names: Sequence[str], data: Iterable[Sequence[Any]]
    ) -> int:
        """Write the rows; a table gets headings in words, and only the columns that fit a page."""
        # some releases of cliff take the names of columns letter by letter
        parsed_args.sort_columns = [_name(name) for name in parsed_args.sort_columns]
        if parsed_args.formatter != "table":
            return super().produce_output(parsed_args, column_names, data)
        data = list(data)
        if not data and not parsed_args.print_empty:
            self.app.say(self.nothing)
            return 0
        shown = parsed_args.columns or [name for name in column_names if name not in self.detail]
        parsed_args.columns = [_heading(name) for name in shown]
        parsed_args.sort_columns = [_heading(name) for name in parsed_args.sort_columns]
        return super().produce_output(parsed_args, [_heading(name) for name in column_names], data)


class FactsCommand(CacheCommand, ShowOne):
    """A command that answers with the facts of one thing."""

    def _load_formatter_plugins(self) -> Any:
        return _Formatters(shell=_Shell())

    def facts(self, parsed_args: argparse.Namespace) -> Row:
        """A value for every column."""
        raise NotImplementedError

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Sequence[str], Iterable[Any]]:
        """The columns and the values, as cliff wants them."""
        facts = self.facts(parsed_args)
        return self.columns, [facts[column] for column in self.columns]


def _name(column: str) -> str:
    """A column as it is named in JSON, whether it was given so or as a table's heading."""
    return column.strip().lower().replace(" ", "_")


def _heading(column: str) -> str:
    return " ".join("ID" if word == "id" else word.capitalize() for word in column.split("_"))


def default_config_path() -> str:
    """Where the configuration is when nobody says otherwise."""
    return os.environ.get("NOVA_IMAGECACHE_CONFIG") or "/etc/nova-imagecache.toml"

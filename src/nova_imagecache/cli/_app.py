"""The application: global options, help, logging to stderr, and how an error looks."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from typing import TYPE_CHECKING, Any

from cliff.app import App
from cliff.commandmanager import CommandManager
from cliff.complete import CompleteCommand
from cliff.help import HelpCommand

from nova_imagecache import CacheConfig, ConfigError, ImageCacheError, InvalidRequestError
from nova_imagecache.cli import NAME, _bases, _disks, _fetch, _upkeep
from nova_imagecache.cli._base import default_config_path
from nova_imagecache.cli._cells import one_line

if TYPE_CHECKING:
    from typing import TextIO

_EX_USAGE = 2
_LEVELS = (logging.ERROR, logging.WARNING, logging.INFO, logging.DEBUG)

_COMMANDS: dict[str, Any] = {
    "backends": _upkeep.Backends,
    "check": _upkeep.Check,
    "cleanup": _upkeep.Cleanup,
    "create-disk": _fetch.CreateDisk,
    "disks": _disks.Disks,
    "ensure": _fetch.Ensure,
    "list": _bases.List,
    "pin": _bases.MakePin,
    "precache": _fetch.Precache,
    "recover": _upkeep.Recover,
    "remove": _bases.Remove,
    "remove-disk": _disks.RemoveDisk,
    "show": _bases.Show,
    "unpin": _bases.Unpin,
    "usage": _upkeep.Usage,
    "verify": _bases.Verify,
}


class _Version(argparse.Action):
    """Prints the version, and looks it up only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        import nova_imagecache

        sys.stdout.write(f"{NAME} {nova_imagecache.__version__}\n")
        parser.exit()


class _Complete(CompleteCommand):
    """Print the completion for bash."""

    def get_epilog(self) -> str:
        return ""


class _Help(HelpCommand):
    """Show the help of one command, or of all."""

    app: CacheApp

    def __init__(self, app: CacheApp, app_args: argparse.Namespace | None) -> None:
        super().__init__(app, app_args)

    def get_epilog(self) -> str:
        return ""

    def take_action(self, parsed_args: argparse.Namespace) -> int:
        if not parsed_args.cmd:
            self.app.print_help(self.app.stdout)
            return 0
        try:
            return int(super().take_action(parsed_args) or 0)
        except ValueError:
            self.app.complain(InvalidRequestError(f"no command {parsed_args.cmd[0]!r}", todo=f"See {NAME} --help"))
            return _EX_USAGE


class _Handler(logging.Handler):
    """Log records on whatever ``sys.stderr`` is at that moment: a progress display puts itself there."""

    def emit(self, record: logging.LogRecord) -> None:
        # where nobody reads stderr any more, the command still goes on
        with contextlib.suppress(BrokenPipeError):
            sys.stderr.write(self.format(record) + "\n")


class _Formatter(logging.Formatter):
    """One line a record, in the form of an error message; with its traceback where ``debug``."""

    def __init__(self, *, debug: bool) -> None:
        super().__init__()
        self._debug = debug

    def format(self, record: logging.LogRecord) -> str:
        line = f"{NAME}: {record.levelname.lower()}: {one_line(record.getMessage())}"
        if self._debug and record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class CacheApp(App):
    """``nova-imagecache``."""

    NAME = NAME
    LOG = logging.getLogger("nova_imagecache.cli")

    def __init__(self) -> None:
        manager = CommandManager(None, convert_underscores=False)
        for name, command in _COMMANDS.items():
            manager.add_command(name, command)
        super().__init__(description=None, version=None, command_manager=manager)
        # cliff's own, which it has added by now, look up which distribution brings each command: 100 ms
        manager.add_command("help", _Help)
        manager.add_command("complete", _Complete)
        self._handlers: list[logging.Handler] = []
        self._levels: list[tuple[logging.Logger, int]] = []

    def build_option_parser(
        self, description: str | None, version: str | None, argparse_kwargs: dict[str, Any] | None = None
    ) -> argparse.ArgumentParser:
        """The parser of the global options, which may stand before and after the command."""
        del description, version, argparse_kwargs
        return _option_parser()

    def configure_logging(self) -> None:
        """Send the log to stderr, and to ``--log-file``, until ``stop_logging``."""
        console = _Handler()
        console.setFormatter(_Formatter(debug=self.options.debug))
        self._handlers.append(console)
        shown = level = _LEVELS[min(self.options.verbose_level, len(_LEVELS) - 1)]
        console.setLevel(shown)
        if self.options.log_file:
            file = self._log_file()
            file.setFormatter(logging.Formatter(self.LOG_FILE_MESSAGE_FORMAT))
            self._handlers.append(file)
            level = min(level, logging.INFO)
        root, ours = logging.getLogger(), logging.getLogger("nova_imagecache")
        self._levels = [(root, root.level), (ours, ours.level)]
        # what other libraries say below a warning is of no use here, and may show requests; their warnings are for -v,
        # since what matters of them comes back as an error of ours
        root.setLevel(max(level, logging.WARNING))
        ours.setLevel(level)
        if shown > logging.INFO:
            console.addFilter(logging.Filter(ours.name))
        for handler in self._handlers:
            root.addHandler(handler)

    def _log_file(self) -> logging.Handler:
        try:
            return logging.FileHandler(self.options.log_file)
        except OSError as err:
            sys.stderr.write(f"{NAME}: error: cannot write the log: {one_line(err)}\n")
            raise SystemExit(_EX_USAGE) from err

    def stop_logging(self) -> None:
        """Leave the logging of the process as it was."""
        for handler in self._handlers:
            logging.getLogger().removeHandler(handler)
            handler.close()
        for logger, level in self._levels:
            logger.setLevel(level)
        self._handlers, self._levels = [], []

    def config(self) -> CacheConfig:
        """The configuration that the options and the environment name.

        Raises:
            ConfigError: there is none, or it is wrong.
        """
        path = self.options.config or default_config_path()
        if not self.options.config and not os.path.lexists(path):
            raise ConfigError([f"{path} does not exist: give --config FILE, or set NOVA_IMAGECACHE_CONFIG"])
        return CacheConfig.from_toml(path)

    def complain(self, error: ImageCacheError) -> None:
        """Write the error on one line of stderr, after its traceback where ``--debug`` asks for it."""
        self.LOG.error("%s", error, exc_info=error if self.options.debug else None)

    def warn(self, text: str) -> None:
        """Write a warning on one line of stderr."""
        self.LOG.warning("%s", text)

    @property
    def quiet(self) -> bool:
        """Whether ``--quiet`` was given."""
        return bool(self.options.verbose_level == 0)

    def say(self, text: str) -> None:
        """Write a line to stderr where a person reads it: on a terminal, or when asked by ``-v``."""
        if self.options.verbose_level > 1 or (self.options.verbose_level == 1 and sys.stderr.isatty()):
            sys.stderr.write(text + "\n")

    def interact(self) -> None:
        """No command was given. There is no interactive mode: the help says what to do."""
        self.print_help(sys.stderr)
        raise SystemExit(_EX_USAGE)

    def run_subcommand(self, argv: list[str]) -> int:
        """The command's exit code; 2 where there is no such command."""
        if argv[0] in ("-h", "--help"):
            self.print_help(self.stdout)
            return 0
        try:
            self.command_manager.find_command(argv)
        except ValueError:
            near = [] if argv[0].startswith("-") else self.get_fuzzy_matches(argv[0])
            hint = f"Did you mean {' or '.join(near[:3])}?" if near else f"See {NAME} --help"
            self.complain(InvalidRequestError(f"no command {argv[0]!r}", todo=hint))
            return _EX_USAGE
        return int(super().run_subcommand(argv))

    def print_help(self, out: TextIO) -> None:
        """Write the global options and one line for each command."""
        out.write(_option_parser(with_help=True).format_help())
        out.write("\ncommands:\n")
        for name, entry in sorted(self.command_manager):
            summary = (entry.load().__doc__ or "").partition("\n")[0].rstrip(".")
            out.write(f"  {name:<13}{summary}\n")
        out.write(f"\nOptions of a command: {NAME} help COMMAND\n")


def _option_parser(*, with_help: bool = False) -> argparse.ArgumentParser:
    # -h is left to the commands where there is one: this parser would take it from any place of the line
    parser = argparse.ArgumentParser(
        prog=NAME,
        usage=f"{NAME} [options] COMMAND ...",
        description="The image cache of a compute host: from an image to the root disk of an instance.",
        add_help=with_help,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    parser.add_argument("--config", metavar="FILE", help=f"the configuration, TOML (default: {default_config_path()})")
    parser.add_argument(
        "--libvirt",
        metavar="URI",
        help="ask this libvirt for users of bases as well, besides the configuration's libvirt_uri",
    )
    parser.add_argument(
        "--disks",
        metavar="DIR",
        action="append",
        default=[],
        help="look for users of bases in this directory as well, besides disks_dir and the configuration's disk_dirs; "
        "may be given again",
    )
    talk = parser.add_mutually_exclusive_group()
    talk.add_argument(
        "-v", "--verbose", action="count", dest="verbose_level", default=1, help="log what happens; -vv: in detail"
    )
    talk.add_argument("-q", "--quiet", action="store_const", dest="verbose_level", const=0, help="errors only")
    parser.add_argument("--log-file", metavar="FILE", help="append the log to this file as well")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    return parser

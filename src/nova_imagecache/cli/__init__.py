"""The command line ``nova-imagecache``: data on stdout, talk and progress on stderr, exit codes of the exceptions.

It uses the public names of the library and nothing else, so it is also an example of their use.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

EX_SIGINT = 130
EX_SIGPIPE = 141
NAME = "nova-imagecache"


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of the command line run with ``argv``, by default this process's own arguments."""
    _open_streams()
    missing = [name for name in ("cliff", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        sys.stderr.write(f"{NAME}: error: {' and '.join(missing)} not found: pip install 'nova-imagecache[cli]'\n")
        return 1
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except KeyboardInterrupt:
        return EX_SIGINT
    except BrokenPipeError:
        code = EX_SIGPIPE
    except OSError as err:
        sys.stderr.write(f"{NAME}: error: cannot write the output: {err}\n")
        code = 1
    else:
        return code
    # what is still in the buffer cannot be written: the interpreter would try again at exit and complain
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def _open_streams() -> None:
    # Python leaves None where a service manager or a shell (>&-) has closed the descriptor
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115  # open until the end
    if hasattr(sys.stdout, "reconfigure"):
        # an argument that is not valid text is shown in the table of results, and must not end it
        sys.stdout.reconfigure(errors="backslashreplace")


def _run(argv: list[str]) -> int:
    from nova_imagecache.cli._app import CacheApp

    app = CacheApp()
    try:
        code = app.run(argv)
    except SystemExit as stop:
        # argparse ends this way: None after help, 2 after a usage error
        code = stop.code if isinstance(stop.code, int) else 0
    finally:
        app.stop_logging()
    if code == EX_SIGPIPE:
        raise BrokenPipeError
    return code

"""Processes of their own for what does not survive a fork, as Ceph's client: forked from one that never used it."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")


def run(module: str, function: str, *arguments: Any, timeout: float = 60) -> int:
    """The exit code of a process that calls this function of this module; 0 or that of a SIGKILL.

    The module is imported once, for all such processes.
    """
    _serve(module)
    with tempfile.NamedTemporaryFile() as said:
        process = _CONTEXT.Process(target=_call, args=(said.name, module, function, arguments))
        process.start()
        process.join(timeout)
        code = process.exitcode
        if code is None:
            process.kill()
            process.join()
        process.close()
        assert code in (0, -signal.SIGKILL), f"the child ended with {code}: {Path(said.name).read_text()}"
        return code


def _serve(module: str) -> None:
    _CONTEXT.set_forkserver_preload([module])
    before = os.environ.get("PYTHONPATH")
    # not every Python hands its own path on to the server
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _call(said: str, module: str, function: str, arguments: tuple[Any, ...]) -> None:
    with Path(said).open("w") as errors:
        os.dup2(errors.fileno(), 2)
    getattr(importlib.import_module(module), function)(*arguments)

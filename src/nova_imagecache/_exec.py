"""Runs child processes: argument lists, C locale, resource limits, a time-out, and the child's own words in errors."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nova_imagecache import _turns
from nova_imagecache.exceptions import BackendError, CommandError

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Sequence

SEAMS = ("run",)

_POLL = 0.05
_STDERR_LIMIT = 16 * 1024
_GRACE = 5
"""Seconds between SIGXCPU, which says why a child ended, and SIGKILL, which the kernel sends at the hard limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a child may use: ``cpu`` seconds, ``memory`` (address space) and ``file_size`` in bytes; None: no limit.

    Never more than this process may give: its own hard limits hold where they are lower.
    """

    cpu: int | None = None
    memory: int | None = None
    file_size: int | None = None


def run(
    argv: Sequence[str],
    *,
    timeout: float,
    limits: Limits | None = None,
    stage: str | None = None,
    checkpoint: Callable[[], None] | None = None,
) -> str:
    """What the command wrote to stdout.

    Limits are set by util-linux's ``prlimit`` and the child's death with this process by its ``setpriv``, which both
    exec the command in place: still one process, and nothing runs between fork and exec (preexec_fn is unsafe in a
    threaded process). ``checkpoint`` is called 20 times a second; when it raises, the child is killed.

    Raises:
        CommandError: the command ended with another code than 0, was killed, or ran out of time.
        BackendError: the command is not installed.
    """
    import subprocess

    command = [*_limited(limits), *argv]
    for tool, package in ((argv[0], f"the package that brings {argv[0]}"), (command[0], "util-linux")):
        if shutil.which(tool) is None:
            raise BackendError(f"{tool} is not installed", stage=stage, todo=f"Install {package}")
    env = {"LC_ALL": "C", "PATH": os.environ.get("PATH", os.defpath)}
    deadline = time.monotonic() + timeout
    with (
        _turns.given_up(),
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env,
            # a Ctrl-C at the terminal is ours to answer: the child would die of it and look like a bad image
            process_group=0,
        ) as child,
    ):
        try:
            stdout, stderr = _communicate(child, deadline, checkpoint)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):  # it ended by itself
                child.kill()
            raise
    words = stderr[-_STDERR_LIMIT:].decode("utf-8", "replace")
    if child.returncode is None or stdout is None:
        raise CommandError(argv, None, f"no end after {timeout:.0f} s; {words}", stage=stage)
    if child.returncode != 0:
        raise CommandError(argv, child.returncode, words, stage=stage)
    return stdout.decode("utf-8", "replace")


def _communicate(
    child: subprocess.Popen[bytes], deadline: float, checkpoint: Callable[[], None] | None
) -> tuple[bytes | None, bytes]:
    from subprocess import TimeoutExpired

    while True:
        left = deadline - time.monotonic()
        try:
            return child.communicate(timeout=min(_POLL, max(left, 0)) if checkpoint else max(left, 0))
        except TimeoutExpired:
            if checkpoint is not None:
                checkpoint()
            if left <= 0:
                child.kill()
                return None, child.communicate()[1]


def _limited(limits: Limits | None) -> list[str]:
    if limits is None:
        return []
    import resource

    flags = ["--core=0"]
    for flag, kind, value, grace in (
        ("cpu", resource.RLIMIT_CPU, limits.cpu, _GRACE),
        ("as", resource.RLIMIT_AS, limits.memory, 0),
        ("fsize", resource.RLIMIT_FSIZE, limits.file_size, 0),
    ):
        if value is not None:
            hard = resource.getrlimit(kind)[1]
            soft, most = (x if hard == resource.RLIM_INFINITY else min(x, hard) for x in (value, value + grace))
            flags.append(f"--{flag}={soft}:{most}")
    return ["prlimit", *flags, "setpriv", "--pdeathsig", "KILL"]

"""The machine and the versions that a run was made with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import runner

if TYPE_CHECKING:
    from benchmarks.meter import Figures

_OURS = ("nova-imagecache", "python-glanceclient", "requests", "urllib3", "oslo.utils", "filelock", "xxhash", "isal")
_ALSO = ("zstandard",)


def describe(directory: Path) -> Figures:
    """Facts about this machine; ``directory`` is where the measured files are."""
    return {
        "cpu": _first(r"^model name\s*: (.*)$", "/proc/cpuinfo") or platform.machine(),
        "cores": cores(),
        "memory": int(_first(r"^MemTotal:\s+(\d+) kB$", "/proc/meminfo") or 0) * 1024,
        "kernel": platform.release(),
        "filesystem": _filesystem(directory),
        "python": platform.python_version(),
        "versions": versions(),
    }


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def versions() -> Figures:
    """What is measured, and with what."""
    found = {}
    for name in (*_OURS, *_ALSO):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    for name in ("nova", "ironic", "glance"):
        releases = sorted(runner.REPO.glob(f".venv-{name}/lib/python*/site-packages/{name}-*.dist-info"))
        if releases:
            found[name] = releases[0].name.removeprefix(f"{name}-").removesuffix(".dist-info")
    for name, argv in (("qemu-img", ["qemu-img", "--version"]), ("ceph", ["ceph-osd", "--version"])):
        if number := _number(argv):
            found[name] = number
    return found


def _number(argv: list[str]) -> str | None:
    try:
        said = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    found = re.search(r"\d+\.\d+[.\d]*", said)
    return found[0] if found else None


def _first(pattern: str, path: str) -> str | None:
    found = re.search(pattern, Path(path).read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    return found[1] if found else None


def _filesystem(directory: Path) -> str:
    """The type of the file system that holds the directory."""
    device = directory.stat().st_dev
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        before, _, after = line.partition(" - ")
        if before.split()[2] == f"{os.major(device)}:{os.minor(device)}":
            return after.split()[0]
    return "unknown"

"""Ceph's programs, and its modules rados and rbd, which come from Debian and not from PyPI."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
from pathlib import Path
from typing import Any

_PROGRAMS = ("ceph-mon", "ceph-mgr", "ceph-osd", "monmaptool", "setpriv")
_MODULES = ("rados", "rbd")


def missing() -> str | None:
    """What keeps a CephCluster from running here, None: nothing."""
    programs = [name for name in _PROGRAMS if shutil.which(name) is None]
    if programs:
        return f"no Ceph: {', '.join(programs)} missing; tools/setup.sh test installs them"
    modules = [name for name in _MODULES if importlib.util.find_spec(name) is None]
    if modules:
        return f"no Ceph: Python has no {' and '.join(modules)}; tools/setup.sh test links Debian's into .venv"
    return None


def bindings() -> tuple[Any, Any]:
    """The modules rados and rbd, imported when first asked for; they ship no types."""
    rados, rbd = (importlib.import_module(name) for name in _MODULES)
    return rados, rbd


def link_bindings(directory: Path) -> Path:
    """The directory, with rados and rbd in it and nothing else: for another environment of this same Python."""
    directory.mkdir(exist_ok=True)
    for name in _MODULES:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise RuntimeError(str(missing()))
        origin = Path(spec.origin).resolve()
        link = directory / origin.name
        if not link.exists():
            link.symlink_to(origin)
    return directory

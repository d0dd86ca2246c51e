"""What a release is made of: sdist and wheels built from the working tree, and an environment that has only those."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
PROJECT: dict[str, Any] = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))

_NOT_SOURCES = shutil.ignore_patterns(
    *(".git", ".venv*", ".work", ".hypothesis", ".*_cache", "__pycache__", "*.egg-info", "_build", ".coverage*"),
    *("build", "dist"),
)
_EPOCH = "1700000000"
"""SOURCE_DATE_EPOCH: the same times in every archive."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """``rebuilt`` is a wheel made of the sdist alone."""

    sdist: Path
    wheel: Path
    rebuilt: Path


@dataclass(frozen=True, slots=True)
class Environment:
    """A virtual environment without anything of this repository but what was installed."""

    path: Path

    @property
    def python(self) -> Path:
        return self.path / "bin/python"

    def run(
        self, *argv: str | Path, cwd: Path, check: bool = True, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """A program of the environment; nothing of this process's Python is handed on."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COVERAGE"))}
        done = subprocess.run(
            [str(self.path / "bin" / argv[0]), *map(str, argv[1:])],
            cwd=cwd,
            env={**clean, **environment},
            check=False,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0 or not check, f"{' '.join(map(str, argv))}\n{done.stdout}{done.stderr}"
        return done


def pip(python: Path, *arguments: str | Path) -> None:
    """The pip of this process, working on another environment: none of them needs one of its own."""
    argv = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{' '.join(argv)}\n{done.stdout}{done.stderr}"


def new_environment(path: Path, *requirements: str) -> Environment:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(path)], check=True, timeout=60)
    made = Environment(path)
    if requirements:
        pip(made.python, "install", "--quiet", *requirements)
    return made


def build(where: Path) -> Built:
    """Everything that a release uploads, and what somebody else makes of it; the working tree is not touched."""
    # what [build-system] asks for and no more
    tools = new_environment(where / "tools", "build", *PROJECT["build-system"]["requires"])

    def made(kind: str, source: Path, to: Path) -> Path:
        arguments = ("-m", "build", "--no-isolation", f"--{kind}", "--outdir", to, source)
        tools.run("python", *arguments, cwd=where, SOURCE_DATE_EPOCH=_EPOCH)
        (result,) = to.iterdir()
        return result

    tree = where / "tree"
    shutil.copytree(REPO, tree, ignore=_NOT_SOURCES, symlinks=True)
    sdist = made("sdist", tree, where / "sdist")
    wheel = made("wheel", tree, where / "wheel")
    # not with a filter: Debian 12's Python 3.11.2 knows none, and this archive was made just now
    shutil.unpack_archive(sdist, where / "unpacked")
    (unpacked,) = (where / "unpacked").iterdir()
    return Built(sdist=sdist, wheel=wheel, rebuilt=made("wheel", unpacked, where / "rebuilt"))


def main(to: str) -> None:
    """Write sdist and wheel into a directory: ``python -m harness.built DIRECTORY``."""
    Path(to).mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        made = build(Path(scratch))
        for archive in (made.sdist, made.wheel):
            shutil.copy(archive, to)
            sys.stdout.write(f"{to}/{archive.name}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])

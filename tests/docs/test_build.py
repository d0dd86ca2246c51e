"""The documentation builds, without a warning."""

from __future__ import annotations

import html
import importlib
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

import nova_imagecache

from .pages import DOCS, REPO

PUBLIC_MODULES = ("backends", "domains", "finders", "oslo", "sources", "testing")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages as HTML, made with the words of ``make docs``."""
    out = tmp_path_factory.mktemp("html")
    recipe = (REPO / "Makefile").read_text(encoding="utf-8")
    found = re.search(r"\$\(PY\) -m (sphinx .*) docs/_build/html$", recipe, re.MULTILINE)
    assert found is not None
    argv = [sys.executable, "-m", *found[1].split(), str(out)]
    done = subprocess.run(argv, cwd=REPO, capture_output=True, text=True, check=False, timeout=110)
    assert (done.returncode, done.stderr) == (0, "")
    return out


@pytest.mark.slow
def test_the_documentation_builds_without_a_warning(built: Path) -> None:
    """Every page comes out, and every reference in it leads somewhere: Sphinx is told to be nitpicky."""
    sources = {path.relative_to(DOCS) for path in DOCS.rglob("*.md") if "_build" not in path.parts}
    assert {path.with_suffix(".html") for path in sources} <= {
        path.relative_to(built) for path in built.rglob("*.html")
    }


@pytest.mark.slow
def test_docstrings_come_out_as_they_are_meant(built: Path) -> None:
    """Sections of docstrings are lists, names in them are links, and no markup is left over."""
    page = (built / "reference/api/cache.html").read_text(encoding="utf-8")
    assert re.search(r'href="[^"]*#nova_imagecache.NoSpaceError"[^>]*><code[^>]*><span[^>]*>NoSpaceError', page)
    assert re.search(r"<dt[^>]*>Raises.*?<li><p>", page, re.DOTALL)
    for path in built.rglob("*.html"):
        if "_static" in path.parts or path.name in ("genindex.html", "search.html"):
            continue
        prose = re.sub(r"<pre>.*?</pre>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        text = html.unescape(re.sub(r"<[^>]+>", "", prose))
        left = re.search(r"``|:py:|\{eval-rst\}|\{toctree\}|\{\.terminal\}", text)
        assert left is None, f"{path.relative_to(built)}: {text[max(left.start() - 60, 0) : left.end() + 60]!r}"


def described(built: Path) -> set[str]:
    """The full names of everything that is described, from what the build leaves for other projects' references."""
    head, _, body = (built / "objects.inv").read_bytes().partition(b"zlib.\n")
    assert head.startswith(b"# Sphinx inventory version 2")
    return {line.split(" ")[0] for line in zlib.decompress(body).decode().splitlines() if " py:" in line}


@pytest.mark.slow
@pytest.mark.parametrize(
    "module",
    ["nova_imagecache", *(f"nova_imagecache.{name}" for name in PUBLIC_MODULES)],
)
def test_every_public_name_is_described(built: Path, module: str) -> None:
    """What may be imported is on a page of the API with its docstring; Sphinx sees to it that it is on one only."""
    loaded = importlib.import_module(module)
    names = getattr(loaded, "__all__", None) or [
        name
        for name, value in vars(loaded).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == module
    ]
    assert names
    # a name that a contract exports for its authors is described where callers import it
    again = set(nova_imagecache.__all__) if module != "nova_imagecache" else set()
    there = described(built)
    for name in names:
        if module == "nova_imagecache":
            assert {f"{module}.{name}", getattr(getattr(loaded, name), "__module__", "") + f".{name}"} & there, name
        elif name not in again:
            assert f"{module}.{name}" in there, name


@pytest.mark.slow
def test_pages_need_no_network(built: Path) -> None:
    """No page loads a script, style, font or picture from another host."""
    for path in built.rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|img|link|iframe)\b[^>]*?(?:src|href)="(https?:[^"]*)"', path.read_text("utf-8")
        )
        assert loaded == [], path.relative_to(built)

"""The example of a third party's backend is small, built of public names, and all of it is in the documentation."""

from __future__ import annotations

import ast
import io
import re
import tokenize
import tomllib
from pathlib import Path

import yaml  # type: ignore[import-untyped]  # its stubs are for one call

import nova_imagecache
from nova_imagecache import backends, testing

REPO = Path(__file__).resolve().parents[2]
PROJECT = REPO / "examples/nova-imagecache-btrfs"
SOURCES = sorted((PROJECT / "src").rglob("*.py"))
PAGE = REPO / "docs/how-to/write-a-backend.md"
_INCLUDED = re.compile(r"^```\{literalinclude\} (\S+)\n((?::.*\n)*)```$", re.MULTILINE)


def test_it_is_under_250_lines_of_code() -> None:
    """Blank lines, comments and docstrings are not counted."""
    assert sum(len(_code_lines(path)) for path in SOURCES) < 250


def test_it_imports_public_names_only() -> None:
    """What an author can read about, and what stays: no name with an underscore, no module that the kit hides."""
    public = {"nova_imagecache": {*nova_imagecache.__all__, "backends", "testing", "__version__"}}
    public |= {"nova_imagecache.backends": set(backends.__all__), "nova_imagecache.testing": set(testing.__all__)}
    for path in [*SOURCES, *(PROJECT / "tests").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "nova_imagecache":
                assert {alias.name for alias in node.names} <= public[node.module or ""], path.name
            if isinstance(node, ast.Import):
                imported = {alias.name for alias in node.names if alias.name.startswith("nova_imagecache")}
                assert imported <= {"nova_imagecache", "nova_imagecache_btrfs"}, path.name
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "backends":
                assert node.attr in backends.__all__, f"{path.name}: backends.{node.attr}"


def test_the_page_includes_what_there_is() -> None:
    """Each file is there, and holds the places that the page names."""
    included = _included()
    assert len(included) > 8
    assert all(lines for _, lines in included)


def test_the_page_leaves_no_line_out() -> None:
    """Who reads the page from top to bottom has read the backend."""
    shown: dict[Path, set[int]] = {}
    for path, lines in _included():
        shown.setdefault(path, set()).update(lines)
    for path in SOURCES:
        if path.name != "__init__.py":
            assert _code_lines(path) - shown.get(path, set()) == set(), path.name


def test_the_page_shows_the_projects_own_file() -> None:
    """The entry point on the page is the one that the project has."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))
    entry = project["project"]["entry-points"]["nova_imagecache.backends"]["btrfs"]
    assert entry == "nova_imagecache_btrfs:BtrfsBackend"
    assert PROJECT / "pyproject.toml" in {path for path, _ in _included()}


def _included() -> list[tuple[Path, range]]:
    """What the page includes: each file, and the lines of it."""
    found = []
    for target, text in _INCLUDED.findall(PAGE.read_text(encoding="utf-8")):
        path = (PAGE.parent / target).resolve()
        options = yaml.safe_load(re.sub(r"^:(\S+):", r"\1: ", text, flags=re.MULTILINE)) or {}
        found.append((path, _lines(path, options)))
    return found


def _lines(path: Path, options: dict[str, str]) -> range:
    """What Sphinx takes for these options; an error where there is no such place."""
    text = path.read_text(encoding="utf-8").splitlines()
    if "pyobject" in options:
        node = _found(path, options["pyobject"])
        return range(min([node.lineno, *(one.lineno for one in node.decorator_list)]), (node.end_lineno or 0) + 1)
    start = next(i for i, line in enumerate(text) if options.get("start-at", "") in line)
    end = len(text)
    if "end-before" in options:
        end = next(i for i, line in enumerate(text) if i > start and options["end-before"] in line)
    return range(start + 1, end + 1)


def _found(path: Path, name: str) -> ast.FunctionDef | ast.ClassDef:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    *outer, last = name.split(".")
    for part in outer:
        body = next(one for one in body if isinstance(one, ast.ClassDef) and one.name == part).body
    return next(one for one in body if isinstance(one, ast.FunctionDef | ast.ClassDef) and one.name == last)


def _code_lines(path: Path) -> set[int]:
    text = path.read_text(encoding="utf-8")
    words: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            words |= set(range(docstring.lineno, (docstring.end_lineno or 0) + 1))
    nothing = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in nothing:
            code |= set(range(token.start[0], token.end[0] + 1))
    return code - words

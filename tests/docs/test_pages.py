"""The pages cannot rot: their code runs, and their links lead somewhere."""

from __future__ import annotations

import ast
import configparser
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import yaml  # type: ignore[import-untyped]  # its stubs are for one call

from nova_imagecache import _plugins
from nova_imagecache._config import CacheConfig
from nova_imagecache.backends import BackendPaths

from .ground import RUNNING, Ground
from .pages import DOCS, LANGUAGES, REPO, Block, blocks, commands, name, pages, shown

PAGES = pages()
ELSEWHERE = {
    "README.md": "tests/docs/test_pages.py",
    "docs/tutorial/first-cache.md": "tests/docs/test_pages.py",
    "docs/how-to/glance.md": "tests/docs/test_pages_services.py",
    "docs/how-to/ceph.md": "tests/docs/test_pages_services.py",
    "docs/tutorial/first-guest.md": "tests/examples/test_first_guest.py",
}
"""Pages that need another ground than a cache over a directory of images, and the tests that run them."""


def ids(page: Path) -> str:
    return name(page)


HERE = [
    page
    for page in PAGES
    if name(page) not in ELSEWHERE and any(block.language in RUNNING and block.reason is None for block in blocks(page))
]


@pytest.mark.parametrize("page", HERE, ids=ids)
def test_a_page_runs_from_top_to_bottom(page: Path, ground: Ground) -> None:
    """Python and console blocks run one after the other, and print what the page shows."""
    ground.walk(page)


@pytest.mark.parametrize(("page", "test"), ELSEWHERE.items())
def test_a_page_that_needs_more_is_run_by_a_test_of_its_own(page: str, test: str) -> None:
    """The test is there, and names the page."""
    assert Path(page).name in (REPO / test).read_text(encoding="utf-8")


def test_the_first_tutorial_runs_from_an_empty_directory(bare: Ground) -> None:
    """A beginner who has nothing gets what the text says."""
    assert bare.walk(DOCS / "tutorial/first-cache.md") > 12


def test_the_source_that_a_page_writes_keeps_the_contract(tmp_path: Path) -> None:
    """The classes of the page on sources, as they stand, in a file for pytest: every promise that a shelf can keep."""
    code = [block.code for block in blocks(DOCS / "how-to/write-a-source.md") if block.language == "python"]
    classes = [text for text in code if text.startswith(("from contextlib", "import hashlib"))]
    assert len(classes) == 2
    (tmp_path / "test_shelf.py").write_text("\n".join(classes))
    argv = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
        "--rootdir",
        str(tmp_path),
    ]
    done = subprocess.run([*argv, "test_shelf.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 8, done.stdout


def test_the_readme_runs(ground: Ground) -> None:
    """The twenty lines that everybody sees first; Glance and its places are the only things that are others."""
    here = ground.directory
    booted: list[tuple[Path, str]] = []
    ground.names["boot"] = lambda *disk: booted.append(disk)
    ground.replaced |= {
        "/var/lib/nova/": f"{here}/",
        'source="glance"': 'source="directory"',
        '{"cloud": "mycloud"}': f'{{"path": "{here}/images"}}',
    }
    assert ground.walk(REPO / "README.md") == 1
    assert [(path.name, disk_format) for path, disk_format in booted] == [("disk", "qcow2")]


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_a_block_is_in_a_language_that_is_looked_at(page: Path) -> None:
    """A block in another language would be looked at by nobody; one that is not run says why."""
    for block in blocks(page):
        assert block.language in ("", *LANGUAGES), f"{block}: {block.language}"
        assert block.reason is None or len(block.reason) > 10, f"{block}: a reason, please"


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_python_that_does_not_run_still_imports_what_exists(page: Path) -> None:
    """A name imported from the library on a page is one it has, whether the block runs or not."""
    for block in blocks(page):
        if block.language != "python":
            continue
        for node in ast.walk(ast.parse(block.code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "nova_imagecache":
                module = __import__(node.module or "", fromlist=["x"])
                for imported in node.names:
                    assert hasattr(module, imported.name), f"{block}: {node.module} has no {imported.name}"


def read_toml(block: Block, tmp_path: Path) -> None:
    values = tomllib.loads(block.code)
    if "project" in values:
        groups = values["project"].get("entry-points", {})
        known = {_plugins.BACKENDS, _plugins.SOURCES}
        assert not {group for group in groups if group.startswith("nova_imagecache")} - known, str(block)
        return
    config = CacheConfig.from_mapping({"root": str(tmp_path), **values})
    _plugins.load_backend(config.backend, config.backend_options, BackendPaths(root=tmp_path, disks_dir=tmp_path))
    _plugins.load_source(config.source, config.source_options)


def read_ini(block: Block, _tmp_path: Path) -> None:
    # oslo.config has options that may be given more than once
    configparser.ConfigParser(interpolation=None, strict=False).read_string(block.code)


READERS: dict[str, Callable[[Block, Path], object]] = {
    "toml": read_toml,
    "ini": read_ini,
    "yaml": lambda block, _: yaml.safe_load(block.code),
    "json": lambda block, _: json.loads(block.code),
    "xml": lambda block, _: ET.fromstring(block.code),
}


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_configuration_on_a_page_is_taken(page: Path, tmp_path: Path) -> None:
    """What a page says to write into a file is read without a complaint, by the plug-ins that it names as well."""
    for block in blocks(page):
        if block.language in READERS and block.reason is None:
            try:
                READERS[block.language](block, tmp_path)
            except Exception as err:
                raise AssertionError(f"{block}: {err}") from err


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_to_files(page: Path) -> None:
    """Every relative link and picture of a page leads to something in the repository."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{name(page)}: {target}"


def test_every_page_is_in_a_table_of_contents() -> None:
    """A page that no toctree has is found by nobody."""
    known = {path.resolve() for path in DOCS.rglob("*.md") if "_build" not in path.parts}
    reached = {DOCS / "index.md"}
    waiting = [DOCS / "index.md"]
    while waiting:
        page = waiting.pop()
        for tree in re.findall(
            r"^```\{toctree\}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
        ):
            for entry in tree.splitlines():
                if entry and not entry.startswith(":"):
                    found = {path.resolve() for path in page.parent.glob(f"{entry}.md")} - reached
                    reached |= found
                    waiting += found
    assert reached == known


class TestPages:
    """The reading of pages itself."""

    def test_a_console_block_is_split_into_commands(self) -> None:
        """A here-document, a loop, a line that ends with a backslash are whole; the rest is what they print."""
        found = list(commands("$ cat <<END\na\nEND\n$ echo a \\\n  b\na b\n$ for x in c; do\n  echo $x\ndone\nc\n"))
        assert [(one.text, one.output) for one in found] == [
            ("cat <<END\na\nEND", ""),
            ("echo a \\\n  b", "a b"),
            ("for x in c; do\n  echo $x\ndone", "c"),
        ]

    @pytest.mark.parametrize(
        ("expected", "real", "same"),
        [
            ("a b", "a   b", True),
            ("a ... c", "a b c", True),
            ("a ... c", "a c", True),
            ("id ...ms", "id 12ms", True),
            ("a b", "a c", False),
            ("", "anything", True),
        ],
    )
    def test_what_is_shown_is_compared(self, expected: str, real: str, same: bool) -> None:
        """Three dots stand for anything."""
        assert shown(expected, real) is same

    def test_a_reason_belongs_to_the_next_block_alone(self, tmp_path: Path) -> None:
        """A block that is not run says why, in a comment before it."""
        page = tmp_path / "page.md"
        page.write_text("<!-- not run: needs a cloud -->\n```python\na\n```\n\ntext\n\n```python\nb\n```\n")
        assert [block.reason for block in blocks(page)] == ["needs a cloud", None]

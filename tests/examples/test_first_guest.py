"""The tutorial on the first guest says what happens: its commands run as they stand, on a real libvirtd."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from docs.ground import Ground as Reader
from docs.pages import DOCS, REPO, blocks
from services.libvirtd_ground import Ground
from services.libvirtd_hosts import forget_guests

PAGE = DOCS / "tutorial/first-guest.md"
_INCLUDED = re.compile(r"^```\{literalinclude\} (\S+)\n:pyobject: (\w+)\.(\w+)\n:dedent:\n```$", re.MULTILINE)


@pytest.mark.services
def test_a_reader_gets_what_the_page_says(libvirt_ground: Ground) -> None:
    """From the first command to the last, in a checkout, with nothing but libvirt."""
    here, _ = libvirt_ground.places()
    for name in ("examples", "tests"):
        (here / name).symlink_to(REPO / name)
    reader = Reader(here)
    del reader.environ["PYTHONPATH"]  # the page says itself where modules are
    reader.environ |= {"LIBVIRT_DEFAULT_URI": libvirt_ground.daemon.uri, "PYTHONWARNINGS": "error"}
    try:
        assert reader.walk(PAGE) == sum(block.reason is None for block in blocks(PAGE))
    finally:
        forget_guests(libvirt_ground)


def test_what_is_included_exists() -> None:
    """Every part of the driver that the page shows is there, and the page shows most of it."""
    included = _INCLUDED.findall(PAGE.read_text(encoding="utf-8"))
    [path] = {path for path, _, _ in included}
    tree = ast.parse(Path(PAGE.parent, path).read_text(encoding="utf-8"))
    for _, outer, inner in included:
        [found] = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == outer]
        assert inner in {node.name for node in found.body if isinstance(node, ast.FunctionDef)}
    assert len(included) >= 8

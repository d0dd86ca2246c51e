"""The page of versions says what the code says."""

from __future__ import annotations

import importlib
import pkgutil
import re

import nova_imagecache
from harness.built import PROJECT, REPO
from nova_imagecache import Backend, _layout, _records
from nova_imagecache.testing import CONTRACT_VERSION

PAGE = (REPO / "docs/explanation/versions.md").read_text(encoding="utf-8")


def numbers() -> list[str]:
    """The second column of the first table."""
    return re.findall(r"^\| [^|]*\| ([^|]+) \| [^|]* \| [^|]* \|$", PAGE, re.MULTILINE)[1:]


def test_the_numbers_are_those_of_the_code() -> None:
    """Release, contract, suites, layout, record; the inspector's moves too often to be written down."""
    version = PROJECT["project"]["version"]
    assert nova_imagecache.__version__ == version
    contract = [Backend.api_version, CONTRACT_VERSION]
    storage = [_layout.LAYOUT, _records.RECORD_VERSION]
    assert numbers() == [version, *map(str, contract), *map(str, storage), "grows"]


def test_every_public_module_has_its_place_on_the_page() -> None:
    """A module without a leading underscore is a promise, or it gets one."""
    found = {"nova_imagecache"}
    for module in pkgutil.walk_packages(nova_imagecache.__path__, "nova_imagecache."):
        if not any(part.startswith("_") for part in module.name.split(".")):
            found.add(module.name)
    table = PAGE.partition("## What is public")[2].partition("## Semantic versioning")[0]
    named = {name for row in re.findall(r"^\| ([^|]*) \|", table, re.MULTILINE) for name in re.findall(r"`(\S+)`", row)}
    assert named == found


def test_modules_of_which_all_is_public_say_what_that_is() -> None:
    """Their ``__all__`` names what they have, once, and nothing private but the version."""
    for name in ("nova_imagecache", "nova_imagecache.backends", "nova_imagecache.sources", "nova_imagecache.testing"):
        module = importlib.import_module(name)
        assert len(module.__all__) == len(set(module.__all__))
        for public in module.__all__:
            assert getattr(module, public) is not None, f"{name}.{public}"
            assert not public.startswith("_")

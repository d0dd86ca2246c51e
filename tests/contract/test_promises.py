"""A failed test of a contract says in words which promise was broken, and where that is documented."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import nova_imagecache
from nova_imagecache.testing import CONTRACT_VERSION, BackendContract, Promise, SourceContract, promises

REPO = Path(__file__).resolve().parents[2]
PAGE = "docs/reference/contracts.md"
CONTRACTS = (BackendContract, SourceContract)

SUITE = '''
import pytest
from nova_imagecache.testing import BackendContract, MemoryBackend


class Loses(MemoryBackend):
    """What was retired does not come back."""

    def restore_base(self, retired):
        self.storage.retired.pop(retired.token)


class Forgets(MemoryBackend):
    """Its capacity is an error of its own."""

    def capacity(self):
        raise ZeroDivisionError("a bug of the plug-in")


class TestLoses(BackendContract):
    fault_modules = ()

    def make_backend(self, paths):
        return Loses()


class TestForgets(TestLoses):
    def make_backend(self, paths):
        return Forgets()

    def read_disk(self, backend, disk):
        raise AssertionError("never reached")


class TestBare(TestLoses):
    def filled(self, backend, paths):
        pytest.skip("this storage is never full")
'''


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What pytest tells the author of a backend that breaks its promises."""
    suite = tmp_path_factory.mktemp("suite") / "test_loses.py"
    suite.write_text(SUITE)
    tests = "test_restored_base_is_whole or test_usage_is_sane or test_full_while_creating"
    argv = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
        "-q",
        "-rs",
        "-k",
        tests,
        str(suite),
    ]
    done = subprocess.run(argv, cwd=suite.parent, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout


def test_a_broken_promise_is_told_in_words(report: str) -> None:
    """What was expected, the promise, the test that watches over it, the page and the docstrings that make it."""
    told = f"""
E           AssertionError: broken promise: a restored base is found
E           the promise: Restoring gives back the name, the record, the bytes and the marks.
E           watched by: RemovalContract.test_restored_base_is_whole, contract version {CONTRACT_VERSION}
E           documented: {PAGE}#removal; help("nova_imagecache.backends.Backend.retire_base"),
"""
    assert _plain(told) in _plain(report)


def test_an_error_of_the_plug_in_is_told_the_same_way(report: str) -> None:
    """Not only what the contract compares: whatever a backend raises where it should not."""
    error = report.split("ZeroDivisionError: a bug of the plug-in")[1]
    assert "the promise: ``usage`` tells a base's sizes" in error
    assert f"documented: {PAGE}#publishing" in error


def test_a_skipped_test_is_no_broken_promise(report: str) -> None:
    """What a storage cannot have is said, and blamed on nobody."""
    assert "this storage is never full" in report
    skipped = next(line for line in report.splitlines() if "this storage is never full" in line)
    assert "promise" not in skipped


@pytest.mark.parametrize("contract", CONTRACTS)
def test_every_test_of_a_contract_is_a_promise(contract: type) -> None:
    """Each has words, a chapter, and names that say so; none is left out of the list."""
    tests = {name for name in dir(contract) if name.startswith("test_")}
    told = promises(contract)
    assert {promise.test.partition(".")[2] for promise in told} == tests
    assert len(tests) > 15
    for promise in told:
        assert promise.text.endswith("."), promise
        for name in promise.names:
            assert inspect.getdoc(_named(name)), f"{promise.test}: {name} says nothing"


@pytest.mark.parametrize(
    "promise", [one for contract in CONTRACTS for one in promises(contract)], ids=lambda one: one.test
)
def test_every_promise_stands_in_the_reference(promise: Promise) -> None:
    """In the chapter that a failure names, in the very words."""
    chapters = _chapters((REPO / PAGE).read_text(encoding="utf-8"))
    assert promise.chapter in chapters
    assert _plain(promise.text.replace("``", "`")) in _plain(chapters[promise.chapter])


def test_the_reference_lists_nothing_else() -> None:
    """A promise that no test watches over any more is gone from the page."""
    told = [one for contract in CONTRACTS for one in promises(contract)]
    chapters = _chapters((REPO / PAGE).read_text(encoding="utf-8"))
    listed = [line for text in chapters.values() for line in re.findall(r"^\* (.*)", text, re.MULTILINE)]
    assert len(listed) == len(told)


def test_tests_keep_their_names_and_their_arguments() -> None:
    """A promise is told around a test, which pytest sees as it was: fixtures, parameters, docstring."""
    test = BackendContract.test_one_winner
    assert (test.__name__, list(inspect.signature(test).parameters)) == ("test_one_winner", ["self", "backend"])
    assert test.__doc__ is not None


def _named(name: str) -> object:
    found: object = nova_imagecache
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _chapters(page: str) -> dict[str, str]:
    """The page's sections, by the anchors that their headings have."""
    parts = re.split(r"^#+ (.*)$", page, flags=re.MULTILINE)
    return {
        re.sub(r"[^\w-]", "", head.lower().replace(" ", "-")): text
        for head, text in zip(parts[1::2], parts[2::2], strict=True)
    }


def _plain(text: str) -> str:
    return " ".join(text.split())

"""Words for a broken promise: what was promised, which test keeps watch over it, and where it is documented."""

from __future__ import annotations

import functools
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from nova_imagecache.backends import Backend
from nova_imagecache.exceptions import ImageCacheError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CONTRACT_VERSION = Backend.api_version
"""The version of the contracts that the suites test: the ``api_version`` of the interface that makes these promises.

Within a version the tests may look closer, but never ask for more than that version's documentation promises.
"""

PAGE = "docs/reference/contracts.md"
"""Where every promise is listed."""

_E = TypeVar("_E", bound=BaseException)
_C = TypeVar("_C", bound=type)


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """One promise of a contract.

    Attributes:
        text: the promise, in words: the first paragraph of the test's docstring.
        test: the test that watches over it, "Class.test_name".
        chapter: the section of the reference that lists it, as the anchor of its heading.
        names: what in ``nova_imagecache`` makes the promise in its docstring ("backends.Backend.retire_base").
    """

    text: str
    test: str
    chapter: str
    names: tuple[str, ...]

    def report(self) -> str:
        """What is added to the error of a test that failed."""
        told = ", ".join(f'help("nova_imagecache.{name}")' for name in self.names)
        return (
            f"the promise: {self.text}\n"
            f"watched by: {self.test}, contract version {CONTRACT_VERSION}\n"
            f"documented: {PAGE}#{self.chapter}; {told}"
        )


def chapter(anchor: str, *names: str) -> Callable[[_C], _C]:
    """Ties the tests of a class to the section ``anchor`` of the reference and to the documented ``names``.

    Whatever a test of the class raises then says in a note which promise was broken, and where it is documented.
    """

    def tied(cls: _C) -> _C:
        for name, test in list(vars(cls).items()):
            if name.startswith("test_"):
                told = Promise(text=_words(test), test=f"{cls.__name__}.{name}", chapter=anchor, names=names)
                setattr(cls, name, _noted(test, told))
        return cls

    return tied


def promises(contract: type) -> tuple[Promise, ...]:
    """Every promise that the tests of ``BackendContract``, ``SourceContract`` or a subclass watch over, in order."""
    names = dict.fromkeys(name for cls in contract.__mro__ for name in vars(cls) if name.startswith("test_"))
    tests = (getattr(contract, name) for name in names)
    return tuple(test.promise for test in tests if hasattr(test, "promise"))


def _words(test: Callable[..., None]) -> str:
    return " ".join((test.__doc__ or "").strip().split("\n\n")[0].split())


def _noted(test: Callable[..., None], told: Promise) -> Callable[..., None]:
    @functools.wraps(test)
    def noted(*args: Any, **kwargs: Any) -> None:
        __tracebackhide__ = True
        try:
            test(*args, **kwargs)
        except Exception as err:  # reason: it goes on as it is, with words
            err.add_note(told.report())
            raise

    vars(noted)["promise"] = told
    return noted


# --- what tests are written in ---------------------------------------------------------------------------------------


def promise(kept: object, words: str) -> None:
    """AssertionError in ``words`` unless the promise was kept."""
    if not kept:
        raise AssertionError(f"broken promise: {words}")


@contextmanager
def at_place(words: str) -> Iterator[None]:
    """Whatever the block raises says in a note where that was, unless its own words do."""
    try:
        yield
    except Exception as err:  # reason: it goes on as it is, with words
        if words not in str(err):
            err.add_note(words)
        raise


def same(actual: object, expected: object, words: str) -> None:
    """AssertionError in ``words``, with what differs, unless both are equal."""
    if actual != expected:
        raise AssertionError(f"broken promise: {words}: {_difference(actual, expected)}")


def refused(error: type[_E], call: Callable[[], object], words: str) -> _E:
    """The ``error`` that the call raised; AssertionError in ``words`` if it raised none or another of our errors."""
    try:
        answer = call()
    except error as err:
        return err
    except ImageCacheError as err:
        raise AssertionError(f"broken promise: {words}: expected {error.__name__}, got {err!r}") from err
    raise AssertionError(f"broken promise: {words}: expected {error.__name__}, got the answer {answer!r}")


def _difference(actual: object, expected: object) -> str:
    if not (isinstance(actual, bytes) and isinstance(expected, bytes)):
        return f"expected {expected!r}, got {actual!r}"
    if len(actual) != len(expected):
        return f"expected {len(expected)} bytes, got {len(actual)}"
    first = next(i for i, (a, b) in enumerate(zip(actual, expected, strict=True)) if a != b)
    return f"bytes differ from offset {first} on: expected {expected[first : first + 8]!r}, got {actual[first:][:8]!r}"

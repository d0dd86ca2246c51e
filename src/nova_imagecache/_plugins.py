"""Finds backends and sources by name. The only importer of stevedore."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, TypeVar, cast

from nova_imagecache import _guard
from nova_imagecache.backends import Backend, BackendPaths, BackendProperties
from nova_imagecache.exceptions import BackendError, BackendNotFoundError, ConfigError, SourceError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from nova_imagecache.sources import ImageSource, LoadableSource

BACKENDS = "nova_imagecache.backends"
SOURCES = "nova_imagecache.sources"

_OPTION = re.compile(r"(\w+): ")
"""How a problem begins that names its option."""

_HANDED = ("root", "disks_dir", "group", "qemu_user")
"""Options of the configuration itself that a plug-in is handed beside its own, as BackendPaths."""

_UNLOADED = "Look at the cause: install the plug-in again with all that it needs, or correct its options"

_T = TypeVar("_T")


def available(group: str) -> tuple[str, ...]:
    """The names installed in an entry-point group, sorted; loads none of them."""
    from importlib.metadata import entry_points

    return tuple(sorted({entry.name for entry in entry_points(group=group)}))


def available_backends() -> tuple[str, ...]:
    """The names of the installed backends."""
    return available(BACKENDS)


def available_sources() -> tuple[str, ...]:
    """The names of the installed image sources."""
    return available(SOURCES)


def _load(group: str, name: str) -> Any:
    # stevedore's ExtensionManager would import every plug-in of the group to answer one name, DriverManager one.
    # invoke_on_load stays off: constructing is ours, so that what a plug-in raises can be told apart.
    from stevedore.driver import DriverManager
    from stevedore.exception import NoMatches

    try:
        return DriverManager(group, name, invoke_on_load=False, on_load_failure_callback=_raise_load_failure).driver
    except NoMatches as err:
        raise BackendNotFoundError(name, available(group), group=group) from err


def _raise_load_failure(_manager: object, _entry_point: object, error: BaseException) -> None:
    raise error


def load_backend(name: str, options: Mapping[str, Any], paths: BackendPaths) -> Backend:
    """The backend of that name, constructed and not yet guarded.

    Raises:
        BackendNotFoundError: no such plug-in; lists those that are there.
        BackendError: the plug-in cannot be imported, is of another api_version, or failed to construct.
        ConfigError: the plug-in refused its options.
    """

    def failed(text: str) -> BackendError:
        return BackendError(f"backend {name!r} cannot be loaded: {text}", backend=name, stage="loading", todo=_UNLOADED)

    with _guard.translated(failed):
        cls = _load(BACKENDS, name)
    version = getattr(cls, "api_version", None)
    if not (isinstance(cls, type) and issubclass(cls, Backend)) or version != Backend.api_version:
        raise BackendError(
            f"plug-in {name!r} is no backend of api_version {Backend.api_version} (it says {version!r})",
            backend=name,
            stage="loading",
            todo="Install a release of the plug-in that matches this library",
        )
    with _guard.translated(failed):
        backend = cls(options, paths)
        properties = backend.properties
    if not isinstance(properties, BackendProperties):
        raise failed(f"its properties are no BackendProperties but {properties!r:.80}")
    return backend


def load_source(name: str, options: Mapping[str, Any]) -> ImageSource:
    """The source of that name, constructed and not yet guarded.

    Raises:
        BackendNotFoundError: no such plug-in; lists those that are there.
        SourceError: the plug-in cannot be imported, has no ``from_options``, or failed in it.
        ConfigError: the plug-in refused its options.
    """

    def failed(text: str) -> SourceError:
        return SourceError(f"source {name!r} cannot be loaded: {text}", stage="loading", todo=_UNLOADED)

    with _guard.translated(failed):
        cls = cast("type[LoadableSource]", _load(SOURCES, name))
        return cls.from_options(options)


def unless_refused(table: str, options: Mapping[str, Any], load: Callable[[], _T], problems: list[str]) -> _T | None:
    """What ``load`` gives; None if the plug-in refused its ``options``: ``problems`` has got the reasons then.

    Each names its option as it stands in the configuration: a plug-in may be constructed without one, and need not know
    that its options come from ``table``. What it was handed beside them is the configuration's own.
    """
    try:
        return load()
    except ConfigError as err:
        for problem in err.problems:
            option = _OPTION.match(problem)
            own = option is not None and option[1] in _HANDED and option[1] not in options
            separator = "." if option is not None else ": "
            problems.append(problem if own or problem.startswith(table) else f"{table}{separator}{problem}")
        return None

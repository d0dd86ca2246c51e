"""Plug-ins are found by name, and whatever is wrong with one is said with its name."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stevedore import ExtensionManager

from nova_imagecache import CacheConfig, ImageCache, _plugins, available_backends, available_sources
from nova_imagecache.backends import Backend, BackendPaths
from nova_imagecache.backends.qcow2 import Qcow2Backend
from nova_imagecache.exceptions import BackendError, BackendNotFoundError, ConfigError, ImageCacheError, SourceError
from nova_imagecache.sources.directory import DirectorySource

CODE = '''
from nova_imagecache.backends import ConfigError
from nova_imagecache.backends.file import FileBackend
from nova_imagecache.testing import MemoryBackend

class Good(FileBackend):
    """A backend."""

class Raises(FileBackend):
    def __init__(self, options, paths):
        raise ZeroDivisionError("in my constructor")

class Refuses(FileBackend):
    def __init__(self, options, paths):
        raise ConfigError(["backend_options.colour: unknown option"])

class Old(FileBackend):
    api_version = 0

class New(FileBackend):
    api_version = 2

class NoVersion:
    pass

class NotABackend:
    api_version = 1

class Abstract(__import__("nova_imagecache.backends").backends.Backend):
    api_version = 1

class NoProperties(FileBackend):
    properties = None

def function(options, paths):
    return Good(options, paths)

function.api_version = 1

value = 7

class Source:
    name = "mine"
    @classmethod
    def from_options(cls, options):
        if options.get("fail"):
            raise RuntimeError("no luck")
        if options.get("wrong"):
            raise ConfigError(["source_options.wrong: unknown option", "there is no such place"])
        return cls()
    def get(self, image_id):
        raise RuntimeError("no luck either")

class NoSource:
    pass
'''

BACKENDS = {
    "good": "Good",
    "raises": "Raises",
    "refuses": "Refuses",
    "old": "Old",
    "new": "New",
    "noversion": "NoVersion",
    "notabackend": "NotABackend",
    "abstract": "Abstract",
    "noproperties": "NoProperties",
    "function": "function",
    "value": "value",
    "noname": "Nowhere",
}


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution with good and bad plug-ins, as pip would have put it there."""
    where = tmp_path / "site"
    info = where / "imagecache_thirdparty-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: imagecache-thirdparty\nVersion: 1.0\n")
    lines = ["[nova_imagecache.backends]", *(f"{name} = thirdparty:{attr}" for name, attr in BACKENDS.items())]
    lines += ["broken = thirdparty_broken:Backend", "exits = thirdparty_exits:Backend", "nomodule = no_such_module:X"]
    lines += ["[nova_imagecache.sources]", "mine = thirdparty:Source", "nosource = thirdparty:NoSource"]
    lines += ["broken = thirdparty_broken:Source"]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    (where / "thirdparty.py").write_text(CODE)
    (where / "thirdparty_broken.py").write_text("import no_such_dependency\n")
    (where / "thirdparty_exits.py").write_text("raise ValueError('at import')\n")
    monkeypatch.syspath_prepend(str(where))
    # stevedore remembers groups for the life of the process
    monkeypatch.setattr(ExtensionManager, "ENTRY_POINT_CACHE", {})
    for name in ("thirdparty", "thirdparty_broken", "thirdparty_exits"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    importlib.invalidate_caches()


@pytest.fixture
def paths(tmp_path: Path) -> BackendPaths:
    return BackendPaths(root=tmp_path / "cache", disks_dir=tmp_path / "disks")


def refused(paths: BackendPaths, name: str) -> BackendError:
    with pytest.raises(BackendError) as caught:
        _plugins.load_backend(name, {}, paths)
    assert caught.value.stage == "loading"
    assert caught.value.backend == name
    assert name in str(caught.value)
    return caught.value


def test_our_own_plugins_are_found() -> None:
    """By the entry points of this distribution, beside the third party's."""
    assert {"file", "qcow2", "good"} <= set(available_backends())
    assert {"glance", "directory", "mine"} <= set(available_sources())
    assert list(available_backends()) == sorted(available_backends())


def test_a_backend_is_loaded_by_name(paths: BackendPaths) -> None:
    """Ours and a third party's, with options and paths."""
    backend = _plugins.load_backend("qcow2", {"base_format": "native"}, paths)
    assert isinstance(backend, Qcow2Backend)
    assert backend.options.base_format == "native"
    assert type(_plugins.load_backend("good", {}, paths)).__name__ == "Good"


def test_loading_one_imports_no_other(paths: BackendPaths) -> None:
    """A broken plug-in harms only who asks for it."""
    _plugins.load_backend("file", {}, paths)
    assert "thirdparty" not in sys.modules
    assert "thirdparty_broken" not in sys.modules


def test_an_unknown_backend_lists_those_that_are_there(paths: BackendPaths) -> None:
    """The name may be misspelt, or its package missing."""
    error = refused(paths, "zfs")
    assert isinstance(error, BackendNotFoundError)
    assert error.name == "zfs"
    assert {"file", "good", "qcow2"} <= set(error.available)
    assert "file" in str(error)


@pytest.mark.parametrize("name", ["", "file:", "file = x", "../file", "File", "qcow2 "])
def test_names_that_are_none_are_not_found(paths: BackendPaths, name: str) -> None:
    """Nothing is guessed."""
    with pytest.raises(BackendNotFoundError):
        _plugins.load_backend(name, {}, paths)


def test_an_unknown_source_lists_those_that_are_there() -> None:
    """In their own group."""
    with pytest.raises(BackendNotFoundError) as caught:
        _plugins.load_source("swift", {})
    assert {"directory", "glance", "mine"} <= set(caught.value.available)
    assert "file" not in caught.value.available
    assert caught.value.group == "nova_imagecache.sources"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("broken", "no_such_dependency"),
        ("exits", "at import"),
        ("nomodule", "no_such_module"),
        ("noname", "Nowhere"),
        ("raises", "in my constructor"),
        ("abstract", "abstract"),
    ],
)
def test_a_backend_that_cannot_be_loaded_says_why(paths: BackendPaths, name: str, words: str) -> None:
    """With the cause, for its author."""
    error = refused(paths, name)
    assert words in str(error)
    assert error.__cause__ is not None


@pytest.mark.parametrize("name", ["old", "new", "noversion", "notabackend", "function", "value"])
def test_what_is_no_backend_of_this_version_is_refused(paths: BackendPaths, name: str) -> None:
    """Before it is constructed."""
    assert "api_version 1" in str(refused(paths, name))


def test_a_backend_without_properties_is_refused(paths: BackendPaths) -> None:
    """The core would trip over it later, far from its name."""
    assert "properties" in str(refused(paths, "noproperties"))


def test_refused_options_stay_a_config_error(paths: BackendPaths) -> None:
    """With the plug-in's own list of problems."""
    with pytest.raises(ConfigError) as caught:
        _plugins.load_backend("refuses", {}, paths)
    assert caught.value.problems == ("backend_options.colour: unknown option",)


@pytest.mark.parametrize("name", ["file", "qcow2"])
def test_our_backends_say_all_that_is_wrong_with_their_options(paths: BackendPaths, name: str) -> None:
    """Unknown names and wrong values together."""
    options = {"base_format": "vmdk", "preallocate": True, "refrence": "link", "colour": 1, "reference": []}
    with pytest.raises(ConfigError) as caught:
        _plugins.load_backend(name, options, paths)
    named = sorted(problem.partition(":")[0].partition(".")[2] for problem in caught.value.problems)
    assert named == ["base_format", "colour", "preallocate", "reference", "refrence"]


def test_a_source_is_loaded_by_name(tmp_path: Path) -> None:
    """Ours and a third party's."""
    assert isinstance(_plugins.load_source("directory", {"path": str(tmp_path)}), DirectorySource)
    assert _plugins.load_source("mine", {}).name == "mine"


@pytest.mark.parametrize(("name", "options"), [("broken", {}), ("nosource", {}), ("mine", {"fail": True})])
def test_a_source_that_cannot_be_loaded_says_why(name: str, options: dict[str, Any]) -> None:
    """It comes out as our error that names it."""
    with pytest.raises(SourceError, match=name) as caught:
        _plugins.load_source(name, options)
    assert caught.value.stage == "loading"
    assert caught.value.__cause__ is not None
    assert "image service" not in str(caught.value)
    assert "plug-in" in str(caught.value)


def test_a_sources_refused_options_stay_a_config_error() -> None:
    """As a backend's."""
    with pytest.raises(ConfigError, match="wrong"):
        _plugins.load_source("mine", {"wrong": 1})


def test_a_cache_is_made_from_names(tmp_path: Path) -> None:
    """The whole way: configuration, plug-ins, and the plug-in's failure in a call."""
    config = CacheConfig(root=tmp_path / "cache", backend="good", source="mine")
    with ImageCache.from_config(config) as cache, pytest.raises(SourceError, match="no luck either") as caught:
        cache.ensure_base("img")
    assert "source mine failed in get" in str(caught.value)
    assert caught.value.image_id == "img"
    assert not (tmp_path / "cache" / "bases").exists()


@pytest.mark.parametrize(("backend", "colours"), [("refuses", ("colour",)), ("qcow2", ("colour", "reference"))])
@pytest.mark.parametrize(
    ("source", "source_options", "wrong"),
    [
        ("mine", {"wrong": 1}, ("", ".wrong")),
        ("directory", {"pat": "/x"}, (".pat", ".path")),
        ("glance", {"x": 1}, (".x",)),
    ],
)
def test_what_both_plugins_refuse_is_one_error(
    tmp_path: Path, backend: str, colours: tuple[str, ...], source: str, source_options: dict[str, Any], wrong: Any
) -> None:
    """Whoever writes a configuration reads of everything that is wrong with it at once."""
    config = CacheConfig(
        root=tmp_path,
        backend=backend,
        backend_options={"colour": 1, "reference": "chain"},
        source=source,
        source_options=source_options,
    )
    with pytest.raises(ConfigError) as caught:
        ImageCache.from_config(config)
    named = [problem.partition(":")[0] for problem in caught.value.problems]
    ours = [name for name in named if name.startswith("backend_options")]
    assert ours == [f"backend_options.{name}" for name in colours]
    assert sorted(named[len(ours) :]) == [f"source_options{name}" for name in wrong]


@pytest.mark.parametrize("backend", ["qcow2", "file"])
def test_what_is_wrong_with_the_configurations_own_options_is_told_as_theirs(tmp_path: Path, backend: str) -> None:
    """A group that is not there is no option of the backend, though the backend is who finds out."""
    config = CacheConfig(root=tmp_path, backend=backend, group="no-such-group", source="mine")
    with pytest.raises(ConfigError) as caught:
        ImageCache.from_config(config)
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["group"]


def test_a_plugins_option_may_be_called_as_one_of_the_configuration(tmp_path: Path) -> None:
    """Then it is the plug-in's."""
    config = CacheConfig(root=tmp_path, backend="qcow2", backend_options={"group": "x"}, source="mine")
    with pytest.raises(ConfigError, match=r"^backend_options\.group: "):
        ImageCache.from_config(config)


@pytest.mark.parametrize("name", sorted({*BACKENDS, "broken", "exits", "nomodule", "zfs"} - {"good"}))
def test_whatever_is_wrong_it_is_our_error(tmp_path: Path, name: str) -> None:
    """A service that starts with a bad configuration gets one kind of error."""
    with pytest.raises(ImageCacheError):
        ImageCache.from_config(CacheConfig(root=tmp_path, backend=name, source="mine"))


def test_the_contract_is_what_the_guard_wraps() -> None:
    """Every public method of the contract is one that the guard has."""
    from nova_imagecache._guard import GuardedBackend

    public: list[Callable[..., Any]] = [
        value for name, value in inspect.getmembers(Backend) if not name.startswith("_") and callable(value)
    ]
    assert public
    for method in public:
        assert getattr(GuardedBackend, method.__name__) is not method, method

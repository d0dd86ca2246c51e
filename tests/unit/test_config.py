"""CacheConfig: what it takes, and that it says all that is wrong at once."""

from __future__ import annotations

import dataclasses
import math
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from nova_imagecache import CacheConfig, ConfigError
from nova_imagecache._config import parse_duration, parse_size

GIB = 1 << 30


def test_the_root_is_enough() -> None:
    """Every other name has the documented default."""
    config = CacheConfig(root=Path("/var/cache/x"))
    assert config.disks_dir == Path("/var/cache/x/disks")
    assert (config.backend, config.source) == ("qcow2", "glance")
    assert (config.backend_options, config.source_options) == ({}, {})
    assert config.max_idle == timedelta(hours=24)
    assert config.lock_timeout == timedelta(hours=1)
    assert config.remove_unused is True
    assert config.allow_unverified is False
    assert (config.max_virtual_size, config.max_bytes, config.min_free_bytes) == (None, None, 0)
    assert config.max_concurrent_fetches == 4
    assert (config.group, config.qemu_user, config.nova_base_dir) == (None, None, None)
    assert (config.libvirt_uri, config.disk_dirs) == (None, ())


def test_a_configuration_is_frozen() -> None:
    """A cache is never told something else behind its back."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        CacheConfig(root=Path("/x")).backend = "file"  # type: ignore[misc]  # that is the point


def test_text_becomes_durations_sizes_and_paths() -> None:
    """As it comes out of a file."""
    config = CacheConfig.from_mapping(
        {"root": "/x", "disks_dir": "/y", "max_idle": "7d", "lock_timeout": 90, "max_bytes": "2G", "min_free_bytes": 5}
        | {"disk_dirs": ["/srv/b", "/srv/a", "/srv/b"]}
    )
    assert config.disk_dirs == (Path("/srv/b"), Path("/srv/a"))
    assert config.root == Path("/x")
    assert config.disks_dir == Path("/y")
    assert config.max_idle == timedelta(days=7)
    assert config.lock_timeout == timedelta(seconds=90)
    assert config.max_bytes == 2 * GIB
    assert config.min_free_bytes == 5


def test_toml_is_read_with_its_tables(tmp_path: Path) -> None:
    """Top-level keys are the attributes; plug-ins' options are tables."""
    path = tmp_path / "config.toml"
    path.write_text('root = "/x"\nmax_idle = "40m"\n[backend_options]\nbase_format = "native"\n')
    config = CacheConfig.from_toml(path)
    assert config.max_idle == timedelta(minutes=40)
    assert config.backend_options == {"base_format": "native"}
    assert CacheConfig.from_toml(str(path)) == config


@pytest.mark.parametrize("content", [b"root = ", b"\xff\xfe", b'root = "/x"\nroot = "/y"'])
def test_a_file_that_is_no_toml_is_a_config_error(tmp_path: Path, content: bytes) -> None:
    """With the file's name in it."""
    path = tmp_path / "config.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.toml"):
        CacheConfig.from_toml(path)


@pytest.mark.parametrize("values", [None, "root", ["root"]])
def test_what_is_no_mapping_is_a_config_error(values: Any) -> None:
    """Before any option is looked at."""
    with pytest.raises(ConfigError, match="no mapping of options"):
        CacheConfig.from_mapping(values)


def test_a_file_that_is_not_there_is_a_config_error(tmp_path: Path) -> None:
    """Nor is a directory a file."""
    for path in (tmp_path / "none.toml", tmp_path, "/a\0b"):
        with pytest.raises(ConfigError, match=str(path)):
            CacheConfig.from_toml(path)


@pytest.mark.parametrize(
    "disks",
    [
        *("/y", "/y/", "/y/.", "/x/../y", "/y/staging", "/y/trash/disks", "/y/disks/../bases", "/y/users", "/y/locks"),
        *("/y/quarantine", "/y/templates", "/y/adopted", "/y/pins/a/b", "/y/cache.json"),
    ],
)
def test_disks_cannot_lie_where_the_cache_keeps_its_own_files(disks: str) -> None:
    """What a sweep of the cache's own files finds there it removes."""
    with pytest.raises(ConfigError, match=r"disks_dir: .* give /y/disks or a directory elsewhere"):
        CacheConfig.from_mapping({"root": "/y", "disks_dir": disks})


@pytest.mark.parametrize("disks", ["/", "/y/disks", "/y/disks/vms", "/y/instances", "/yy", "/y/../staging", "/staging"])
def test_disks_may_lie_beside_around_and_below(disks: str) -> None:
    """Nova's cache is below its instances; names that the cache does not use are free."""
    assert CacheConfig.from_mapping({"root": "/y", "disks_dir": disks}).disks_dir == Path(disks)


def test_all_problems_come_at_once() -> None:
    """Nobody corrects a file once per mistake."""
    values = {
        "disks_dir": "relative",
        "backend": "",
        "backend_options": ["x"],
        "source": 7,
        "source_options": {1: 2},
        "max_idle": "1 fortnight",
        "remove_unused": "yes",
        "lock_timeout": -1,
        "max_virtual_size": "big",
        "max_bytes": -1,
        "min_free_bytes": True,
        "max_concurrent_fetches": 0,
        "allow_unverified": 1,
        "group": " ",
        "qemu_user": 107,
        "nova_base_dir": "",
        "libvirt_uri": ["qemu:///system"],
        "disk_dirs": ["/srv/a", "relative"],
        "max_idel": "24h",
        "colour": "red",
    }
    with pytest.raises(ConfigError) as caught:
        CacheConfig.from_mapping(values)
    named = sorted(problem.partition(":")[0] for problem in caught.value.problems)
    assert named == sorted([*values, "root"])
    assert "known: allow_unverified, backend" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("root", "relative"),
        ("root", "/a\0b"),
        ("root", ""),
        ("root", None),
        ("root", 7),
        ("libvirt_uri", ""),
        ("disk_dirs", "/srv/a"),
        ("disk_dirs", None),
        ("disk_dirs", [["/srv/a"]]),
        ("max_concurrent_fetches", -1),
        ("max_concurrent_fetches", "4"),
        ("max_concurrent_fetches", True),
        ("max_idle", math.inf),
        ("max_idle", math.nan),
        ("max_idle", "99999999999999w"),
        ("max_idle", None),
        ("lock_timeout", timedelta(seconds=-1)),
        ("max_bytes", 1.5),
    ],
)
def test_wrong_values_are_config_errors(name: str, value: Any) -> None:
    """Whatever a file can hold, nothing but a ConfigError comes out."""
    with pytest.raises(ConfigError) as caught:
        CacheConfig.from_mapping({"root": "/x", name: value})
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [name]


@pytest.mark.parametrize("name", ["backend_options", "source_options"])
def test_what_plug_ins_are_told_is_never_shown(name: str) -> None:
    """It may hold a token: neither a configuration that is logged nor a refusal shows it."""
    config = CacheConfig.from_mapping({"root": "/x", name: {"token": "hidden-token"}})
    assert "hidden-token" not in repr(config)
    for wrong in (["token=hidden-token"], "token=hidden-token", {7: "hidden-token"}):
        with pytest.raises(ConfigError, match=name) as caught:
            CacheConfig.from_mapping({"root": "/x", name: wrong})
        assert "hidden-token" not in str(caught.value)


def test_options_may_be_any_mapping_and_are_copied() -> None:
    """What the caller does with its own afterwards changes nothing."""
    mine = {"base_format": "raw"}
    config = CacheConfig(root=Path("/x"), backend_options=MappingProxyType(mine))
    mine["base_format"] = "native"
    assert config.backend_options == {"base_format": "raw"}


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(0, 0), (1.5, 1.5), ("24h", 86400), ("40m", 2400), ("7d", 604800), ("1w", 604800), ("10s", 10), (" 1.5 h ", 5400)],
)
def test_durations(value: Any, seconds: float) -> None:
    """Seconds, or a number with its unit."""
    assert parse_duration(value) == timedelta(seconds=seconds)
    assert parse_duration(timedelta(seconds=seconds)) == timedelta(seconds=seconds)


@pytest.mark.parametrize("value", ["", "24", "h", "-1h", "1h30m", "1y", None, True, [1], -1, math.inf, "9" * 30 + "w"])
def test_texts_that_are_no_durations(value: Any) -> None:
    """Nothing is guessed."""
    with pytest.raises(ValueError, match=r"duration|below zero"):
        parse_duration(value)


@pytest.mark.parametrize(
    ("value", "size"),
    [
        (0, 0),
        (7, 7),
        ("7", 7),
        ("1K", 1024),
        ("20G", 20 * GIB),
        ("512MiB", 512 << 20),
        ("1 tb", 1 << 40),
        ("2p", 2 << 50),
    ],
)
def test_sizes(value: Any, size: int) -> None:
    """Bytes, or a number with its power of 1024."""
    assert parse_size(value) == size


@pytest.mark.parametrize("value", ["", "G", "-1", "1.5G", "20X", "1GG", None, True, 1.0, -1])
def test_texts_that_are_no_sizes(value: Any) -> None:
    """Nothing is guessed."""
    with pytest.raises(ValueError, match="no size"):
        parse_size(value)

"""CacheConfig: everything an ImageCache is told, checked at once, with all problems in one error."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from nova_imagecache.exceptions import ConfigError

OWN_NAMES = frozenset(
    {
        *("CACHEDIR.TAG", "cache.json", "bases", "staging", "trash", "quarantine", "users", "pins", "locks"),
        *("templates", "refused", "revoked", "hosts", "adopted"),
    }
)
"""What a cache and its backend keep in the root."""

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|h|d|w)")
_DURATION_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_SIZE = re.compile(r"(\d+)\s*(?:([KMGTP])(?:i?B)?)?", re.IGNORECASE)


def parse_duration(value: object) -> timedelta:
    """A duration: a timedelta, seconds as a number, or text such as "24h", "40m", "7d".

    Raises:
        ValueError: anything else, or below zero.
    """
    seconds: float | None = None
    if isinstance(value, timedelta):
        seconds = value.total_seconds()
    elif isinstance(value, int | float) and not isinstance(value, bool):
        seconds = value
    elif isinstance(value, str) and (found := _DURATION.fullmatch(value.strip())):
        seconds = float(found[1]) * _DURATION_UNITS[found[2]]
    # beyond the largest timedelta: a typing error, or infinity and NaN, which TOML has
    if seconds is None or not abs(seconds) < timedelta.max.total_seconds():
        raise ValueError(f'{value!r} is no duration: give seconds, or text such as "24h"')
    duration = timedelta(seconds=seconds)
    if duration < timedelta(0):
        raise ValueError(f"{value!r} is below zero")
    return duration


def parse_size(value: object) -> int:
    """Bytes: an int, or text such as "20G" or "512MiB" (powers of 1024).

    Raises:
        ValueError: anything else, or below zero.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, str) and (found := _SIZE.fullmatch(value.strip())):
        return int(found[1]) << 10 * (" KMGTP".index(found[2].upper()) if found[2] else 0)
    raise ValueError(f'{value!r} is no size: give bytes, or text such as "20G"')


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """What an ImageCache is told.

    Attributes:
        root: directory of the cache; created on first use.
        disks_dir: directory that holds one directory per disk id; None: ``root``/disks.
        backend: entry-point name of the backend.
        backend_options: handed to the backend, which checks them.
        source: entry-point name of the image source.
        source_options: handed to the source, which checks them.
        max_idle: how long a base that nobody uses stays.
        remove_unused: False: no base goes by itself: cleanup only observes, and nothing is evicted to make room.
        lock_timeout: how long to wait for somebody who makes no progress, and for another host's import into Ceph.
        max_virtual_size: the largest virtual size of an image, bytes; None: no limit.
        max_bytes: what all bases together may take, bytes; None: no limit.
        min_free_bytes: what a fetch leaves free on the storage.
        max_concurrent_fetches: fetches that one process does at once.
        allow_unverified: take images of which no digest is known.
        group: group that may read bases (and nobody else); None: whoever knows an image id.
        qemu_user: user that must be able to read bases; ``check()`` looks.
        nova_base_dir: a Nova ``_base`` directory beside this cache; ``check()`` reports it, nothing writes to it.
        libvirt_uri: the libvirt that is asked for users of bases as well, by ``LibvirtDomains``; None: none.
        disk_dirs: directories that are looked at for users of bases as well, by ``DiskDirectories``.

    Durations are timedeltas, seconds or text such as "24h"; sizes are bytes or text such as "20G". ``repr`` leaves both
    ``*_options`` out, since they may hold a token.

    Raises:
        ConfigError: ``problems`` lists everything that is wrong.
    """

    root: Path
    disks_dir: Path | None = None
    backend: str = "qcow2"
    backend_options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    source: str = "glance"
    source_options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    max_idle: timedelta = timedelta(hours=24)
    remove_unused: bool = True
    lock_timeout: timedelta = timedelta(hours=1)
    max_virtual_size: int | None = None
    max_bytes: int | None = None
    min_free_bytes: int = 0
    max_concurrent_fetches: int = 4
    allow_unverified: bool = False
    group: str | None = None
    qemu_user: str | None = None
    nova_base_dir: Path | None = None
    libvirt_uri: str | None = None
    disk_dirs: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        problems: list[str] = []
        for name, convert, optional in _CONVERTERS:
            value = getattr(self, name)
            if value is None and optional:
                continue
            try:
                object.__setattr__(self, name, convert(value))
            except ValueError as err:
                problems.append(f"{name}: {err}")
        if not problems and self.disks_dir is not None and (reason := _not_for_disks(self.root, self.disks_dir)):
            problems.append(f"disks_dir: {reason}")
        if problems:
            raise ConfigError(problems)
        if self.disks_dir is None:
            object.__setattr__(self, "disks_dir", self.root / "disks")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> CacheConfig:
        """A configuration from plain values, as they come out of TOML or JSON.

        Raises:
            ConfigError: with every unknown name and every wrong value.
        """
        if not isinstance(values, Mapping):
            raise ConfigError([f"{values!r:.80} is no mapping of options"])
        known = {f.name for f in dataclasses.fields(cls)}
        problems = [
            f"{name}: unknown option; known: {', '.join(sorted(known))}" for name in sorted(set(values) - known)
        ]
        if "root" not in values:
            problems.append("root: must be given")
        try:
            config = cls(**{"root": "/", **{k: v for k, v in values.items() if k in known}})
        except ConfigError as err:
            raise ConfigError([*problems, *err.problems]) from err
        if problems:
            raise ConfigError(problems)
        return config

    @classmethod
    def from_toml(cls, path: str | Path) -> CacheConfig:
        """A configuration from a TOML file whose top-level keys are the attributes' names.

        Raises:
            ConfigError: the file cannot be read or parsed, or its values are wrong.
        """
        import tomllib

        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as err:  # unreadable, no UTF-8, no TOML, no path at all
            raise ConfigError([f"{path}: {err}"]) from err
        return cls.from_mapping(values)


def _path(value: object) -> Path:
    if isinstance(value, str | Path) and str(value) and "\0" not in str(value):
        path = Path(value)
        if path.is_absolute():
            return path
    raise ValueError(f"{value!r} is no absolute path")


def _paths(value: object) -> tuple[Path, ...]:
    if isinstance(value, list | tuple):
        return tuple(dict.fromkeys(_path(one) for one in value))
    raise ValueError(f"{value!r} is no list of absolute paths")


def _not_for_disks(root: Path, disks_dir: Path) -> str | None:
    """Why root disks cannot lie there, None: they can. What is swept as the cache's own must hold nothing else."""
    below = Path(os.path.relpath(disks_dir, root)).parts
    if below and below[0] not in OWN_NAMES:
        return None
    return f"{disks_dir} is where the cache keeps its own files; give {root / 'disks'} or a directory elsewhere"


def _name(value: object) -> str:
    if isinstance(value, str) and value.strip():
        return value
    raise ValueError(f"{value!r} is no name")


def _flag(value: object) -> bool:
    if isinstance(value, bool):
        return value
    raise ValueError(f"{value!r} is neither true nor false")


def _count(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    raise ValueError(f"{value!r} is no whole number from 1 up")


def _options(value: object) -> dict[str, Any]:
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return dict(value)
    # the value may hold a token, and errors end up in logs
    raise ValueError(f"a value of type {type(value).__name__} is no table of options by name")


_CONVERTERS: tuple[tuple[str, Any, bool], ...] = (
    ("root", _path, False),
    ("disks_dir", _path, True),
    ("backend", _name, False),
    ("backend_options", _options, False),
    ("source", _name, False),
    ("source_options", _options, False),
    ("max_idle", parse_duration, False),
    ("remove_unused", _flag, False),
    ("lock_timeout", parse_duration, False),
    ("max_virtual_size", parse_size, True),
    ("max_bytes", parse_size, True),
    ("min_free_bytes", parse_size, False),
    ("max_concurrent_fetches", _count, False),
    ("allow_unverified", _flag, False),
    ("group", _name, True),
    ("qemu_user", _name, True),
    ("nova_base_dir", _path, True),
    ("libvirt_uri", _name, True),
    ("disk_dirs", _paths, False),
)

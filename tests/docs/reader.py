"""Layout 1 on files, read by somebody who has the page docs/reference/on-storage.md and nothing else.

Nothing of the library is imported here, and nothing is done that the page does not say.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import stat
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Base:
    record: dict[str, Any]
    last_used: float | None
    unused_since: float | None
    links: int
    paths: list[tuple[str, str] | None]
    pins: list[str]
    allocated: int

    @property
    def users(self) -> int:
        return self.links + len(self.paths)


@dataclass
class Cache:
    bases: dict[str, Base] = field(default_factory=dict)
    disks: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    staging: int = 0
    trash: int = 0
    overhead: int = 0

    def named(self, image_id: str) -> set[tuple[str, str]]:
        """Who uses the base, as far as names are known."""
        links = {
            key for key, disk in self.disks.items() if disk["reference"] == "link" and disk["image_id"] == image_id
        }
        return links | {user for user in self.bases[image_id].paths if user is not None}


def read(root: Path, disks_dir: Path) -> Cache:
    """The cache at ``root``; ValueError where it is none that this reader knows."""
    about = json.loads((root / "cache.json").read_bytes())
    if about["layout"] > 1 or about["storage"] != "files":
        raise ValueError(about)
    cache = Cache()
    for directory in listed(root / "bases"):
        if (base := read_base(root, directory)) is not None:
            cache.bases[directory.name] = base
    for directory in listed(disks_dir):
        for path in listed(directory):
            if path.suffix == ".json" and not path.name.startswith("."):
                record = versioned(path)
                disk = path.with_suffix("")
                if record is not None and disk.exists():
                    cache.disks[directory.name, disk.name] = {**record, "virtual_size": virtual_size(disk, record)}
    cache.staging = below(root / "staging")
    cache.trash = below(root / "trash") + below(root / "quarantine")
    counted = cache.staging + cache.trash + sum(base.allocated for base in cache.bases.values())
    cache.overhead = below(root, without=("disks",)) + blocks(root) - counted
    return cache


def read_base(root: Path, directory: Path) -> Base | None:
    record = versioned(directory / "base.json")
    if record is None or (directory / "disk").stat().st_size != record["size"]:
        return None
    return Base(
        record=record,
        last_used=mark(directory / "last-used"),
        unused_since=mark(directory / "unused-since"),
        links=(directory / "disk").stat().st_nlink - 1,
        paths=[user(path) for path in listed(root / "users" / directory.name)],
        pins=[path.stem for path in listed(root / "pins" / directory.name) if holds(path)],
        allocated=below(directory) + blocks(directory),
    )


def versioned(path: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("version") == 1 else None


def user(path: Path) -> tuple[str, str] | None:
    try:
        values = json.loads(path.read_bytes())
        return values["disk_id"], values["name"]
    except (OSError, ValueError, KeyError):
        return None


def holds(path: Path) -> bool:
    try:
        until = json.loads(path.read_bytes())["until"]
    except (OSError, ValueError, KeyError):
        return True
    return until is None or until > time.time()


def mark(path: Path) -> float | None:
    return path.stat().st_mtime if path.exists() else None


def virtual_size(disk: Path, record: dict[str, Any]) -> int:
    if record["format"] == "raw":
        return disk.stat().st_size
    with disk.open("rb") as file:
        return int.from_bytes(file.read(32)[24:32], "big")


def blocks(path: Path) -> int:
    return path.lstat().st_blocks * 512


def below(directory: Path, *, without: tuple[str, ...] = ()) -> int:
    """Allocated bytes of everything below a directory, each inode once."""
    seen: dict[tuple[int, int], int] = {}
    waiting = [path for path in listed(directory) if path.name not in without]
    while waiting:
        path = waiting.pop()
        status = path.lstat()
        seen[status.st_dev, status.st_ino] = status.st_blocks * 512
        if stat.S_ISDIR(status.st_mode):
            waiting += listed(path)
    return sum(seen.values())


def listed(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []


# --- and written


def publish(root: Path, image_id: str, content: bytes, record: dict[str, Any]) -> bool:
    """Publish a base of these bytes by rules 1 and 6; whether it was not there before."""
    entry = root / "staging" / f"{image_id}.{secrets.token_hex(8)}"
    entry.mkdir(0o700)
    held = os.open(entry, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        for name, data in (("disk", content), ("base.json", json.dumps(record).encode())):
            with (entry / name).open("xb") as file:
                file.write(data)
                os.fchmod(file.fileno(), 0o444)
                os.fsync(file.fileno())
        entry.chmod(0o711)
        os.fsync(held)
        (root / "bases").mkdir(0o711, exist_ok=True)
        try:
            entry.rename(root / "bases" / image_id)
        except OSError:
            return False
        sync(root / "bases")
        return True
    finally:
        os.close(held)


def sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(fd)
    os.close(fd)

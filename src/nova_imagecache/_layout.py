"""The cache root: what lies where (layout 1), who may open it, and the pins in it.

::

    <root>/CACHEDIR.TAG  cache.json           what this directory is; a newer layout or another storage is refused
           bases/ trash/ quarantine/ users/   the file backends'
           staging/                           unfinished things, each held by the process that makes it
           pins/<image-id>/<owner>.json       {"until": POSIX seconds or null}
           locks/                             lock files, never unlinked
"""

from __future__ import annotations

import errno
import grp
import json
import logging
import os
import pwd
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from nova_imagecache import _entries, _fs
from nova_imagecache._config import OWN_NAMES
from nova_imagecache._models import Pin
from nova_imagecache.exceptions import BackendError, ConfigError, NoSpaceError

if TYPE_CHECKING:
    from pathlib import Path

    from nova_imagecache.exceptions import ImageCacheError

_log = logging.getLogger(__name__)

LAYOUT = 1
_QUIET = 1_000_000_000
_OPENING = "opening the cache"
_WRONG_PLACE = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL),
    *(errno.EACCES, errno.EPERM, errno.EROFS),
)
"""What a path gives that names no directory, or one that is not for this user; the rest is the storage's failure."""
_TAG = b"""Signature: 8a477f597d28d172789f06886806bc55
# This file marks the directory as a cache (https://bford.info/cachedir/). It is made by nova_imagecache.
"""
_OURS = OWN_NAMES | {"disks", "lost+found"}


class _Owner:
    """A user by its id: ``name`` as people call it, ``run`` says how to be it."""

    def __init__(self, uid: int) -> None:
        try:
            user = self.name = pwd.getpwuid(uid).pw_name
        except KeyError:
            self.name, user = f"uid {uid}", f"'#{uid}'"
        self.run = f"Run this as {self.name}, who owns the root: `sudo -u {user} nova-imagecache ...`"


class Root:
    """One cache root, prepared on first use. ``storage`` is the kind of storage that its backend keeps there.

    With ``group`` a new root is for the members of that group alone.
    """

    def __init__(self, path: Path, storage: str, *, group: str | None = None) -> None:
        self.path = path
        self.staging = path / "staging"
        self.locks = path / "locks"
        self._pins = path / "pins"
        self._bases = path / "bases"
        self._storage = storage
        # 0711: entered by those who know a name, listed by nobody
        self._mode = 0o750 if group is not None else 0o711
        self._group = group
        self._seen = self._ready = False

    def prepare(self) -> None:
        """The root exists and is ours to change; checked once.

        Raises:
            ConfigError: it is of a newer layout, of another storage, or a directory of something else.
            ConfigError: it cannot be made or written where it is named, or by this user.
            NoSpaceError, BackendError: its storage has no room, or failed.
        """
        if self._ready:
            return
        if self._is_guest():
            raise self._not_ours()
        self.look()
        self._ready = True

    def look(self) -> None:
        """As ``prepare``, for what only looks: the superuser may, at another user's root, and makes nothing there."""
        if self._seen:
            return
        # others may be at it, in this process or another: making it twice is harmless, and waiting for a thread is not
        # (a child forked meanwhile would wait for ever)
        try:
            self._make()
        except OSError as err:
            raise self._refusal(err) from err
        self._seen = True

    def _refusal(self, err: OSError) -> ImageCacheError:
        if err.errno in (errno.ENOSPC, errno.EDQUOT):
            full = NoSpaceError(stage=_OPENING)
            full.detail = f"the cache root {self.path} cannot be made: no space left"
            return full
        text = f"the cache root {self.path} cannot be used: {err.strerror}"
        if err.errno not in _WRONG_PLACE:
            return BackendError(text, stage=_OPENING)
        owner = self._other_owner() if err.errno in (errno.EACCES, errno.EPERM) else None
        deed = "Give this user a directory it owns" if owner is None else owner.run
        return ConfigError([f"root: {text}"], stage=_OPENING, todo=f"{deed}, or correct root in the configuration")

    def _not_ours(self) -> ConfigError:
        """What the superuser hears who would leave files that the root's owner can neither write nor remove."""
        owner = self._other_owner()
        whose = "another user" if owner is None else owner.name
        problem = f"root: the cache root {self.path} belongs to {whose}, who could not use what root makes there"
        return ConfigError([problem], stage=_OPENING, todo=None if owner is None else owner.run)

    def _is_guest(self) -> bool:
        """Whether we are the superuser, in a root that is another user's."""
        return os.geteuid() == 0 and self._other_owner() is not None

    def _other_owner(self) -> _Owner | None:
        """The user whose root it is, where that is not this one."""
        try:
            owner = self.path.stat().st_uid
        except OSError:  # it is not there, or behind a directory that is closed
            return None
        return None if owner == os.geteuid() else _Owner(owner)

    def _make(self) -> None:
        described = self.path / "cache.json"
        if self._is_guest():
            if not described.exists() or not self.staging.is_dir():
                raise self._not_ours()
            self._compare(described)
            return
        _fs.make_dirs(self.path, self._mode)
        if not described.exists():
            strangers = sorted(set(os.listdir(self.path)) - _OURS)  # noqa: PTH208 - names, not paths
            if strangers:
                raise ConfigError([f"root: {self.path} is no cache and not empty (it holds {strangers[0]!r})"])
            self._give_to_group()
            _fs.make_dirs(self.staging, 0o700)
            self._write_once("CACHEDIR.TAG", _TAG)
            text = json.dumps({"layout": LAYOUT, "storage": self._storage}) + "\n"
            self._write_once("cache.json", text.encode())
        self._compare(described)
        for directory, mode in ((self.staging, 0o700), (self.locks, 0o755), (self._pins, 0o755)):
            _fs.make_dirs(directory, mode)
        if not os.access(self.staging, os.W_OK | os.X_OK):
            raise PermissionError(13, "it belongs to another user, or is mounted read-only", str(self.staging))

    def _give_to_group(self) -> None:
        if self._group is None:
            return
        try:
            gid = grp.getgrnam(self._group).gr_gid
        except KeyError:
            raise ConfigError([f"group: there is no group {self._group!r} on this host"]) from None
        if self.path.stat().st_gid != gid:
            _fs.chown(self.path, gid)

    def _write_once(self, name: str, data: bytes) -> None:
        with _entries.entry(self.staging, name, 0o700) as making:
            _fs.write_file(making / "new", data, 0o644)
            with suppress(FileExistsError):  # another process prepares the same root
                _fs.publish_file(making / "new", self.path / name)

    def _compare(self, described: Path) -> None:
        try:
            values = json.loads(described.read_bytes())
            layout, storage = values["layout"], values["storage"]
        except (ValueError, TypeError, KeyError) as err:
            raise ConfigError([f"root: {described} is damaged ({err!r}); restore it or remove the cache"]) from err
        if not isinstance(layout, int) or layout > LAYOUT:
            raise ConfigError(
                [f"root: {self.path} has layout {layout!r}, this release knows {LAYOUT}: use a newer nova_imagecache"]
            )
        if storage != self._storage:
            raise ConfigError(
                [f"root: {self.path} belongs to storage {storage!r}, not {self._storage!r}: give each its own root"]
            )

    def bases_changed(self) -> int | None:
        """When a base came or went last, as a number to compare; None: just now, or there is nothing to tell it by.

        A directory's time moves in steps of milliseconds, so that of the last second tells nothing.
        """
        try:
            changed = os.stat(self._bases).st_mtime_ns  # noqa: PTH116 - one call
        except OSError:
            return None
        return changed if abs(time.time_ns() - changed) > _QUIET else None

    # --- pins

    def pin(self, pin: Pin) -> None:
        """Write the owner's pin, in place of an older one of the same owner."""
        directory = self._pins / pin.image_id
        data = json.dumps({"until": pin.until}).encode() + b"\n"
        # whoever takes ended pins away holds it too: what he read as ended is not renewed before it goes
        with _entries.held(directory):
            _fs.fsync_dir(self._pins)  # another may have made it just now, and not come to that
            _entries.replace_file(directory / f"{pin.owner}.json", data, 0o644, staging=self.staging)

    def unpin(self, image_id: str, owner: str) -> None:
        """Take the owner's pin away; one that is not there is fine."""
        directory = self._pins / image_id
        _fs.unlink(directory / f"{owner}.json")
        # who holds it is about to write a pin
        held = _entries.hold(directory, wait=True, follow=True)
        if held is not None:
            try:
                if _fs.rmdir(directory):
                    _fs.fsync_dir(self._pins)
            finally:
                held.release()

    def pins(self, image_id: str, now: float) -> tuple[Pin, ...]:
        """The pins that hold at POSIX seconds ``now``. A pin that cannot be read holds: doubt keeps the base."""
        try:
            pins = self._read_pins(image_id)
        except OSError:
            return (Pin(image_id=image_id, owner="unreadable"),)
        return tuple(pin for pin in pins if pin.until is None or pin.until > now)

    def _read_pins(self, image_id: str) -> list[Pin]:
        """All pins, ended or not; one that cannot be read has no end."""
        found = []
        directory = f"{self._pins}/{image_id}"
        try:
            names = sorted(os.listdir(directory))  # noqa: PTH208 - names, not paths
        except FileNotFoundError:
            return []
        for name in names:
            if not name.endswith(".json"):
                continue
            try:
                with open(f"{directory}/{name}", "rb") as file:  # noqa: PTH123 - thousands in a pass
                    until = json.loads(file.read())["until"]
                end = float(until) if isinstance(until, int | float) else None
            except FileNotFoundError:  # unpinned meanwhile
                continue
            except (OSError, ValueError, TypeError, KeyError, OverflowError):
                end = None
            found.append(Pin(image_id=image_id, owner=name.removesuffix(".json"), until=end))
        return found

    def sweep_pins(self, now: float) -> tuple[list[str], dict[str, str]]:
        """Take the pins away that are over at POSIX seconds ``now``: (names removed, failed with the reason).

        One that is renewed meanwhile stays.
        """
        removed: list[str] = []
        failed: dict[str, str] = {}
        for image_id in sorted(self.pinned() or ()):
            if not self._ended(image_id, now):
                continue
            held = None
            try:
                held = _entries.hold(self._pins / image_id, wait=False, follow=True)
                if held is None:
                    continue
                for pin in self._ended(image_id, now):
                    # not synced: one that a power cut brings back is over all the same
                    _fs.unlink(self._pins / image_id / f"{pin.owner}.json")
                    removed.append(f"{image_id}/{pin.owner}")
                _fs.rmdir(self._pins / image_id)
            except OSError as err:
                _log.warning("pins of %s that are over cannot be removed: %s", image_id, err)
                failed[image_id] = str(err)
            finally:
                if held is not None:
                    held.release()
        return removed, failed

    def _ended(self, image_id: str, now: float) -> list[Pin]:
        try:
            pins = self._read_pins(image_id)
        except OSError:  # they hold, as ``pins`` says
            return []
        return [pin for pin in pins if pin.until is not None and pin.until <= now]

    def pinned(self) -> frozenset[str] | None:
        """The image ids that have a pin, ended or not: one listing for a whole pass. None: it cannot be had, and
        each may have one, as ``pins`` says."""
        try:
            return frozenset(os.listdir(self._pins))  # noqa: PTH208 - names, not paths
        except FileNotFoundError:
            return frozenset()
        except OSError as err:
            _log.warning("what is pinned cannot be listed: %s", err)
            return None

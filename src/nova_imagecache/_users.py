"""Who depends on a base: what the storage counts, joined with what finders know. Doubt is never "nobody"."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from nova_imagecache import _guard
from nova_imagecache._chains import OF_DOMAIN, KnownBases, reads_by_name
from nova_imagecache._models import FileLocation
from nova_imagecache.exceptions import ConfigError, ImageCacheError, UsersUnknownError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from nova_imagecache._config import CacheConfig
    from nova_imagecache._models import BaseImage, DiskUser, RootDisk
    from nova_imagecache.backends import Backend

_log = logging.getLogger(__name__)


@runtime_checkable
class UserFinder(Protocol):
    """Something outside the storage that knows users of bases: a hypervisor, a directory of disks, a driver's list."""

    @property
    def name(self) -> str:
        """What ``DiskUser.known_by`` says of the users it finds."""

    def find(self, bases: Sequence[BaseImage]) -> Iterable[DiskUser]:
        """The users of these bases that it knows; all bases in one call, so that a pass costs one look.

        Raises:
            UsersUnknownError: it cannot tell now. Every base of the call is kept.
        """


def configured(config: CacheConfig) -> list[UserFinder]:
    """The finders that the configuration names. Nobody is asked yet; what they need is imported.

    Raises:
        ConfigError: libvirt is to be asked, and its module cannot be imported.
    """
    found: list[UserFinder] = []
    chains = None
    if config.libvirt_uri is not None:
        from nova_imagecache.domains import LibvirtDomains, load_libvirt

        try:
            load_libvirt()
        except UsersUnknownError as err:
            raise ConfigError([f"libvirt_uri: {err.detail} ({err.todo})"]) from err
        domains = LibvirtDomains(config.libvirt_uri)
        chains = domains.chains
        found.append(domains)
    if config.disk_dirs:
        from nova_imagecache.finders import DiskDirectories

        found.append(DiskDirectories(config.disk_dirs, chains=chains))
    return found


def from_finders(finders: Sequence[UserFinder], bases: Sequence[BaseImage]) -> dict[str, list[DiskUser]]:
    """What the finders know, by image id.

    Raises:
        UsersUnknownError: a finder cannot tell, or failed.
    """
    found: dict[str, list[DiskUser]] = {}
    for finder in finders if bases else ():
        ask(finder, bases, found)
    return found


def ask(finder: UserFinder, bases: Sequence[BaseImage], found: dict[str, list[DiskUser]]) -> None:
    """Add what one finder knows to what is found, by image id. Without bases: nothing, if it could tell.

    Raises:
        UsersUnknownError: it cannot tell, or failed.
    """
    try:
        with _guard.translated(partial(_unknown, finder)):
            for user in finder.find(bases):
                found.setdefault(user.image_id, []).append(user)
    except UsersUnknownError:
        raise
    except ImageCacheError as err:  # a finder may ask a storage, or another cache
        raise _unknown(finder, err.summary()) from err


def _unknown(finder: UserFinder, text: str) -> UsersUnknownError:
    name = getattr(finder, "name", type(finder).__name__)
    return UsersUnknownError(f"finder {name} cannot tell: {text}")


def users_of(backend: Backend, finders: Sequence[UserFinder], base: BaseImage) -> list[DiskUser]:
    """Every user of one base.

    Raises:
        UsersUnknownError: the storage or a finder cannot tell.
    """
    users = list(backend.iter_users(base))
    if finders:
        users += from_finders(finders, [base]).get(base.image_id, [])
    return users


def readers_by_name(backend: Backend, finders: Sequence[UserFinder], bases: Sequence[BaseImage]) -> list[DiskUser]:
    """The users of a base, given by all the names it has or had, that would read other bytes under its name.

    Disks that hold the base by a link of their own would not, nor what a finder says without telling of which disk.

    Raises:
        UsersUnknownError: the storage or a finder cannot tell.
    """
    readers = [user for user in backend.iter_users(bases[-1]) if user.known_by != "link"]
    found = from_finders(finders, bases).get(bases[0].image_id, [])
    known = KnownBases(bases)
    for user in found if known else ():
        if user.disk_id is None:
            continue
        # where it names no file, nothing shows that it reads through a link
        paths = [path for path in (user.detail, user.detail.rpartition(OF_DOMAIN)[0]) if path and os.path.lexists(path)]
        if not paths or any(reads_by_name(path, known) for path in paths):
            readers.append(user)
    return readers


def count(stored: Iterable[DiskUser], found: Iterable[DiskUser]) -> int:
    """How many disks that is, each once, however many know of it.

    One that only a finder names is taken for one of those that the storage counts without a name. Never 0 where there
    is any.
    """
    nameless = 0
    named: set[tuple[str | None, str | None]] = set()
    for user in stored:
        if user.disk_id is None:
            nameless += 1
        else:
            named.add((user.disk_id, user.name))
    more: set[tuple[str | None, str | None]] = set()
    said = 0
    for user in found:
        if user.disk_id is None:
            said = 1
        else:
            more.add((user.disk_id, user.name))
    return max(len(named) + max(nameless, len(more - named)), said)


def with_names(users: Sequence[DiskUser], disks: Iterable[RootDisk], base: BaseImage) -> list[DiskUser]:
    """The users with names put to those that the storage only counts (hard links), from the root disks we made.

    A counted user that no disk of ours explains stays in the list without a name.
    """
    named = [user for user in users if user.disk_id is not None]
    counted = [user for user in users if user.disk_id is None]
    known = {(user.disk_id, user.name) for user in named}
    for disk in disks:
        if not counted:
            break
        if disk.reference != counted[0].known_by or _holds_another(disk, base):
            continue
        user = counted.pop(0)
        if (disk.disk_id, disk.name) in known:  # a finder named it already: one user, known twice
            continue
        detail = str(getattr(disk.location, "path", "")) or user.detail
        named.append(replace(user, disk_id=disk.disk_id, name=disk.name, detail=detail))
    return named + counted


def _holds_another(disk: RootDisk, base: BaseImage) -> bool:
    """Whether the disk's link is seen to hold other bytes: those that were cached under the image's id before."""
    if not isinstance(disk.location, FileLocation) or not isinstance(base.location, FileLocation):
        return False
    try:
        held, there = os.stat(f"{disk.location.path}.base"), os.stat(base.location.path)  # noqa: PTH116 - of many
    except OSError:
        return False
    return (held.st_dev, held.st_ino) != (there.st_dev, there.st_ino)

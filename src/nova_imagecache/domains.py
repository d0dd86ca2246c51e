"""libvirt: a root disk as libvirt wants it described, and the users of bases among a hypervisor's domains.

The only importer of libvirt, which is loaded when it is first asked, or for a configuration that names it: the extra
``[libvirt]``.
"""

from __future__ import annotations

import importlib
import logging
import os
import time
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

from nova_imagecache._ahead import attended
from nova_imagecache._chains import OF_DOMAIN, KnownBases, backing_file, record_of, uses
from nova_imagecache._models import BlockLocation, DiskUser, RbdLocation
from nova_imagecache.exceptions import DiskNotFoundError, InvalidRequestError, UsersUnknownError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from types import ModuleType

    from nova_imagecache._models import BaseImage, RootDisk

_log = logging.getLogger(__name__)

# --- a root disk for a domain ----------------------------------------------------------------------------------------


def disk_element(
    disk: RootDisk,
    *,
    target: str = "vda",
    bus: str = "virtio",
    cache: str | None = "none",
    io: str | None = None,
    discard: str | None = None,
    backing: Path | None = None,
) -> ET.Element:
    """The ``<disk>`` of a root disk for a domain's ``<devices>``. Make it anew at every start: paths are absolute.

    ``cache``, ``io`` and ``discard`` are the attributes of libvirt's ``<driver>``; None: libvirt's own choice.
    ``backing`` is where the base of a path reference lies (``get_base(...).location.path``); None: what the overlay
    says. An overlay's base is spelled out and keeps its owner (``relabel='no'``): libvirt gives what it labels to the
    qemu user and never back, and then the cache can no longer link it.

    Raises:
        DiskNotFoundError: an overlay is not there, or its record, so that nobody knows the format of its base.
        InvalidRequestError: an overlay can be read by its guest's user alone, and ``backing`` is not given; or it reads
            through another file than its link, which the element would leave out.
    """
    element = ET.Element("disk", device="disk")
    driver = {"name": "qemu", "type": disk.format, "cache": cache, "io": io, "discard": discard}
    ET.SubElement(element, "driver", {name: value for name, value in driver.items() if value is not None})
    location = disk.location
    if isinstance(location, RbdLocation):
        element.set("type", "network")
        element.append(_rbd_source(location))
    elif isinstance(location, BlockLocation):
        element.set("type", "block")
        ET.SubElement(element, "source", dev=str(location.path))
    else:
        element.set("type", "file")
        ET.SubElement(element, "source", file=str(location.path))
        if disk.format != "raw":
            element.append(_backing_store(disk, location.path, backing))
    ET.SubElement(element, "target", dev=target, bus=bus)
    return element


def _rbd_source(location: RbdLocation) -> ET.Element:
    source = ET.Element("source", protocol="rbd", name=f"{location.pool}/{location.name}")
    for address, port in location.hosts:
        ET.SubElement(source, "host", name=address, port=str(port))
    if location.user is not None and location.secret_uuid is not None:
        auth = ET.SubElement(source, "auth", username=location.user)
        ET.SubElement(auth, "secret", type="ceph", uuid=location.secret_uuid)
    return source


def _backing_store(disk: RootDisk, path: Path, backing: Path | None) -> ET.Element:
    """What the overlay reads through; an empty element ends a chain, where none would make libvirt probe."""
    store = ET.Element("backingStore")
    if disk.reference == "none":
        return store
    record = record_of(path)
    if record is None:
        todo = "Bring its record along, beside the disk"
        raise DiskNotFoundError("the disk has no record", disk_id=disk.disk_id, name=disk.name, todo=todo)
    file = _backing_of(disk, path, backing)
    if file is None:
        return store
    store.set("type", "file")
    ET.SubElement(store, "format", type=record.base_format)
    source = ET.SubElement(store, "source", file=str(file))
    ET.SubElement(source, "seclabel", model="dac", relabel="no")
    ET.SubElement(store, "backingStore")
    return store


def _backing_of(disk: RootDisk, path: Path, backing: Path | None) -> Path | None:
    """Where the overlay's base is, None: the overlay needs none any more, since libvirt's blockPull took it in."""
    link = path.with_name(f"{path.name}.base")
    try:
        named = backing_file(path)
    except OSError as err:  # libvirt gives a disk to the guest's user, and not always back
        _log.info("%s cannot be read (%s): its record says reference %s", path, err.strerror, disk.reference)
        known = link if disk.reference == "link" else backing
        if known is None:
            raise _refused(disk, "the overlay is not readable", "Give backing=, the path of its base") from err
        return known
    if named is None:
        if not os.path.lexists(path):
            raise DiskNotFoundError(disk_id=disk.disk_id, name=disk.name)
        return None
    if disk.reference == "path":
        return backing or named
    # by its name alone where the directory has moved since a block job made the name absolute
    if named.name != link.name and not _same_file(named, link):
        raise _refused(disk, f"the overlay reads through {named}", "Commit what lies between it and its base")
    return link


def _refused(disk: RootDisk, message: str, todo: str) -> InvalidRequestError:
    return InvalidRequestError(message, disk_id=disk.disk_id, name=disk.name, stage="element", todo=todo)


def _same_file(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:  # not there, or not to be seen
        return False


# --- the users among the domains -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Disk:
    """A disk of a domain: the file on top, the layers below it that libvirt knows, and whether headers know more."""

    domain: str
    layers: tuple[Path, ...]
    probe: bool


class LibvirtDomains:
    """The disks of a hypervisor's domains: whole live chains of the running ones, and what the definitions name.

    ``connection`` is a URI, opened read-only for each look and closed after it, or a function that gives a connection
    which stays its owner's. No event loop is needed. libvirt asks every running qemu, and waits for one that hangs:
    after ``timeout`` seconds that is doubt, and the waiting is left to a thread. A look costs two calls, one for each
    persistent domain, and a stat for each layer of each disk. Bases are known by device and inode, and by path.
    """

    name = "libvirt"

    def __init__(self, connection: str | Callable[[], Any] = "qemu:///system", *, timeout: float = 30.0) -> None:
        self._connection = connection
        self._timeout = timeout

    def __str__(self) -> str:
        return self._connection if isinstance(self._connection, str) else "its own connection"

    def __repr__(self) -> str:
        return f"<LibvirtDomains at {self}>"

    def find(self, bases: Sequence[BaseImage]) -> Iterator[DiskUser]:
        """The users of these bases among the domains' disks.

        Raises:
            UsersUnknownError: libvirt cannot be asked, or a disk cannot be read and nothing says what it uses.
        """
        known = KnownBases(bases)
        told: set[Path] = set()
        seen: set[tuple[str, Path]] = set()
        for disk in self._disks():
            for image_id, certain in _uses(disk, known, told):
                top = disk.layers[0]
                if (image_id, top) in seen:  # it runs, and is defined to
                    continue
                seen.add((image_id, top))
                yield DiskUser(
                    image_id=image_id,
                    known_by=self.name,
                    disk_id=top.parent.name,
                    name=top.name,
                    detail=f"{top}{OF_DOMAIN}{disk.domain}",
                    certain=certain,
                )
            told.add(disk.layers[0])

    def chains(self) -> list[tuple[Path, ...]]:
        """The layers of each disk that libvirt knows whole, the top first: of running domains, and raw ones of others.

        For ``DiskDirectories(..., chains=...)``: a file that a guest has open may be its user's alone.

        Raises:
            UsersUnknownError: libvirt cannot be asked.
        """
        return [disk.layers for disk in self._disks() if not disk.probe]

    def _disks(self) -> list[_Disk]:
        """The disks of all domains, those of running ones first. A second try finds a libvirtd that was restarted."""
        libvirt = load_libvirt()
        deadline = time.monotonic() + self._timeout

        def check() -> None:
            if time.monotonic() > deadline:
                raise UsersUnknownError(f"libvirt does not answer within {self._timeout:.0f} s", stage="users")

        try:
            return attended(lambda: self._look(libvirt), check)
        except libvirt.libvirtError as err:
            _log.info("libvirt is asked again: %s", err)
        try:
            return attended(lambda: self._look(libvirt), check)
        except libvirt.libvirtError as err:
            raise UsersUnknownError(f"libvirt cannot be asked: {err}", stage="users") from err

    def _look(self, libvirt: ModuleType) -> list[_Disk]:
        with self._connected(libvirt) as connection:
            # in this order: a domain that starts or stops meanwhile is in one of the two answers, or in both
            defined = list(_defined(libvirt, connection))
            stats = connection.getAllDomainStats(
                libvirt.VIR_DOMAIN_STATS_BLOCK,
                libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_ACTIVE
                | libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_BACKING
                | libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_NOWAIT,
            )
            return [disk for domain, figures in stats for disk in _running(domain.name(), figures)] + defined

    @contextmanager
    def _connected(self, libvirt: ModuleType) -> Iterator[Any]:
        if isinstance(self._connection, str):
            manager: Any = closing(libvirt.openReadOnly(self._connection))
        else:
            manager = nullcontext(self._connection())
        with manager as connection:
            yield connection


def log_libvirt_errors() -> None:
    """Let libvirt tell its errors to this module's log, at debug, instead of writing them to stderr.

    For a process of one's own: libvirt has one such handler for all who use it in a process. Without libvirt nothing is
    done; whoever asks it hears of that.
    """
    try:
        libvirt = load_libvirt()
    except UsersUnknownError:
        return
    libvirt.registerErrorHandler(lambda _context, error: _log.debug("libvirt: %s", error[2]), None)


def load_libvirt() -> ModuleType:
    """The module ``libvirt``, which ``LibvirtDomains`` needs: so that a service knows at its start.

    Raises:
        UsersUnknownError: it cannot be imported.
    """
    try:
        return importlib.import_module("libvirt")  # it ships no types
    except ImportError as err:
        todo = "Install nova-imagecache[libvirt]; it compiles against Debian's libvirt-dev, by pkg-config"
        raise UsersUnknownError(f"libvirt-python cannot be imported: {err}", stage="users", todo=todo) from err


def _running(domain: str, figures: Mapping[str, Any]) -> Iterator[_Disk]:
    """The live chains: figures count layers, and layers of one disk follow each other under one name."""
    chains: dict[str, list[Path]] = {}
    for number in range(figures.get("block.count", 0)):
        path = figures.get(f"block.{number}.path")
        if path is not None:  # else it is on a network, or an empty drive
            chains.setdefault(figures[f"block.{number}.name"], []).append(Path(path))
    for layers in chains.values():
        yield _Disk(domain=domain, layers=tuple(layers), probe=False)


def _defined(libvirt: ModuleType, connection: Any) -> Iterator[_Disk]:
    """The disks that persistent domains start with next time."""
    for domain in connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_PERSISTENT):
        try:
            xml = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
        except libvirt.libvirtError as err:
            if err.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:  # undefined meanwhile
                continue
            raise
        for disk in ET.fromstring(xml).iterfind("./devices/disk"):  # noqa: S314 - libvirtd's words
            driver = disk.find("driver")
            layers = [path for source in disk.iter("source") if (path := _source(connection, source)) is not None]
            if layers:
                # a raw disk's header is its guest's word
                probe = driver is None or driver.get("type") != "raw"
                yield _Disk(domain=domain.name(), layers=tuple(layers), probe=probe)


def _source(connection: Any, source: ET.Element) -> Path | None:
    """The file or device of a ``<source>``, None: it is elsewhere."""
    if (path := source.get("file") or source.get("dev")) is not None:
        return Path(path)
    if (volume := source.get("volume")) is not None:
        pool = connection.storagePoolLookupByName(source.get("pool"))
        return Path(pool.storageVolLookupByName(volume).path())
    return None


def _uses(disk: _Disk, known: KnownBases, told: set[Path]) -> Iterator[tuple[str, bool]]:
    """The images that a disk depends on, each once, and whether that is certain."""
    found: dict[str, bool] = {}
    for layer in disk.layers:
        if (image_id := known.at(layer)) is not None:
            found[image_id] = True
    # of a running domain libvirt's word is whole, and its disk may be its qemu's alone
    if disk.probe and disk.layers[0] not in told:
        for image_id, certain in uses(disk.layers[0], known):
            found.setdefault(image_id, certain)
    yield from found.items()

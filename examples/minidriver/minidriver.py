"""A small virt driver: guests of libvirt with root disks from nova_imagecache, on any backend.

It keeps no state of its own. Which instances there are is what libvirt has defined; which image and disks they have is
what the cache has made. So nothing can contradict, and after a crash every call can be made again.
"""

# ruff: noqa: T201, INP001 - a script that answers on the terminal

from __future__ import annotations

import argparse
import json
import shutil
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self
from xml.etree import ElementTree as ET
from xml.sax.saxutils import escape

import libvirt

from nova_imagecache import CacheConfig, ImageCache, RootDisk, exceptions
from nova_imagecache.domains import LibvirtDomains, disk_element

RESCUE = "disk.rescue"
DOMAIN = """\
<domain type='{type}'>
  <name>{name}</name><memory unit='MiB'>{memory}</memory>
  <os><type>hvm</type></os>
  <devices><serial type='file'><source path='{console}'/></serial></devices>
</domain>
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverConfig:
    """What minidriver.toml says: ``[cache]`` is the library's, ``[driver]`` ours; ``disk``: cache, io and discard."""

    cache: CacheConfig
    consoles: str
    uri: str | None = None
    type: str = "kvm"
    reserved_disk_mb: int = 0
    disk: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_toml(cls, path: Path) -> Self:
        """The configuration in a file."""
        values = tomllib.loads(path.read_text(encoding="utf-8"))
        return cls(cache=CacheConfig.from_mapping(values["cache"]), **values["driver"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """A guest with its root disk; ``size`` is bytes, ``reference`` what ties the disk to the image's base."""

    name: str
    running: bool
    rescued: bool
    image_id: str
    size: int
    reference: str


class MiniDriver:
    """The guests of one host."""

    def __init__(self, config: DriverConfig) -> None:
        self._config = config
        self._reserved_mb = config.reserved_disk_mb
        Path(str(config.cache.disks_dir)).mkdir(parents=True, exist_ok=True)
        self._libvirt = libvirt.open(config.uri)
        # cleanup asks libvirt, too: the bases of guests that others made stay as well
        finder = LibvirtDomains(lambda: self._libvirt)
        self.cache = ImageCache.from_config(config.cache, user_finders=[finder])

    def spawn(self, name: str, image_id: str, size: int | None = None, memory_mb: int = 512) -> None:
        """Start a new guest with a root disk of ``size`` bytes (None: the image's size), made of the image."""
        console = escape(f"{self._config.consoles}/{name}.log")
        xml = DOMAIN.format(type=self._config.type, name=escape(name), memory=memory_mb, console=console)
        domain = self._libvirt.defineXML(xml)  # refused where there is a guest of that name
        try:
            self.cache.create_root_disk(image_id, name, size=size)  # the whole disk, or nothing
        except BaseException:
            domain.undefine()
            raise
        self.start(name)

    def start(self, name: str) -> None:
        """Start the guest with its disks as they are now."""
        domain = ET.fromstring(self._libvirt.lookupByName(name).XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))  # noqa: S314  # of libvirt
        for devices in domain.iter("devices"):
            for old in devices.findall("disk"):
                devices.remove(old)
            # described anew at every start: libvirt believes what it is told, and disks move, or are flattened
            for disk, target in zip(self._disks(name), ("vda", "vdb"), strict=False):
                devices.append(disk_element(disk, target=target, **self._config.disk))
        self._libvirt.defineXML(ET.tostring(domain, encoding="unicode")).create()

    def stop(self, name: str) -> None:
        """Switch the guest off, if it is on."""
        if (domain := self._libvirt.lookupByName(name)).isActive():
            domain.destroy()

    def destroy(self, name: str) -> None:
        """Remove the guest and its disks. What is gone already is no error: a crash in the middle is made good."""
        if name in {domain.name() for domain in self._libvirt.listAllDomains()}:
            self.stop(name)
            self._libvirt.lookupByName(name).undefine()
        for disk in (RESCUE, "disk"):
            self.cache.remove_root_disk(name, name=disk)

    def resize(self, name: str, size: int) -> None:
        """Grow the root disk to ``size`` bytes. The guest is off meanwhile, and on again whatever happens."""
        self.stop(name)
        try:
            self.cache.resize_root_disk(name, size=size)
        finally:
            self.start(name)

    def rescue(self, name: str, image_id: str | None = None) -> None:
        """Boot from a new disk of this image (None: the instance's own), with the root disk as the second one."""
        image_id = image_id or self.cache.get_root_disk(name).image_id
        self.cache.create_root_disk(image_id, name, name=RESCUE)  # may take long: the guest runs on
        self.stop(name)
        self.start(name)

    def unrescue(self, name: str) -> None:
        """Boot from the root disk again."""
        self.stop(name)
        self.cache.remove_root_disk(name, name=RESCUE)
        self.start(name)

    def list(self) -> Iterator[Instance]:
        """Every guest whose root disk this cache has made."""
        for domain in sorted(self._libvirt.listAllDomains(), key=lambda domain: domain.name()):
            with suppress(exceptions.DiskNotFoundError, exceptions.InvalidRequestError):  # somebody else's
                *rescue, disk = self._disks(domain.name())
                yield Instance(
                    name=domain.name(),
                    running=bool(domain.isActive()),
                    rescued=bool(rescue),
                    image_id=disk.image_id,
                    size=disk.virtual_size,
                    reference=disk.reference,
                )

    def periodic(self) -> tuple[str, ...]:
        """Drop bases that are idle for ``max_idle``, and what dead processes left; the images that went."""
        # a copy leaves no trace at its base: the base stays because we say that its image is in use
        in_use = [instance.image_id for instance in self.list()]
        return self.cache.cleanup(self.cache.plan_cleanup(in_use=in_use)).removed

    def resources(self) -> dict[str, dict[str, int]]:
        """What this host has, by the names of OpenStack's Placement; the cache's disk is reserved."""
        with suppress(exceptions.BackendError):  # cannot be counted now: the last figure is better than too small a one
            self._reserved_mb = self.cache.reserved_disk_mb(self._config.reserved_disk_mb)
        usage = self.cache.usage()
        disks = shutil.disk_usage(str(self._config.cache.disks_dir)) if usage.own_filesystem else usage
        memory_mb, vcpus = self._libvirt.getInfo()[1:3]
        return {
            "VCPU": {"total": vcpus},
            "MEMORY_MB": {"total": memory_mb},
            "DISK_GB": {"total": disks.total >> 30, "reserved": -(-self._reserved_mb // 1024)},
        }

    def _disks(self, name: str) -> tuple[RootDisk, ...]:
        """The guest's disks, the one that it boots from first."""
        root = self.cache.get_root_disk(name)
        with suppress(exceptions.DiskNotFoundError):
            return self.cache.get_root_disk(name, name=RESCUE), root
        return (root,)


def _argument(text: str) -> str | int:
    return int(text[:-1]) << {"M": 20, "G": 30}[text[-1]] if text[:-1].isdigit() and text[-1] in "MG" else text


def main() -> None:
    """What a method of the driver gives, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, epilog="Sizes are written 512M, 20G.")
    parser.add_argument("config", type=Path)
    parser.add_argument("command", choices=[name for name in vars(MiniDriver) if not name.startswith("_")])
    parser.add_argument("arguments", nargs="*", type=_argument)
    args = parser.parse_args()
    try:
        with (driver := MiniDriver(DriverConfig.from_toml(args.config))).cache:
            result = getattr(driver, args.command)(*args.arguments)
            if result is not None:
                print(json.dumps([asdict(one) for one in result] if isinstance(result, Iterator) else result))
    except (exceptions.ImageCacheError, libvirt.libvirtError) as err:
        parser.exit(1, f"{err}\n")


if __name__ == "__main__":
    main()

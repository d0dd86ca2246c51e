"""A cache whose images boot: what the tests with libvirt share."""

from __future__ import annotations

import functools
import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.images import MIB, Sample, qemu_img
from harness.rig import KINDS, Rig
from nova_imagecache import FileLocation, ImageCache, ImageSource, RootDisk
from nova_imagecache.domains import LibvirtDomains
from services import guest
from services.libvirtd_ground import Ground

WROTE = guest.WROTE


@functools.cache
def bootable(banner: str, image_format: str = "raw") -> Sample:
    """An image whose guest prints ``banner`` and ``<banner>-data``."""
    data = guest.image(banner, f"{banner}-data", MIB)
    if image_format == "raw":
        return Sample(guest=data, served=data, disk_format="raw")
    with tempfile.TemporaryDirectory() as directory:
        source, target = Path(directory, "raw"), Path(directory, "qcow2")
        source.write_bytes(data)
        qemu_img("convert", "-q", "-f", "raw", "-O", "qcow2", str(source), str(target))
        return Sample(guest=data, served=target.read_bytes(), disk_format="qcow2")


def shelve(directory: Path, samples: Mapping[str, Sample]) -> None:
    """Put images into a directory as the source ``directory`` wants them."""
    directory.mkdir()
    for image_id, sample in samples.items():
        (directory / f"{image_id}.img").write_bytes(sample.served)
        digest = {"os_hash_algo": sample.digest.algorithm, "os_hash_value": sample.digest.value}
        (directory / f"{image_id}.json").write_text(json.dumps({"disk_format": sample.disk_format, **digest}))


def says(banner: str, *, again: bool = False) -> list[str]:
    """What the guest of ``bootable(banner)`` prints; ``again``: when it finds what it wrote at an earlier start."""
    return [banner, f"{banner}-data", *([WROTE] if again else []), "DONE"]


class BootRig(Rig):
    """A cache on a Ground with bootable images "one" and "two"; ``apart``: on another filesystem than its disks."""

    def __init__(self, ground: Ground, kind: str, *, apart: bool = False) -> None:
        here, there = ground.places()
        image_format = "qcow2" if "native" in kind else "raw"
        samples = {name: bootable(name.upper(), image_format) for name in ("one", "two")}
        super().__init__(here, kind, samples)
        self.ground = ground
        if apart:
            self.root = there / "root"
            # as it is out of the box: it links where it can
            self.options = {**KINDS[kind][1], "reference": "auto"}

    def finding(self, source: ImageSource | None = None, **config: Any) -> ImageCache:
        """A cache that asks libvirt as well."""
        return self.cache(source, user_finders=[LibvirtDomains(self.ground.daemon.uri)], **config)

    def base(self, image_id: str) -> Path:
        """The base's file."""
        return self.root / "bases" / image_id / "disk"

    def digest(self, image_id: str) -> str:
        """Of the base's file as it is now."""
        return hashlib.sha512(self.base(image_id).read_bytes()).hexdigest()


def path_of(disk: RootDisk) -> Path:
    """The file of a root disk."""
    assert isinstance(disk.location, FileLocation)
    return disk.location.path

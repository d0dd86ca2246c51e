"""Thousands of bases and disks in seconds: one is made by the library, the others are copies of what it left."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

from nova_imagecache import BackendPaths, CacheConfig, ImageCache
from nova_imagecache.backends.qcow2 import Qcow2Backend
from nova_imagecache.testing import FakeImage, FakeSource

if TYPE_CHECKING:
    from pathlib import Path


def populate(root: Path, count: int) -> None:
    """``count`` bases below ``root``, each with one disk that is linked to it, below ``root``/disks."""
    disks = root / "disks"
    with ImageCache(
        CacheConfig(root=root, disks_dir=disks),
        source=FakeSource({"seed": FakeImage(data=b"seed" * 1024)}),
        backend=Qcow2Backend({}, BackendPaths(root=root, disks_dir=disks)),
    ) as cache:
        cache.create_root_disk("seed", "seed-vm", size=1 << 30)
    seed, disk = root / "bases" / "seed", disks / "seed-vm"
    record = (seed / "base.json").read_text(encoding="utf-8")
    disk_record = (disk / "disk.json").read_text(encoding="utf-8")
    for number in range(count - 1):
        image_id = f"image-{number:05d}"
        base = root / "bases" / image_id
        base.mkdir(0o711)
        shutil.copyfile(seed / "disk", base / "disk")
        (base / "base.json").write_text(record.replace('"seed"', f'"{image_id}"'), encoding="utf-8")
        (base / "last-used").touch()
        home = disks / f"vm-{number:05d}"
        home.mkdir()
        os.link(base / "disk", home / "disk.base")
        shutil.copyfile(disk / "disk", home / "disk")
        (home / "disk.json").write_text(disk_record.replace('"seed"', f'"{image_id}"'), encoding="utf-8")

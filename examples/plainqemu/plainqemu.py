"""A guest without libvirt: QEMU on a root disk from nova_imagecache, on any backend. ``plainqemu.py CONFIG IMAGE ID``.

It prints what the guest says on its serial port, and ends when the guest says DONE.
"""

# ruff: noqa: T201, INP001 - a script that answers on the terminal

from __future__ import annotations

import json
import subprocess
import sys

from nova_imagecache import CacheConfig, FileLocation, ImageCache, RbdLocation, RootDisk

QEMU = ("qemu-system-x86_64", "-accel", "tcg", "-m", "64", "-nodefaults", "-display", "none", "-serial", "stdio")


def block_device(disk: RootDisk, config: CacheConfig) -> str:
    """The disk for ``-blockdev``: its format stated and never probed, since its guest may have written any header."""
    match disk.location:
        case FileLocation(path=path):
            storage = {"driver": "file", "filename": str(path)}
        case RbdLocation(pool=pool, name=name, user=user):
            conf = config.backend_options.get("conf", "/etc/ceph/ceph.conf")
            storage = {"driver": "rbd", "pool": pool, "image": name, "user": user or "admin", "conf": conf}
        case location:
            storage = {"driver": "host_device", "filename": str(location.path)}
    return json.dumps({"node-name": "root", "driver": disk.format, "file": storage})


def run(disk: RootDisk, config: CacheConfig) -> bool:
    """Boot from the disk; whether the guest says DONE. The overlay's header names its base and the base's format."""
    argv = [*QEMU, "-blockdev", block_device(disk, config), "-device", "virtio-blk-pci,drive=root"]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as qemu:
        assert qemu.stdout is not None  # noqa: S101 - it is a pipe
        try:
            for line in qemu.stdout:
                print(line.rstrip(), flush=True)
                if line.strip() == "DONE":
                    return True
        finally:
            qemu.terminate()
    return False


def main() -> int:
    """Run the guest on its disk, which is made if it is not there."""
    path, image_id, disk_id = sys.argv[1:]
    config = CacheConfig.from_toml(path)
    with ImageCache.from_config(config) as cache:
        disk = cache.create_root_disk(image_id, disk_id)
    return 0 if run(disk, config) else 1


if __name__ == "__main__":
    sys.exit(main())

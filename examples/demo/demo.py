"""The main job in the open: an image in a real Glance becomes the root disks of three instances.

Run it with ``make demo``. It works in a temporary directory, talks to a Glance of its own on this machine, and leaves
nothing behind. Read it from ``main`` on: the calls on ``cache`` are all that a virt driver needs.
"""

# ruff: noqa: T201, INP001 - a demo talks to its reader, and is no package

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from nova_imagecache import CacheConfig, FileLocation, ImageCache, Progress, RootDisk
from services.glance import ADMIN, GlanceServer  # tests/services: the Glance that the tests use, too

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MIB = 2**20
GIB = 2**30
IMAGE_SIZE = 1 * GIB  # what a guest sees; 64 MiB of it are written
DISK_SIZE = 4 * GIB


def main() -> None:
    """One image, three instances, and what is left to do afterwards."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that Glance ends in this case, too
    print("\n   From an image in Glance to the root disk of an instance\n")
    with tempfile.TemporaryDirectory(prefix="nova-imagecache-demo-") as name, ExitStack() as stack:
        work = Path(name)
        with step("make a qcow2 image: 64 MiB of data in a disk of 1 GiB") as say:
            image_file = make_image(work / "image.qcow2")
            say(readable(image_file.stat().st_size))
        with step("start a real Glance (sqlite, files, no keystone)") as say:
            glance = stack.enter_context(GlanceServer(work / "glance"))
            say(glance.url)
        with step("upload the image") as say:
            image_id = glance.upload(image_file, disk_format="qcow2")
            say(image_id)
        use_cache(work, glance.url, image_id)


def use_cache(work: Path, endpoint: str, image_id: str) -> None:
    """What a virt driver does, from its first instance on."""
    config = CacheConfig(
        root=work / "cache",
        disks_dir=work / "instances",
        backend="qcow2",
        source="glance",
        source_options={"endpoint": endpoint, "token": ADMIN},
    )
    with ImageCache.from_config(config) as cache:
        with step("ensure_base, cold: download, check, unpack, publish") as say:
            base = cache.ensure_base(image_id, progress=show_progress())
            say(f"{base.format}, {base.virtual_size / GIB:.0f} GiB for the guest")

        for instance in ("instance-1", "instance-2"):
            with step(f"create_root_disk for {instance}") as say:
                disk = cache.create_root_disk(image_id, instance, size=DISK_SIZE)
                say(describe(disk))

        with step("ensure_base, warm: it is there") as say:
            cache.ensure_base(image_id)
            say("no network, no lock, no child process")
        with step("create_root_disk for instance-3, warm") as say:
            disk = cache.create_root_disk(image_id, "instance-3", size=DISK_SIZE)
            say(describe(disk))

        with step("usage: what the cache takes") as say:
            usage = cache.usage()
            say(f"{usage.base_count} base: {readable(usage.allocated)} ({readable(usage.reclaimable)} reclaimable)")

        with step("plan_cleanup: what could go, and why not") as say:
            plan = cache.plan_cleanup()
            say(f"{readable(plan.freeable)} could go")
        for item in plan.items:
            print(f"              {item.image_id}: {item.verdict}, {item.reason}")

        print(f"\n   The disk of instance-3 ({disk.format}, tied to its base by a {disk.reference}):\n")
        print_backing_chain(disk)


def make_image(path: Path) -> Path:
    """A qcow2 image with four runs of 16 MiB of data, far from each other."""
    run("qemu-img", "create", "-q", "-f", "qcow2", str(path), str(IMAGE_SIZE))
    for number in range(4):
        run("qemu-io", "-f", "qcow2", "-c", f"write -q -P {number + 1} {number * 256}M 16M", str(path))
    return path


def show_progress() -> Callable[[Progress], None]:
    """A callback that prints a line for each quarter of a stage that is done."""
    shown: set[tuple[str, int]] = set()

    def progress(now: Progress) -> None:
        total = now.total or 0
        quarter = 4 * now.done // total if total else 0
        if quarter and (now.stage, quarter) not in shown:
            shown.add((now.stage, quarter))
            print(f"              {now.stage:<7} {readable(now.done):>10} of {readable(total)}", flush=True)

    return progress


def readable(size: int) -> str:
    """Bytes as a reader likes them."""
    return f"{size / MIB:.1f} MiB" if size >= MIB else f"{size // 1024} KiB"


def describe(disk: RootDisk) -> str:
    """The disk in a few words."""
    assert isinstance(disk.location, FileLocation)  # noqa: S101  the qcow2 backend makes files
    allocated = disk.location.path.stat().st_blocks * 512
    return f"{disk.virtual_size / GIB:.0f} GiB for the guest, {readable(allocated)} on disk"


def print_backing_chain(disk: RootDisk) -> None:
    """What qemu itself says of the disk and of everything below it."""
    assert isinstance(disk.location, FileLocation)  # noqa: S101  as above
    print(run("qemu-img", "info", "--backing-chain", "-f", disk.format, str(disk.location.path)))


def run(*argv: str) -> str:
    """The standard output of a command that must succeed."""
    return subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True).stdout


@contextmanager
def step(title: str) -> Iterator[Callable[[str], None]]:
    """Times what happens inside and prints it as one line: the time, the step, and what was said about it."""
    said: list[str] = []
    start = time.perf_counter()
    yield said.append
    took = time.perf_counter() - start
    shown = f"{took:7.2f} s " if took >= 1 else f"{took * 1000:7.1f} ms"
    print(f"{shown}  {title:<58} {'; '.join(said)}", flush=True)


if __name__ == "__main__":
    main()

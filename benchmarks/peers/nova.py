"""One measurement of Nova's image cache: ``.venv-nova/bin/python -m benchmarks.peers.nova TASK``.

What runs is Nova's code as it is, called as ``LibvirtDriver._try_fetch_image_cache`` calls it::

    imagebackend.Qcow2(instance, "disk").cache(fetch_func=libvirt_utils.fetch_image, context, filename=sha1(image_id),
                                               image_id, size, trusted_certs=None)

and for the cleanup pass ``libvirt.imagecache.ImageCacheManager.update``. Four things are not Nova's production set-up:

* no Keystone: ``RequestContext(user_auth_plugin=noauth.NoAuth())`` and ``[glance]api_servers``; session, client and
  checksums are the real ones;
* privileged calls (``utime`` alone, on this path) run in the process instead of through privsep's daemon, which spares
  Nova a little;
* instances are real objects that were never saved, and the pass finds no block devices: there is no database;
* no nova-compute, libvirt or message bus around it.

Imports and configuration are not in the times.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from benchmarks import meter

if TYPE_CHECKING:
    from benchmarks.meter import Figures

MIB = 2**20
HOST = "host"


def set_up(task: Figures) -> None:
    """Import and configure Nova as nova-compute does, with its own default of native threads."""
    sys.argv = ["nova-compute"]
    from nova import monkey_patch

    monkey_patch.patch(backend="threading")
    import nova.conf
    import nova.privsep
    from nova import objects

    conf = nova.conf.CONF
    conf([], project="nova", default_config_files=[])
    conf.set_override("host", HOST)
    conf.set_override("instances_path", task["root"])
    conf.set_override("lock_path", str(Path(task["root"]) / "locks"), "oslo_concurrency")
    conf.set_override("api_servers", [task["endpoint"]], "glance")
    objects.register_all()
    nova.privsep.sys_admin_pctxt.set_client_mode(False)
    from nova.virt.libvirt import imagebackend, imagecache, utils  # noqa: F401 - imported before anything is timed


def context() -> Any:
    """A request of an admin whom nobody asks for a token."""
    from keystoneauth1 import noauth
    from nova.context import RequestContext

    return RequestContext("bench", "bench", is_admin=True, overwrite=False, user_auth_plugin=noauth.NoAuth())


def root_disk(image_id: str, size: int) -> float:
    """Seconds of what LibvirtDriver does for a root disk."""
    from nova import objects
    from nova.virt.libvirt import imagebackend, imagecache
    from nova.virt.libvirt import utils as libvirt_utils

    instance = objects.Instance(uuid=str(uuid.uuid4()))
    request = context()
    start = time.perf_counter()
    Path(libvirt_utils.get_instance_path(instance)).mkdir(parents=True, exist_ok=True)
    imagebackend.Qcow2(instance, "disk").cache(
        fetch_func=libvirt_utils.fetch_image,
        context=request,
        filename=imagecache.get_cache_fname(image_id),
        image_id=image_id,
        size=size,
        trusted_certs=None,
    )
    return time.perf_counter() - start


# --- measurements ----------------------------------------------------------------------------------------------------


def cold(task: Figures) -> Figures:
    """An image becomes a base and a root disk."""
    root_disk(task["warm_up"], task["size"])
    meter.ready()
    with meter.Meter() as costs:
        root_disk(task["image"], task["size"])
    base = Path(task["root"]) / "_base" / hashlib.sha1(task["image"].encode()).hexdigest()  # noqa: S324 - Nova's name
    return {**costs.figures, "base_allocated": base.stat().st_blocks * 512}


def warm(task: Figures) -> Figures:
    """Root disks, one after the other, from a base that is there."""
    root_disk(task["image"], task["size"])
    meter.ready()
    with meter.Meter() as costs:
        times = [root_disk(task["image"], task["size"]) for _number in range(task["n"])]
    return {**costs.figures, **meter.spread(times)}


def crowd(task: Figures) -> Figures:
    """Many threads that want a root disk of one image: when each had it, by the host's clock."""
    root_disk(task["warm_up"], task["size"])
    made = [0.0] * task["threads"]

    def one(number: int) -> None:
        root_disk(task["image"], task["size"])
        made[number] = time.monotonic()

    meter.ready()
    start = time.monotonic()
    with meter.Meter() as costs:
        meter.together(task["threads"], one)
    return {**costs.figures, "start": start, "based": made, "made": made}


def cleanup(task: Figures) -> Figures:
    """A pass of the image cache manager over bases that all have an instance."""
    from nova import objects
    from nova.virt.libvirt import imagecache

    instances = _populate(Path(task["root"]), task["bases"])
    with mock.patch.object(objects.BlockDeviceMappingList, "bdms_by_instance_uuid", return_value={}):
        manager = imagecache.ImageCacheManager()
        meter.ready()
        with meter.Meter() as costs:
            manager.update(context(), instances)
    if len(manager.active_base_files) != task["bases"] or manager.removable_base_files:
        raise SystemExit(f"the pass is wrong: {task['bases']} bases are in use")
    return costs.figures


def _populate(root: Path, count: int) -> Any:
    """``count`` bases with one instance each, whose disk is a real overlay; the instances."""
    from nova import objects

    bases = root / "_base"
    bases.mkdir()
    seed_base, seed = bases / ("x" * 40), root / "seed.qcow2"
    with seed_base.open("wb") as file:
        file.truncate(MIB)
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(seed_base), "-F", "raw", str(seed), "1M"]
    subprocess.run(argv, check=True)
    overlay = seed.read_bytes()
    seed.unlink()
    found = []
    for number in range(count):
        image_id, instance_id = (str(uuid.uuid5(uuid.NAMESPACE_OID, f"{kind} {number}")) for kind in ("image", "vm"))
        base = bases / hashlib.sha1(image_id.encode()).hexdigest()  # noqa: S324 - Nova's name
        shutil.copyfile(seed_base, base)
        (root / instance_id).mkdir()
        # a name of the same length: the header stays as it is
        (root / instance_id / "disk").write_bytes(overlay.replace(os.fsencode(seed_base), os.fsencode(base)))
        found.append(
            objects.Instance(
                id=number + 1,
                uuid=instance_id,
                host=HOST,
                hostname="guest",
                image_ref=image_id,
                kernel_id="",
                ramdisk_id="",
                os_type=None,
                task_state=None,
                vm_state="active",
            )
        )
    seed_base.unlink()
    return objects.InstanceList(objects=found)


_WORK = {"cold": cold, "warm": warm, "crowd": crowd, "cleanup": cleanup}


def main() -> None:
    """Do what the task says."""
    task = meter.task()
    set_up(task)
    meter.answer(_WORK[task["what"]](task))
    # threads of oslo's would keep the process
    os._exit(0)


if __name__ == "__main__":
    main()

"""One measurement of the library in a process of its own: ``python -m benchmarks.worker TASK``.

Everything goes through the public names. The task says in ``what`` which of the functions below is run, and in
``config`` what the cache is told.
"""

from __future__ import annotations

import importlib
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import meter
from nova_imagecache import CacheConfig, ImageCache
from nova_imagecache.finders import DiskDirectories

if TYPE_CHECKING:
    from benchmarks.meter import Figures

_IMPORTED = meter.memory()


def _imported(config: Figures) -> int:
    """Resident bytes after the imports, Ceph's bindings among them where they are used."""
    if config.get("backend") != "rbd":
        return _IMPORTED
    for module in ("rados", "rbd"):
        importlib.import_module(module)
    return meter.memory()


def open_cache(task: Figures) -> ImageCache:
    """The cache that the task describes; with ``finder`` it looks at the header of every disk."""
    config = CacheConfig.from_mapping(task["config"])
    assert config.disks_dir is not None  # noqa: S101 - the configuration fills it in
    finders = [DiskDirectories([config.disks_dir])] if task.get("finder") else []
    return ImageCache.from_config(config, user_finders=finders)


def cold(task: Figures) -> Figures:
    """An image becomes a base and a root disk."""
    imported = _imported(task["config"])
    with open_cache(task) as cache:
        if warm_up := task.get("warm_up"):
            cache.ensure_base(warm_up)
            if task.get("size"):
                cache.create_root_disk(warm_up, "warm-up", size=task["size"])
        meter.ready()
        with meter.Meter(imported) as costs:
            base = cache.ensure_base(task["image"])
            there = time.perf_counter()
            if task.get("size"):
                cache.create_root_disk(task["image"], "measured", size=task["size"])
            disk = time.perf_counter() - there
        figures = {**costs.figures, "disk_seconds": disk, "made_by": base.record.made_by}
        figures["base_seconds"] = figures["seconds"] - disk
        figures["base_allocated"] = cache.base_usage(task["image"]).allocated
        return figures


def warm(task: Figures) -> Figures:
    """Root disks, one after the other, from a base that is there."""
    with open_cache(task) as cache:
        # the first one makes what later ones use
        cache.create_root_disk(task["image"], "first", size=task["size"])
        meter.ready()
        times = []
        with meter.Meter(_IMPORTED) as costs:
            for number in range(task["n"]):
                start = time.perf_counter()
                cache.create_root_disk(task["image"], f"disk-{number}", size=task["size"])
                times.append(time.perf_counter() - start)
        return {**costs.figures, **meter.spread(times)}


def hit(task: Figures) -> Figures:
    """ensure_base of a base that is there."""
    with open_cache(task) as cache:
        cache.ensure_base(task["image"])
        meter.ready()
        times = []
        with meter.Meter(_IMPORTED) as costs:
            for _number in range(task["n"]):
                start = time.perf_counter()
                cache.ensure_base(task["image"])
                times.append(time.perf_counter() - start)
        return {**costs.figures, **meter.spread(times)}


def bare(task: Figures) -> Figures:
    """``qemu-img create`` of an overlay and nothing else: no record, no reference, no sync."""
    directory, base = Path(task["directory"]), task["base"]
    meter.ready()
    times = []
    with meter.Meter() as costs:
        for number in range(task["n"]):
            argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw"]
            start = time.perf_counter()
            subprocess.run([*argv, str(directory / f"bare-{number}"), str(task["size"])], check=True)
            times.append(time.perf_counter() - start)
    return {**costs.figures, **meter.spread(times)}


def crowd(task: Figures) -> Figures:
    """Many threads that want a root disk of one image: when each had its base, and its disk; by the host's clock."""
    threads = task["threads"]
    based, made = [0.0] * threads, [0.0] * threads
    with open_cache(task) as cache:
        cache.ensure_base(task["warm_up"])

        def one(number: int) -> None:
            cache.ensure_base(task["image"])
            based[number] = time.monotonic()
            if task.get("size"):
                cache.create_root_disk(task["image"], f"{task['prefix']}-{number}", size=task["size"])
                made[number] = time.monotonic()

        meter.ready()
        start = time.monotonic()
        with meter.Meter(_IMPORTED) as costs:
            meter.together(threads, one)
    return {**costs.figures, "start": start, "based": based, "made": made if task.get("size") else based}


def at_once(task: Figures) -> Figures:
    """The same number of warm root disks, one after the other and all at one moment."""
    with open_cache(task) as cache:
        cache.create_root_disk(task["image"], "first", size=task["size"])

        def one(name: str) -> float:
            start = time.perf_counter()
            cache.create_root_disk(task["image"], name, size=task["size"])
            return time.perf_counter() - start

        meter.ready()
        start = time.perf_counter()
        for number in range(task["n"]):
            one(f"after-{number}")
        after = time.perf_counter() - start
        times = [0.0] * task["n"]
        with meter.Meter(_IMPORTED) as costs:
            seconds = meter.together(task["n"], lambda number: times.__setitem__(number, one(f"at-once-{number}")))
        return {**costs.figures, **meter.spread(times), "seconds": seconds, "one_by_one": after}


def cleanup(task: Figures) -> Figures:
    """A whole cleanup pass over what is there, the first one of its process; and its parts, once more."""
    parts: Figures = {}
    with open_cache(task) as cache:
        meter.ready()
        with meter.Meter(_IMPORTED) as costs:
            plan = cache.plan_cleanup()
            report = cache.cleanup(plan)
        for name, call in (("plan", cache.plan_cleanup), ("usage", cache.usage), ("recover", cache.recover)):
            start = time.perf_counter()
            call()
            parts[name] = time.perf_counter() - start
    kept = [item for item in plan.items if item.verdict == "keep" and item.users]
    if len(kept) != task["bases"] or report.removed or report.failed:
        raise SystemExit(f"the plan is wrong: {task['bases']} bases are to be kept, each with its disk")
    return {**costs.figures, **parts}


def going(task: Figures) -> Figures:
    """After the disks of every third base went: the pass that marks these bases, and the one that removes them."""
    parts: Figures = {}
    with open_cache(task) as cache:
        gone = 0
        for number, disk in enumerate(list(cache.root_disks())):
            if number % 3 == 0:
                cache.remove_root_disk(disk.disk_id)
                gone += 1
        meter.ready()
        start, before = time.perf_counter(), time.process_time()
        report = cache.cleanup()
        parts |= {"mark": time.perf_counter() - start, "mark_cpu": time.process_time() - before}
        with meter.Meter(_IMPORTED) as costs:
            removal = cache.cleanup(cache.plan_cleanup(max_idle=0))
    if len(report.marked) != gone or len(removal.removed) != gone or report.failed or removal.failed:
        raise SystemExit(f"the passes are wrong: {gone} bases are to be marked, and then to go")
    return {**costs.figures, **parts, "removed": gone}


def start_up(task: Figures) -> Figures:
    """Importing the package, in a process that has nothing of it yet."""
    meter.ready()
    start = time.perf_counter()
    argv = [task["python"], "-I", "-c", "pass"]
    subprocess.run(argv, check=True)
    empty = time.perf_counter() - start
    argv[-1] = "import nova_imagecache"
    start = time.perf_counter()
    subprocess.run(argv, check=True)
    return {"seconds": time.perf_counter() - start - empty, "threads": threading.active_count()}


_WORK = {
    "cold": cold,
    "warm": warm,
    "hit": hit,
    "bare": bare,
    "crowd": crowd,
    "at_once": at_once,
    "cleanup": cleanup,
    "going": going,
    "start_up": start_up,
}


def main() -> None:
    """Do what the task says."""
    task = meter.task()
    meter.answer(_WORK[task["what"]](task))


if __name__ == "__main__":
    main()

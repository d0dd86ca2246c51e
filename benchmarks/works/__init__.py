"""What is measured, by name: each yields the samples of one round, in which those who are compared take turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from benchmarks.bench import Bench, Sample
from benchmarks.works.ceph import rbd_clone, rbd_import
from benchmarks.works.cleanup import cleanup
from benchmarks.works.cold import cold
from benchmarks.works.crowd import at_once, crowd
from benchmarks.works.warm import hit, start_up, warm

Work = Callable[[Bench, int], Iterator[Sample]]

WORKS: dict[str, Work] = {
    "start-up": start_up,
    "hit": hit,
    "warm": warm,
    "at-once": at_once,
    "cold": cold,
    "crowd": crowd,
    "cleanup": cleanup,
    "rbd-clone": rbd_clone,
    "rbd-import": rbd_import,
}

"""BackendBench measures a backend through its contract, and leaves nothing behind."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nova_imagecache.backends import Backend, BackendPaths, BackendProperties, BaseImage, Retired, RootDisk
from nova_imagecache.backends.file import FileBackend
from nova_imagecache.backends.qcow2 import Qcow2Backend
from nova_imagecache.testing import (
    CONTRACT_VERSION,
    BackendBench,
    BenchReport,
    BenchTiming,
    MemoryBackend,
    bench_backend,
)

MIB = 2**20
COLD = ("stage", "write", "publish")
WARM = ("find_base", "create_root_disk", "get_root_disk", "remove_root_disk")
WALKS = ("iter_bases", "iter_users", "usage", "capacity")
GOING = ("retire_base", "purge_base")


def ticking() -> Callable[[], float]:
    """A clock on which everything takes a second."""
    ticks = itertools.count()
    return lambda: float(next(ticks))


@pytest.mark.parametrize("make", [FileBackend, Qcow2Backend])
def test_real_backends_are_measured(make: Callable[[Any, BackendPaths], Backend], tmp_path: Path) -> None:
    """The three lines of an author: every operation has a time, the storage is as it was."""
    paths = BackendPaths(root=tmp_path / "root", disks_dir=tmp_path / "disks")
    paths.root.mkdir()
    backend = make({}, paths)
    report = bench_backend(backend, rounds=2, base_size=MIB, bases=3)
    assert {timing.operation for timing in report.timings} == {*COLD, *WARM, *WALKS, *GOING}
    assert all(0 < timing.fastest <= timing.median <= timing.slowest for timing in report.timings)
    assert (list(backend.iter_bases()), list(backend.iter_root_disks())) == ([], [])
    assert (backend.capacity().staging, backend.capacity().trash) == (0, 0)


def test_calls_are_counted_and_medians_taken() -> None:
    """Each round is one call, but for hits; a warm path is measured on a base that was brought in once."""
    report = BackendBench(MemoryBackend(), rounds=4, base_size=3 * MIB, bases=7, clock=ticking()).run()
    counts = {timing.operation: timing.count for timing in report.timings}
    assert counts == {
        **dict.fromkeys((*COLD, "create_root_disk", "get_root_disk", "remove_root_disk"), 4),
        **dict.fromkeys(("iter_bases", "usage", "capacity"), 4),
        **dict.fromkeys(GOING, 3),
        "find_base": 40,
        "iter_users": 1,
    }
    assert all(timing.median == 1.0 for timing in report.timings)
    assert (report.median("publish"), report.base_size, report.disk_size, report.bases) == (1.0, 3 * MIB, 6 * MIB, 7)


def test_as_many_bases_are_listed_as_were_asked_for() -> None:
    """The walk over bases is over all of them, the one of the warm path included."""
    seen = []

    class Counting(MemoryBackend):
        def iter_bases(self) -> Any:
            found = list(super().iter_bases())
            seen.append(len(found))
            return iter(found)

    bench_backend(Counting(), rounds=2, base_size=MIB, bases=50)
    assert seen[:2] == [50, 50]


def test_report_is_a_value_that_json_holds() -> None:
    """What is written to a file is what is read from it; the table names every operation."""
    report = bench_backend(MemoryBackend(), rounds=1, base_size=MIB, bases=1)
    values = json.loads(report.to_json())
    timings = tuple(BenchTiming(**timing) for timing in values.pop("timings"))
    assert BenchReport(**values, timings=timings) == report
    assert values["backend"] == "MemoryBackend"
    assert values["contract_version"] == CONTRACT_VERSION
    assert all(operation in str(report) for operation in (*COLD, *WARM, *WALKS))
    with pytest.raises(AttributeError):
        report.bases = 2  # type: ignore[misc]  # that is the point


def test_an_error_leaves_nothing_behind() -> None:
    """A backend that fails in the middle is tidied all the same."""

    class Fails(MemoryBackend):
        def get_root_disk(self, disk_id: str, name: str) -> RootDisk | None:
            raise RuntimeError("in the middle")

    backend = Fails()
    with pytest.raises(RuntimeError, match="in the middle"):
        bench_backend(backend, rounds=2, base_size=MIB, bases=2)
    assert (list(backend.iter_bases()), list(backend.iter_root_disks())) == ([], [])


def test_others_things_are_left_alone() -> None:
    """What was in the storage before is there afterwards."""
    backend = MemoryBackend()
    kept = _publish(backend, "kept")
    backend.create_root_disk(kept, "vm", "disk", MIB)
    bench_backend(backend, rounds=1, base_size=MIB, bases=2)
    assert [base.image_id for base in backend.iter_bases()] == ["kept"]
    assert [disk.disk_id for disk in backend.iter_root_disks()] == ["vm"]


def test_qcow2_bases_are_images() -> None:
    """Where a backend takes no raw bases, what is brought in is a qcow2 file."""
    seen = []

    class Packed(MemoryBackend):
        properties = BackendProperties(base_formats=("qcow2",), disk_kind="clone", storage="memory")

        def retire_base(self, base: BaseImage) -> Retired:
            seen.append((base.format, self.contents(base.image_id)[:4]))
            return super().retire_base(base)

    bench_backend(Packed(), rounds=2, base_size=MIB, bases=1)
    assert set(seen) == {("qcow2", b"QFI\xfb")}


@pytest.mark.parametrize("given", [{"rounds": 0}, {"bases": 0}, {"base_size": 0}, {"disk_size": -1}])
def test_nothing_cannot_be_measured(given: dict[str, int]) -> None:
    """Figures of no calls are no figures."""
    with pytest.raises(ValueError, match="above 0"):
        BackendBench(MemoryBackend(), **given)  # type: ignore[arg-type]  # figures only


def _publish(backend: MemoryBackend, image_id: str) -> BaseImage:
    from nova_imagecache.testing._samples import make_sample, record_of

    sample = make_sample("raw", "kept")
    writer = backend.stage_base(image_id, "raw")
    writer.write_at(0, sample.stored[:MIB])
    return writer.publish(record_of(image_id, sample, "test"))

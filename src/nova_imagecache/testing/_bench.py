"""How fast a backend is, measured through its contract: the cold path, the warm path, a hit, and the walks."""

from __future__ import annotations

import json
import random
import secrets
import statistics
import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from nova_imagecache.backends import Backend, BaseImage
from nova_imagecache.testing._promises import CONTRACT_VERSION
from nova_imagecache.testing._samples import MIB, Sample, record_of, stored_as

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_HITS = 10
"""Hits that are measured for each round: one alone is too short for most clocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchTiming:
    """What one operation took, in seconds, over ``count`` calls."""

    operation: str
    count: int
    median: float
    fastest: float
    slowest: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchReport:
    """What ``BackendBench`` measured.

    Attributes:
        backend: the class of the backend.
        contract_version: of the interface that was measured.
        base_size: bytes of the base that is brought in and of which disks are made.
        disk_size: bytes of the disks.
        bases: how many bases there are while they are listed.
        timings: one for each operation, in the order of the table.
    """

    backend: str
    contract_version: int
    base_size: int
    disk_size: int
    bases: int
    timings: tuple[BenchTiming, ...]

    def median(self, operation: str) -> float:
        """The median of one operation, in seconds; KeyError for one that was not measured."""
        return {timing.operation: timing.median for timing in self.timings}[operation]

    def as_dict(self) -> dict[str, Any]:
        """The report in plain values, as JSON can hold them."""
        return {**asdict(self), "timings": [asdict(timing) for timing in self.timings]}

    def to_json(self) -> str:
        """The report as one JSON object."""
        return json.dumps(self.as_dict(), indent=1)

    def __str__(self) -> str:
        lines = [f"{self.backend}: base {self.base_size // MIB} MiB, {self.bases} bases; milliseconds"]
        lines.append(f"{'operation':<20}{'median':>10}{'fastest':>10}{'slowest':>10}{'calls':>7}")
        for one in self.timings:
            figures = "".join(f"{seconds * 1000:>10.3f}" for seconds in (one.median, one.fastest, one.slowest))
            lines.append(f"{one.operation:<20}{figures}{one.count:>7}")
        return "\n".join(lines)


class BackendBench:
    """Measures a backend through its contract, alone: no source, no conversion, no locks.

        report = BackendBench(MyBackend({}, paths)).run()
        print(report)                # a table
        print(report.to_json())      # for a file

    | operation | what is measured |
    |---|---|
    | ``stage``, ``write``, ``publish`` | the cold path: a writer of the base's size, all its bytes, sync and publish |
    | ``find_base`` | a hit |
    | ``create_root_disk``, ``get_root_disk``, ``remove_root_disk`` | the warm path |
    | ``iter_bases``, ``iter_users``, ``usage``, ``capacity`` | what a periodic pass does |
    | ``retire_base``, ``purge_base`` | a base goes |

    Args:
        backend: one whose storage may be written to. What the bench makes has ids that begin with "bench-" and a random
            part, and is removed again, also after an error.
        rounds: how often the cold and the warm path are gone.
        base_size: bytes of the base, random bytes without holes.
        disk_size: bytes of the disks; None: twice the base.
        bases: how many small bases there are while ``iter_bases`` is measured.
        clock: seconds, monotonic.

    Raises:
        ValueError: ``rounds``, ``bases`` or a size below 1.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        rounds: int = 10,
        base_size: int = 64 * MIB,
        disk_size: int | None = None,
        bases: int = 100,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._disk_size = 2 * base_size if disk_size is None else disk_size
        if min(rounds, bases, base_size, self._disk_size) < 1:
            raise ValueError("rounds, bases and sizes must be above 0")
        self._backend = backend
        self._rounds = rounds
        self._base_size = base_size
        self._bases = bases
        self._clock = clock
        self._prefix = f"bench-{secrets.token_hex(4)}"
        self._taken: dict[str, list[float]] = defaultdict(list)

    def run(self) -> BenchReport:
        """Measure everything once; what was made is removed again."""
        self._taken.clear()
        try:
            base = self._cold_path()
            self._warm_path(base)
            self._walks(base)
        finally:
            self._remove_all()
        return BenchReport(
            backend=type(self._backend).__name__,
            contract_version=CONTRACT_VERSION,
            base_size=self._base_size,
            disk_size=self._disk_size,
            bases=self._bases,
            timings=tuple(_timing(operation, taken) for operation, taken in self._taken.items()),
        )

    # --- the paths

    def _cold_path(self) -> BaseImage:
        """A base, brought in ``rounds`` times; the last one stays."""
        sample = self._sample(self._base_size)
        for number in range(self._rounds):
            base = self._bring_in(f"{self._prefix}-{number}", sample)
            if number < self._rounds - 1:
                with self._measured("retire_base"):
                    retired = self._backend.retire_base(base)
                with self._measured("purge_base"):
                    self._backend.purge_base(retired)
        return base

    def _bring_in(self, image_id: str, sample: Sample) -> BaseImage:
        with self._measured("stage"):
            writer = self._backend.stage_base(image_id, sample.format)
            writer.set_size(len(sample.stored))
        view = memoryview(sample.stored)
        with self._measured("write"):
            for offset in range(0, len(view), MIB):
                writer.write_at(offset, view[offset : offset + MIB])
        with self._measured("publish"):
            writer.sync()
            return writer.publish(record_of(image_id, sample, "bench"))

    def _warm_path(self, base: BaseImage) -> None:
        for number in range(self._rounds):
            for _hit in range(_HITS):
                with self._measured("find_base"):
                    self._backend.find_base(base.image_id)
            disk_id = f"{self._prefix}-{number}"
            with self._measured("create_root_disk"):
                self._backend.create_root_disk(base, disk_id, "disk", self._disk_size)
            with self._measured("get_root_disk"):
                self._backend.get_root_disk(disk_id, "disk")
        with self._measured("iter_users"):
            list(self._backend.iter_users(base))
        for number in range(self._rounds):
            with self._measured("remove_root_disk"):
                self._backend.remove_root_disk(f"{self._prefix}-{number}", "disk")

    def _walks(self, base: BaseImage) -> None:
        small = self._sample(4096)
        for number in range(1, self._bases):
            image_id = f"{self._prefix}-small-{number}"
            writer = self._backend.stage_base(image_id, small.format)
            writer.write_at(0, small.stored)
            writer.publish(record_of(image_id, small, "bench"))
        for _round in range(self._rounds):
            with self._measured("iter_bases"):
                list(self._backend.iter_bases())
            with self._measured("usage"):
                self._backend.usage(base)
            with self._measured("capacity"):
                self._backend.capacity()

    # --- help

    def _sample(self, size: int) -> Sample:
        formats = self._backend.properties.base_formats
        words = random.Random(size).randbytes(min(size, MIB))  # noqa: S311 - the same bytes in every run
        guest = (words * -(-size // len(words)))[:size]
        return stored_as("raw" if "raw" in formats else formats[0], guest)

    @contextmanager
    def _measured(self, operation: str) -> Iterator[None]:
        start = self._clock()
        yield
        self._taken[operation].append(self._clock() - start)

    def _remove_all(self) -> None:
        for disk in list(self._backend.iter_root_disks()):
            if disk.disk_id.startswith(self._prefix):
                self._backend.remove_root_disk(disk.disk_id, disk.name)
        for base in list(self._backend.iter_bases()):
            if base.image_id.startswith(self._prefix):
                self._backend.purge_base(self._backend.retire_base(base))


def bench_backend(
    backend: Backend, *, rounds: int = 10, base_size: int = 64 * MIB, disk_size: int | None = None, bases: int = 100
) -> BenchReport:
    """What ``BackendBench`` measures of the backend, in one call."""
    return BackendBench(backend, rounds=rounds, base_size=base_size, disk_size=disk_size, bases=bases).run()


def _timing(operation: str, taken: list[float]) -> BenchTiming:
    return BenchTiming(
        operation=operation,
        count=len(taken),
        median=statistics.median(taken),
        fastest=min(taken),
        slowest=max(taken),
    )

"""Everything at once, by processes that are killed at any moment: no base in use is lost, no litter, no lock stuck.

NOVA_IMAGECACHE_SOAK=SECONDS runs it longer. What was run is told at the end of the whole run.
"""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import pytest

from harness import images
from harness.children import ChildError, child
from harness.images import MIB
from harness.rig import Rig, backing_name
from harness.said import SAID
from harness.upkeep import DAY, assert_counts_as_du, dense, names, open_cache
from nova_imagecache import (
    BaseInUseError,
    BaseNotFoundError,
    BasePinnedError,
    DiskExistsError,
    DiskNotFoundError,
    ImageCache,
    InvalidRequestError,
    NoSpaceError,
)
from nova_imagecache.finders import DiskDirectories

SECONDS = float(os.environ.get("NOVA_IMAGECACHE_SOAK", "15"))
PROCESSES = 8
DISKS = 12
SIZE = 4 * MIB
SAMPLES = {
    **{f"raw-{number}": images.raw(f"soak {number}") for number in range(3)},
    **{f"dense-{number}": dense(f"soak {number}") for number in range(2)},
    "packed": images.qcow2("soak"),
    "twin": images.raw("soak 0"),
}
DEEDS = ("ensure", "create", "remove", "move", "clean", "pin", "unpin", "recover", "look", "remove_base")
FEWEST = 3
"""Of each kind of deed that came to an end, also by a refusal: with fewer, the run has shown nothing."""
EXPECTED = (BaseInUseError, BaseNotFoundError, BasePinnedError, DiskExistsError, DiskNotFoundError, NoSpaceError)
"""What a driver hears when others remove, use or fill what it works on."""


class Life:
    """One process's random deeds, until its time is up; it counts what came to its end."""

    def __init__(self, rig: Rig, seed: str, seconds: float) -> None:
        self._rig = rig
        self._dice = random.Random(seed)
        self._until = time.monotonic() + seconds
        self.counts: Counter[str] = Counter()

    def run(self) -> Counter[str]:
        clock_error = self._dice.choice([0.0, 0.0, 3 * DAY, -3 * DAY])
        finders = [DiskDirectories([self._rig.disks, self._rig.dir / "moved"])]
        deeds = [self.ensure] * 4 + [self.create] * 6 + [self.remove] * 4 + [self.move] * 2 + [self.clean] * 2
        deeds += [self.pin, self.unpin, self.recover, self.look, self.remove_base]
        with open_cache(
            self._rig, lambda: time.time() + clock_error, user_finders=finders, max_bytes=int(5.5 * MIB)
        ) as cache:
            while time.monotonic() < self._until:
                self.do(self._dice.choice(deeds), cache)
        return self.counts

    def do(self, deed: Callable[[ImageCache], None], cache: ImageCache) -> None:
        name = deed.__name__
        try:
            deed(cache)
        except EXPECTED as err:
            name = f"{name}: {type(err).__name__}"
        self.counts[name] += 1

    def _image(self) -> str:
        return self._dice.choice(list(SAMPLES))

    def _disk(self) -> str:
        return f"vm-{self._dice.randrange(DISKS)}"

    @contextmanager
    def _instance(self, name: str, how: int) -> Iterator[None]:
        """The driver's own order among what it does with one instance; the kernel ends it with the process."""
        fd = os.open(self._rig.dir / f"driver.{name}", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, how)
            yield
        finally:
            os.close(fd)

    def ensure(self, cache: ImageCache) -> None:
        image_id = self._image()
        assert cache.ensure_base(image_id).image_id == image_id

    def create(self, cache: ImageCache) -> None:
        disk_id = self._disk()
        with self._instance(disk_id, fcntl.LOCK_SH):
            cache.create_root_disk(self._image(), disk_id, size=SIZE)

    def remove(self, cache: ImageCache) -> None:
        cache.remove_root_disk(self._disk())

    def move(self, cache: ImageCache) -> None:
        """An instance's directory goes elsewhere, or comes back."""
        name = self._disk()
        here, there = self._rig.disks / name, self._rig.dir / "moved" / f"{name}_resize"
        # a driver moves what nobody works on: neither itself nor the cache
        with self._instance(name, fcntl.LOCK_EX), cache._engine.disk_lock(name, "disk"), suppress(OSError):
            if there.exists():
                if not here.exists():
                    there.rename(here)
            elif (here / "disk").exists():
                here.rename(there)

    def clean(self, cache: ImageCache) -> None:
        report = cache.cleanup(cache.plan_cleanup(max_idle=self._dice.choice([0.0, 1.0])))
        assert not report.failed, report

    def pin(self, cache: ImageCache) -> None:
        # by a clock that is ahead it is over already
        with suppress(InvalidRequestError):
            cache.pin(self._image(), f"owner-{self._dice.randrange(2)}", until=time.time() + self._dice.random())

    def unpin(self, cache: ImageCache) -> None:
        cache.unpin(self._image(), f"owner-{self._dice.randrange(2)}")

    def recover(self, cache: ImageCache) -> None:
        report = cache.recover()
        assert not report.failed, report

    def look(self, cache: ImageCache) -> None:
        cache.usage()
        list(cache.root_disks())

    def remove_base(self, cache: ImageCache) -> None:
        cache.remove_base(self._image())


def _no_disk_lost_its_base(rig: Rig) -> int:
    """Every disk, wherever its directory is now, opens and reads as its image; how many there are."""
    found = [*rig.disks.glob("*/disk"), *(rig.dir / "moved").glob("*/disk")]
    for path in found:
        name = backing_name(path)
        assert name is not None
        assert (path.parent / name).exists(), f"{path} lost its base {name}"
    return len(found)


def _round(rig: Rig, number: int, seconds: float) -> tuple[Counter[str], int]:
    """Eight processes at once, half of which are killed at some moment: (what they did, how many were killed)."""
    counts: Counter[str] = Counter()
    killed = 0
    dice = random.Random(f"round {number}")
    begin = time.monotonic()
    lives = [Life(rig, f"{number} {index}", seconds) for index in range(PROCESSES)]
    with ExitStack() as stack:
        running = [stack.enter_context(child(life.run)) for life in lives]
        for index, victim in enumerate(running[: PROCESSES // 2]):
            time.sleep(max(0.0, begin + seconds * (index + dice.random()) / PROCESSES * 2 - time.monotonic()))
            with suppress(ProcessLookupError):
                os.kill(victim.pid, signal.SIGKILL)
        for process in running:
            try:
                counts += process.result()
            except ChildError:
                if process.wait() != -signal.SIGKILL:
                    raise
                killed += 1
    return counts, killed


@pytest.mark.slow
@pytest.mark.timeout(SECONDS * 3 + 120)
@pytest.mark.parametrize("kind", ["link", "path"])
def test_a_year_in_seconds(kind: str, quick_path: Path, record_property: Callable[[str, object], None]) -> None:
    """Random ensure, create, remove, move, clean, pin and kill -9: what is in use stays, what is left is tidy."""
    rig = Rig(quick_path, kind, SAMPLES)
    rig.cache().recover()
    # a directory that is not there is doubt for whoever looks into it
    for directory in (rig.disks, rig.dir / "moved"):
        directory.mkdir()
    counts: Counter[str] = Counter()
    killed = rounds = checked = 0
    end = time.monotonic() + SECONDS / 2
    while (left := end - time.monotonic()) > 0:
        done, dead = _round(rig, rounds, min(left, 2.5))
        counts, killed, rounds = counts + done, killed + dead, rounds + 1
        checked += _no_disk_lost_its_base(rig)
    assert not rig.cache().recover().failed
    _bring_back(rig)
    report = rig.cache().recover()
    assert not report.failed, report
    rig.check("after the soak")
    rig.check_tidy("after the soak")
    with open_cache(rig, lock_timeout=timedelta(seconds=10)) as cache:
        assert_counts_as_du(rig, cache.usage(), "after the soak")
        # no lock is stuck: every base and every disk can be worked on at once
        for disk_id in [disk.disk_id for disk in cache.root_disks()]:
            cache.remove_root_disk(disk_id)
        for image_id in SAMPLES:
            for owner in range(2):
                cache.unpin(image_id, f"owner-{owner}")
        cache.cleanup(cache.plan_cleanup(max_idle=0))
        assert names(cache) == set()
        for number, image_id in enumerate(SAMPLES):
            cache.create_root_disk(image_id, f"vm-{number}", size=SIZE)
    rig.check("and on it goes")
    told = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    ran = sum(counts.values())
    record_property(
        SAID, f"soak ({kind}): {ran} runs in {rounds} rounds, {killed} killed, {checked} disks looked at; {told}"
    )
    assert killed > 0
    assert checked > 0
    done = Counter({deed: sum(n for name, n in counts.items() if name.partition(":")[0] == deed) for deed in DEEDS})
    assert min(done.values()) >= FEWEST, told


def _bring_back(rig: Rig) -> None:
    """Moved directories return, so that every disk can be compared; what took the name meanwhile goes."""
    for there in (rig.dir / "moved").glob("*_resize"):
        here = rig.disks / there.name.removesuffix("_resize")
        if here.exists():
            with rig.cache() as cache:
                cache.remove_root_disk(here.name)
            shutil.rmtree(here, ignore_errors=True)
        there.rename(here)
    with rig.cache() as cache:
        for disk in list(cache.root_disks()):
            # as a driver does with what came back: a disk of the same id may have taken its path reference along
            cache.attach_root_disk(disk.image_id, disk.disk_id)

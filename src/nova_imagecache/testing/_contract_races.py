"""The part of ``BackendContract`` about those who meet: every interleaving by the step, and processes side by side."""

from __future__ import annotations

import os
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING

import pytest

from nova_imagecache.backends import Backend, BackendPaths
from nova_imagecache.exceptions import BaseInUseError, BaseNotFoundError, DiskExistsError, ImageCacheError
from nova_imagecache.testing._contract_crash import CrashContract
from nova_imagecache.testing._contract_kit import promise, same
from nova_imagecache.testing._faults import FaultPlan
from nova_imagecache.testing._promises import at_place, chapter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_Answers = list[ImageCacheError | OSError | None]

ROUNDS = 12
PROCESSES = 4


@chapter(
    "concurrency",
    "backends.Backend",
    "backends.BaseWriter.publish",
    "backends.Backend.create_root_disk",
    "backends.Backend.recover",
)
class RaceContract(CrashContract):
    """Whoever meets whom, and whenever: what is there is whole."""

    def test_observers_see_all_or_nothing(self, backend: Backend, paths: BackendPaths) -> None:
        """A base that is found, by whomever and at whatever moment, is whole: record, bytes and place in the list."""
        observers = [backend, self.make_backend(paths)]
        sample = self.sample(backend)

        def observe(observer: Backend, image_id: str) -> bytes:
            deadline = time.monotonic() + 30
            while (found := observer.find_base(image_id)) is None:
                promise(time.monotonic() < deadline, "a published base is found by every observer")
            promise(image_id in {base.image_id for base in observer.iter_bases()}, "a base that is found is listed")
            same(found.record, self.record(image_id, sample), "a base that is found has its whole record")
            return self.base_bytes(observer, found)

        with ThreadPoolExecutor(len(observers)) as pool:
            for number in range(ROUNDS):
                image_id = f"img-{number}"
                writer = self.stage(backend, image_id, sample)
                seen = [pool.submit(observe, observer, image_id) for observer in observers]
                writer.publish(self.record(image_id, sample))
                for answer in seen:
                    same(answer.result(60), sample.stored, "a base that is found holds all its bytes")
        observers[1].close()

    def test_removal_at_each_step_of_creation(self, tmp_path: Path) -> None:
        """A removal by two looks may come at any step of a creation: either it sees the disk, and the base stays for a
        whole disk; or the creation sees that the base is gone, and makes none."""
        for words, backend, meeting in self._meetings("create", tmp_path):
            with at_place(words):
                with meeting as answers, suppress(BaseInUseError):
                    self.remove_by_two_looks(backend)
                disk = backend.get_root_disk("vm", "disk")
                if answers == [None]:
                    promise(disk, f"{words}: a disk that was made is there")
                else:
                    promise(isinstance(answers[0], BaseNotFoundError), f"{words}: creation fails with {answers[0]!r}")
                    same(disk, None, f"{words}: a disk that was refused is not there")
                self._check_whole("create", backend, words)
                base = backend.find_base("img")
                if disk is not None and disk.reference != "none":
                    promise(base, f"{words}: the base of a disk that was made stays; whoever removes it sees its user")
                if disk is not None and base is not None:
                    self.check_users(backend, base, 1, f"{words}: the disk is a user of the base that stayed")

    @pytest.mark.parametrize("work", ["publish", "create"])
    def test_recover_at_each_step(self, work: str, tmp_path: Path) -> None:
        """``recover`` may come at any step of live work, from any process, and the work succeeds all the same."""
        for words, backend, meeting in self._meetings(work, tmp_path):
            with at_place(words):
                with meeting as answers:
                    same(backend.recover().failed, {}, f"{words}: recover fails nowhere")
                same(answers, [None], f"{words}: recover leaves live work alone")
                promise(backend.find_base("img"), f"{words}: the base is there")
                promise(work == "publish" or backend.get_root_disk("vm", "disk"), f"{words}: the disk is there")
                self._check_whole(work, backend, words)

    def test_publishers_in_processes(self, paths: BackendPaths) -> None:
        """Of many processes that publish one image at once, one wins; what is found is all one's."""
        self._need_forks()

        def publish(backend: Backend, *, number: int) -> None:
            writer = self.stage(backend, "img", self.sample(backend, f"racer-{number}"))
            writer.publish(self.record("img", self.sample(backend, f"racer-{number}"), source=f"racer-{number}"))

        self._in_processes(paths, publish)
        backend = self.make_backend(paths)
        bases = list(backend.iter_bases())
        same([base.image_id for base in bases], ["img"], "one image has one base, whoever published it")
        winner = self.sample(backend, bases[0].record.source)
        same(self.base_bytes(backend, bases[0]), winner.stored, "the winner's bytes go with the winner's record")
        same(backend.recover().removed, (), "processes that lost the race leave nothing to sweep")
        backend.close()

    def test_creators_in_processes(self, paths: BackendPaths) -> None:
        """Of many processes that make one disk at once, exactly one does; the others get DiskExistsError."""
        self._need_forks()
        backend = self.make_backend(paths)
        base = self.publish(backend, "img")

        def create(other: Backend, *, number: int) -> None:
            disk_id = "vm" if number % 2 else "vm-2"
            with suppress(DiskExistsError):
                self.create(other, base, disk_id)
                self.create(other, base, f"winner-of-{disk_id}-{number}")

        self._in_processes(paths, create)
        disks = list(backend.iter_root_disks())
        same(len(disks), 4, f"two disks of many makers have one winner each ({disks})")
        for disk in disks:
            self.check_disk(backend, disk, self.sample(backend), "a disk that several processes made is whole")
        self.check_users(backend, base, 4, "processes that lost the race leave no user")
        same(backend.recover().removed, (), "processes that lost the race leave nothing to sweep")
        backend.close()

    # --- one who is held at a step while another acts

    def _meetings(self, work: str, tmp_path: Path) -> Iterator[tuple[str, Backend, AbstractContextManager[_Answers]]]:
        """For each step of the work: words for it, a backend that acts meanwhile, and a block in which the work is held
        there; after the block its only answer is None, or the error it ended with."""
        steps = self._seen_steps(work, tmp_path)
        for step, name in enumerate(steps.names):
            paths = self._prepared(work, tmp_path / f"{step}")
            worker, other = self.make_backend(paths), self.make_backend(paths)
            yield f"met at step {name} of {work}", other, self._held(work, worker, steps.plan(), step)
            worker.close()
            other.close()

    @contextmanager
    def _held(self, work: str, worker: Backend, plan: FaultPlan, step: int) -> Iterator[_Answers]:
        answers: _Answers = []

        def run() -> None:
            try:
                self._act(work, worker)
            except (ImageCacheError, OSError) as err:
                answers.append(err)
            else:
                answers.append(None)

        with plan:
            pause = plan.pause(step)
            thread = threading.Thread(target=run)
            thread.start()
            while thread.is_alive() and not pause.reached.wait(0.01):
                pass
            try:
                yield answers
            finally:
                pause.release()
                thread.join(60)

    # --- processes

    def _need_forks(self) -> None:
        if not self.forks or type(self).act_in_child is not CrashContract.act_in_child:
            pytest.skip("this storage is not seen by forked children")

    def _in_processes(self, paths: BackendPaths, work: Callable[..., None]) -> None:
        """Do the work in several forked processes, all started at the same moment."""
        starting, started = os.pipe()
        with warnings.catch_warnings():
            # as in act_in_child
            warnings.simplefilter("ignore", DeprecationWarning)
            children = [
                self._fork(paths, partial(work, number=number), starting, started) for number in range(PROCESSES)
            ]
        os.close(starting)
        os.close(started)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        same(codes, [0] * PROCESSES, "each of several processes ends well")

    def _fork(self, paths: BackendPaths, work: Callable[[Backend], None], starting: int, started: int) -> int:
        child = os.fork()
        if child:
            return child
        try:
            os.close(started)
            os.read(starting, 1)  # nothing comes: it ends when the parent closes its end
            backend = self.make_backend(paths)
            work(backend)
            backend.close()
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            raise
        finally:
            os._exit(70)

"""The part of ``BackendContract`` about failures and death at every step, and what ``recover`` makes of it.

A backend whose changes go through modules with ``SEAMS``, its own or those that ``fault_modules`` names, is tried at
each of its steps. One whose steps cannot be seen is only tried as a whole, and the tests of single steps say so.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from contextlib import suppress
from typing import TYPE_CHECKING, ClassVar

import pytest

from nova_imagecache._models import BaseImage
from nova_imagecache.backends import Backend, BackendPaths
from nova_imagecache.exceptions import BaseNotFoundError, DiskExistsError, ImageCacheError
from nova_imagecache.testing._contract_kit import DISK_SIZE, MIB, ContractKit, promise, same
from nova_imagecache.testing._faults import FaultPlan, When
from nova_imagecache.testing._promises import at_place, chapter
from nova_imagecache.testing._steps import Steps, traced, watched_modules

if TYPE_CHECKING:
    from pathlib import Path

ACTIONS = ("publish", "create", "remove", "resize", "flatten", "attach", "attach-anew", "restore", "purge")
MAY_LACK_DISK = ("publish", "create", "remove", "purge")


@chapter("crashes", "backends.Backend.recover", "backends.BaseWriter.publish", "backends.Backend.create_root_disk")
class CrashContract(ContractKit):
    """Every operation, disturbed at each of its steps: afterwards everything that is there is whole."""

    fault_modules: ClassVar[tuple[str, ...] | None] = None
    """The modules whose ``SEAMS`` are this backend's steps. None: the library's own, and those of the backend's package
    that are imported and have ``SEAMS``. (): the steps cannot be seen, and the tests of single steps are skipped."""

    actions: ClassVar[tuple[str, ...]] = ACTIONS
    """The operations to disturb. One more class for an option that changes little may name fewer."""

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """One test for each of the actions of the class that is collected."""
        if "action" in metafunc.fixturenames:
            actions = getattr(metafunc.cls, "actions", ACTIONS)
            metafunc.parametrize("action", actions)

    def test_steps_can_be_seen(self, tmp_path: Path) -> None:
        """Steps that change storage go through ``SEAMS`` of the ``fault_modules``, so that each can be tried."""
        for action in ("publish", "create"):
            steps = self._steps(action, tmp_path / action)
            if self.fault_modules == ():
                pytest.skip(steps.unseen)
            promise(not steps.unseen, steps.unseen)

    def test_failure_at_each_step(self, action: str, tmp_path: Path) -> None:
        """A step that fails (disk full) leaves everything whole, the same call works again, and all can be tidied."""
        steps = self._seen_steps(action, tmp_path)
        undisturbed = self._kept_undisturbed(action, tmp_path / "undisturbed")
        for step, name in enumerate(steps.names):
            words = f"after {action} failed at step {name}"
            with at_place(words):
                paths = self._prepared(action, tmp_path / f"{step}")
                backend = self.make_backend(paths)
                with steps.plan().fail(step), suppress(OSError, ImageCacheError):
                    self._act(action, backend)
                if action == "restore":
                    # what gives the name back has itself failed: recover gives it back
                    same(backend.recover().failed, {}, f"{words}: recover fails nowhere")
                self._check_whole(action, backend, words)
                self._act_again(action, backend)
                same(backend.recover().failed, {}, f"{words}: recover fails nowhere")
                self._check_goes_on(backend, words)
                self._check_nothing_kept(backend, paths, undisturbed, words)
                backend.close()

    def test_death_at_each_step(self, action: str, tmp_path: Path) -> None:
        """A process that dies at a step leaves everything whole, and nothing that ``recover`` does not sweep."""
        if not self.forks:
            pytest.skip("this storage is not seen by forked children")
        steps = self._seen_steps(action, tmp_path)
        undisturbed = self._kept_undisturbed(action, tmp_path / "undisturbed")
        moments: list[tuple[int, When]] = [(step, "before") for step in range(len(steps.names))]
        moments += [(len(steps.names) - 1, "after")] if steps.names else []
        for step, when in moments:
            words = f"after {action} died {when} step {steps.names[step]}"
            with at_place(words):
                paths = self._prepared(action, tmp_path / f"{when}-{step}")
                self.act_in_child(action, paths, steps.plan().kill(step, when=when))
                self._check_recovered(action, paths, undisturbed, words)

    def test_death_while_staging(self, paths: BackendPaths) -> None:
        """What a dead process had staged is invisible, and swept once."""
        if not self.forks:
            pytest.skip("this storage is not seen by forked children")
        before = self._measure(paths)
        self.act_in_child("stage", paths, FaultPlan(self.fault_modules or ()))
        backend = self.make_backend(paths)
        same(backend.find_base("img"), None, "what a dead process had staged is not found")
        promise(backend.recover().removed, "recover names what it swept")
        same(backend.recover().removed, (), "recover has nothing left to sweep the second time")
        same(backend.capacity().staging, before, "recover frees what a dead process had staged")
        promise(self.publish(backend, "img"), "an image comes in after another process died staging it")
        backend.close()

    def act_in_child(self, action: str, paths: BackendPaths, plan: FaultPlan) -> None:
        """Do the action in another process under the plan, and come back when that process is dead.

        By fork; a storage whose client does not survive that overrides this, and calls ``child`` in a spawned process
        with ``plan.spec()``.
        """
        with warnings.catch_warnings():
            # Python 3.12 warns of forking beside threads; the child runs this thread only, and ends without cleaning up
            warnings.simplefilter("ignore", DeprecationWarning)
            process = os.fork()
        if process == 0:
            try:
                self.child(action, paths, plan)
            finally:
                os._exit(70)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        promise(status in (0, -signal.SIGKILL), f"{action} in a child ends or is killed, not {status}")

    def leftovers(self, paths: BackendPaths) -> list[str]:  # noqa: ARG002 - for those that can tell
        """Names in the storage that nothing needs, where that can be told; asked when ``recover`` has run."""
        return []

    def child(self, action: str, paths: BackendPaths, plan: FaultPlan) -> None:
        """What the other process does; it does not come back."""
        backend = self.make_backend(paths)
        try:
            with plan:
                self._act(action, backend)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            raise
        os._exit(0)

    # --- the actions

    def _prepared(self, action: str, directory: Path) -> BackendPaths:
        directory.mkdir()
        paths = self.make_paths(directory)
        backend = self.make_backend(paths)
        if action not in ("publish", "stage"):
            base = self.publish(backend, "img")
            if action not in ("create", "purge"):
                self.create(backend, base)
            if action == "attach-anew":
                self._bring_in_anew(backend, base)
        backend.close()
        return paths

    def _bring_in_anew(self, backend: Backend, base: BaseImage) -> None:
        # what a disk is left with when the cache lost its base: its own link, or a path that leads to the next one
        retired = backend.retire_base(base)
        if backend.properties.disk_kind != "clone":
            backend.purge_base(retired)
        self.publish(backend, "img")

    def _act(self, action: str, backend: Backend) -> None:
        if action == "stage":
            # kept: a writer that nobody holds may discard itself
            writer = self.stage(backend, "img", self.sample(backend))
            writer.sync()
            os.kill(os.getpid(), signal.SIGKILL)
        elif action == "publish":
            self._act_publish(backend)
        elif action == "create":
            self.create(backend, self._base(backend))
        elif action == "remove":
            backend.remove_root_disk("vm", "disk")
        elif action == "resize":
            backend.resize_root_disk("vm", "disk", DISK_SIZE + MIB)
        elif action == "flatten":
            backend.flatten_root_disk("vm", "disk")
        elif action in ("attach", "attach-anew"):
            backend.attach_root_disk(self._base(backend), "vm", "disk")
        elif action == "restore":
            backend.restore_base(backend.retire_base(self._base(backend)))
        else:
            backend.purge_base(backend.retire_base(self._base(backend)))

    def _act_publish(self, backend: Backend) -> None:
        sample = self.sample(backend)
        writer = backend.stage_base("img", sample.format)
        try:
            writer.set_size(len(sample.stored))
            writer.write_at(0, sample.stored)
            writer.write_sums(bytes(24))
            writer.publish(self.record("img", sample))
        finally:
            writer.discard()

    def _act_again(self, action: str, backend: Backend) -> None:
        # the call that was disturbed may have done its work but for tidying up
        with suppress(BaseNotFoundError, DiskExistsError):
            self._act(action, backend)

    def _steps(self, action: str, tmp_path: Path) -> Steps:
        tmp_path.mkdir(exist_ok=True)
        backend = self.make_backend(self._prepared(action, tmp_path / "trace"))
        with FaultPlan(watched_modules(backend, self.fault_modules)) as plan:
            self._act(action, backend)
        backend.close()
        return traced(action, backend, self.fault_modules, plan.trace)

    def _seen_steps(self, action: str, tmp_path: Path) -> Steps:
        steps = self._steps(action, tmp_path)
        if steps.unseen:
            pytest.skip(steps.unseen)
        return steps

    def _kept_undisturbed(self, action: str, directory: Path) -> int:
        """The bytes that stay on the storage when the action was not disturbed and all is gone again."""
        words = f"after {action} that nothing disturbed"
        with at_place(words):
            paths = self._prepared(action, directory)
            backend = self.make_backend(paths)
            self._act(action, backend)
            self._check_goes_on(backend, words)
            backend.recover()
            backend.close()
        return sum(self.kept(paths).values())

    def _measure(self, paths: BackendPaths) -> int:
        backend = self.make_backend(paths)
        staging = backend.capacity().staging
        backend.close()
        return staging

    # --- what must hold

    def _check_recovered(self, action: str, paths: BackendPaths, undisturbed: int, words: str) -> None:
        backend = self.make_backend(paths)
        report = backend.recover()
        same(report.failed, {}, f"{words}: recover fails nowhere")
        same(report.alive, (), f"{words}: recover takes nothing for a living process's")
        same(self.leftovers(paths), [], f"{words}: recover leaves nothing that nothing needs")
        second = backend.recover()
        same((second.removed, second.restored), ((), ()), f"{words}: recover sweeps all at once (first: {report})")
        capacity = backend.capacity()
        if capacity.complete and backend.properties.disk_kind != "clone":
            empty = self.make_backend(self.make_paths(paths.root.parent / "empty"))
            same(capacity.staging, empty.capacity().staging, f"{words}: recover leaves nothing in staging")
            same(capacity.trash, empty.capacity().trash, f"{words}: recover leaves nothing in trash")
            empty.close()
        if backend.get_root_disk("vm", "disk") is None:
            same(self.litter(paths, "vm"), [], f"{words}: recover leaves no half-made disk")
        self._check_whole(action, backend, words)
        self._act_again(action, backend)
        self._check_goes_on(backend, words)
        self._check_nothing_kept(backend, paths, undisturbed, words)
        backend.close()

    def _check_whole(self, action: str, backend: Backend, words: str) -> None:
        sample = self.sample(backend)
        base = backend.find_base("img")
        if base is not None:
            same(self.base_bytes(backend, base), sample.stored, f"{words}: a base that is found is whole")
        disk = backend.get_root_disk("vm", "disk")
        if disk is not None:
            self.check_disk(backend, disk, sample, f"{words}: a disk that is listed is whole")
        promise(disk or action in MAY_LACK_DISK, f"{words}: a disk that was there stays")
        listed = [disk] if disk else []
        same(list(backend.iter_root_disks()), listed, f"{words}: iter_root_disks agrees with get_root_disk")

    def _check_goes_on(self, backend: Backend, words: str) -> None:
        sample = self.sample(backend)
        base = backend.find_base("img") or self.publish(backend, "img")
        same(self.base_bytes(backend, base), sample.stored, f"{words}: the image has a base that is whole")
        if backend.get_root_disk("vm", "disk") is None:
            self.create(backend, base)
        disk = backend.attach_root_disk(base, "vm", "disk")
        self.check_disk(backend, disk, sample, f"{words}: the disk can be made and attached, and is whole")
        self.check_users(backend, base, 0 if disk.reference == "none" else 1, f"{words}: users are counted rightly")
        backend.remove_root_disk("vm", "disk")
        same(backend.get_root_disk("vm", "disk"), None, f"{words}: the disk can be removed")
        self.check_users(backend, base, 0, f"{words}: a removed disk is no user")
        backend.purge_base(backend.retire_base(base))
        same(backend.find_base("img"), None, f"{words}: the base can be removed")

    def _check_nothing_kept(self, backend: Backend, paths: BackendPaths, undisturbed: int, words: str) -> None:
        """When bases and disks are gone, nothing as large as a base's data stays beyond what always does."""
        backend.recover()
        kept = self.kept(paths)
        more = sum(kept.values()) - undisturbed
        largest = max(kept, key=lambda name: kept[name], default="")
        promise(
            more < self.sample(backend).data,
            f"{words}: no base's bytes stay when base and disk are gone: {more} bytes do; the largest is {largest}",
        )

    def _base(self, backend: Backend) -> BaseImage:
        found = backend.find_base("img")
        if found is None:
            raise BaseNotFoundError(image_id="img", stage="contract")
        return found

"""The part of ``BackendContract`` about marks and about how a base goes."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

from nova_imagecache._models import BaseImage, Retired, RootDisk
from nova_imagecache.backends import Backend
from nova_imagecache.exceptions import BaseInUseError, BaseNotFoundError
from nova_imagecache.testing._contract_kit import ContractKit, in_threads, promise, refused, same
from nova_imagecache.testing._promises import chapter

if TYPE_CHECKING:
    from collections.abc import Callable

CLOCK_SLACK = 120.0
"""Seconds by which a storage's clock may differ from ours."""

ROUNDS = 20


@chapter("marks", "backends.Backend.touch_base", "backends.Backend.mark_unused", "backends.Backend.mark_inspected")
class MarksContract(ContractKit):
    """What is remembered about the use of a base."""

    def test_unused_mark(self, backend: Backend) -> None:
        """``mark_unused`` sets the time it is given; None takes it away; ``last_used`` is not its business."""
        base = self.publish(backend, "img")
        same(base.unused_since, None, "a new base is not marked unused")
        backend.touch_base(base)
        used = self._marks(backend)[0]
        for when in (1_700_000_000.0, 1_600_000_000.5, time.time() + 3600):
            backend.mark_unused(base, when)
            mark = self._marks(backend)[1]
            promise(mark is not None and abs(mark - when) < 0.01, f"mark_unused({when}) is kept, not {mark}")
        backend.mark_unused(base, None)
        same(self._marks(backend), (used, None), "mark_unused(None) takes the mark away and leaves last_used alone")
        backend.mark_unused(base, None)

    def test_touch(self, backend: Backend) -> None:
        """``touch_base`` says now, and takes the unused mark away."""
        base = self.publish(backend, "img")
        backend.mark_unused(base, 1_700_000_000.0)
        backend.touch_base(base)
        used, unused = self._marks(backend)
        same(unused, None, "touch_base takes the unused mark away")
        promise(used is not None and abs(used - time.time()) < CLOCK_SLACK, f"touch_base sets last_used to now: {used}")
        backend.touch_base(base)
        later = self._marks(backend)[0]
        promise(later is not None and used is not None and later >= used, "last_used never goes back")

    def test_marks_of_a_base_that_is_gone(self, backend: Backend) -> None:
        """Marking a base that is gone is no error and does not bring it back."""
        base = self.publish(backend, "img")
        backend.purge_base(backend.retire_base(base))
        backend.mark_unused(base, 1_700_000_000.0)
        backend.mark_unused(base, None)
        same(backend.find_base("img"), None, "a mark does not bring a base back")
        same(list(backend.iter_bases()), [], "a mark does not bring a base back to the list")
        promise(self.publish(backend, "img"), "a mark on a base that is gone is in nobody's way")

    def test_inspected(self, backend: Backend) -> None:
        """``mark_inspected`` is remembered, or not, and never turned into another version."""
        base = self.publish(backend, "img")
        backend.mark_inspected(base, 7)
        found = backend.find_base("img")
        promise(found and found.inspected in (base.inspected, 7), "inspected is what was marked, or was before")

    def _marks(self, backend: Backend) -> tuple[float | None, float | None]:
        found = backend.find_base("img")
        promise(found, "a mark leaves the base where it is")
        return (found.last_used, found.unused_since) if found else (None, None)


@chapter("removal", "backends.Backend.retire_base", "backends.Backend.restore_base", "backends.Backend.purge_base")
class RemovalContract(ContractKit):
    """Retire, restore, purge."""

    def test_retired_base_is_not_found(self, backend: Backend) -> None:
        """Retiring takes the name away and keeps the bytes."""
        base = self.publish(backend, "img")
        keep = self.publish(backend, "keep", "two")
        retired = backend.retire_base(base)
        same(retired.base.image_id, "img", "a retired base says which it was")
        same(backend.find_base("img"), None, "a retired base is not found")
        same([b.image_id for b in backend.iter_bases()], ["keep"], "a retired base is not listed, the others are")
        refused(BaseNotFoundError, lambda: backend.usage(base), "usage of a retired base is BaseNotFoundError")
        refused(BaseNotFoundError, lambda: backend.retire_base(base), "a base is retired once only")
        same(self.base_bytes(backend, keep), self.sample(backend, "two").stored, "other bases are left alone")
        backend.purge_base(retired)

    def test_retire_of_a_base_that_is_gone(self, backend: Backend) -> None:
        """A base that was purged cannot be retired, nor measured."""
        base = self.publish(backend, "img")
        backend.purge_base(backend.retire_base(base))
        refused(BaseNotFoundError, lambda: backend.retire_base(base), "retire of a gone base is BaseNotFoundError")
        refused(BaseNotFoundError, lambda: backend.usage(base), "usage of a gone base is BaseNotFoundError")

    def test_one_retires(self, backend: Backend) -> None:
        """Of many who retire one base, exactly one does."""
        base = self.publish(backend, "img")
        answers = in_threads([partial(backend.retire_base, base) for _ in range(self.threads)])
        winners = [answer for answer in answers if isinstance(answer, Retired)]
        same(len(winners), 1, f"exactly one of many retires a base ({answers})")
        losers = {type(answer) for answer in answers if not isinstance(answer, Retired)}
        same(losers, {BaseNotFoundError}, "the others get BaseNotFoundError")
        backend.purge_base(winners[0])

    def test_restored_base_is_whole(self, backend: Backend) -> None:
        """Restoring gives back the name, the record, the bytes and the marks."""
        base = self.publish(backend, "img")
        backend.mark_unused(base, 1_700_000_000.0)
        before = backend.find_base("img")
        backend.restore_base(backend.retire_base(base))
        after = backend.find_base("img")
        promise(after, "a restored base is found")
        same(after, before, "a restored base is what it was")
        promise(after and self.base_bytes(backend, after) == self.sample(backend).stored, "and holds its bytes")
        promise(after and backend.retire_base(after), "a restored base can be retired again")

    def test_restore_after_the_name_was_taken(self, backend: Backend) -> None:
        """If a new base took the name meanwhile, it keeps it, and the old one stays for its users.

        A disk tied by a path reads whatever has the name: for such disks both bases hold the same bytes.
        """
        disk = self.create(backend, self.publish(backend, "img", "old"))
        seed = "old" if disk.reference == "path" else "new"
        retired = backend.retire_base(self._found(backend))
        new = self.publish(backend, "img", seed, source="new")
        backend.restore_base(retired)
        base = self._found(backend)
        same(base.record, new.record, "restore never replaces a base that has taken the name")
        same(self.base_bytes(backend, base), self.sample(backend, seed).stored, "nor its bytes")
        same(len(list(backend.iter_bases())), 1, "one image has one base")
        self.check_disk(backend, disk, self.sample(backend, "old"), "a disk of the old base stays whole after restore")
        later = self.create(backend, base, "vm-2")
        self.check_disk(backend, later, self.sample(backend, seed), "a new disk is made of the new base")

    def test_purged_base_is_gone(self, backend: Backend) -> None:
        """After purge the image can be brought in again, with other bytes."""
        backend.purge_base(backend.retire_base(self.publish(backend, "img", "old")))
        same(backend.find_base("img"), None, "a purged base is not found")
        base = self.publish(backend, "img", "new")
        same(self.base_bytes(backend, base), self.sample(backend, "new").stored, "a purged base leaves nothing behind")

    def test_purge_beside_a_new_base(self, backend: Backend) -> None:
        """Purging the old base of an image leaves the new one alone."""
        retired = backend.retire_base(self.publish(backend, "img", "old"))
        base = self.publish(backend, "img", "new")
        backend.purge_base(retired)
        same(self.base_bytes(backend, base), self.sample(backend, "new").stored, "purge touches the retired base only")

    def test_quarantined_base_is_out_of_use(self, backend: Backend) -> None:
        """A damaged base is not found again, and the image can be brought in anew."""
        backend.quarantine_base(self.publish(backend, "img", "bad"))
        same(backend.find_base("img"), None, "a base in quarantine is not found")
        same(list(backend.iter_bases()), [], "a base in quarantine is not listed")
        promise(self.publish(backend, "img"), "an image comes in again after its base went to quarantine")

    def test_purge_and_the_disks_that_depend(self, backend: Backend) -> None:
        """Disks keep what they hold on to by themselves; a storage that cannot purge then says so."""
        base = self.publish(backend, "img")
        disk = self.create(backend, base)
        if disk.reference == "path":
            return  # only the core's two looks protect such a disk
        try:
            backend.purge_base(backend.retire_base(base))
        except BaseInUseError as err:
            same([user.disk_id for user in err.users], ["vm"], "BaseInUseError names the users")
        same(backend.find_base("img"), None, "a base that was retired is not found")
        self.check_disk(backend, disk, self.sample(backend), "a disk outlives the purge of its base")

    def test_removal_and_creation_see_each_other(self, backend: Backend) -> None:
        """However a removal and a creation meet, a disk that was made is whole: both write before they look."""
        for count in range(ROUNDS):
            base = self.publish(backend, "img")
            create = partial(self.create, backend, base, f"vm-{count}")
            calls: list[Callable[[], RootDisk | None]] = [create, partial(self.remove_by_two_looks, backend)]
            made, _ = in_threads(calls)
            if isinstance(made, RootDisk):
                self.check_disk(backend, made, self.sample(backend), "a disk made while its base goes is whole")
                backend.flatten_root_disk(made.disk_id, made.name)
            else:
                promise(isinstance(made, BaseNotFoundError), f"creation fails only since the base vanished ({made!r})")
            found = backend.find_base("img")
            if found is not None:
                backend.purge_base(backend.retire_base(found))

    def _found(self, backend: Backend) -> BaseImage:
        found = backend.find_base("img")
        if found is None:
            raise AssertionError("broken promise: a published base is found")
        return found

"""The part of ``BackendContract`` about storage that has no room left."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import pytest

from nova_imagecache._models import RootDisk
from nova_imagecache.backends import Backend, BackendPaths, BaseImage
from nova_imagecache.exceptions import ImageCacheError, NoSpaceError
from nova_imagecache.testing._contract_kit import DISK_SIZE, MIB, ContractKit, promise, same
from nova_imagecache.testing._full import FULL
from nova_imagecache.testing._promises import chapter

if TYPE_CHECKING:
    from collections.abc import Callable

_T = TypeVar("_T")


@chapter("full-storage", "exceptions.NoSpaceError", "backends.BaseWriter", "backends.Backend.create_root_disk")
class FullContract(ContractKit):
    """What has no room is refused whole; what frees room works."""

    def test_full_while_staging(self, backend: Backend, paths: BackendPaths) -> None:
        """A base that finds no room is NoSpaceError, or OSError with ENOSPC; nothing is published, discard works."""
        before = backend.capacity().staging
        sample = self.sample(backend)

        def bring_in() -> BaseImage:
            writer = backend.stage_base("img", sample.format)
            try:
                self.write(writer, sample)
                return writer.publish(self.record("img", sample))
            finally:
                writer.discard()

        with self._filled(backend, paths):
            made = _unless_full(bring_in, "bringing a base in")
            promise(made is None, "the hook filled() leaves no room, not even for 64 KiB")
            same(backend.find_base("img"), None, "a base that found no room is not found")
            same(list(backend.iter_bases()), [], "a base that found no room is not listed")
        same(backend.capacity().staging, before, "a base that found no room leaves nothing in staging")
        base = self.publish(backend, "img")
        same(self.base_bytes(backend, base), sample.stored, "the image comes in once there is room")

    def test_full_while_creating(self, backend: Backend, paths: BackendPaths) -> None:
        """A disk is made whole or not at all; one that finds no room is NoSpaceError and leaves nothing behind."""
        base = self.publish(backend, "img")
        with self._filled(backend, paths):
            disk = _unless_full(partial(self.create, backend, base), "making a disk")
            if disk is None:
                self.check_no_disk(backend, paths, "vm", "disk", "a disk that found no room leaves nothing")
                self.check_users(backend, base, 0, "a disk that found no room is no user")
        disk = disk or self.create(backend, base)
        self.check_disk(backend, disk, self.sample(backend), "a disk is whole, or made once there is room")
        self.check_users(backend, base, 1, "a disk is one user, however full the storage was")

    @pytest.mark.parametrize("change", ["resize", "flatten", "attach"])
    def test_full_while_changing(self, backend: Backend, paths: BackendPaths, change: str) -> None:
        """A disk that cannot be changed for want of room keeps its bytes and its base, and can be changed later."""
        base = self.publish(backend, "img")
        disk = self.create(backend, base)
        self.write_disk(backend, disk, MIB, b"guest!!!" * 64)
        before = self.read_disk(backend, disk)
        calls: dict[str, Callable[[], RootDisk]] = {
            "resize": partial(backend.resize_root_disk, "vm", "disk", DISK_SIZE + MIB),
            "flatten": partial(backend.flatten_root_disk, "vm", "disk"),
            "attach": partial(backend.attach_root_disk, base, "vm", "disk"),
        }
        with self._filled(backend, paths):
            changed = _unless_full(calls[change], f"{change} of a disk")
            now = backend.get_root_disk("vm", "disk")
            if changed is None and now is not None:
                # what failed after the disk had grown may have left it so
                grown = replace(now, virtual_size=disk.virtual_size) if change == "resize" else now
                same(grown, disk, f"{change} that finds no room leaves the disk what it was")
            else:
                same(now, changed, f"get_root_disk tells what {change} did")
        same(self.read_disk(backend, now or disk)[:DISK_SIZE], before, f"{change} without room keeps the disk's bytes")
        again = calls[change]()
        same(backend.get_root_disk("vm", "disk"), again, f"{change} works once there is room")
        same(self.read_disk(backend, again)[:DISK_SIZE], before, f"{change} keeps the disk's bytes once there is room")
        left = 0 if again.reference == "none" else 1
        self.check_users(backend, base, left, f"after {change} users are counted rightly")

    def test_full_storage_can_be_freed(self, backend: Backend, paths: BackendPaths) -> None:
        """Reading, removing disks and removing bases need no room."""
        base, other = self.publish(backend, "img"), self.publish(backend, "other", "two")
        disk = self.create(backend, base)
        with self._filled(backend, paths):
            self.check_disk(backend, disk, self.sample(backend), "a disk on full storage is whole")
            backend.remove_root_disk("vm", "disk")
            self.check_users(backend, base, 0, "a disk that was removed from full storage is no user")
            backend.purge_base(backend.retire_base(base))
            same([b.image_id for b in backend.iter_bases()], ["other"], "a base can be removed from full storage")
            same(backend.recover().failed, {}, "recover works on full storage")
        same(self.base_bytes(backend, other), self.sample(backend, "two").stored, "other bases stay whole")

    def _filled(self, backend: Backend, paths: BackendPaths) -> AbstractContextManager[None]:
        filled = self.filled(backend, paths)
        if filled is None:
            pytest.skip("the hook filled() gives no storage without room")
        return filled


def _unless_full(call: Callable[[], _T], words: str) -> _T | None:
    """The call's answer; None if it says that there is no room."""
    try:
        return call()
    except NoSpaceError:
        return None
    except (OSError, ImageCacheError) as err:
        if isinstance(err, OSError) and err.errno in FULL:
            return None
        raise AssertionError(f"broken promise: {words} without room is NoSpaceError or ENOSPC, not {err!r}") from err

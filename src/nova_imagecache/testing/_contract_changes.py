"""The part of ``BackendContract`` about changing root disks."""

from __future__ import annotations

from functools import partial

from nova_imagecache.backends import Backend, BackendPaths
from nova_imagecache.exceptions import BaseNotFoundError, DiskExistsError, DiskNotFoundError
from nova_imagecache.testing._contract_kit import (
    DISK_SIZE,
    GUEST_SIZE,
    MIB,
    REFERENCES,
    ContractKit,
    promise,
    refused,
    same,
)
from nova_imagecache.testing._promises import chapter


@chapter(
    "changes",
    "backends.Backend.remove_root_disk",
    "backends.Backend.resize_root_disk",
    "backends.Backend.flatten_root_disk",
    "backends.Backend.attach_root_disk",
)
class ChangeContract(ContractKit):
    """A root disk is removed, resized, flattened, attached."""

    def test_remove(self, backend: Backend, paths: BackendPaths) -> None:
        """A removed disk leaves nothing; one that is not there is no error; it can be made again."""
        base = self.publish(backend, "img")
        self.create(backend, base)
        keep = self.create(backend, base, "vm-2")
        for _ in range(2):
            backend.remove_root_disk("vm", "disk")
            self.check_no_disk(backend, paths, "vm", "disk", "a removed disk leaves nothing")
        backend.remove_root_disk("never", "disk")
        self.check_disk(backend, keep, self.sample(backend), "removing a disk leaves the others alone")
        same(self.base_bytes(backend, base), self.sample(backend).stored, "removing a disk leaves its base alone")
        again = self.create(backend, base, size=GUEST_SIZE)
        self.check_disk(backend, again, self.sample(backend), "a disk can be made again after it was removed")

    def test_resize(self, backend: Backend) -> None:
        """A disk grows, keeps its bytes, and reads as zeros where it is new."""
        disk = self.create(backend, self.publish(backend, "img"))
        self.write_disk(backend, disk, DISK_SIZE - 512, b"guest!!!" * 64)
        before = self.read_disk(backend, disk)
        for size in (DISK_SIZE, DISK_SIZE + 512, 2 * DISK_SIZE):
            grown = backend.resize_root_disk("vm", "disk", size)
            same(grown.virtual_size, size, "resize answers with the new size")
            same(backend.get_root_disk("vm", "disk"), grown, "get_root_disk tells the new size")
            zeros = bytes(size - DISK_SIZE)
            same(self.read_disk(backend, grown), before + zeros, "a resized disk keeps its bytes, new ones are zeros")
        resize = partial(backend.resize_root_disk, "never", "disk", DISK_SIZE)
        refused(DiskNotFoundError, resize, "resize of a disk that is not there is DiskNotFoundError")

    def test_flatten(self, backend: Backend) -> None:
        """A flattened disk stands alone: same bytes, no user, and its base may go."""
        base = self.publish(backend, "img")
        disk = self.create(backend, base)
        self.write_disk(backend, disk, MIB, b"guest!!!" * 64)
        before = self.read_disk(backend, disk)
        for _ in range(2):
            flat = backend.flatten_root_disk("vm", "disk")
            same((flat.reference, flat.virtual_size), ("none", DISK_SIZE), "a flattened disk has reference none")
            same(backend.get_root_disk("vm", "disk"), flat, "get_root_disk tells that a disk stands alone")
            same(self.read_disk(backend, flat), before, "a flattened disk keeps its bytes")
            self.check_users(backend, base, 0, "a flattened disk is no user any more")
        backend.purge_base(backend.retire_base(base))
        same(self.read_disk(backend, flat), before, "a flattened disk needs no base")
        backend.remove_root_disk("vm", "disk")
        same(backend.get_root_disk("vm", "disk"), None, "a flattened disk can be removed")
        flatten = partial(backend.flatten_root_disk, "never", "disk")
        refused(DiskNotFoundError, flatten, "flatten of a disk that is not there is DiskNotFoundError")

    def test_attach(self, backend: Backend) -> None:
        """Attaching a disk to its own base changes nothing a guest can see."""
        base = self.publish(backend, "img")
        disk = self.create(backend, base)
        self.write_disk(backend, disk, MIB, b"guest!!!" * 64)
        before = self.read_disk(backend, disk)
        for _ in range(2):
            tied = backend.attach_root_disk(base, "vm", "disk")
            allowed = REFERENCES[backend.properties.disk_kind]
            promise(tied.reference in allowed, f"an attached disk has the reference of its kind, not {tied.reference}")
            same(backend.get_root_disk("vm", "disk"), tied, "get_root_disk tells what attach_root_disk did")
            same(self.read_disk(backend, tied), before, "an attached disk keeps its bytes")
            self.check_users(backend, base, 1, "an attached disk is one user")
        attach = partial(backend.attach_root_disk, base, "never", "disk")
        refused(DiskNotFoundError, attach, "attach of a disk that is not there is DiskNotFoundError")

    def test_attach_to_other_bytes(self, backend: Backend) -> None:
        """A disk is never tied to a base that holds other bytes than it was made of, nor to one that is gone."""
        base, other = self.publish(backend, "img"), self.publish(backend, "other", "two")
        disk = self.create(backend, base)
        attach = partial(backend.attach_root_disk, other, "vm", "disk")
        refused(DiskExistsError, attach, "attach to a base of other bytes is DiskExistsError")
        same(backend.get_root_disk("vm", "disk"), disk, "a refused attach leaves the disk's facts alone")
        self.check_disk(backend, disk, self.sample(backend), "a refused attach leaves the disk's bytes alone")
        self.check_users(backend, other, 0, "a refused attach leaves no user")
        if disk.reference == "none":
            return  # it stands alone: attaching it ties nothing, whether there is a base or not
        retired = backend.retire_base(base)
        attach = partial(backend.attach_root_disk, base, "vm", "disk")
        refused(BaseNotFoundError, attach, "attach to a base that is gone is BaseNotFoundError")
        backend.restore_base(retired)
        self.check_disk(backend, disk, self.sample(backend), "an attach that failed leaves the disk whole")

    def test_attach_to_the_base_that_came_again(self, backend: Backend) -> None:
        """A disk that lost its base is whole and counted again once it is tied to the same bytes, brought in anew."""
        base = self.publish(backend, "img")
        self.create(backend, base)
        retired = backend.retire_base(base)
        if backend.properties.disk_kind == "overlay":
            backend.purge_base(retired)
        again = self.publish(backend, "img")
        tied = backend.attach_root_disk(again, "vm", "disk")
        self.check_disk(backend, tied, self.sample(backend), "a disk is whole once it is tied to its base again")
        self.check_users(backend, again, 1, "a disk that is tied to a base is its user")

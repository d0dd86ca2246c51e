"""The part of ``BackendContract`` about ``recover`` and ``close`` in quiet times: they take nothing from the living."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nova_imagecache.testing._contract_kit import ContractKit, promise, same
from nova_imagecache.testing._promises import chapter

if TYPE_CHECKING:
    from nova_imagecache._models import RootDisk
    from nova_imagecache.backends import Backend, BackendPaths


@chapter("recovery", "backends.Backend.recover", "backends.Backend.close")
class RecoveryContract(ContractKit):
    """``recover`` sweeps what is dead and nothing else."""

    def test_recover_on_clean_storage(self, backend: Backend) -> None:
        """Where nothing died, nothing is swept."""
        same(self._removed(backend), (), "recover on empty storage removes nothing")
        base = self.publish(backend, "img")
        backend.mark_unused(base, 1_700_000_000.0)
        disk = self.create(backend, base)
        self.create(backend, base, "flat")
        backend.flatten_root_disk("flat", "disk")
        before = (backend.find_base("img"), list(backend.iter_bases()), self._disks(backend))
        report = backend.recover()
        same(report.removed, (), "recover where nothing died removes nothing")
        same(report.failed, {}, "recover where nothing died fails nowhere")
        after = (backend.find_base("img"), list(backend.iter_bases()), self._disks(backend))
        same(after, before, "recover leaves bases, marks and disks alone")
        same(self.base_bytes(backend, base), self.sample(backend).stored, "recover leaves a base's bytes alone")
        self.check_disk(backend, disk, self.sample(backend), "recover leaves a disk's bytes alone")
        self.check_users(backend, base, 1, "recover leaves the users of a base alone")

    def test_recover_leaves_the_living_alone(self, backend: Backend, paths: BackendPaths) -> None:
        """What a live process works on stays, whoever recovers."""
        sample = self.sample(backend)
        writer = self.stage(backend, "img", sample)
        other = self.make_backend(paths)
        for observer in (backend, other):
            same(self._removed(observer), (), "recover leaves a live writer alone")
        base = writer.publish(self.record("img", sample))
        same(self.base_bytes(backend, base), sample.stored, "a writer publishes all its bytes after a recover")
        other.close()

    def test_close(self, paths: BackendPaths) -> None:
        """``close`` loses nothing."""
        backend = self.make_backend(paths)
        self.publish(backend, "img")
        backend.close()
        other = self.make_backend(paths)
        found = other.find_base("img")
        promise(found and self.base_bytes(other, found) == self.sample(other).stored, "close loses nothing")
        other.close()

    def _removed(self, backend: Backend) -> tuple[str, ...]:
        return backend.recover().removed

    def _disks(self, backend: Backend) -> list[RootDisk]:
        return sorted(backend.iter_root_disks(), key=lambda disk: (disk.disk_id, disk.name))

"""Our own backends keep the contract, and the contract notices who does not."""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pytest

from nova_imagecache.backends import (
    Backend,
    BackendPaths,
    BackendProperties,
    BaseImage,
    BaseRecord,
    BaseWriter,
    DiskUser,
    FileLocation,
    Retired,
    RootDisk,
)
from nova_imagecache.backends.file import FileBackend
from nova_imagecache.backends.qcow2 import Qcow2Backend
from nova_imagecache.exceptions import BaseNotFoundError, DiskExistsError
from nova_imagecache.testing import CONTRACT_VERSION, BackendContract, MemoryBackend, MemoryStorage
from nova_imagecache.testing._memory_store import MemoryWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


class TestMemory(BackendContract):
    """A storage without files: three hooks more than the three lines."""

    forks = False
    actions = ("publish",)  # no steps can be seen in it
    backend_class: type[MemoryBackend] = MemoryBackend

    @cached_property
    def storages(self) -> dict[Path, MemoryStorage]:
        return {}

    def make_backend(self, paths: BackendPaths) -> Backend:
        return self.backend_class({}, paths, storage=self.storages.setdefault(paths.root, MemoryStorage()))

    def read_disk(self, backend: Backend, disk: RootDisk) -> bytes:
        assert isinstance(backend, MemoryBackend)
        return backend.disk_contents(disk.disk_id, disk.name)

    def write_disk(self, backend: Backend, disk: RootDisk, offset: int, data: bytes) -> None:
        assert isinstance(backend, MemoryBackend)
        backend.write_disk(disk.disk_id, disk.name, offset, data)


class TestFile(BackendContract):
    """Copies of raw bases: the three lines."""

    def make_backend(self, paths: BackendPaths) -> Backend:
        return FileBackend({}, paths)


class TestFileNative(BackendContract):
    """Copies of qcow2 bases."""

    base_format = "qcow2"
    actions = ("create",)

    def make_backend(self, paths: BackendPaths) -> Backend:
        return FileBackend({"base_format": "native"}, paths)


class TestFilePreallocated(BackendContract):
    """Copies whose blocks are reserved."""

    actions = ("create", "resize")

    def make_backend(self, paths: BackendPaths) -> Backend:
        return FileBackend({"preallocate": "space"}, paths)


class TestQcow2(BackendContract):
    """Overlays on raw bases by links."""

    def make_backend(self, paths: BackendPaths) -> Backend:
        return Qcow2Backend({}, paths)


class TestQcow2Native(BackendContract):
    """Overlays on qcow2 bases by links."""

    base_format = "qcow2"
    actions = ("create", "attach-anew")

    def make_backend(self, paths: BackendPaths) -> Backend:
        return Qcow2Backend({"base_format": "native", "reference": "link"}, paths)


class TestQcow2Path(BackendContract):
    """Overlays on raw bases by paths."""

    def make_backend(self, paths: BackendPaths) -> Backend:
        return Qcow2Backend({"reference": "path"}, paths)


class TestQcow2NativePath(BackendContract):
    """Overlays on qcow2 bases by paths."""

    base_format = "qcow2"
    actions = ("flatten",)

    def make_backend(self, paths: BackendPaths) -> Backend:
        return Qcow2Backend({"base_format": "native", "reference": "path"}, paths)


# --- backends that break one promise each ----------------------------------------------------------------------------


class ShownTooEarly(MemoryBackend):
    """A base is there as soon as it is staged."""

    def stage_base(self, image_id: str, format: str) -> BaseWriter:  # noqa: A002 - the contract's name
        writer = super().stage_base(image_id, format)
        record = _record(image_id)
        writer.publish(record)
        return super().stage_base(image_id, format)


class LoserWins(MemoryBackend):
    """The last to publish replaces the base."""

    def stage_base(self, image_id: str, format: str) -> BaseWriter:  # noqa: A002 - the contract's name
        writer = super().stage_base(image_id, format)
        assert isinstance(writer, MemoryWriter)
        publish, bases = writer.publish, self.storage.bases

        def replacing(record: BaseRecord) -> BaseImage:
            bases.pop(image_id, None)
            return publish(record)

        writer.publish = replacing  # type: ignore[method-assign]
        return writer


class LoserLeavesLitter(MemoryBackend):
    """Who comes second leaves a staged base behind."""

    def stage_base(self, image_id: str, format: str) -> BaseWriter:  # noqa: A002 - the contract's name
        writer = super().stage_base(image_id, format)
        assert isinstance(writer, MemoryWriter)
        discard = writer.discard
        writer.discard = lambda: None if image_id in self.storage.bases else discard()  # type: ignore[method-assign]
        return writer


class NobodyUses(MemoryBackend):
    """It cannot count, and says nobody."""

    def iter_users(self, base: BaseImage) -> Iterator[DiskUser]:
        return iter(())


class RetiredHasNoUsers(MemoryBackend):
    """It counts by name, and a retired base has none."""

    def iter_users(self, base: BaseImage) -> Iterator[DiskUser]:
        return super().iter_users(base) if self.find_base(base.image_id) else iter(())


class RestoreLoses(MemoryBackend):
    """What was retired does not come back."""

    def restore_base(self, retired: Retired) -> None:
        self.storage.retired.pop(retired.token)


class RestoreReplaces(MemoryBackend):
    """What comes back takes its name from whoever has it."""

    def restore_base(self, retired: Retired) -> None:
        self.storage.bases.pop(retired.base.image_id, None)
        super().restore_base(retired)


class RetiresTheDead(MemoryBackend):
    """Retiring a base that is gone is taken to have worked."""

    def retire_base(self, base: BaseImage) -> Retired:
        try:
            return super().retire_base(base)
        except BaseNotFoundError:
            return Retired(base=base, token="none")


class WritesThrough(MemoryBackend):
    """A disk shares its base's blocks and does not part with them."""

    def create_root_disk(self, base: BaseImage, disk_id: str, name: str, size: int) -> RootDisk:
        disk = super().create_root_disk(base, disk_id, name, size)
        self.storage.disks[disk_id, name].blocks = self.storage.bases[base.image_id].blocks
        return disk


class MakesOutOfNothing(MemoryBackend):
    """A disk is made although its base went away."""

    def create_root_disk(self, base: BaseImage, disk_id: str, name: str, size: int) -> RootDisk:
        try:
            return super().create_root_disk(base, disk_id, name, size)
        except BaseNotFoundError:
            return RootDisk(
                disk_id=disk_id,
                name=name,
                location=base.location,
                format="raw",
                virtual_size=size,
                image_id=base.image_id,
                reference="clone",
            )


class MakesAgain(MemoryBackend):
    """A disk that exists is replaced."""

    def create_root_disk(self, base: BaseImage, disk_id: str, name: str, size: int) -> RootDisk:
        self.storage.disks.pop((disk_id, name), None)
        return super().create_root_disk(base, disk_id, name, size)


class RefusesLate(MemoryBackend):
    """A disk that exists is grown before it is refused."""

    def create_root_disk(self, base: BaseImage, disk_id: str, name: str, size: int) -> RootDisk:
        try:
            return super().create_root_disk(base, disk_id, name, size)
        except DiskExistsError:
            self.resize_root_disk(disk_id, name, size)
            raise


class JoinsNames(MemoryBackend):
    """Two disks whose id and name read the same together are one."""

    def create_root_disk(self, base: BaseImage, disk_id: str, name: str, size: int) -> RootDisk:
        joined = f"{disk_id}.{name}"
        if any(f"{disk[0]}.{disk[1]}" == joined for disk in self.storage.disks):
            raise DiskExistsError(disk_id=disk_id, name=name)
        return super().create_root_disk(base, disk_id, name, size)


class FlattensInName(MemoryBackend):
    """A flattened disk still counts as a user."""

    def flatten_root_disk(self, disk_id: str, name: str) -> RootDisk:
        stored = self.storage.disks[disk_id, name]
        stored.disk = replace(stored.disk, reference="none")
        return stored.disk


class ForgetsTouch(MemoryBackend):
    """A touched base stays marked unused."""

    def touch_base(self, base: BaseImage) -> None:
        since = self.storage.bases[base.image_id].unused_since
        super().touch_base(base)
        self.storage.bases[base.image_id].unused_since = since


class SweepsTheLiving(MemoryBackend):
    """Recovery takes everything unfinished for dead."""

    def recover(self) -> Any:
        self.abandon()
        return super().recover()


class RoundsTime(MemoryBackend):
    """A record loses what it finds small."""

    def find_base(self, image_id: str) -> BaseImage | None:
        base = super().find_base(image_id)
        if base is None:
            return None
        return replace(base, record=replace(base.record, fetched_at=float(int(base.record.fetched_at))))


class NoFormat(MemoryBackend):
    """It names no format that a base may have."""

    properties = BackendProperties(base_formats=(), disk_kind="clone", storage="memory")
    wanted_base_format = None


class WorksEarly(FileBackend):
    """It makes its directories when it is constructed."""

    def __init__(self, options: dict[str, Any], paths: BackendPaths) -> None:
        super().__init__(options, paths)
        (paths.root / "bases").mkdir(exist_ok=True)


class WritesInPlace(FileBackend):
    """A disk is made under its final name, so that whoever dies leaves half of one."""

    def create_root_disk(self, base: BaseImage, disk_id: str, name: str, size: int) -> RootDisk:
        disk = super().create_root_disk(base, disk_id, name, size)
        assert isinstance(disk.location, FileLocation)
        content = disk.location.path.read_bytes()
        disk.location.path.write_bytes(b"")
        self.touch_base(base)
        disk.location.path.write_bytes(content)
        return disk


BROKEN = [
    (ShownTooEarly, "test_staged_base_is_invisible", "not found before publish"),
    (LoserWins, "test_one_winner", "same base"),
    (LoserWins, "test_late_loser_gets_the_first", "the base that was first"),
    (LoserLeavesLitter, "test_one_winner", "nothing in staging"),
    (NobodyUses, "test_users_are_counted", "every root disk is a user"),
    (RetiredHasNoUsers, "test_users_of_a_retired_base", "a retired base keeps its users"),
    (RestoreLoses, "test_restored_base_is_whole", "a restored base is found"),
    (RestoreReplaces, "test_restore_after_the_name_was_taken", "restore never replaces"),
    (RetiresTheDead, "test_retire_of_a_base_that_is_gone", "retire of a gone base"),
    (RetiresTheDead, "test_one_retires", "exactly one"),
    (WritesThrough, "test_writes_never_reach_the_base", "never reach the base"),
    (MakesOutOfNothing, "test_vanished_base", "is BaseNotFoundError"),
    (MakesAgain, "test_existing_disk_is_untouched", "not made again"),
    (MakesAgain, "test_one_creator_wins", "exactly one of many"),
    (RefusesLate, "test_existing_disk_is_untouched", "first disk's facts alone"),
    (FlattensInName, "test_flatten", "no user any more"),
    (ForgetsTouch, "test_touch", "takes the unused mark away"),
    (SweepsTheLiving, "test_recover_leaves_the_living_alone", "live writer alone"),
    (RoundsTime, "test_record_round_trips", "fetched_at comes back"),
    (NoFormat, "test_facts", "at least one format"),
]


@pytest.mark.parametrize(("broken", "test", "words"), BROKEN, ids=lambda value: getattr(value, "__name__", value))
def test_contract_notices(broken: type[MemoryBackend], test: str, words: str, tmp_path: Path) -> None:
    """A backend that breaks a promise fails the test of that promise, in words that name it."""
    contract = TestMemory()
    contract.backend_class = broken
    with pytest.raises(AssertionError, match=f"broken promise: .*{words}"):
        _run(contract, test, tmp_path)


def test_contract_notices_names_that_are_joined(tmp_path: Path) -> None:
    """A backend that takes one disk for another cannot make all that the grammar allows."""
    contract = TestMemory()
    contract.backend_class = JoinsNames
    with pytest.raises(DiskExistsError):
        _run(contract, "test_disks_at_the_limits", tmp_path)


def test_contract_notices_io_in_the_constructor(tmp_path: Path) -> None:
    """A constructor that makes directories breaks its promise."""
    contract = _contract(lambda paths: WorksEarly({}, paths))
    with pytest.raises(AssertionError, match="the constructor does no I/O"):
        _run(contract, "test_constructor_does_no_io", tmp_path)


@pytest.mark.parametrize("test", ["test_failure_at_each_step", "test_death_at_each_step"])
def test_contract_notices_disks_in_place(test: str, tmp_path: Path) -> None:
    """A disk that is written under its final name is found half-made after a failure or a death."""
    contract = _contract(lambda paths: WritesInPlace({}, paths))
    with pytest.raises(AssertionError, match="a disk that is listed is whole"):
        _run(contract, test, tmp_path, action="create")


def test_contract_has_a_version() -> None:
    """A plug-in can tell which contract it has passed."""
    assert BackendContract.contract_version == CONTRACT_VERSION == 1


def _contract(make: Callable[[BackendPaths], Backend]) -> BackendContract:
    class Local(BackendContract):
        def make_backend(self, paths: BackendPaths) -> Backend:
            return make(paths)

    return Local()


def _run(contract: BackendContract, test: str, tmp_path: Path, **given: Any) -> None:
    paths = contract.make_paths(tmp_path / "storage")
    known = {"paths": paths, "tmp_path": tmp_path, **given}
    method = getattr(contract, test)
    wanted = inspect.signature(method).parameters
    if "backend" in wanted:
        known["backend"] = contract.make_backend(paths)
    method(**{name: known[name] for name in wanted})


def _record(image_id: str) -> BaseRecord:
    return BaseRecord(
        image_id=image_id,
        format="raw",
        virtual_size=0,
        size=0,
        source_format="raw",
        source_size=0,
        source_digest=None,
        evidence="none",
        made_by="stored",
        source="test",
        fetched_at=0.0,
    )

"""The contract notices who does not keep it, and says in words which promise was broken and where it is documented."""

from __future__ import annotations

import inspect
import secrets
import shutil
import sys
from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

from contract.memory import MemoryContract
from nova_imagecache.backends import (
    Backend,
    BackendPaths,
    BackendProperties,
    BaseImage,
    BaseRecord,
    BaseWriter,
    DiskUser,
    FileLocation,
    NoSpaceError,
    RecoveryReport,
    Retired,
    RootDisk,
)
from nova_imagecache.backends.file import FileBackend
from nova_imagecache.exceptions import BaseNotFoundError, DiskExistsError
from nova_imagecache.testing import CONTRACT_VERSION, BackendContract, MemoryBackend, SourceContract, Step
from nova_imagecache.testing._memory_store import MemoryWriter
from nova_imagecache.testing._steps import traced, watched_modules

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


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

        writer.publish = replacing  # type: ignore[method-assign]  # this one alone breaks it
        return writer


class LoserLeavesLitter(MemoryBackend):
    """Who comes second leaves a staged base behind."""

    def stage_base(self, image_id: str, format: str) -> BaseWriter:  # noqa: A002 - the contract's name
        writer = super().stage_base(image_id, format)
        assert isinstance(writer, MemoryWriter)
        discard = writer.discard

        def leaving() -> None:
            if image_id not in self.storage.bases:
                discard()

        writer.discard = leaving  # type: ignore[method-assign]  # this one alone breaks it
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


class TakesAnyOption(MemoryBackend):
    """What it does not know it ignores."""

    def __init__(self, options: Any = None, paths: BackendPaths | None = None, **given: Any) -> None:
        super().__init__({}, paths, **given)


class NamesAnother(MemoryBackend):
    """Its errors tell of another image."""

    def retire_base(self, base: BaseImage) -> Retired:
        try:
            return super().retire_base(base)
        except BaseNotFoundError:
            raise BaseNotFoundError(image_id="somebody's") from None


class NobodyKnows(MemoryBackend):
    """Where it cannot count it says nobody."""

    def iter_users(self, base: BaseImage) -> Iterator[DiskUser]:
        return iter(()) if self.users_unknown else super().iter_users(base)


class HasNoErrno(MemoryBackend):
    """Storage without room is any error at all."""

    def stage_base(self, image_id: str, format: str) -> BaseWriter:  # noqa: A002 - the contract's name
        writer = super().stage_base(image_id, format)
        write_at = writer.write_at

        def writing(offset: int, buffer: bytes | bytearray | memoryview) -> None:
            try:
                write_at(offset, buffer)
            except NoSpaceError as err:
                raise OSError(str(err)) from err

        writer.write_at = writing  # type: ignore[method-assign]  # this one alone breaks it
        return writer


class MakesWithoutRoom(MemoryBackend):
    """A disk for which there is no room is there all the same, and refused."""

    def create_root_disk(self, base: BaseImage, disk_id: str, name: str, size: int) -> RootDisk:
        total, self._total = self._total, 2**40
        disk = super().create_root_disk(base, disk_id, name, size)
        self._total = total
        self._need(0 if self.storage.used < total else 1, disk_id, name)
        return disk


class LiesAboutWritten(MemoryBackend):
    """What was written reads as something else."""

    def stage_base(self, image_id: str, format: str) -> BaseWriter:  # noqa: A002 - the contract's name
        writer = super().stage_base(image_id, format)
        writer.read_at = lambda offset, length: bytes(length)  # type: ignore[method-assign]  # this one alone breaks it
        return writer


class SweepsAllFiles(FileBackend):
    """Recovery takes every unfinished directory for dead."""

    def recover(self) -> RecoveryReport:
        for path in self.staging.glob("*"):
            shutil.rmtree(path)
        return super().recover()


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


class LeavesBytes(FileBackend):
    """What it puts aside while it purges a base is forgotten by whoever dies there."""

    def purge_base(self, retired: Retired) -> None:
        aside = self.paths.root / f"aside-{secrets.token_hex(4)}"
        aside.write_bytes(b"x" * 2**20)
        super().purge_base(retired)
        aside.unlink()


class CannotGoOn(FileBackend):
    """It has bugs that show when something was disturbed."""

    def resize_root_disk(self, disk_id: str, name: str, size: int) -> RootDisk:
        busy = self.paths.root / "busy"
        busy.touch()
        disk = super().resize_root_disk(disk_id, name, size)
        busy.unlink()
        return disk

    def iter_root_disks(self) -> Iterator[RootDisk]:
        if (self.paths.root / "busy").exists():
            raise ZeroDivisionError("a bug of the plug-in")
        return super().iter_root_disks()

    def recover(self) -> RecoveryReport:
        if list(self.staging.glob("*")):
            raise ZeroDivisionError("a bug of the plug-in")
        return super().recover()


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
    (ShownTooEarly, "test_observers_see_all_or_nothing", "whole record"),
    (TakesAnyOption, "test_unknown_options_are_refused", "an unknown option is ConfigError"),
    (NamesAnother, "test_errors_name_what_they_are_about", "about image other"),
    (NobodyKnows, "test_users_that_cannot_be_counted", "are UsersUnknownError"),
    (HasNoErrno, "test_full_while_staging", "NoSpaceError or ENOSPC"),
    (MakesWithoutRoom, "test_full_while_creating", "leaves nothing"),
    (LiesAboutWritten, "test_written_bytes_can_be_read", "read_at gives what was written"),
]


@pytest.mark.parametrize(("broken", "test", "words"), BROKEN, ids=lambda value: getattr(value, "__name__", value))
def test_contract_notices(broken: type[MemoryBackend], test: str, words: str, tmp_path: Path) -> None:
    """A backend that breaks a promise fails the test of that promise, in words that name it."""
    contract = MemoryContract()
    contract.backend_class = broken
    with pytest.raises(AssertionError, match=f"broken promise: .*{words}"):
        _run(contract, test, tmp_path)


def test_contract_notices_names_that_are_joined(tmp_path: Path) -> None:
    """A backend that takes one disk for another cannot make all that the grammar allows."""
    contract = MemoryContract()
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


def test_contract_notices_recovery_beside_the_living(tmp_path: Path) -> None:
    """Who sweeps what another process is making breaks that process's work."""
    contract = _contract(lambda paths: SweepsAllFiles({}, paths))
    with pytest.raises(AssertionError, match="recover leaves live work alone"):
        _run(contract, "test_recover_at_each_step", tmp_path, work="publish")


def test_contract_notices_steps_that_nobody_sees(tmp_path: Path) -> None:
    """A suite that looks in the wrong module would try nothing, and pass."""
    contract = _contract(lambda paths: FileBackend({}, paths))
    type(contract).fault_modules = ("nova_imagecache._exec",)
    with pytest.raises(AssertionError, match=r"no step of nova_imagecache\._exec was tried: publish takes"):
        _run(contract, "test_steps_can_be_seen", tmp_path)


@pytest.mark.parametrize("test", ["test_failure_at_each_step", "test_death_at_each_step"])
def test_contract_notices_bytes_that_nobody_needs(test: str, tmp_path: Path) -> None:
    """What a disturbed operation leaves is found by its size, when everything else is gone."""
    contract = _contract(lambda paths: LeavesBytes({}, paths))
    with pytest.raises(AssertionError, match=r"after purge .*no base's bytes stay .*the largest is root/aside-"):
        _run(contract, test, tmp_path, action="purge")


@pytest.mark.parametrize("test", ["test_failure_at_each_step", "test_death_at_each_step"])
def test_an_error_of_the_plug_in_names_the_step(test: str, tmp_path: Path) -> None:
    """Whoever reads it learns after which step it was."""
    contract = _contract(lambda paths: CannotGoOn({}, paths))
    with pytest.raises(ZeroDivisionError) as caught:
        _run(contract, test, tmp_path, action="resize")
    assert caught.value.__notes__[0].startswith("after resize ")
    assert "step 00-exec.run" in caught.value.__notes__[0]


def test_an_error_beside_a_held_step_names_the_step(tmp_path: Path) -> None:
    """So it is where somebody meets another's step."""
    contract = _contract(lambda paths: CannotGoOn({}, paths))
    with pytest.raises(ZeroDivisionError) as caught:
        _run(contract, "test_recover_at_each_step", tmp_path, work="publish")
    assert caught.value.__notes__[0].startswith("met at step 03-fs.create")


# --- a backend whose own steps nobody sees


FORWARDED = [name for name, value in vars(Backend).items() if inspect.isfunction(value) and not name.startswith("_")]


def _stranger(paths: BackendPaths) -> Backend:
    """A backend of another package, which does its work where its suite does not look."""

    def forward(name: str) -> Callable[..., Any]:
        return lambda self, *given: getattr(self.inner, name)(*given)

    members = {name: forward(name) for name in FORWARDED}
    facts = {"__module__": "toy.storage", "__init__": lambda _: None, "properties": FileBackend.properties}
    backend: Any = type("Stranger", (Backend,), {**members, **facts})()
    backend.inner = FileBackend({}, paths)
    stranger: Backend = backend
    return stranger


def test_a_suite_that_sees_no_step_of_the_plug_in_fails(tmp_path: Path) -> None:
    """The library's own steps are not the plug-in's."""
    with pytest.raises(AssertionError, match=r"no step of toy was tried: publish .*or set fault_modules"):
        _run(_contract(_stranger), "test_steps_can_be_seen", tmp_path)


@pytest.mark.parametrize(
    ("test", "given"),
    [
        ("test_failure_at_each_step", {"action": "restore"}),
        ("test_death_at_each_step", {"action": "attach"}),
        ("test_recover_at_each_step", {"work": "create"}),
    ],
)
def test_a_test_of_steps_that_sees_none_is_skipped(test: str, given: dict[str, str], tmp_path: Path) -> None:
    """It has tried nothing, and says so, with what to do."""
    with pytest.raises(pytest.skip.Exception, match="no step of toy was tried"):
        _run(_contract(_stranger), test, tmp_path, **given)


def test_steps_that_cannot_be_seen_are_the_authors_word(tmp_path: Path) -> None:
    """Whoever says so passes, and the tests that tried nothing are skipped."""
    contract = _contract(_stranger)
    type(contract).fault_modules = ()
    with pytest.raises(pytest.skip.Exception, match="fault_modules is empty"):
        _run(contract, "test_steps_can_be_seen", tmp_path)


def test_the_plug_ins_own_seams_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of every imported module of its package, and of no other."""
    for name in ("toy", "toy._ops", "toyshop._ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name in ("toy._ops", "toyshop._ops"):
        vars(sys.modules[name])["SEAMS"] = ("link",)
    backend = _stranger(BackendPaths(root=tmp_path, disks_dir=tmp_path))
    assert watched_modules(backend, None) == ("nova_imagecache._fs", "nova_imagecache._exec", "toy._ops")
    assert watched_modules(backend, ("toy._other",)) == ("toy._other",)
    ours = Step(index=0, name="fs.mkdir", nth=1, module="nova_imagecache._fs")
    own = Step(index=1, name="ops.link", nth=1, module="toy._ops")
    assert traced("publish", backend, None, [ours, own]).unseen == ""
    assert "no step of toy was tried: publish" in traced("publish", backend, None, [ours]).unseen
    assert traced("flatten", backend, None, []).unseen == "", "a copy stands alone already"


def test_contract_has_a_version() -> None:
    """A plug-in can tell which contract it has passed: that of the interface which it implements."""
    assert BackendContract.contract_version == SourceContract.contract_version == CONTRACT_VERSION == 1
    assert Backend.api_version == CONTRACT_VERSION


def test_contract_notices_another_interface(tmp_path: Path) -> None:
    """A backend of another api_version does not pass this contract."""

    class Newer(MemoryBackend):
        api_version = 2

    contract = MemoryContract()
    contract.backend_class = Newer
    with pytest.raises(AssertionError, match="api_version is that of the contract"):
        _run(contract, "test_facts", tmp_path)


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

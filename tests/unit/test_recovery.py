"""What ``recover()`` takes and what it leaves, among the disks of a host."""

from __future__ import annotations

import grp
import os
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conftest import InChild
from harness import images, places
from harness.children import run_to_death
from harness.images import MIB, qemu_img
from harness.rig import Rig
from harness.upkeep import names, open_cache
from nova_imagecache import (
    BackendError,
    BackendPaths,
    BaseInUseError,
    BasePinnedError,
    CacheConfig,
    ImageCache,
    ImageCacheError,
)
from nova_imagecache.backends.qcow2 import Qcow2Backend
from nova_imagecache.finders import DiskDirectories
from nova_imagecache.testing import FaultPlan

SIZE = 4 * MIB


@pytest.fixture(params=["link", "path"])
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    with places.quick(tmp_path) as directory:
        yield Rig(directory, request.param, {"img": images.raw("recovered")})


@pytest.mark.parametrize("damage", [b"QFI\xfb\0\0\0\x09", b"QFI\xfb", b""], ids=["version", "short", "empty"])
def test_a_disk_with_a_damaged_header_keeps_its_base(damage: bytes, rig: Rig) -> None:
    """What it reads through cannot be told: neither its link nor its reference goes, and it can still be mended."""
    cache = rig.cache()
    cache.create_root_disk("img", "vm", size=SIZE)
    disk = rig.disks / "vm" / "disk"
    whole = disk.read_bytes()
    disk.write_bytes(damage)
    assert cache.recover().removed == ()
    assert cache.cleanup(cache.plan_cleanup(max_idle=0)).removed == ()
    disk.write_bytes(whole)
    rig.check("mended")
    rig.check_tidy("mended")


def test_a_disk_that_was_flattened_by_others_lets_its_base_go(rig: Rig) -> None:
    """Its header names nothing any more: what tied it is taken away, once."""
    cache = rig.cache()
    cache.create_root_disk("img", "vm", size=SIZE)
    path = str(rig.disks / "vm" / "disk")
    qemu_img("rebase", "-q", "-f", "qcow2", "-b", "", path)
    assert cache.recover().removed == (("disks/vm/disk.base",) if rig.kind == "link" else ())
    assert cache.users("img") == []
    assert cache.get_root_disk("vm").reference == "none"
    assert cache.recover().removed == ()


def _die_while_making(rig: Rig) -> None:
    """Of vm/disk its record is there, and what ties it; nothing else."""
    rig.cache().ensure_base("img")
    plan = FaultPlan().kill("fs.fsync_dir", match=str(rig.disks))

    def make() -> None:
        with plan:
            rig.cache().create_root_disk("img", "vm", size=SIZE)

    assert run_to_death(make, "while it made a disk")
    assert (rig.disks / "vm" / "disk.json").exists()


@pytest.mark.parametrize("whose", ["its maker's", "the driver's"])
def test_the_directory_of_a_dead_maker_goes_if_it_was_made_for_the_disk(whose: str, rig: Rig) -> None:
    """One that the driver made, for files of its own, stays as it was."""
    if whose == "the driver's":
        (rig.disks / "vm").mkdir(parents=True)
    _die_while_making(rig)
    assert rig.cache().recover().removed
    assert (rig.disks / "vm").exists() is (whose == "the driver's")
    rig.check_tidy("recovered")


def test_the_directory_of_a_dead_maker_goes_with_another_disk(rig: Rig) -> None:
    """It is that one's from then on."""
    _die_while_making(rig)
    with rig.cache() as cache:
        cache.create_root_disk("img", "vm", name="disk.rescue", size=SIZE)
        assert cache.recover().removed
        cache.remove_root_disk("vm", name="disk.rescue")
    assert not (rig.disks / "vm").exists()


def test_what_others_called_like_ours_stays(rig: Rig) -> None:
    """Nobody wrote down that it is ours, and it does not look it."""
    cache = rig.cache()
    cache.create_root_disk("img", "vm", size=SIZE)
    (rig.disks / "notours").mkdir()
    theirs = [
        rig.disks / "vm" / "golden.base",
        rig.disks / "notours" / "debian.base",
        rig.disks / "notours" / ".config.0123456789abcdef" / "x",
        rig.disks / "notours" / ".disk.sixteen letters" / "disk",
        rig.disks / ".check.ed",
    ]
    for path in theirs:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"somebody's only copy")
    directory = rig.disks / "vm" / "of_theirs.base"
    directory.mkdir(mode=0o555)
    leads = rig.disks / "vm" / ".disk.0123456789abcdef"
    leads.symlink_to(directory)
    assert cache.cleanup().swept == cache.recover().removed == ()
    assert all(path.read_bytes() == b"somebody's only copy" for path in theirs)
    assert directory.is_dir()
    assert leads.is_symlink()


@pytest.mark.parametrize("group", [None, grp.getgrgid(os.getgid()).gr_name])
@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_a_link_without_its_disk_and_record_is_ours(group: str | None, mask: int, rig: Rig) -> None:
    """A driver that died while it deleted the directory leaves any of the three: the base goes in its time."""
    before = os.umask(mask)
    try:
        paths = BackendPaths(root=rig.root, disks_dir=rig.disks, group=group)
        config = CacheConfig(root=rig.root, disks_dir=rig.disks, group=group)
        backend = Qcow2Backend(rig.options, paths)
        with ImageCache(config, source=rig.source(), backend=backend) as cache:
            cache.create_root_disk("img", "vm", size=SIZE)
            mode = (rig.root / "bases" / "img" / "disk").stat().st_mode
            assert stat.S_IMODE(mode) == (0o444 if group is None else 0o440)
            link = rig.disks / "vm" / "disk.base"
            for name in ("disk", "disk.json"):
                (rig.disks / "vm" / name).unlink()
            assert cache.recover().removed == (("disks/vm/disk.base",) if rig.kind == "link" else ())
            assert not link.exists()
    finally:
        os.umask(before)


def test_a_link_of_a_base_that_was_made_ours_again_is_ours(open_path: Path) -> None:
    """Its file is a copy, with the mode of the old one."""
    rig = Rig(open_path, "link", {"img": images.raw("recovered")})
    cache = rig.cache()
    cache.ensure_base("img")
    if os.geteuid() == 0:
        os.chown(rig.root / "bases" / "img" / "disk", 65534, 65534)
    assert cache.repair_base("img") is (os.geteuid() == 0)
    cache.create_root_disk("img", "vm", size=SIZE)
    for name in ("disk", "disk.json"):
        (rig.disks / "vm" / name).unlink()
    assert cache.recover().removed == ("disks/vm/disk.base",)


def test_directories_of_others_are_passed_over(open_path: Path, in_child: InChild) -> None:
    """A filesystem of its own has one that root alone may list: it stops nothing and is no failure."""
    open_path.chmod(0o777)
    rig = Rig(open_path, "link", {"img": images.raw("recovered")})

    def make() -> None:
        rig.cache().create_root_disk("img", "vm", size=SIZE)

    in_child(make, unprivileged=True)
    (rig.disks / "lost+found").mkdir()
    (rig.disks / "lost+found").chmod(0o700)
    (rig.disks / "vm" / "disk").unlink()

    def recover() -> tuple[tuple[str, ...], dict[str, str]]:
        report = rig.cache().recover()
        return report.removed, report.failed

    removed, failed = in_child(recover, unprivileged=True)
    assert failed == {}
    assert removed == ("disks/vm/disk.base",)
    assert not (rig.disks / "vm").exists(), "its record went along"


def test_a_directory_of_ours_that_cannot_be_listed_is_a_failure(open_path: Path, in_child: InChild) -> None:
    """Told, with the others swept all the same."""
    open_path.chmod(0o777)
    rig = Rig(open_path, "link", {"img": images.raw("recovered")})

    def make() -> None:
        for disk_id in ("a", "b"):
            rig.cache().create_root_disk("img", disk_id, size=SIZE)
        (rig.disks / "a").chmod(0)
        (rig.disks / "b" / "disk").unlink()

    in_child(make, unprivileged=True)

    def recover() -> tuple[int, list[str]]:
        report = rig.cache().recover()
        return len(report.removed), list(report.failed)

    assert in_child(recover, unprivileged=True) == (1, ["disks/a"])
    (rig.disks / "a").chmod(0o755)


@pytest.mark.parametrize("entry", ["staging/img.0123456789abcdef", "trash/img.0123456789abcdef", "users/img"])
def test_an_entry_of_others_is_a_failure(entry: str, open_path: Path, in_child: InChild) -> None:
    """As of a command that root ran and that was killed: told, with everything else swept all the same."""
    open_path.chmod(0o777)
    rig = Rig(open_path, "path", {"img": images.raw("recovered"), "other": images.raw("another")})
    litter = ["staging/x.0123456789abcdef", "staging/z.0123456789abcdef", "trash/z.0123456789abcdef"]

    def make() -> None:
        rig.cache().create_root_disk("other", "vm", size=SIZE)
        for name in ("trash", *litter):
            (rig.root / name).mkdir()
        twice = rig.root / "users" / "other" / "older.disk.json"
        twice.write_bytes((rig.root / "users" / "other" / "vm.disk.json").read_bytes().replace(b"/vm/", b"/older/"))

    in_child(make, unprivileged=True)
    (rig.root / entry).mkdir()
    (rig.root / entry).chmod(0o700)

    def recover() -> tuple[set[str], list[str]]:
        report = rig.cache().recover()
        return set(report.removed), list(report.failed)

    assert in_child(recover, unprivileged=True) == ({*litter, "users/other/older.disk.json"}, [entry])


def test_whole_disks_are_not_held_for_a_look(rig: Rig) -> None:
    """A recover over thousands of directories stands in nobody's way: it holds those where something is dead."""
    cache = rig.cache()
    for number in range(3):
        cache.create_root_disk("img", f"vm-{number}", size=SIZE)
    with FaultPlan() as plan:
        assert cache.recover().removed == ()
    assert plan.trace == ()
    (rig.disks / "vm-1" / ".disk.0123456789abcdef").mkdir()
    removed = cache.recover().removed
    assert {os.path.dirname(name) for name in removed} == {"disks/vm-1"}  # noqa: PTH120 - reason: of a name
    rig.check_tidy("recovered")


# --- a base whose removal died between its two looks


def _overlay(rig: Rig, base: Path) -> Path:
    """A disk that only a finder can see, over the base."""
    path = rig.dir / "foreign" / "vm" / "disk"
    path.parent.mkdir(parents=True)
    qemu_img("create", "-q", "-f", "qcow2", "-b", str(base), "-F", "raw", str(path))
    return path


def _retire_and_die(rig: Rig, in_child: InChild, cache: ImageCache) -> None:
    base = cache.ensure_base("img")

    def retire() -> None:
        rig.backend().retire_base(base)

    in_child(retire)  # and the process ends
    assert names(cache) == set()


def test_a_base_that_was_pinned_meanwhile_comes_back(rig: Rig, in_child: InChild) -> None:
    """Whoever looks a second time finds the pin; a sweep must not decide without."""
    with rig.cache() as cache:
        _retire_and_die(rig, in_child, cache)
        cache.pin("img", "owner")
        assert len(cache.recover().restored) == 1
        assert names(cache) == {"img"}
        with pytest.raises(BasePinnedError):
            cache.remove_base("img")


def test_a_base_that_only_a_finder_knows_a_user_of_comes_back(rig: Rig, in_child: InChild) -> None:
    """So it is with users that the storage does not count."""
    (rig.dir / "foreign").mkdir()
    with open_cache(rig, user_finders=[DiskDirectories([rig.dir / "foreign"])]) as cache:
        base = rig.root / "bases" / "img" / "disk"
        cache.ensure_base("img")
        (rig.dir / "foreign").rmdir()
        disk = _overlay(rig, base)
        _retire_and_die(rig, in_child, cache)
        cache.cleanup(cache.plan_cleanup(max_idle=0))
        assert names(cache) == {"img"}
        qemu_img("check", "-q", str(disk))
        with pytest.raises(BaseInUseError):
            cache.remove_base("img")


def test_a_base_that_nobody_uses_goes_with_the_next_pass(rig: Rig, in_child: InChild) -> None:
    """Its removal was only put off."""
    with rig.cache() as cache:
        _retire_and_die(rig, in_child, cache)
        cache.recover()
        assert cache.cleanup(cache.plan_cleanup(max_idle=0)).removed == ("img",)
        rig.check_tidy("removed after all")


# --- what an operator put in the place of a disk's directory


def _stuck(call: Callable[[], object]) -> ImageCacheError | None:
    """What a call raises, within five seconds."""
    raised: list[ImageCacheError] = []

    def run() -> None:
        try:
            call()
        except ImageCacheError as err:
            raised.append(err)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(5)
    assert not thread.is_alive(), "it goes round and round"
    return raised[0] if raised else None


def test_a_directory_that_was_moved_and_linked_is_worked_in(rig: Rig) -> None:
    """Made, resized, looked at and removed behind the symbolic link, as before it; the link itself stays."""
    with rig.cache() as cache:
        cache.create_root_disk("img", "vm", size=SIZE)
        elsewhere = rig.dir / "elsewhere"
        (rig.disks / "vm").rename(elsewhere)
        (rig.disks / "vm").symlink_to(elsewhere)
        assert cache.resize_root_disk("vm", size=2 * SIZE).virtual_size == 2 * SIZE
        cache.create_root_disk("img", "vm", name="disk.rescue", size=SIZE)
        assert cache.recover().removed == ()
        cache.remove_root_disk("vm", name="disk.rescue")
        cache.remove_root_disk("vm")
        assert sorted(path.name for path in elsewhere.iterdir()) == []
        assert cache.users("img") == []
        assert (rig.disks / "vm").is_symlink()


@pytest.mark.parametrize("kind", ["a file", "a link to nowhere"])
def test_what_is_no_directory_is_an_error_at_once(kind: str, rig: Rig) -> None:
    """A disk is neither made there nor said to be removed: its storage may only be away."""
    rig.disks.mkdir(parents=True)
    with rig.cache() as cache:
        if kind == "a file":
            (rig.disks / "vm").write_text("somebody's")
        else:
            (rig.disks / "vm").symlink_to(rig.dir / "not mounted")
        for call in (lambda: cache.create_root_disk("img", "vm", size=SIZE), lambda: cache.remove_root_disk("vm")):
            err = _stuck(call)
            assert isinstance(err, BackendError)
            assert "should be a directory" in str(err)
        assert os.path.lexists(rig.disks / "vm")


# --- bases behind a symbolic link


def _moved(rig: Rig) -> Path:
    """Where an operator moved the base, and left a symbolic link."""
    rig.cache().ensure_base("img")
    elsewhere = rig.dir / "elsewhere"
    (rig.root / "bases" / "img").rename(elsewhere)
    (rig.root / "bases" / "img").symlink_to(elsewhere)
    return elsewhere


def test_a_base_that_was_moved_and_linked_goes_by_its_link(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """What lies behind it may be another root's too: it stays, and the log says where."""
    elsewhere = _moved(rig)
    with rig.cache() as cache:
        report = cache.cleanup(cache.plan_cleanup(max_idle=0))
        assert (report.removed, report.failed) == (("img",), {})
        assert names(cache) == set()
        assert (elsewhere / "disk").exists()
        assert str(elsewhere) in caplog.text
        assert list((rig.root / "trash").iterdir()) == []
        assert cache.recover().removed == ()


@pytest.mark.parametrize("step", ["fs.rename", "fs.unlink"])
def test_a_removal_of_one_that_died(step: str, rig: Rig, in_child: InChild) -> None:
    """As of any base: it comes back, or it goes on going."""
    _moved(rig)
    with rig.cache() as cache:
        base = cache.get_base("img")

    def die() -> None:
        backend = rig.backend()
        retired = backend.retire_base(base)
        with FaultPlan().kill(step, match="/trash/"):
            backend.purge_base(retired)

    with pytest.raises(EOFError):
        in_child(die)
    with rig.cache() as cache:
        report = cache.recover()
        assert (report.failed, report.alive) == ({}, ())
        assert (len(report.restored), len(report.removed)) == ((1, 0) if step == "fs.rename" else (0, 1))
        assert names(cache) == ({"img"} if step == "fs.rename" else set())
    assert list((rig.root / "trash").iterdir()) == []


def test_a_removal_of_one_that_goes_on_is_left_alone(rig: Rig) -> None:
    """A recover beside it knows no users that only finders see."""
    _moved(rig)
    with rig.cache() as cache:
        backend = rig.backend()
        retired = backend.retire_base(cache.get_base("img"))
        report = cache.recover()
        assert [name.rpartition(".")[0] for name in report.alive] == ["trash/img"]
        backend.restore_base(retired)
        assert names(cache) == {"img"}

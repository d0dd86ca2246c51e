"""What disk directories and a driver tell of a base's users: every file, every name, and doubt where there is some."""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import subprocess
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest

from conftest import InChild
from harness import images, places
from harness.images import MIB, qemu_img
from harness.rig import Rig, backing_name
from harness.upkeep import names, open_cache
from nova_imagecache import (
    BaseImage,
    BaseInUseError,
    DiskUser,
    ImageCache,
    RbdLocation,
    UserFinder,
    UsersUnknownError,
)
from nova_imagecache.finders import DiskDirectories, ImagesInUse
from nova_imagecache.testing import FaultPlan

_T = TypeVar("_T")
SAMPLES = {"img": images.raw("found"), "other": images.raw("not asked for")}


class Place:
    """A cache, and a directory of disks that it did not make."""

    def __init__(self, directory: Path) -> None:
        self.rig = Rig(directory, "link", SAMPLES)
        self.disks = directory / "instances"
        self.disks.mkdir()
        for image_id in SAMPLES:
            self.rig.cache().ensure_base(image_id)
        self.base = self.rig.root / "bases" / "img" / "disk"

    def overlay(self, name: str, backing: str | Path, backing_format: str = "raw") -> Path:
        """A qcow2 file over ``backing``, named just so in its header."""
        path = self.disks / name
        path.parent.mkdir(parents=True, exist_ok=True)
        qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", str(backing), "-F", backing_format, str(path), "4M")
        assert backing_name(path) == str(backing)
        return path

    def bases(self) -> list[BaseImage]:
        return list(self.rig.cache().bases())

    def find(self, bases: list[BaseImage] | None = None) -> list[DiskUser]:
        return list(DiskDirectories([self.disks]).find(self.bases() if bases is None else bases))

    def found(self) -> list[tuple[str, str]]:
        """(image id, path below the directory) of every user."""
        return sorted((user.image_id, str(Path(user.detail).relative_to(self.disks))) for user in self.find())

    def cache(self, *finders: UserFinder) -> ImageCache:
        return open_cache(self.rig, user_finders=finders or [DiskDirectories([self.disks])])

    def kept(self) -> bool:
        """Whether the base outlives a cleanup that grants no idle time."""
        with self.cache() as cache:
            cache.cleanup(cache.plan_cleanup(max_idle=0))
            return "img" in names(cache)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with places.quick(tmp_path) as directory:
        yield Place(directory)


def header(backing: bytes, offset: int = 512, length: int | None = None) -> bytes:
    """A qcow2 header as a guest may write it."""
    made = bytearray(4096)
    length = len(backing) if length is None else length
    struct.pack_into(">4sIQIIQ", made, 0, b"QFI\xfb", 2, offset, length, 16, 4 * MIB)
    made[512 : 512 + len(backing)] = backing[: len(made) - 512]
    return bytes(made)


# --- files by any name


@pytest.mark.parametrize(
    "name",
    [
        "vm/disk",
        "vm/disk.rescue",
        "vm/disk.eph0",
        "vm/disk.eph1",
        "0f8fad5b-d9cb-469f-a165-70867728950e_resize/disk",
        "vm/snapshots/2024-01-01/disk",
        "lonely",
        "vm/.hidden",
        "vm/disk.base.snap",
        "vm/snap.base",
        "vm/snap.json",
        "vm/console.log",
        "a/b/c/d/e/f/g/disk",
    ],
)
def test_every_file_counts(name: str, place: Place) -> None:
    """Whatever it is called and wherever it lies below the directory."""
    place.overlay(name, place.base)
    assert place.found() == [("img", name)]
    [user] = place.find()
    assert (user.known_by, user.certain, user.name) == ("disk directories", True, Path(name).name)
    assert place.kept()


def test_a_disk_by_the_name_of_a_record_counts(place: Place) -> None:
    """Also beside a disk of ours, of which the name says that it is the record."""
    place.overlay("vm/disk", "disk.base")
    os.link(place.base, place.disks / "vm" / "disk.base")
    place.overlay("vm/disk.json", place.rig.root / "bases" / "other" / "disk")
    assert place.found() == [("img", "vm/disk"), ("other", "vm/disk.json")]


@pytest.mark.parametrize("form", ["absolute", "relative", "file:", "file:relative", "dots", "link"])
def test_backing_names_in_every_form(form: str, place: Place) -> None:
    """As qemu reads them: relative to the file, with or without the protocol, by another link of the same inode."""
    relative = os.path.relpath(place.base, place.disks / "vm")
    link = place.disks / "a link of libvirt's"
    backing = {
        "absolute": str(place.base),
        "relative": relative,
        "file:": f"file:{place.base}",
        "file:relative": f"file:{relative}",
        "dots": str(place.base.parent / ".." / "img" / "disk"),
        "link": str(link),
    }[form]
    if form == "link":
        os.link(place.base, link)
    place.overlay("vm/disk", backing)
    assert ("img", "vm/disk") in place.found()


def test_a_name_through_another_mount_counts(place: Place) -> None:
    """While the base has no name it cannot be compared: then the end of the path tells."""
    place.overlay("vm/disk", "/another/mount/bases/img/disk")
    place.overlay("vm/other", "/another/mount/bases/gone/disk")
    assert place.found() == [("img", "vm/disk")]


@pytest.mark.services
def test_a_user_through_another_mount_that_comes_after_the_plan(place: Place) -> None:
    """The second look, at a base that is just being removed, finds it."""
    with places.mounted_again(place.rig.root, place.rig.dir / "alias") as alias, place.cache() as cache:
        plan = cache.plan_cleanup(max_idle=0)
        top = place.overlay("vm/disk", alias / "bases" / "img" / "disk")
        assert cache.cleanup(plan).removed == ("other",)
        qemu_img("compare", "-q", "-f", "qcow2", "-F", "raw", str(top), str(place.base))


def test_a_symbolic_name_of_the_base_counts(place: Place) -> None:
    """The chain leads through it to the same inode."""
    (place.disks / "alias").symlink_to(place.base)
    place.overlay("vm/disk", place.disks / "alias")
    assert place.found() == [("img", "vm/disk")]


def test_chains_are_followed_to_their_end(place: Place) -> None:
    """An overlay on an overlay on an overlay; a snapshot's overlay names the disk it was made of."""
    place.overlay("vm/disk", place.base)
    place.overlay("vm/disk.snap1", "disk", "qcow2")
    place.overlay("vm/disk.snap2", place.disks / "vm" / "disk.snap1", "qcow2")
    assert [name for _image_id, name in place.found()] == ["vm/disk", "vm/disk.snap1", "vm/disk.snap2"]
    # also where the layers between lie elsewhere
    for name in ("disk", "disk.snap1"):
        (place.disks.parent / name).hardlink_to(place.disks / "vm" / name)
        (place.disks / "vm" / name).unlink()
    qemu_img(
        *("rebase", "-u", "-f", "qcow2", "-b", str(place.disks.parent / "disk.snap1"), "-F", "qcow2"),
        str(place.disks / "vm" / "disk.snap2"),
    )
    assert place.found() == [("img", "vm/disk.snap2")]


def test_our_own_disks_and_their_snapshots_count(place: Place) -> None:
    """A disk with its link, moved to the directory; and a snapshot overlay over it."""
    place.rig.cache().create_root_disk("img", "vm")
    (place.rig.disks / "vm").rename(place.disks / "vm_resize")
    place.overlay("vm_resize/disk.snap", "disk", "qcow2")
    assert place.found() == [("img", "vm_resize/disk"), ("img", "vm_resize/disk.snap")]


def test_only_the_bases_that_are_asked_about(place: Place) -> None:
    """A disk of another image is nobody's business here."""
    place.overlay("vm/disk", place.base)
    other = [base for base in place.bases() if base.image_id == "other"]
    assert place.find(other) == []
    assert place.find([]) == []


def test_several_directories(place: Place) -> None:
    """All are looked at."""
    place.overlay("vm/disk", place.base)
    users = list(DiskDirectories([place.rig.root, place.disks]).find(place.bases()))
    assert [user.detail for user in users] == [str(place.disks / "vm" / "disk")]


# --- what is no user


def test_a_chain_that_nobody_follows_to_its_end(place: Place) -> None:
    """QEMU opens it all the same: what lies below so many overlays is doubt, and keeps the base."""
    below, below_format = place.base, "raw"
    for number in range(66):
        below = place.overlay(f"vm/{number}", below, below_format)
        below_format = "qcow2"
    assert subprocess.run(["qemu-io", "-r", "-c", "read 0 4k", below], capture_output=True, check=False).returncode == 0
    with pytest.raises(UsersUnknownError, match=r"below 64 overlays.*qemu-img commit"):
        place.find()
    assert place.kept()


def test_ever_longer_names_end(place: Place) -> None:
    """A guest's header that names its own file through a symbolic link: no chain, and no doubt."""
    place.overlay("vm/disk", "here/disk")
    (place.disks / "vm" / "here").symlink_to(".")
    assert place.found() == []


def test_loops_end(place: Place) -> None:
    """Files that name each other, or themselves, open nowhere and use nothing."""
    place.overlay("a/disk", "../b/disk", "qcow2")
    place.overlay("b/disk", "../a/disk", "qcow2")
    place.overlay("c/disk", "disk", "qcow2")
    assert place.found() == []


def test_symbolic_links_are_not_followed(place: Place) -> None:
    """Neither files nor directories: what they lead to is found where it lies, or is not ours to look at."""
    elsewhere = place.rig.dir / "elsewhere"
    (place.disks / "vm").mkdir()
    place.overlay("vm/real", place.base).rename(place.rig.dir / "moved")
    elsewhere.mkdir()
    (place.rig.dir / "moved").rename(elsewhere / "disk")
    (place.disks / "vm" / "disk").symlink_to(elsewhere / "disk")
    (place.disks / "dir").symlink_to(elsewhere)
    (place.disks / "loop").symlink_to(place.disks)
    assert place.found() == []


def test_other_files_use_nothing(place: Place) -> None:
    """Raw disks, consoles, keys, sockets, empty files."""
    vm = place.disks / "vm"
    vm.mkdir()
    (vm / "disk").write_bytes(bytes(MIB))
    (vm / "console.log").write_text("login: ")
    (vm / "empty").touch()
    (vm / "short").write_bytes(b"QFI\xfb")
    os.mkfifo(vm / "fifo")
    assert place.found() == []


def test_a_raw_disk_of_ours_is_raw_whatever_its_guest_writes(place: Place) -> None:
    """A guest that writes a header which names a base keeps nothing: the record says raw."""
    place.rig.kind, place.rig.backend_name, place.rig.options = "file", "file", {}
    place.rig.cache().create_root_disk("img", "vm")
    shutil.copytree(place.rig.disks / "vm", place.disks / "vm")
    with (place.disks / "vm" / "disk").open("r+b") as file:
        file.write(header(str(place.base).encode()))
    assert place.found() == []
    # of one without a record nobody knows what it is: it keeps the base
    (place.disks / "vm" / "disk.json").unlink()
    assert place.found() == [("img", "vm/disk")]


@pytest.mark.parametrize(
    "written",
    [
        header(b"x" * 1023),
        header(b"/".join([b"d" * 255] * 4)),
        header(b"/dev/null/disk"),
        header(b"a\0b"),
        header(b"\xff\xfe\x00\x80"),
        header(b"nowhere"),
        header(b"."),
        header(b"/"),
        header(b"file:"),
        header(b"json:{"),
        header(b"json:[]"),
        header(b"rbd:vms/disk"),
        header(b"nbd://127.0.0.1:1/disk"),
        header(b"disk", offset=2**63),
        header(b"disk", offset=2**64 - 1),
        header(b"disk", length=2**32 - 1),
        header(b"disk", offset=10**9),
        header(b"json:" + b"[" * 1000),
        header(b"../fifo"),
        header(b"../socket"),
        header(b"../circle"),
        b"QFI\xfb" + bytes(range(256)) * 2,
        b"QFI\xfb" + b"\xff" * 1000,
    ],
    ids=range(23),
)
def test_rubbish_in_a_header_stops_nothing(written: bytes, place: Place) -> None:
    """A guest may write any header on a raw disk: it neither hides other disks nor keeps every base."""
    (place.disks / "a").mkdir()
    (place.disks / "a" / "disk").write_bytes(written)
    os.mkfifo(place.disks / "fifo")
    (place.disks / "circle").symlink_to("circle")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(place.disks / "socket"))
    assert place.found() == []
    place.overlay("vm/disk", place.base)
    assert place.found() == [("img", "vm/disk")]
    with place.cache() as cache:
        cache.remove_base("other")


@pytest.mark.parametrize("form", ["{}", "file:{}", 'json:{{"driver": "raw", "file": {{"filename": "{}"}}}}'])
def test_only_files_and_disks_are_opened(form: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest's header may name a device that does things when it is opened: /dev/watchdog restarts the host."""
    fifo = place.disks.parent / "device"
    os.mkfifo(fifo)
    (place.disks / "disk").write_bytes(header(form.format(fifo).encode()))
    opened: list[str] = []
    really = os.open

    def note(path: str, flags: int) -> int:
        opened.append(path)
        return really(path, flags)

    monkeypatch.setattr(os, "open", note)
    assert place.found() == []
    assert str(place.disks / "disk") in opened
    assert str(fifo) not in opened


# --- names that qemu knows and we must


@pytest.mark.parametrize("old_format", ["qcow", "qed"])
def test_formats_that_nobody_makes_any_more(old_format: str, place: Place) -> None:
    """QEMU reads their overlays still."""
    path = place.disks / "disk"
    qemu_img("create", "-q", "-f", old_format, "-b", str(place.base), "-F", "raw", str(path))
    assert place.found() == [("img", "disk")]


@pytest.mark.parametrize("via", ["real", "other"])
def test_a_root_behind_a_symbolic_link(via: str, tmp_path: Path) -> None:
    """A disk names the base by another path, and comes between the plan and the removal: the second look sees it."""
    (tmp_path / "real").mkdir()
    for name in ("link", "other"):
        (tmp_path / name).symlink_to("real")
    place = Place(tmp_path / "link")
    with place.cache() as cache:
        plan = cache.plan_cleanup(max_idle=0)
        place.overlay("vm/disk", tmp_path / via / place.base.relative_to(tmp_path / "link"))
        assert "img" not in cache.cleanup(plan).removed
        assert "img" in names(cache)


@pytest.mark.parametrize(
    "text",
    [
        'json:{{"driver":"raw","file":{{"driver":"file","filename":"{path}"}}}}',
        'json:{{"driver": "raw", "file.driver": "file", "file.filename": "{path}"}}',
        'json:{{"file":{{"filename":"{path}"}}}}',
        'json:{{"file":{{"filename":"/over/it"}},"backing":{{"driver":"raw","file":{{"filename":"{path}"}}}}}}',
    ],
)
def test_backing_names_in_json(text: str, place: Place) -> None:
    """Block jobs of qemu write such names; they lead to the base as well."""
    (place.disks / "vm").mkdir()
    (place.disks / "vm" / "disk").write_bytes(header(text.format(path=place.base).encode()))
    assert place.found() == [("img", "vm/disk")]


@pytest.mark.parametrize(
    "text",
    [
        '{{"driver":"qcow2","file.filename":"{over}","backing.driver":"raw","backing.file.filename":"{path}"}}',
        '{{"driver":"qcow2","file.filename":"{over}","backing":{{"driver":"raw","file.filename":"{path}"}}}}',
        '{{"driver":"qcow2","file.filename":"{over}","backing":{{"driver":"raw"}},"backing.file.filename":"{path}"}}',
        (
            '{{"driver":"preallocate","file":{{"driver":"qcow2","file":{{"filename":"{over}"}},'
            '"backing":{{"driver":"raw","file":{{"filename":"{path}"}}}}}}}}'
        ),
        '{{"driver":"raw","file":{{"driver":"raw","file.filename":"{path}"}}}}',
    ],
    ids=["flat", "nested", "both", "filter", "deep"],
)
def test_names_in_json_that_qemu_opens(text: str, place: Place) -> None:
    """Flat or nested or both: what QEMU reads the base's bytes through leads to the base."""
    over = place.overlay("over", "nowhere")
    qemu_img("create", "-q", "-f", "qcow2", str(over), "4M")
    name = "json:" + text.format(over=over, path=place.base)
    top_format = json.loads(name.removeprefix("json:"))["driver"]
    top = place.overlay("vm/disk", name, top_format)
    read = subprocess.run(["qemu-img", "compare", "-f", "qcow2", "-F", "raw", top, place.base], check=False)
    assert read.returncode == 0
    assert ("img", "vm/disk") in place.found()


# --- files that go, or cannot be read


def test_vanishing_files_use_nothing(place: Place) -> None:
    """Removed between the listing and the look; the others are found."""
    gone = place.overlay("a/disk", place.base)
    place.overlay("b/disk", place.base)
    found = iter(DiskDirectories([place.disks]).find(place.bases()))
    first = next(found)
    (gone if first.detail != str(gone) else place.disks / "b" / "disk").unlink()
    assert list(found) == []


def test_a_directory_that_vanishes_uses_nothing(place: Place) -> None:
    """An instance is removed while a pass looks at another one."""
    for number in range(4):
        place.overlay(f"vm-{number}/disk", place.base)
    users = iter(DiskDirectories([place.disks]).find(place.bases()))
    next(users)
    for directory in list(place.disks.iterdir()):
        shutil.rmtree(directory)
    assert list(users) == []


@pytest.mark.parametrize("what", ["renamed", "and another made", "away and back"])
def test_a_directory_that_is_renamed_while_one_looks_is_found(what: str, place: Place) -> None:
    """As Nova does when it resizes an instance, or goes back; its turn comes after that."""
    for number in range(3):
        place.overlay(f"vm-{number}/disk", place.base)
    users = iter(DiskDirectories([place.disks]).find(place.bases()))
    seen = [Path(next(users).detail).parent]
    # they are looked at in this order
    later = sorted((path for path in place.disks.iterdir() if path != seen[0]), key=lambda path: path.stat().st_ino)
    renamed = later[0].with_name(f"{later[0].name}_resize")
    later[0].rename(renamed)
    if what == "and another made":
        later[0].mkdir()
    elif what == "away and back":
        seen.append(Path(next(users).detail).parent)
        renamed.rename(later[0])
    seen += [Path(user.detail).parent for user in users]
    assert sorted(seen) == sorted(path for path in place.disks.iterdir() if (path / "disk").exists())


def test_directories_that_come_and_go_while_one_looks_are_no_doubt(place: Place) -> None:
    """A busy host: an instance is made and another removed with each look at one; those that stay are found."""
    for number in range(20):
        place.overlay(f"vm-{number}/disk", place.base)
    seen = set()
    for number, user in enumerate(DiskDirectories([place.disks]).find(place.bases())):
        assert user.disk_id is not None
        seen.add(user.disk_id)
        if number < 20:
            place.overlay(f"new-{number}/disk", place.base)
        if number % 5 == 1:
            shutil.rmtree(place.disks / user.disk_id)
    assert {path.name for path in place.disks.iterdir()} <= seen


def test_directories_that_are_renamed_without_end_are_doubt(place: Place) -> None:
    """The look comes to an end all the same."""
    place.overlay("vm-0/disk", place.base)

    def look() -> None:
        for number, _user in enumerate(DiskDirectories([place.disks]).find(place.bases())):
            assert number < 100
            (place.disks / f"vm-{number}").rename(place.disks / f"vm-{number + 1}")

    with pytest.raises(UsersUnknownError, match="are being renamed"):
        look()


def test_a_base_that_is_just_removed_is_known_by_its_path(place: Place) -> None:
    """At the second look it lies in the trash: whoever names its old path, or a link of it, brings it back."""
    [base] = [base for base in place.bases() if base.image_id == "img"]
    place.overlay("vm/disk", place.base)
    (place.disks / "link").hardlink_to(place.base)
    place.overlay("linked/disk", place.disks / "link")
    backend = place.rig.backend()
    retired = backend.retire_base(base)
    users = place.find([base, retired.base])
    assert {user.detail for user in users} == {
        str(place.disks / "vm" / "disk"),
        str(place.disks / "linked" / "disk"),
    }
    assert {user.image_id for user in users} == {"img"}
    backend.restore_base(retired)


def test_a_user_that_comes_between_the_two_looks_brings_the_base_back(place: Place) -> None:
    """Foreign software makes an overlay by the base's path while it is being removed."""
    plan = FaultPlan()
    retiring = plan.pause("fs.rename", match="trash/img")
    with plan, ThreadPoolExecutor(1) as pool:
        removing = pool.submit(place.cache().remove_base, "img")
        retiring.wait()
        place.overlay("vm/disk", place.base)
        retiring.release()
        with pytest.raises(BaseInUseError):
            removing.result(60)
    assert place.kept()
    assert place.base.exists()


# --- what may be doubted, and what need not be


def test_a_directory_that_is_not_there_is_doubt(place: Place) -> None:
    """Its filesystem may not be mounted: whatever uses bases lies in it."""
    finder = DiskDirectories([place.disks, place.disks.parent / "not mounted"])
    with pytest.raises(UsersUnknownError, match="not mounted"):
        list(finder.find(place.bases()))


def test_bases_that_are_no_files_have_no_users_among_files(place: Place) -> None:
    """Nothing is read, and nothing can be in doubt."""
    location = RbdLocation(pool="vms", name="base.img")
    bases = [replace(base, location=location) for base in place.bases()]
    assert list(DiskDirectories([Path("/nowhere")]).find(bases)) == []


@pytest.mark.parametrize("spoil", [b"QFI\xfb\0\0\0\x07", b"QFI\xfb" + b"\xff" * 200, b"QFI\xfb"])
def test_a_damaged_header_is_told_once(place: Place, spoil: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """It uses nothing, since QEMU opens it neither, and it stops nothing; the file is named in the log."""
    path = place.overlay("vm/disk", place.base)
    with path.open("r+b") as file:
        file.truncate(len(spoil))
        file.write(spoil)
    finder = DiskDirectories([place.disks])
    for _look in range(3):
        assert list(finder.find(place.bases())) == []
    said = [record.getMessage() for record in caplog.records if "damaged header" in record.getMessage()]
    assert len(said) == 1
    assert str(path) in said[0]


def _as_nobody(place: Place, in_child: InChild, look: Callable[[], _T]) -> _T:
    for path in (place.rig.root, *place.rig.root.rglob("*")):
        os.chown(path, 65534, 65534, follow_symlinks=False)
    seen: _T = in_child(look, unprivileged=True)
    return seen


@pytest.fixture
def shared(open_path: Path) -> Place:
    open_path.chmod(0o777)
    return Place(open_path)


def test_an_unreadable_file_with_our_record(shared: Place, in_child: InChild) -> None:
    """The hypervisor gave it to the guest's user: the record beside it says what it uses, with doubt."""
    shared.rig.cache().create_root_disk("img", "vm")
    (shared.rig.disks / "vm").rename(shared.disks / "vm")
    (shared.disks / "vm").chmod(0o755)
    (shared.disks / "vm" / "disk").chmod(0)
    users = _as_nobody(shared, in_child, shared.find)
    assert [(user.image_id, user.name, user.certain) for user in users] == [("img", "disk", False)]


def test_an_unreadable_file_without_a_record(shared: Place, in_child: InChild) -> None:
    """It may use any base: all are kept, and the reason names the file."""
    shared.overlay("vm/disk", shared.base).chmod(0)

    def look() -> tuple[str, dict[str, str], set[str]]:
        with shared.cache() as cache:
            try:
                cache.users("other")
                told = ""
            except UsersUnknownError as err:
                told = str(err)
            report = cache.cleanup(cache.plan_cleanup(max_idle=0))
            return told, report.kept, names(cache)

    told, kept, left = _as_nobody(shared, in_child, look)
    assert str(shared.disks / "vm" / "disk") in told
    assert kept.keys() == left == {"img", "other"}
    assert "unknown" in kept["img"]


def test_an_unreadable_layer_keeps_what_it_may_use(shared: Place, in_child: InChild) -> None:
    """A snapshot names a disk that cannot be read and lies outside: with a record that is told, without it all is."""
    shared.rig.cache().create_root_disk("img", "vm")
    elsewhere = shared.rig.disks / "vm"
    elsewhere.chmod(0o755)
    shared.overlay("vm/disk.snap", elsewhere / "disk", "qcow2")
    (elsewhere / "disk").chmod(0)
    users = _as_nobody(shared, in_child, shared.find)
    assert [(user.image_id, user.name, user.certain) for user in users] == [("img", "disk.snap", False)]
    (elsewhere / "disk.json").unlink()
    with pytest.raises(UsersUnknownError):
        _as_nobody(shared, in_child, shared.find)


def test_a_directory_that_cannot_be_listed(shared: Place, in_child: InChild) -> None:
    """What lies in it may use any base."""
    shared.overlay("vm/disk", shared.base)
    (shared.disks / "vm").chmod(0)
    with pytest.raises(UsersUnknownError, match="vm"):
        _as_nobody(shared, in_child, shared.find)


@pytest.mark.parametrize("name", ["console.log", "console.log.0", "disk.info", "libvirt.xml"])
def test_what_is_no_disk_is_passed_over(name: str, shared: Place, in_child: InChild) -> None:
    """A console of a running guest belongs to another user on every production host."""
    shared.overlay("vm/disk", shared.base)
    (shared.disks / "vm" / name).write_text("login: ")
    (shared.disks / "vm" / name).chmod(0o600)
    users = _as_nobody(shared, in_child, shared.find)
    assert [(user.image_id, user.name) for user in users] == [("img", "disk")]


@pytest.mark.parametrize("name", ["lost+found", "vm/swtpm"])
def test_directories_that_hold_no_disks_are_passed_over(name: str, shared: Place, in_child: InChild) -> None:
    """A filesystem has one that root alone can list, and a TPM's state is its user's."""
    (shared.disks / name).mkdir(parents=True)
    (shared.disks / name).chmod(0o700)
    assert _as_nobody(shared, in_child, shared.find) == []


def test_names_that_a_driver_says_are_no_disks(shared: Place, in_child: InChild) -> None:
    """Instead of those that are known, as shell patterns."""
    for name in ("console.log", "trace.bin"):
        (shared.disks / name).write_text("")
        (shared.disks / name).chmod(0o600)

    def look(*not_disks: str) -> list[DiskUser]:
        return list(DiskDirectories([shared.disks], not_disks=not_disks).find(shared.bases()))

    assert _as_nobody(shared, in_child, lambda: look("*.log", "trace.*")) == []
    with pytest.raises(UsersUnknownError, match=r"console\.log"):
        _as_nobody(shared, in_child, lambda: look("trace.*"))


def test_all_doubts_are_counted(shared: Place, in_child: InChild) -> None:
    """An operator sees how many files are in the way, and one of them by its name."""
    for number in range(3):
        shared.overlay(f"vm-{number}/disk", shared.base).chmod(0)
    with pytest.raises(UsersUnknownError, match=r"vm-\d/disk cannot be read.*and 2 more"):
        _as_nobody(shared, in_child, shared.find)


def test_what_a_hypervisor_has_open_it_tells(shared: Place, in_child: InChild) -> None:
    """A snapshot that is its guest's user's alone: the live chain says what it uses; other files stay in doubt."""
    disk = shared.overlay("vm/disk", shared.base)
    snapshot = shared.overlay("vm/disk.snap", disk, "qcow2")
    snapshot.chmod(0)
    asked = []

    def chains() -> list[tuple[Path, ...]]:
        asked.append(1)
        return [(Path("/elsewhere"),), (snapshot, disk, shared.base)]

    def look() -> tuple[list[tuple[str, str | None]], int]:
        users = list(DiskDirectories([shared.disks], chains=chains).find(shared.bases()))
        return sorted((user.image_id, user.name) for user in users), len(asked)

    found, looks = _as_nobody(shared, in_child, look)
    assert (found, looks) == ([("img", "disk"), ("img", "disk.snap")], 1)
    shared.overlay("other/disk", shared.base).chmod(0)
    with pytest.raises(UsersUnknownError, match="other/disk"):
        _as_nobody(shared, in_child, look)


def test_a_hypervisor_is_asked_only_where_something_is_in_doubt(place: Place) -> None:
    """Readable files speak for themselves."""
    place.overlay("vm/disk", place.base)

    def chains() -> list[tuple[Path, ...]]:
        raise AssertionError("asked in vain")

    assert len(list(DiskDirectories([place.disks], chains=chains).find(place.bases()))) == 1


def test_the_reason_in_a_plan_says_what_is_in_doubt(shared: Place, in_child: InChild) -> None:
    """An operator who reads it knows which file to look at."""
    shared.overlay("vm/disk", shared.base).chmod(0)

    def look() -> set[str]:
        with shared.cache() as cache:
            return {item.reason for item in cache.plan_cleanup(max_idle=0).items}

    [reason] = _as_nobody(shared, in_child, look)
    assert reason.startswith("its users are unknown: ")
    assert str(shared.disks / "vm" / "disk") in reason


def test_no_child_process_runs(place: Place) -> None:
    """Thousands of headers are read by this process, and nothing is changed by looking."""
    for number in range(20):
        place.overlay(f"vm-{number}/disk", place.base)
    with FaultPlan() as plan:
        assert len(place.find()) == 20
    assert plan.trace == ()


# --- the driver's word


def test_images_in_use_are_kept(place: Place) -> None:
    """The callable is asked at every look, so that it may change its mind."""
    in_use = ["img", "unknown to us"]
    asked = []

    def image_ids() -> Iterable[str]:
        asked.append(1)
        return in_use

    cache = place.cache(ImagesInUse(image_ids))
    assert [user.known_by for user in cache.users("img")] == ["driver"]
    with pytest.raises(BaseInUseError):
        cache.remove_base("img")
    assert cache.cleanup(cache.plan_cleanup(max_idle=0)).removed == ("other",)
    in_use.clear()
    assert cache.cleanup(cache.plan_cleanup(max_idle=0)).removed == ("img",)
    assert len(asked) > 3


def test_a_driver_that_says_a_generator(place: Place) -> None:
    """Any iterable will do."""
    cache = place.cache(ImagesInUse(lambda: (name for name in ["img"])))
    assert len(cache.users("img")) == 1
    assert cache.users("other") == []


def test_a_driver_that_says_one_text_keeps_everything(place: Place) -> None:
    """Its letters are no image ids: who forgets the list loses no base."""
    with place.cache(ImagesInUse(lambda: "img")) as cache:
        report = cache.cleanup(cache.plan_cleanup(max_idle=0))
        assert (report.removed, set(report.kept)) == ((), {"img", "other"})
        with pytest.raises(UsersUnknownError, match="no list of image ids"):
            cache.users("img")


@pytest.mark.parametrize("error", [RuntimeError("database is away"), KeyError("x"), ConnectionResetError()])
def test_a_driver_that_fails_keeps_everything(error: Exception, place: Place) -> None:
    """Unknown is not zero: nothing goes, by cleanup or by hand, and the reason is told."""

    def image_ids() -> Iterable[str]:
        raise error

    with place.cache(ImagesInUse(image_ids)) as cache:
        for _look in range(2):
            report = cache.cleanup(cache.plan_cleanup(max_idle=0))
            assert report.removed == ()
            assert set(report.kept) == {"img", "other"}
        with pytest.raises(UsersUnknownError, match="driver"):
            cache.remove_base("img")
        with pytest.raises(UsersUnknownError):
            cache.users("img")


def test_a_driver_that_fails_at_the_second_look(place: Place) -> None:
    """Everything that was about to go comes back."""
    asked = []

    def image_ids() -> Iterable[str]:
        asked.append(1)
        if len(asked) > 1:
            raise TimeoutError("gone meanwhile")
        return ()

    with place.cache(ImagesInUse(image_ids)) as cache:
        report = cache.cleanup(cache.plan_cleanup(max_idle=0))
        assert report.removed == ()
        assert set(report.kept) == names(cache) == {"img", "other"}
    assert list(place.rig.root.glob("trash/*")) == []

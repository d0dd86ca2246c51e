"""Files in the making: nobody sees them, nothing is left of them, and a disk is synced before it has its name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.images import MIB, raw
from harness.rig import Rig
from nova_imagecache import DiskExistsError, DiskNotFoundError, NoSpaceError, _fs
from nova_imagecache.backends._making import Making
from nova_imagecache.testing import FaultPlan
from nova_imagecache.testing._faults import When


@pytest.fixture(params=[True, False], ids=["nameless", "named"])
def making(request: pytest.FixtureRequest, tmp_path: Path) -> Making:
    return Making(tmp_path, "disk", nameless=request.param)


def _names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir() if not path.name.startswith(".")}


def test_a_file_is_there_when_it_is_published(making: Making, tmp_path: Path) -> None:
    """Under its final name or under none that anybody looks at; nothing else is left."""
    fd = making.create("disk", 0o600)
    os.write(fd, b"whole")
    assert _names(tmp_path) == set()
    making.publish(fd, tmp_path / "disk")
    os.close(fd)
    making.close()
    assert [path.name for path in tmp_path.iterdir()] == ["disk"]
    assert (tmp_path / "disk").read_bytes() == b"whole"
    assert (tmp_path / "disk").stat().st_mode & 0o777 == 0o600


def test_a_name_that_is_taken_stays(making: Making, tmp_path: Path) -> None:
    """Whoever was first keeps it, and nothing is left of the other."""
    (tmp_path / "disk").write_bytes(b"first")
    fd = making.create("disk", 0o600)
    with pytest.raises(FileExistsError):
        making.publish(fd, tmp_path / "disk")
    os.close(fd)
    making.close()
    assert [path.name for path in tmp_path.iterdir()] == ["disk"]
    assert (tmp_path / "disk").read_bytes() == b"first"


@pytest.mark.parametrize("step", ["fs.mkdir", "fs.create"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_nothing_is_left_of_what_could_not_be_made(step: str, when: When, tmp_path: Path) -> None:
    """Whether the step that failed had done its work or not."""
    making = Making(tmp_path, "disk", nameless=False)
    with FaultPlan().fail(step, when=when), pytest.raises(OSError, match="No space"):
        making.create("disk", 0o600)
    making.close()
    assert list(tmp_path.iterdir()) == []


def test_a_filesystem_without_nameless_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked once; then files have a hidden name, which a child process can open."""
    asked = []
    monkeypatch.setattr(_fs, "create_nameless", lambda *arguments: asked.append(arguments))
    making = Making(tmp_path, "disk", nameless=True)
    for name in ("record", "disk"):
        fd = making.create(name, 0o600)
        os.write(fd, name.encode())
        assert making.path(name).read_text() == name
        making.publish(fd, tmp_path / name)
        os.close(fd)
    making.close()
    assert len(asked) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "record"]


@pytest.mark.parametrize("kind", ["link", "path", "file"])
def test_what_is_named_is_synced(kind: str, tmp_path: Path) -> None:
    """Record and disk before the disk's name, and where the record alone leads to the reference, it before that."""
    rig = Rig(tmp_path, kind, {"img": raw("synced")})
    rig.cache().ensure_base("img")
    with FaultPlan() as plan:
        rig.cache().create_root_disk("img", "vm", size=4 * MIB)
    disk = rig.disks / "vm" / "disk"
    steps = [(step.name, step.targets) for step in plan.trace]
    [named] = [at for at, (name, targets) in enumerate(steps) if targets[-1:] == (str(disk),) and name != "fs.touch"]
    own = [
        at for at, (name, targets) in enumerate(steps) if name == "fs.fsync" and targets[0].startswith(str(disk.parent))
    ]
    assert len([at for at in own if at < named]) >= 2
    assert steps[named + 1 :][0] == ("fs.fsync_dir", (str(disk.parent),))
    if kind == "path":
        referred, finished = [
            at for at, (name, targets) in enumerate(steps) if name == "fs.rename" and "/users/" in targets[-1]
        ]
        assert own[0] < referred < named < finished


@pytest.mark.parametrize("kind", ["link", "path", "file"])
def test_a_file_that_another_put_at_the_disks_name_meanwhile(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is his: nothing of ours says that it is a disk, and nothing that a removal would take it."""
    rig = Rig(tmp_path, kind, {"img": raw("raced")})
    disk = rig.disks / "vm" / "disk"
    for step in ("give_name", "link"):
        really = getattr(_fs, step)

        def meet(source: object, target: Path, really: Callable[[object, Path], None] = really) -> None:
            if target == disk:
                disk.write_bytes(b"foreign")
            really(source, target)

        monkeypatch.setattr(_fs, step, meet)
    with rig.cache() as cache:
        with pytest.raises(DiskExistsError):
            cache.create_root_disk("img", "vm", size=4 * MIB)
        assert [path.name for path in disk.parent.iterdir()] == ["disk"]
        assert cache.users("img") == []
        with pytest.raises(DiskNotFoundError):
            cache.remove_root_disk("vm")
    assert disk.read_bytes() == b"foreign"


@pytest.mark.parametrize("kind", ["link", "path", "file"])
def test_a_disk_that_has_its_name_stays_one_whatever_fails_then(kind: str, tmp_path: Path) -> None:
    """Its maker hears of the failure, and what is there can be removed as a disk."""
    rig = Rig(tmp_path, kind, {"img": raw("failed behind")})
    with rig.cache() as cache:
        cache.ensure_base("img")
        step = "fs.link" if kind == "file" else "fs.give_name"
        with FaultPlan().fail(step, when="after", match="vm/disk", nth=2), pytest.raises(NoSpaceError):
            cache.create_root_disk("img", "vm", size=4 * MIB)
        assert cache.get_root_disk("vm").image_id == "img"
        cache.remove_root_disk("vm")
        assert cache.users("img") == []


@pytest.mark.parametrize("kind", ["link", "path", "file"])
def test_a_directory_that_was_made_for_a_disk_goes_with_the_last(kind: str, tmp_path: Path) -> None:
    """Also when the disk that it was made for goes first; one that its driver made stays."""
    rig = Rig(tmp_path, kind, {"img": raw("neighbours")})
    (rig.disks / "theirs").mkdir(parents=True)
    disks = ["disk", "disk.eph0", "disk.rescue"]
    with rig.cache() as cache:
        for disk_id in ("ours", "theirs"):
            for name in disks:
                cache.create_root_disk("img", disk_id, name=name, size=4 * MIB)
            for name in disks:
                cache.remove_root_disk(disk_id, name=name)
    assert [path.name for path in rig.disks.iterdir()] == ["theirs"]


def test_a_directory_that_cannot_be_handed_on_stays(tmp_path: Path) -> None:
    """As on a full filesystem, where disks can be removed all the same."""
    rig = Rig(tmp_path, "link", {"img": raw("neighbours")})
    with rig.cache() as cache:
        for name in ("disk", "disk.rescue"):
            cache.create_root_disk("img", "vm", name=name, size=4 * MIB)
        with FaultPlan().fail("fs.create", match="vm/.disk.rescue"):
            cache.remove_root_disk("vm")
        cache.remove_root_disk("vm", name="disk.rescue")
        assert cache.users("img") == []
    assert list((rig.disks / "vm").iterdir()) == []

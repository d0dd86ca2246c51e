"""The cache root: made once, by whoever comes first, and never taken from somebody else."""

from __future__ import annotations

import errno
import grp
import json
import multiprocessing
import os
import signal
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from conftest import InChild
from nova_imagecache import CacheConfig, FileLocation, ImageCache
from nova_imagecache._layout import Root
from nova_imagecache.backends import BackendPaths
from nova_imagecache.backends.file import FileBackend
from nova_imagecache.exceptions import BackendError, ConfigError, NoSpaceError
from nova_imagecache.testing import FakeSource, FaultPlan


def prepared(path: Path, storage: str = "files") -> Root:
    root = Root(path, storage)
    root.prepare()
    return root


def refused(path: Path, storage: str = "files") -> str:
    """The one problem with a root; nothing in it was changed."""
    before = sorted(str(found) for found in path.rglob("*"))
    with pytest.raises(ConfigError) as caught:
        prepared(path, storage)
    assert sorted(str(found) for found in path.rglob("*")) == before
    (problem,) = caught.value.problems
    assert problem.startswith("root: ")
    assert str(path) in problem
    return problem


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_construction_does_no_io(tmp_path: Path) -> None:
    """The root appears with the first use."""
    Root(tmp_path / "cache", "files")
    assert list(tmp_path.iterdir()) == []


def test_a_fresh_root_says_what_it_is(tmp_path: Path) -> None:
    """For people, for backups, and for the next release."""
    root = prepared(tmp_path / "deep" / "cache")
    assert json.loads((root.path / "cache.json").read_text()) == {"layout": 1, "storage": "files"}
    assert (root.path / "CACHEDIR.TAG").read_bytes().startswith(b"Signature: 8a477f597d28d172789f06886806bc55\n")
    assert sorted(path.name for path in root.path.iterdir()) == [
        "CACHEDIR.TAG",
        "cache.json",
        "locks",
        "pins",
        "staging",
    ]
    assert list(root.staging.iterdir()) == []


def test_a_root_is_entered_but_not_listed(tmp_path: Path) -> None:
    """Image ids are nobody's business; unfinished things are ours alone."""
    root = prepared(tmp_path / "cache")
    assert mode(root.path) == 0o711
    assert mode(root.staging) == 0o700
    assert mode(root.path / "cache.json") == 0o644


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives a directory to any group")
def test_with_a_group_the_root_is_for_its_members_alone(tmp_path: Path) -> None:
    """Mode and group together: one without the other opens it to the wrong people, or to nobody."""
    group = grp.getgrnam("nogroup")
    root = Root(tmp_path / "cache", "files", group="nogroup")
    root.prepare()
    assert mode(root.path) == 0o750
    assert root.path.stat().st_gid == group.gr_gid
    assert mode(root.staging) == 0o700


@pytest.mark.skipif(os.geteuid() != 0, reason="only root is somebody else")
@pytest.mark.parametrize("grouped", [True, False])
def test_members_of_the_group_read_a_base_by_its_path(open_path: Path, in_child: InChild, grouped: bool) -> None:
    """As QEMU does for a path reference; everybody may where there is no group. Listing is for nobody."""
    config = CacheConfig(root=open_path / "cache", group="nogroup" if grouped else None)
    source = FakeSource({"img": b"\xeb\x3c" + bytes(4094)})
    backend = FileBackend({}, BackendPaths(root=config.root, disks_dir=open_path / "disks", group=config.group))
    base = ImageCache(config, source=source, backend=backend).ensure_base("img")
    assert isinstance(base.location, FileLocation)
    path = base.location.path

    def read() -> int:
        return len(path.read_bytes())

    def read_as_stranger() -> int:
        os.setgroups([])
        os.setgid(12345)
        os.setuid(12345)
        return read()

    assert in_child(read, unprivileged=True) == 4096
    if grouped:
        with pytest.raises(PermissionError):
            in_child(read_as_stranger)
        assert mode(path) == 0o440
    else:
        assert in_child(read_as_stranger) == 4096
        with pytest.raises(PermissionError):
            in_child(lambda: list(path.parent.iterdir()), unprivileged=True)
    with pytest.raises(PermissionError):
        in_child(lambda: path.open("ab"), unprivileged=True)


def test_a_group_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """Before anything lies in the root."""
    with pytest.raises(ConfigError, match="no-such-group"):
        Root(tmp_path / "cache", "files", group="no-such-group").prepare()


def test_an_existing_root_is_used_as_it_is(tmp_path: Path) -> None:
    """Its owner's modes stay, and so does what lies in it."""
    root = prepared(tmp_path / "cache")
    (root.path / "bases" / "img").mkdir(parents=True)
    root.path.chmod(0o700)
    prepared(tmp_path / "cache")
    assert mode(root.path) == 0o700
    assert (root.path / "bases" / "img").is_dir()


def test_an_empty_directory_becomes_a_root(tmp_path: Path) -> None:
    """Made by an administrator, or a filesystem of its own, with what mkfs leaves in it."""
    (tmp_path / "cache" / "lost+found").mkdir(parents=True)
    assert prepared(tmp_path / "cache").locks.is_dir()


def test_a_root_is_looked_at_once(tmp_path: Path) -> None:
    """A hit costs no look at cache.json."""
    root = prepared(tmp_path / "cache")
    (root.path / "cache.json").write_text("{")
    root.prepare()


def test_a_newer_layout_is_refused(tmp_path: Path) -> None:
    """An older release would misread it."""
    prepared(tmp_path / "cache")
    (tmp_path / "cache" / "cache.json").write_text('{"layout": 2, "storage": "files"}')
    assert "newer nova_imagecache" in refused(tmp_path / "cache")


def test_another_storages_root_is_refused(tmp_path: Path) -> None:
    """Each kind of storage has its own."""
    prepared(tmp_path / "cache", "files")
    assert "'files', not 'rbd'" in refused(tmp_path / "cache", "rbd")


@pytest.mark.parametrize("content", ["", "{", "[]", "7", "null", "{}", '{"layout": 1}', '{"storage": "files"}', "\0\0"])
def test_a_damaged_description_is_refused(tmp_path: Path, content: str) -> None:
    """Nobody guesses what the directory is."""
    prepared(tmp_path / "cache")
    (tmp_path / "cache" / "cache.json").write_text(content)
    assert "damaged" in refused(tmp_path / "cache")


@pytest.mark.parametrize("layout", ['"1"', "null", "1.5", "[1]"])
def test_a_layout_that_is_no_number_is_refused(tmp_path: Path, layout: str) -> None:
    """It may be a later release's way of counting."""
    prepared(tmp_path / "cache")
    (tmp_path / "cache" / "cache.json").write_text(f'{{"layout": {layout}, "storage": "files"}}')
    refused(tmp_path / "cache")


@pytest.mark.parametrize("name", ["instances", ".bashrc", "disk.img"])
def test_a_directory_of_something_else_is_refused(tmp_path: Path, name: str) -> None:
    """A wrong path in a configuration must not fill somebody's home; the stranger is named."""
    (tmp_path / name).touch()
    assert repr(name) in refused(tmp_path)


def test_a_file_is_no_root(tmp_path: Path) -> None:
    """Nor a place below one."""
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "cache"):
        with pytest.raises(ConfigError, match=r"^root: ") as caught:
            prepared(path)
        assert str(path) in str(caught.value)
        assert caught.value.stage == "opening the cache"


def test_a_filesystem_that_fails_is_a_backend_error(tmp_path: Path) -> None:
    """No configuration mends it."""
    with FaultPlan().fail(0, error=OSError(errno.EIO, "Input/output error")), pytest.raises(BackendError) as caught:
        prepared(tmp_path / "cache")
    assert str(tmp_path / "cache") in str(caught.value)


def test_a_full_filesystem_is_no_space_and_the_next_call_works(tmp_path: Path) -> None:
    """At every step; nothing half-made is taken for a root."""
    with FaultPlan() as plan:
        prepared(tmp_path / "model")
    for step in plan.trace:
        path = tmp_path / f"cache{step.index}"
        root = Root(path, "files")
        with FaultPlan().fail(step.index), pytest.raises(NoSpaceError) as caught:
            root.prepare()
        assert caught.value.stage == "opening the cache"
        root.prepare()
        assert json.loads((path / "cache.json").read_text())["layout"] == 1


def test_a_root_that_cannot_be_written_is_a_wrong_root(open_path: Path, in_child: InChild) -> None:
    """Another user's: said before anything is fetched, with who that is, or what else to do."""
    prepared(open_path / "cache")

    def attempt() -> list[str]:
        said = []
        for path in (open_path / "cache", open_path / "new"):
            with pytest.raises(ConfigError) as caught:
                prepared(path)
            assert f"{path} cannot be used" in str(caught.value)
            said.append(str(caught.value))
        return said

    if os.geteuid() != 0:
        (open_path / "cache" / "staging").chmod(0o500)
        open_path.chmod(0o555)
    try:
        said = in_child(attempt, unprivileged=True)
        ours = "Run this as root, who owns the root" if os.geteuid() == 0 else "Give this user a directory it owns"
        assert ours in said[0]
        assert "Give this user a directory it owns" in said[1]
    finally:
        open_path.chmod(0o755)
        (open_path / "cache" / "staging").chmod(0o700)


@pytest.mark.slow
def test_many_processes_prepare_one_root_at_once(tmp_path: Path) -> None:
    """All of them find it ready and whole; nothing is left in staging."""
    fork = multiprocessing.get_context("fork")
    for attempt in range(3):
        path = tmp_path / f"cache{attempt}"
        barrier = fork.Barrier(8)

        def work(path: Path = path, barrier: object = barrier) -> None:
            barrier.wait()  # type: ignore[attr-defined]  # a barrier of the context's
            prepared(path)

        processes = [fork.Process(target=work) for _ in range(8)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(30)
        assert [process.exitcode for process in processes] == [0] * 8
        root = prepared(path)
        assert list(root.staging.iterdir()) == []
        assert sorted(found.name for found in path.iterdir()) == [
            "CACHEDIR.TAG",
            "cache.json",
            "locks",
            "pins",
            "staging",
        ]


def test_a_process_forked_while_another_thread_prepares_prepares_itself(tmp_path: Path, in_child: InChild) -> None:
    """It has none of its parent's threads, and waits for none of them."""
    root = Root(tmp_path / "cache", "files")
    plan = FaultPlan()
    pause = plan.pause("fs.link", match="cache.json")

    def prepare_here() -> bool:
        signal.alarm(20)
        root.prepare()
        return (root.path / "cache.json").is_file()

    with plan, ThreadPoolExecutor(1) as pool:
        preparing = pool.submit(root.prepare)
        pause.wait()
        assert in_child(prepare_here)
        pause.release()
        preparing.result(20)
    assert list(root.staging.iterdir()) == []


@pytest.mark.slow
def test_a_process_that_died_while_it_prepared_is_followed_by_the_next(tmp_path: Path) -> None:
    """Kill -9 at every step."""
    with FaultPlan() as plan:
        prepared(tmp_path / "model")

    for step in plan.trace:
        path = tmp_path / f"cache{step.index}"

        def work(path: Path = path, index: int = step.index) -> None:
            with FaultPlan().kill(index):
                prepared(path)

        process = multiprocessing.get_context("fork").Process(target=work)
        process.start()
        process.join(30)
        assert process.exitcode == -9
        prepared(path)

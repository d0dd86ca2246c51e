"""Who depends on a base, for the command line: what the storage counts, disk directories, and libvirt where asked."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .conftest import Site

COMMANDS = [
    ("cleanup", "--max-idle", "0"),
    ("remove", "img"),
]


def _overlay(path: Path, base: str) -> Path:
    """An overlay that nobody told the cache about."""
    path.parent.mkdir(parents=True, exist_ok=True)
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", base, str(path)]
    subprocess.run(argv, check=True)
    return path


def _base(site: Site) -> str:
    site.image("img")
    [row] = site.ok("ensure", "img")
    return str(row["location"])


def _is_there(site: Site) -> bool:
    return [row["image_id"] for row in site.ok("list")] == ["img"]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_overlays_in_disks_dir_keep_their_base(site: Site, command: tuple[str, ...]) -> None:
    """Without a word: a rescue disk, a snapshot, a ``_resize`` directory lie where the disks do."""
    overlay = _overlay(site.path / "disks" / "vm_resize" / "disk.rescue", _base(site))
    answer = site.run(*command, "-f", "json")
    assert answer.code == (0 if command[0] == "cleanup" else 3)
    assert _is_there(site)
    [user] = site.ok("show", "img")["users"]
    assert (user["disk_id"], user["name"], user["known_by"]) == ("vm_resize", "disk.rescue", "disk directories")
    overlay.unlink()
    assert site.run(*command).code == 0
    assert not _is_there(site)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_overlays_in_a_named_directory_keep_their_base(site: Site, command: tuple[str, ...], before: bool) -> None:
    """``--disks`` may be given again, before or behind the command; disks_dir is looked at all the same."""
    base = _base(site)
    directories = [site.path / "first", site.path / "second"]
    overlays = [_overlay(directory / "deep" / "er" / "disk", base) for directory in directories]
    overlays.append(_overlay(site.path / "disks" / "vm" / "disk", base))
    options = [text for directory in directories for text in ("--disks", str(directory))]
    line = [*options, *command] if before else [*command, *options]
    for overlay in overlays:
        assert site.run(*line, "-f", "json").code in (0, 3)
        assert _is_there(site), f"{overlay} and those after it are there"
        overlay.unlink()
    assert site.run(*line).code == 0
    assert not _is_there(site)


def test_a_disk_counts_once(site: Site) -> None:
    """By its link and by its header it is one user."""
    site.image("img")
    site.ok("create-disk", "img", "vm")
    site.ok("create-disk", "img", "vm-2")
    [row] = site.ok("list")
    assert row["users"] == 2
    [row] = site.ok("cleanup", "--dry-run")
    assert (row["users"], row["reason"]) == (2, "2 root disk(s) depend on it")
    assert len(site.ok("show", "img")["users"]) == 2


def test_a_named_directory_that_is_not_there_is_doubt(site: Site) -> None:
    """It may be a filesystem that is not mounted: every base stays, and the reason says why."""
    _base(site)
    answer = site.run("--disks", str(site.path / "nowhere"), "cleanup", "--max-idle", "0", "-f", "json")
    [row] = answer.data
    assert (row["outcome"], row["users"]) == ("kept", None)
    assert "unknown" in row["reason"]
    assert str(site.path / "nowhere") in row["reason"]
    assert site.run("--disks", str(site.path / "nowhere"), "remove", "img").code == 3


def test_a_new_host_has_no_disks_yet(site: Site) -> None:
    """disks_dir is made with the first disk; until then nothing stands in the way."""
    _base(site)
    shutil.rmtree(site.path / "disks", ignore_errors=True)
    assert [row["outcome"] for row in site.ok("cleanup", "--max-idle", "0")] == ["removed"]


def test_libvirt_that_cannot_be_asked_is_doubt(site: Site) -> None:
    """Unknown is not zero, and the reason says what was asked."""
    _base(site)
    uri = f"qemu:///system?socket={site.path}/nowhere"
    answer = site.run("--libvirt", uri, "cleanup", "--max-idle", "0", "-f", "json")
    [row] = answer.data
    assert (row["outcome"], row["users"]) == ("kept", None)
    assert "libvirt" in row["reason"]
    assert site.run("--libvirt", uri, "usage", "-f", "json").data["reclaimable"] == 0
    assert _is_there(site)


def test_libvirt_that_cannot_be_asked_is_told_once(site: Site) -> None:
    """By itself libvirt writes lines of its own to a process's stderr unless it is told not to."""
    pytest.importorskip("libvirt")
    _base(site)
    answer = site.spawn("--libvirt", f"qemu:///system?socket={site.path}/nowhere", "list", "-f", "json")
    assert answer.code == 0
    [line] = answer.err.splitlines()
    assert line.startswith("nova-imagecache: warning: every base is kept: libvirt cannot be asked: ")


def test_what_is_reclaimable_is_judged_as_well(site: Site) -> None:
    """What a fetch could make room with, and what cleanup would remove."""
    base = _base(site)
    assert site.ok("usage")["reclaimable"] > 0
    overlay = _overlay(site.path / "elsewhere" / "disk", base)
    usage: dict[str, Any] = site.run("--disks", str(overlay.parent), "usage", "-f", "json").data
    assert usage["reclaimable"] == 0


def test_the_unit_of_the_timer_runs(site: Site) -> None:
    """The line that systemd is told is one that the command takes, and that asks everybody who knows."""
    unit = Path(__file__).parents[2] / "examples" / "systemd" / "nova-imagecache-cleanup.service"
    [line] = [line for line in unit.read_text().splitlines() if line.startswith("ExecStart=")]
    program, *arguments = line.removeprefix("ExecStart=/usr/bin/env ").split()
    assert (program, arguments[0]) == ("nova-imagecache", "cleanup")
    _base(site)
    site.configure(f'libvirt_uri = "qemu:///system?socket={site.path}/nowhere"\nmax_idle = 0')
    for _mark_and_remove in range(2):
        answer = site.run(*arguments)
        assert (answer.code, [row["outcome"] for row in answer.data]) == (0, ["kept"])


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_the_configuration_names_directories(site: Site, command: tuple[str, ...]) -> None:
    """Every command looks there without an option; ``--disks`` adds another and takes none away."""
    base = _base(site)
    overlays = [_overlay(site.path / name / "vm" / "disk", base) for name in ("configured", "given", "disks")]
    site.configure(f'disk_dirs = ["{site.path}/configured"]')
    options = ["--disks", str(site.path / "given")]
    for overlay in overlays:
        assert site.run(*options, *command, "-f", "json").code == (0 if command[0] == "cleanup" else 3)
        assert _is_there(site), f"{overlay} and those after it are there"
        assert site.run(*options, "usage", "-f", "json").data["reclaimable"] == 0
        overlay.unlink()
    assert site.run(*command).code == 0
    assert not _is_there(site)


def test_the_configuration_names_libvirt(site: Site) -> None:
    """A command without an option asks it, whose silence is doubt; an option adds another and takes none away."""
    pytest.importorskip("libvirt")
    _base(site)
    site.configure(f'libvirt_uri = "qemu:///system?socket={site.path}/configured"')
    given = ("--libvirt", f"qemu:///system?socket={site.path}/given")
    for options in ((), given, ("--libvirt", f"qemu:///system?socket={site.path}/configured")):
        answer = site.run(*options, "remove", "img")
        assert (answer.code, answer.err.count("libvirt cannot be asked")) == (3, 1)
        assert [row["image_id"] for row in site.run("list", "-f", "json").data] == ["img"]
    checked = site.run(*given, "check", "-f", "json").data
    rows = {row["value"]: row for row in checked if row["name"] == "users by libvirt"}
    assert [uri.rpartition("/")[2] for uri in rows] == ["given", "configured"]
    assert all("every base is kept: libvirt cannot be asked" in row["problem"] for row in rows.values())


def test_libvirt_without_its_module_is_a_wrong_configuration(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is done, with what to install."""
    monkeypatch.setitem(sys.modules, "libvirt", None)
    _base(site)
    site.configure('libvirt_uri = "qemu:///system"')
    for command in (("remove", "img"), ("cleanup",), ("list",)):
        answer = site.run(*command)
        assert (answer.code, answer.out) == (2, "")
        assert "Install nova-imagecache[libvirt]" in answer.err
    site.configure()
    assert _is_there(site)
    assert site.run("--libvirt", "qemu:///system", "remove", "img").code == 2


def test_check_tells_who_is_asked(site: Site) -> None:
    """A line for each finder, with where it looks."""
    (site.path / "more").mkdir()
    (site.path / "disks").mkdir()
    site.configure(f'disk_dirs = ["{site.path}/more"]')
    [row] = [row for row in site.run("check", "-f", "json").data if row["name"].startswith("users by")]
    assert (row["name"], row["ok"]) == ("users by disk directories", True)
    assert row["value"] == f"{site.path}/more, {site.path}/disks"

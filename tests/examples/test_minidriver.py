"""The reference virt driver on a real libvirtd: the life of an instance on each backend, and what goes wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import nova_imagecache
from nova_imagecache import DiskTooSmallError, ImageNotFoundError
from services.libvirtd import bindings
from services.libvirtd_guests import domain_xml
from services.libvirtd_hosts import Host
from services.libvirtd_rig import says

if TYPE_CHECKING:
    from minidriver import MiniDriver


pytestmark = pytest.mark.services

EXAMPLE = Path(__file__).resolve().parents[2] / "examples/minidriver"
MIB = 2**20


@contextmanager
def _driver(host: Host) -> Iterator[MiniDriver]:
    from minidriver import DriverConfig, MiniDriver  # it imports libvirt

    driver = MiniDriver(DriverConfig.from_toml(host.driver))
    with driver.cache:
        yield driver


def _states(driver: MiniDriver) -> dict[str, tuple[bool, bool]]:
    return {instance.name: (instance.running, instance.rescued) for instance in driver.list()}


def test_it_is_short() -> None:
    """It is there to be read: under 200 lines."""
    assert len((EXAMPLE / "minidriver.py").read_text().splitlines()) < 200


def test_the_life_of_an_instance(host: Host) -> None:
    """Two guests of one image are spawned; one grows, is rescued with another image and comes back; then both go."""
    with _driver(host) as driver:
        driver.spawn("vm-1", "one", 4 * MIB)
        assert host.console("vm-1") == says("ONE")
        driver.spawn("vm-2", "one")
        assert host.console("vm-2") == says("ONE"), "not the first one's disk"
        listed = {instance.name: instance for instance in driver.list()}
        assert {name: (one.image_id, one.size) for name, one in listed.items()} == {
            "vm-1": ("one", 4 * MIB),
            "vm-2": ("one", MIB),
        }
        assert {one.reference for one in listed.values()} == {host.reference}
        driver.resize("vm-1", 8 * MIB)
        assert host.console("vm-1") == says("ONE", again=True)
        assert {one.size for one in driver.list() if one.name == "vm-1"} == {8 * MIB}
        driver.rescue("vm-1", "two")
        assert host.console("vm-1") == says("TWO")
        assert _states(driver) == {"vm-1": (True, True), "vm-2": (True, False)}
        driver.unrescue("vm-1")
        assert host.console("vm-1") == says("ONE", again=True)
        assert _states(driver) == {"vm-1": (True, False), "vm-2": (True, False)}
        assert driver.periodic() == ("two",), "while the guests run"
        driver.stop("vm-1")
        driver.destroy("vm-2")
        assert _states(driver) == {"vm-1": (False, False)}
        assert driver.periodic() == (), "the one that is off may be started again"
        driver.start("vm-1")
        assert host.console("vm-1") == says("ONE", again=True)
        driver.destroy("vm-1")
        assert list(driver.list()) == []
        assert driver.periodic() == ("one",)
        assert list(driver.cache.root_disks()) == []


def test_as_in_production(production: Host) -> None:
    """From the command line, by an unprivileged user, with guests of another one whom libvirt gives their disks."""
    with _terminal(production) as type_in:
        type_in("spawn", "vm-1", "one", "4M")
        assert production.console("vm-1") == says("ONE")
        type_in("spawn", "vm-2", "one")
        assert production.console("vm-2") == says("ONE")
        assert [(one["name"], one["running"], one["reference"]) for one in type_in("list")] == [
            ("vm-1", True, production.reference),
            ("vm-2", True, production.reference),
        ]
        type_in("resize", "vm-1", "8M")
        assert production.console("vm-1") == says("ONE", again=True)
        type_in("rescue", "vm-1", "two")
        assert production.console("vm-1") == says("TWO")
        gone = type_in("periodic")
        assert gone == (["two"] if production.backend == "file" else []), (
            "a rescue disk needs its base, a copy does not"
        )
        type_in("unrescue", "vm-1")
        assert production.console("vm-1") == says("ONE", again=True)
        assert gone + type_in("periodic") == ["two"]
        type_in("destroy", "vm-1")
        type_in("destroy", "vm-2")
        assert type_in("periodic") == ["one"]
        assert type_in("list") == []


_TERMINAL = """
import json, sys
import minidriver

for line in sys.stdin:
    sys.argv[1:] = json.loads(line)
    minidriver.main()
    print("----")
"""

_AS_USER = """
mount --bind "$1" "$2" && user=$3 && shift 3 || exit 1
exec setpriv --reuid="$user" --regid="$user" --clear-groups "$@"
"""


def _python_for_everybody(host: Host) -> list[str]:
    """A command that runs Python as the cache's user: from another place, for its own may be root's alone."""
    place = host.dir / "python"
    place.mkdir()
    inside = place / Path(sys.executable).resolve().relative_to(sys.base_prefix)
    shell = ["unshare", "--mount", "--propagation", "private", "sh", "-c", _AS_USER, "sh"]
    return [*shell, sys.base_prefix, str(place), str(host.ground.user), str(inside)]


@contextmanager
def _terminal(host: Host) -> Iterator[Any]:
    """A function that types a command in, as the user of the cache, and reads its answer."""
    command = [*_python_for_everybody(host), "-u", "-W", "error", "-c", _TERMINAL]
    packages = [EXAMPLE, Path(nova_imagecache.__file__).parents[1], sysconfig.get_path("platlib")]
    environment = {**os.environ, "PYTHONPATH": ":".join(str(path) for path in packages)}
    environment["LD_LIBRARY_PATH"] = str(host.dir / "python/lib")
    errors = host.dir / "errors"
    with (
        errors.open("w") as file,
        subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True, cwd="/"
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None

        def type_in(*words: str) -> Any:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps([str(host.driver), *words]) + "\n")
            process.stdin.flush()
            lines = [process.stdout.readline()]
            while lines[-1] not in ("", "----\n"):
                lines.append(process.stdout.readline())
            assert lines[-1], f"{' '.join(words)}: {errors.read_text()}"
            return json.loads(lines[0]) if len(lines) > 1 else None

        try:
            yield type_in
        finally:
            process.stdin.close()


def test_what_is_refused_leaves_nothing(host: Host) -> None:
    """A second guest of one name, an image that is not there, a disk too small for it: nothing is made or lost."""
    libvirt = bindings()
    with _driver(host) as driver:
        driver.spawn("vm", "one", 4 * MIB)
        host.console("vm")
        with pytest.raises(libvirt.libvirtError, match="already exists"):
            driver.spawn("vm", "two")
        with pytest.raises(ImageNotFoundError):
            driver.spawn("other", "nowhere")
        with pytest.raises(DiskTooSmallError):
            driver.spawn("other", "one", MIB // 2)
        with pytest.raises(DiskTooSmallError):
            driver.resize("vm", 2 * MIB)
        assert host.console("vm") == says("ONE", again=True), "it runs again"
        assert _states(driver) == {"vm": (True, False)}
        assert [disk.disk_id for disk in driver.cache.root_disks()] == ["vm"]
        with host.ground.daemon.connection() as connection:
            assert [domain.name() for domain in connection.listAllDomains()] == ["vm"]


def test_after_a_crash(apart: Host) -> None:
    """Guests of others, a guest without its disk, a disk without its guest: none is in the way, ``destroy`` ends it."""
    with _driver(apart) as driver, apart.ground.daemon.connection() as connection:
        for name in ("without-disk", "somebody else's"):
            connection.defineXML(domain_xml(name, [], console=apart.dir / "console"))
        driver.cache.create_root_disk("one", "without-guest")
        driver.spawn("vm", "one")
        assert apart.console("vm") == says("ONE")
        assert _states(driver) == {"vm": (True, False)}
        assert driver.periodic() == ()
        for name in ("without-disk", "without-guest", "never-heard-of"):
            driver.destroy(name)
        assert [disk.disk_id for disk in driver.cache.root_disks()] == ["vm"]
        assert sorted(domain.name() for domain in connection.listAllDomains()) == ["somebody else's", "vm"]


def test_what_the_host_reports(host: Host, apart: Host) -> None:
    """All there is, and what is reserved: on the instances' filesystem the cache as well, elsewhere the static part."""
    with _driver(host) as driver, _driver(apart) as beside:
        for each in (driver, beside):
            each.cache.ensure_base("one")
        with host.ground.daemon.connection() as connection:
            info = connection.getInfo()
        report, other = driver.resources(), beside.resources()
        assert (report["VCPU"], report["MEMORY_MB"]) == ({"total": info[2]}, {"total": info[1]})
        disks = shutil.disk_usage(host.dir).total >> 30
        assert other["DISK_GB"] == {"total": disks, "reserved": 2}
        if host.backend == "rbd":
            assert report["DISK_GB"] == {"total": driver.cache.usage().total >> 30, "reserved": 2}
        else:
            assert report["DISK_GB"] == {"total": disks, "reserved": 2}
            assert driver.cache.reserved_disk_mb(0) > 0

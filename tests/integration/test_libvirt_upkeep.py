"""The command line of an operator on a host whose guests run: who uses a base, and a base that libvirt took."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from harness.images import qemu_img
from nova_imagecache import FileLocation, RootDisk, cli
from nova_imagecache.domains import LibvirtDomains, disk_element
from nova_imagecache.finders import DiskDirectories
from services.libvirtd_ground import Ground
from services.libvirtd_guests import Guests, plain_disk
from services.libvirtd_rig import BootRig, path_of, says, shelve

pytestmark = pytest.mark.services


@dataclass(frozen=True)
class Answer:
    """What one run of the command line gave."""

    code: int
    data: Any
    said: str


class Operator:
    """Who runs the command line, as the cache's user, in a child; libvirt stands in the file, or is an option."""

    def __init__(self, rig: BootRig, *, reference: str = "auto", configured: bool = False) -> None:
        self.rig = rig
        self.configured = configured
        shelve(rig.dir / "images", rig.samples)
        self.config = rig.dir / "config.toml"
        uri = f'libvirt_uri = "{rig.ground.daemon.uri}"\n' if configured else ""
        self.config.write_text(
            f'root = "{rig.root}"\ndisks_dir = "{rig.disks}"\nsource = "directory"\n'
            f'{uri}[backend_options]\nreference = "{reference}"\n'
            f'[source_options]\npath = "{rig.dir}/images"\n'
        )

    def run(self, *arguments: str, libvirt: bool = True) -> Answer:
        uri = ["--libvirt", self.rig.ground.daemon.uri] if libvirt and not self.configured else []
        line = ["--config", str(self.config), *uri, *arguments, "-f", "json"]

        def work() -> tuple[int, str, str]:
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = cli.main(line)
            return code, out.getvalue(), err.getvalue()

        code, out, err = self.rig.ground.run(work)
        return Answer(code, json.loads(out) if out.strip() else None, err)

    def create(self, disk_id: str) -> RootDisk:
        """A root disk of image "one"."""
        answer = self.run("create-disk", "one", disk_id)
        assert answer.code == 0, answer
        values = answer.data
        return RootDisk(
            disk_id=disk_id,
            name=values["name"],
            location=FileLocation(path=Path(values["location"])),
            format=values["format"],
            virtual_size=values["virtual_size"],
            image_id="one",
            reference=values["reference"],
        )


# --- who uses a base


@pytest.mark.parametrize("configured", [True, False], ids=["by-the-file", "by-an-option"])
@pytest.mark.parametrize("command", [("cleanup", "--max-idle", "0"), ("remove", "one")], ids=["cleanup", "remove"])
def test_a_guest_that_nobody_told_about_keeps_its_base(
    command: tuple[str, ...], configured: bool, libvirt_ground: Ground, libvirt_guests: Guests
) -> None:
    """Its disk lies where nobody looks and names the base by its path: libvirt knows, running and shut off."""
    rig = BootRig(libvirt_ground, "path")
    operator = Operator(rig, configured=configured)
    assert operator.run("ensure", "one").code == 0
    (rig.dir / "elsewhere").mkdir()
    root = rig.dir / "elsewhere" / "root.img"
    qemu_img("create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(rig.base("one")), str(root))
    assert libvirt_guests.boot("strange", plain_disk(root)) == says("ONE")
    with rig.cache() as alone:
        [item] = alone.plan_cleanup(max_idle=0).items
        assert item.verdict == "remove", "libvirt alone knows"
    for state in ("running", "shut off"):
        answer = operator.run(*command)
        assert answer.code == (0 if command[0] == "cleanup" else 3), (state, answer)
        assert rig.base("one").exists(), state
        [user] = operator.run("show", "one").data["users"]
        assert (user["disk_id"], user["name"], user["known_by"]) == ("elsewhere", "root.img", "libvirt"), state
        libvirt_guests["strange"].destroy()
    libvirt_guests.forget()
    assert operator.run(*command).code == 0
    assert not rig.base("one").exists()


def test_files_that_a_guest_has_to_itself(owners_ground: Ground, owners_guests: Guests) -> None:
    """A snapshot and a console of another user, as on any production host: libvirt tells what the one uses, the other
    is no disk, and the bases that nobody uses go."""
    rig = BootRig(owners_ground, "link")
    operator = Operator(rig)
    disk = operator.create("vm")
    assert operator.run("ensure", "two").code == 0
    home = path_of(disk).parent
    snapshot = home / "disk.snap"
    qemu_img("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(path_of(disk)), str(snapshot))
    console = home / "console.log"
    console.write_text("login: ")
    for path in (snapshot, console):
        path.chmod(0o600)  # of root: libvirt gives the one to the guest's user, and the other to nobody
    spelled = owners_ground.run(partial(disk_element, disk))
    element = plain_disk(snapshot)
    store = element.makeelement("backingStore", {"type": "file"})
    store.append(store.makeelement("format", {"type": "qcow2"}))
    source = store.makeelement("source", {"file": str(path_of(disk))})
    store.append(source)
    below = spelled.find("backingStore")
    assert below is not None
    store.append(below)
    element.insert(2, store)
    assert owners_guests.boot("vm", element) == says("ONE")
    without = operator.run("cleanup", "--max-idle", "0", "--dry-run", libvirt=False).data
    assert {row["verdict"] for row in without} == {"keep"}
    assert all(str(snapshot) in row["reason"] for row in without), "nobody says what it uses"
    rows = {row["image_id"]: row for row in operator.run("cleanup", "--max-idle", "0").data}
    assert (rows["one"]["outcome"], rows["two"]["outcome"]) == ("kept", "removed")

    def found() -> set[tuple[str | None, str | None, str]]:
        domains = LibvirtDomains(owners_ground.daemon.uri)
        finders = [domains, DiskDirectories([rig.disks], chains=domains.chains)]
        with rig.cache(user_finders=finders) as cache:
            return {(user.disk_id, user.name, user.known_by) for user in cache.users("one")}

    assert ("vm", "disk.snap", "disk directories") in owners_ground.run(found)


# --- a base that libvirt took


def test_verify_repair_while_guests_run(owners_ground: Ground, owners_guests: Guests) -> None:
    """A base that a plain domain took is ours again: guests go on, new disks link it and boot, old ones start again."""
    operator = Operator(BootRig(owners_ground, "link"))
    rig = operator.rig
    ours, theirs = owners_ground.user, owners_ground.daemon.qemu
    linked = operator.create("vm-1")
    assert owners_guests.boot("vm-1", plain_disk(path_of(linked))) == says("ONE")
    assert rig.base("one").stat().st_uid == theirs
    checked = {row["name"]: row["problem"] for row in operator.run("check").data}
    assert checked["bases of another owner"] is not None
    named = operator.create("vm-2")
    assert named.reference == "path"
    assert owners_guests.boot("vm-2", disk_element(named)) == says("ONE")
    digest = rig.digest("one")
    answer = operator.run("verify", "--repair")
    assert (answer.code, answer.said) == (0, "")
    assert [(row["image_id"], row["result"]) for row in answer.data] == [("one", "whole")]
    assert (rig.base("one").stat().st_uid, rig.digest("one")) == (ours, digest)
    checked = {row["name"]: row["problem"] for row in operator.run("check").data}
    assert checked["bases of another owner"] is None
    assert all(owners_guests[name].domain.isActive() for name in ("vm-1", "vm-2"))
    fresh = operator.create("vm-3")
    assert fresh.reference == "link"
    assert owners_guests.boot("vm-3", disk_element(fresh)) == says("ONE")
    for disk in (linked, named):
        owners_guests[disk.disk_id].destroy()
        assert owners_guests.boot(disk.disk_id, disk_element(disk)) == says("ONE", again=True)
    assert operator.run("verify", "--repair").code == 0, "nothing is left to repair"
    assert rig.base("one").stat().st_uid == ours


def test_verify_repair_of_a_base_that_a_guest_changed(owners_ground: Ground, owners_guests: Guests) -> None:
    """Who owns a file can change it: it is never taken back, and told as damaged."""
    operator = Operator(BootRig(owners_ground, "link"))
    disk = operator.create("vm")
    owners_guests.boot("vm", plain_disk(path_of(disk)))
    base = operator.rig.base("one")
    inode = base.stat().st_ino
    with base.open("r+b") as file:
        file.seek(512 * 1024)
        file.write(b"changed")
    answer = operator.run("verify", "--repair")
    assert answer.code == 1
    assert [(row["image_id"], row["result"]) for row in answer.data] == [("one", "damaged")]
    assert base.stat().st_ino == inode, "its disk has a link to it, and stays as it is"

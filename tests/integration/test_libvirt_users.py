"""What libvirt knows of the users of bases: live chains, definitions, block jobs, and when it cannot be asked."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from harness.images import qemu_img
from harness.waiting import until
from nova_imagecache import ImageCache, UsersUnknownError
from nova_imagecache.domains import LibvirtDomains, disk_element
from services.libvirtd import bindings
from services.libvirtd_ground import Ground
from services.libvirtd_guests import Guests, plain_disk
from services.libvirtd_rig import BootRig, path_of, says

pytestmark = pytest.mark.services


def _by_libvirt(cache: ImageCache, image_id: str = "one") -> list[tuple[str | None, str | None]]:
    return [(user.disk_id, user.name) for user in cache.users(image_id) if user.known_by == "libvirt"]


def _removable(cache: ImageCache) -> list[str]:
    return [item.image_id for item in cache.plan_cleanup(max_idle=0).items if item.verdict == "remove"]


def _job_done(domain: Any) -> None:
    """Wait for the block job to be over."""
    until(lambda: not domain.blockJobInfo("vda", 0), "the block job")


def _pivot(domain: Any) -> None:
    """End a commit of the active layer as soon as QEMU is ready to: a little later than all bytes are copied."""
    libvirt = bindings()

    def pivoted() -> bool:
        try:
            domain.blockJobAbort("vda", libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)
        except libvirt.libvirtError as err:
            if err.get_error_code() != libvirt.VIR_ERR_BLOCK_COPY_ACTIVE:
                raise
            return False
        return True

    until(pivoted, "the pivot")


def _snapshot(domain: Any, path: Path) -> None:
    libvirt = bindings()
    xml = f"""<domainsnapshot><disks><disk name='vda' snapshot='external'><source file='{path}'/></disk></disks>
        </domainsnapshot>"""
    flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
    domain.snapshotCreateXML(xml, flags)


# --- domains that nobody told about


@pytest.mark.parametrize("through", ["base", "own-link"])
def test_a_guest_that_nobody_told_about(through: str, libvirt_ground: Ground, libvirt_guests: Guests) -> None:
    """An overlay that somebody made on the base keeps it, while its guest runs, is shut off, and until it is gone."""
    rig = BootRig(libvirt_ground, "link")
    strange = rig.dir / "elsewhere"
    strange.mkdir()
    with rig.cache() as alone, rig.finding() as cache:
        cache.ensure_base("one")
        named = rig.base("one")
        if through == "own-link":
            named = strange / "mine"
            named.hardlink_to(rig.base("one"))
        qemu_img("create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(named), str(strange / "root.img"))
        assert _by_libvirt(cache) == []
        assert libvirt_guests.boot("strange", plain_disk(strange / "root.img")) == says("ONE")
        assert _by_libvirt(cache) == [("elsewhere", "root.img")]
        assert any("domain strange" in user.detail for user in cache.users("one"))
        assert cache.cleanup(cache.plan_cleanup(max_idle=0)).removed == ()
        libvirt_guests["strange"].destroy()
        assert _by_libvirt(cache) == [("elsewhere", "root.img")], "from its definition and its header"
        assert cache.cleanup(cache.plan_cleanup(max_idle=0)).removed == ()
        assert libvirt_guests["strange"].boot() == says("ONE", again=True)
        # only a link can be counted by whoever does not ask libvirt
        assert _removable(alone) == (["one"] if through == "base" else [])
        libvirt_guests.forget()
        shutil.rmtree(strange)
        assert cache.cleanup(cache.plan_cleanup(max_idle=0)).removed == ("one",)


def test_a_transient_guest(libvirt_ground: Ground, libvirt_guests: Guests) -> None:
    """A domain without a definition is a user while it runs; a defined one whose disk is the base itself is one too."""
    rig = BootRig(libvirt_ground, "path")
    with rig.finding() as cache:
        disk = cache.create_root_disk("one", "vm")
        libvirt_guests.boot("g", disk_element(disk))
        libvirt_guests["g"].domain.undefine()
        assert _by_libvirt(cache) == [("vm", "disk")]
        libvirt_guests["g"].destroy()
        assert _by_libvirt(cache) == []
        libvirt_guests["h"].define([plain_disk(rig.base("one"), "raw")])
        assert _by_libvirt(cache) == [("one", "disk")]


def test_a_guest_is_one_user(libvirt_ground: Ground, libvirt_guests: Guests) -> None:
    """A guest that runs and is defined is one user, of its own image only."""
    rig = BootRig(libvirt_ground, "path")
    with rig.finding() as cache:
        libvirt_guests.boot("g", disk_element(cache.create_root_disk("one", "vm")))
        cache.ensure_base("two")
        assert _by_libvirt(cache) == [("vm", "disk")]
        assert {(user.disk_id, user.name) for user in cache.users("one")} == {("vm", "disk")}
        assert _by_libvirt(cache, "two") == []


def test_a_volume_of_an_unknown_pool(libvirt_ground: Ground, libvirt_guests: Guests) -> None:
    """A definition whose disk libvirt itself cannot find is doubt, and keeps every base."""
    rig = BootRig(libvirt_ground, "link")
    with rig.finding() as cache:
        element = plain_disk(path_of(cache.create_root_disk("one", "vm")))
        element.set("type", "volume")
        source = element.find("source")
        assert source is not None
        source.attrib = {"pool": "nowhere", "volume": "disk"}
        libvirt_guests["g"].define([element])
        cache.ensure_base("two")
        with pytest.raises(UsersUnknownError):
            cache.users("one")
        assert _removable(cache) == []


# --- block jobs


def test_block_pull(libvirt_ground: Ground, libvirt_guests: Guests) -> None:
    """A disk that libvirt made stand alone uses no base: its link goes with ``recover``, and the base after it."""
    rig = BootRig(libvirt_ground, "link")
    with rig.finding() as cache:
        disk = cache.create_root_disk("one", "vm")
        libvirt_guests.boot("g", disk_element(disk))
        domain = libvirt_guests["g"].domain
        domain.blockPull("vda", 0, 0)
        _job_done(domain)
        assert _by_libvirt(cache) == []
        assert [user.known_by for user in cache.users("one")] == ["link"], "kept until somebody has looked"
        assert cache.recover().removed == ("disks/vm/disk.base",)
        assert cache.users("one") == []
        assert cache.get_root_disk("vm").reference == "none"
        assert cache.cleanup(cache.plan_cleanup(max_idle=0)).removed == ("one",)
        libvirt_guests["g"].destroy()
        element = disk_element(cache.get_root_disk("vm"))
        assert libvirt_guests.boot("g", element) == says("ONE", again=True)
    rig.check_tidy("after blockPull")


def test_a_snapshot_and_its_end(libvirt_ground: Ground, libvirt_guests: Guests) -> None:
    """The chain of a snapshot passes through the disk to the base; committing it brings the disk back on top."""
    libvirt = bindings()
    rig = BootRig(libvirt_ground, "link")
    with rig.finding() as cache:
        disk = cache.create_root_disk("one", "vm")
        libvirt_guests.boot("g", disk_element(disk))
        domain = libvirt_guests["g"].domain
        _snapshot(domain, rig.disks / "vm" / "snap")
        assert _by_libvirt(cache) == [("vm", "snap")]
        assert cache.recover().removed == ()
        libvirt_guests["g"].destroy()
        assert libvirt_guests["g"].boot() == says("ONE", again=True), "libvirt's own definition"
        flags = libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE | libvirt.VIR_DOMAIN_BLOCK_COMMIT_RELATIVE
        domain.blockCommit("vda", str(path_of(disk)), None, 0, flags)
        _pivot(domain)
        (rig.disks / "vm" / "snap").unlink()
        assert _by_libvirt(cache) == [("vm", "disk")]
        assert cache.cleanup(cache.plan_cleanup(max_idle=0)).removed == ()
        libvirt_guests["g"].destroy()
        assert libvirt_guests.boot("g", disk_element(cache.get_root_disk("vm"))) == says("ONE", again=True)


def test_a_link_that_only_a_snapshot_reads(libvirt_ground: Ground, libvirt_guests: Guests) -> None:
    """A snapshot that was pulled onto the base reads through the disk's link: it stays when the disk itself is gone."""
    rig = BootRig(libvirt_ground, "link")
    with rig.finding() as cache:
        disk = cache.create_root_disk("one", "vm")
        libvirt_guests.boot("g", disk_element(disk))
        domain = libvirt_guests["g"].domain
        snapshot = rig.disks / "vm" / "snap"
        _snapshot(domain, snapshot)
        domain.blockRebase("vda", str(rig.disks / "vm" / "disk.base"), 0, 0)
        _job_done(domain)
        path_of(disk).unlink()
        assert cache.recover().removed == ()
        assert _by_libvirt(cache) == [("vm", "snap")]
        assert cache.cleanup(cache.plan_cleanup(max_idle=0)).removed == ()
        libvirt_guests["g"].destroy()
        assert libvirt_guests.boot("g", plain_disk(snapshot)) == says("ONE", again=True)
        libvirt_guests.forget()
        snapshot.unlink()
        cache.recover()
        assert cache.cleanup(cache.plan_cleanup(max_idle=0)).removed == ("one",)
    rig.check_tidy("without the snapshot")


# --- libvirt that does not answer


def test_a_libvirtd_that_is_away(libvirt_ground: Ground) -> None:
    """While libvirtd is away every base stays and it is said why; the same finder goes on when it is back."""
    rig = BootRig(libvirt_ground, "link")
    with rig.finding() as cache:
        cache.ensure_base("one")
        assert _removable(cache) == ["one"]
        libvirt_ground.daemon.stop()
        try:
            [item] = cache.plan_cleanup(max_idle=0).items
            assert (item.verdict, item.reason[:21]) == ("keep", "its users are unknown")
            with pytest.raises(UsersUnknownError, match="libvirt"):
                cache.users("one")
            with pytest.raises(UsersUnknownError):
                cache.remove_base("one")
        finally:
            libvirt_ground.daemon.start()
        assert cache.cleanup(cache.plan_cleanup(max_idle=0)).removed == ("one",)


def test_a_qemu_that_hangs(libvirt_ground: Ground, libvirt_guests: Guests) -> None:
    """A running guest that answers nobody, libvirtd included, is waited for so long and no longer."""
    rig = BootRig(libvirt_ground, "link")
    finder = LibvirtDomains(libvirt_ground.daemon.uri, timeout=0.5)
    with rig.cache(user_finders=[finder]) as cache:
        libvirt_guests.boot("hung", disk_element(cache.create_root_disk("one", "vm")))
        with libvirt_guests["hung"].hanging():
            with pytest.raises(UsersUnknownError, match="does not answer within"):
                cache.users("one")
            assert cache.cleanup(cache.plan_cleanup(max_idle=0)).removed == ()
        until(lambda: _by_libvirt(cache) == [("vm", "disk")], "libvirt")


def test_a_connection_of_its_owner(libvirt_ground: Ground, libvirt_guests: Guests) -> None:
    """A connection that is handed in is used and left open; one that died is asked for once more."""
    rig = BootRig(libvirt_ground, "link")
    with libvirt_ground.daemon.connection() as dead:
        pass
    given = [libvirt_guests.connection, dead]
    with rig.cache(user_finders=[LibvirtDomains(given.pop)]) as cache:
        disk = cache.create_root_disk("one", "vm")
        libvirt_guests["g"].define([disk_element(disk)])
        assert _by_libvirt(cache) == [("vm", "disk")]
        assert given == []
        assert libvirt_guests.connection.isAlive()


def test_an_unreadable_disk_without_a_record(owners_ground: Ground, owners_guests: Guests) -> None:
    """A shut-off foreign guest whose disk the cache may not read may use any base: every one is kept."""
    rig = BootRig(owners_ground, "link")
    strange = owners_ground.here / "strange.img"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", strange, "1M"], check=True)
    strange.chmod(0o600)
    owners_guests["strange"].define([plain_disk(strange)])

    def look() -> str:
        with rig.finding() as cache:
            cache.ensure_base("one")
            with pytest.raises(UsersUnknownError) as caught:
                cache.users("one")
            assert _removable(cache) == []
            return str(caught.value)

    assert "strange.img cannot be read" in owners_ground.run(look)
    owners_guests["strange"].start()
    assert owners_ground.run(lambda: rig.finding().users("one")) == [], "a running guest's chain is libvirt's to tell"

"""Production's libvirt: guests are an unprivileged user's, the cache another's, and libvirtd changes owners."""

from __future__ import annotations

import logging
from functools import partial

import pytest

from harness.waiting import until
from nova_imagecache import BaseCorruptError, CleanupReport, RootDisk
from nova_imagecache.domains import disk_element
from services.libvirtd_ground import Ground
from services.libvirtd_guests import Guests, plain_disk
from services.libvirtd_rig import BootRig, path_of, says

pytestmark = pytest.mark.services


class Words(logging.Handler):
    """What the library says from warnings up."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


class Owned:
    """A cache of the unprivileged user: every call is made by a child that is that user."""

    def __init__(self, ground: Ground, kind: str, *, apart: bool = False) -> None:
        self.ground = ground
        self.rig = BootRig(ground, kind, apart=apart)

    def create(self, disk_id: str, image_id: str = "one") -> tuple[RootDisk, list[str]]:
        """The disk, and what the library warned about."""

        def work() -> tuple[RootDisk, list[str]]:
            words = Words()
            logging.getLogger("nova_imagecache").addHandler(words)
            with self.rig.cache() as cache:
                return cache.create_root_disk(image_id, disk_id), words.said

        return self.ground.run(work)

    def users(self, image_id: str = "one") -> list[tuple[str | None, str, bool]]:
        def work() -> list[tuple[str | None, str, bool]]:
            with self.rig.finding() as cache:
                return [(user.disk_id, user.known_by, user.certain) for user in cache.users(image_id)]

        return self.ground.run(work)

    def cleanup(self) -> CleanupReport:
        def work() -> CleanupReport:
            with self.rig.finding() as cache:
                return cache.cleanup(cache.plan_cleanup(max_idle=0))

        return self.ground.run(work)

    def recover(self) -> tuple[str, ...]:
        def work() -> tuple[str, ...]:
            with self.rig.cache() as cache:
                report = cache.recover()
                assert not report.failed
                return report.removed

        return self.ground.run(work)

    def remove(self, *disk_ids: str) -> None:
        def work() -> None:
            with self.rig.cache() as cache:
                for disk_id in disk_ids:
                    cache.remove_root_disk(disk_id)

        self.ground.run(work)

    def repair(self) -> bool:
        """Whether it was needed."""

        def work() -> bool:
            with self.rig.cache() as cache:
                return cache.repair_base("one")

        return self.ground.run(work)

    def problems(self) -> list[str]:
        """The facts that ``check()`` calls problems."""

        def work() -> list[str]:
            with self.rig.cache() as cache:
                return [fact.name for fact in cache.check().problems]

        return self.ground.run(work)

    def owner(self, image_id: str = "one") -> int:
        """Whose the base's file is."""
        return self.rig.base(image_id).stat().st_uid


@pytest.mark.parametrize(
    ("kind", "apart", "reference"),
    [
        ("link", False, "link"),
        ("link-native", False, "link"),
        ("path", True, "path"),
        ("path-native", False, "path"),
        ("file", False, "none"),
        ("file-native", False, "none"),
    ],
    ids=["link", "link-native", "path-of-another-filesystem", "path-native", "file", "file-native"],
)
def test_bases_stay_ours(kind: str, apart: bool, reference: str, owners_ground: Ground, owners_guests: Guests) -> None:
    """Guests one after the other and together, started with our element: the base keeps owner and bytes."""
    ours, theirs = owners_ground.user, owners_ground.daemon.qemu
    owned = Owned(owners_ground, kind, apart=apart)
    first, said = owned.create("vm-1")
    assert first.reference == reference
    assert (said == []) == (not apart), said
    digest = owned.rig.digest("one")
    element = owners_ground.run(partial(disk_element, first, cache="writeback"))
    assert owners_guests.boot("vm-1", element) == says("ONE")
    assert path_of(first).stat().st_uid == theirs, "libvirt gives a disk to its guest"
    assert owned.owner() == ours
    owners_guests["vm-1"].destroy()
    assert (owned.owner(), path_of(first).stat().st_uid) == (ours, ours)
    assert owners_guests["vm-1"].boot() == says("ONE", again=True)
    second, said = owned.create("vm-2")
    assert second.reference == reference, "made while a guest runs"
    element = owners_ground.run(partial(disk_element, second, cache="writeback"))
    assert owners_guests.boot("vm-2", element) == says("ONE")
    assert (owned.owner(), owned.rig.digest("one"), owned.problems()) == (ours, digest, [])
    counted = owned.rig.references  # a copy needs no base
    by_libvirt = {name for name, known_by, _certain in owned.users() if known_by == "libvirt"}
    assert by_libvirt == ({"vm-1", "vm-2"} if counted else set())
    assert owned.recover() == ()
    assert owned.cleanup().removed == (() if counted else ("one",)), "while both run"
    for name in ("vm-1", "vm-2"):
        owners_guests[name].destroy()
        assert path_of(second).stat().st_uid == (theirs if name == "vm-1" else ours)
    assert owned.cleanup().removed == (), "they may run again"
    owners_guests.forget()
    owned.remove("vm-1", "vm-2")
    assert owned.cleanup().removed == (("one",) if counted else ())
    assert owners_ground.run(lambda: list(owned.rig.cache().bases())) == []


def test_one_foreign_guest(owners_ground: Ground, owners_guests: Guests) -> None:
    """A guest started with plain XML takes the base away from us: said by ``check()``, and disks name it by path."""
    ours, theirs = owners_ground.user, owners_ground.daemon.qemu
    owned = Owned(owners_ground, "link")
    owned.rig.options = {"reference": "auto"}
    first, _said = owned.create("vm-1")
    assert owners_guests.boot("vm-1", disk_element(first)) == says("ONE")
    foreign, _said = owned.create("vm-2")
    assert (foreign.reference, owned.owner(), owned.problems()) == ("link", ours, [])
    assert owners_guests.boot("vm-2", plain_disk(path_of(foreign))) == says("ONE")
    assert owned.owner() == theirs
    assert owned.problems() == ["bases of another owner"]
    third, said = owned.create("vm-3")
    assert third.reference == "path"
    assert len(said) == 1
    assert "a path reference instead of a link: the base is not ours to link" in said[0]
    assert owners_guests.boot("vm-3", disk_element(third)) == says("ONE")
    assert {name for name, known_by, _certain in owned.users() if known_by == "libvirt"} == {"vm-1", "vm-2", "vm-3"}
    for guest in ("vm-1", "vm-2"):
        owners_guests[guest].forget()
        owned.remove(guest)
    assert owned.cleanup().removed == (), "named by path"
    assert owned.owner() == theirs, "libvirt gives nothing back"
    owners_guests.forget()
    owned.remove("vm-3")
    assert owned.cleanup().removed == ("one",), "what is not ours can still be removed"


def test_a_base_is_ours_again(owners_ground: Ground, owners_guests: Guests) -> None:
    """Re-owned while guests run: they go on and start again, new disks link the copy, and it boots."""
    owned = Owned(owners_ground, "link")
    owned.rig.options = {"reference": "auto"}
    linked, _said = owned.create("vm-1")
    owners_guests.boot("vm-1", plain_disk(path_of(linked)))
    named, _said = owned.create("vm-2")
    owners_guests.boot("vm-2", disk_element(named))
    assert (named.reference, owned.problems()) == ("path", ["bases of another owner"])
    digest = owned.rig.digest("one")
    assert owned.repair()
    assert (owned.owner(), owned.rig.digest("one"), owned.problems()) == (owners_ground.user, digest, [])
    fresh, said = owned.create("vm-3")
    assert (fresh.reference, said) == ("link", [])
    assert owners_guests.boot("vm-3", disk_element(fresh)) == says("ONE")
    for disk in (linked, named):
        owners_guests[disk.disk_id].destroy()
        assert owners_guests.boot(disk.disk_id, disk_element(disk)) == says("ONE", again=True)
    assert owned.owner() == owners_ground.user
    assert owned.recover() == ()


def test_a_base_that_a_guest_changed_is_not_taken_back(owners_ground: Ground, owners_guests: Guests) -> None:
    """Who owns a file can change it: such bytes are never made ours again."""
    owned = Owned(owners_ground, "link")
    disk, _said = owned.create("vm")
    owners_guests.boot("vm", plain_disk(path_of(disk)))
    owners_guests["vm"].destroy()
    with owned.rig.base("one").open("r+b") as file:
        file.write(b"changed")
    with pytest.raises(BaseCorruptError):
        owned.repair()
    assert owned.owner() == owners_ground.daemon.qemu
    assert list((owned.rig.root / "staging").iterdir()) == []


def test_block_pull_and_its_link(owners_ground: Ground, owners_guests: Guests) -> None:
    """While a pulled disk is its guest's alone nobody can tell, and its link stays; afterwards ``recover`` takes it."""
    owned = Owned(owners_ground, "link")
    disk, _said = owned.create("vm")
    owners_guests.boot("vm", disk_element(disk))
    domain = owners_guests["vm"].domain
    domain.blockPull("vda", 0, 0)
    until(lambda: not domain.blockJobInfo("vda", 0), "blockPull")
    assert owned.recover() == ()
    assert [known_by for _name, known_by, _certain in owned.users()] == ["link"]
    assert owned.cleanup().removed == ()
    owners_guests["vm"].destroy()
    assert owned.recover() == ("disks/vm/disk.base",)
    assert owned.users() == []
    assert owned.cleanup().removed == ("one",)
    assert owners_guests["vm"].domain.isActive() == 0

"""Root as a guest in the root of an unprivileged service: it may look, and the service goes on."""

from __future__ import annotations

import os
import pwd
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import InChild
from harness.images import raw
from harness.rig import Rig
from nova_imagecache import BaseCorruptError, ConfigError, ImageCache

NOBODY = pwd.getpwnam("nobody")
RUN = "Run this as nobody, who owns the root: `sudo -u nobody nova-imagecache ...`"

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user for a while")


@pytest.fixture
def rig(open_path: Path, in_child: InChild) -> Rig:
    """A cache of nobody's, with a base and a disk."""
    os.chown(open_path, NOBODY.pw_uid, NOBODY.pw_gid)
    rig = Rig(open_path, "link", {name: raw(name) for name in ("a", "b")})

    def work() -> None:
        with rig.cache() as cache:
            cache.create_root_disk("a", "vm")

    in_child(work, unprivileged=True)
    return rig


def _roots(directory: Path) -> list[str]:
    """What is root's in a directory."""
    return [str(path) for path in sorted(directory.rglob("*")) if path.lstat().st_uid == 0]


CHANGES: dict[str, Callable[[ImageCache], object]] = {
    "ensure": lambda cache: cache.ensure_base("a"),
    "create-disk": lambda cache: cache.create_root_disk("a", "vm-2"),
    "remove-disk": lambda cache: cache.remove_root_disk("vm"),
    "resize": lambda cache: cache.resize_root_disk("vm", size=2**30),
    "flatten": lambda cache: cache.flatten_root_disk("vm"),
    "attach": lambda cache: cache.attach_root_disk("a", "vm"),
    "repair": lambda cache: cache.repair_base("a"),
    "remove": lambda cache: cache.remove_base("a"),
    "pin": lambda cache: cache.pin("a", "me"),
    "unpin": lambda cache: cache.unpin("a", "me"),
    "cleanup": lambda cache: cache.cleanup(),
    "recover": lambda cache: cache.recover(),
}

LOOKS: dict[str, Callable[[ImageCache], object]] = {
    "list": lambda cache: [base.image_id for base in cache.bases()],
    "show": lambda cache: (cache.get_base("a").image_id, cache.users("a"), cache.pins("a"), cache.base_usage("a")),
    "usage": lambda cache: cache.usage().bases,
    "verify": lambda cache: cache.verify_base("a").image_id,
    "reserved": lambda cache: cache.reserved_disk_mb(0),
    "plan": lambda cache: cache.plan_cleanup(max_idle=0),
    "disks": lambda cache: ([disk.disk_id for disk in cache.root_disks()], cache.get_root_disk("vm")),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_root_is_told_whose_it_is(change: Callable[[ImageCache], object], rig: Rig) -> None:
    """Before anything is made that its owner could neither write nor remove, with the command that helps."""
    with pytest.raises(ConfigError) as caught, rig.cache() as cache:
        change(cache)
    assert "belongs to nobody" in caught.value.detail
    assert caught.value.todo == RUN
    assert _roots(rig.dir) == []


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS.keys())
def test_root_sees_what_the_owner_sees(look: Callable[[ImageCache], object], rig: Rig, in_child: InChild) -> None:
    """And leaves nothing behind."""
    with rig.cache() as cache:
        seen = look(cache)
    assert _roots(rig.dir) == []
    assert seen == in_child(lambda: look(rig.cache()), unprivileged=True)


def test_root_finds_damage_and_moves_nothing(rig: Rig, in_child: InChild) -> None:
    """It says who can take the base out of the way."""
    with (rig.root / "bases" / "a" / "disk").open("r+b") as file:
        file.write(b"damage")
    with pytest.raises(BaseCorruptError) as caught, rig.cache() as cache:
        cache.verify_base("a")
    assert caught.value.todo == f"It stays in its place. {RUN}"
    assert _roots(rig.dir) == []

    def verify() -> str | None:
        with pytest.raises(BaseCorruptError) as caught, rig.cache() as cache:
            cache.verify_base("a")
        return caught.value.todo

    assert "in quarantine" in str(in_child(verify, unprivileged=True))


def test_root_checks_for_the_owner(rig: Rig, in_child: InChild) -> None:
    """The owner's bases are not another's to root, and where there are no disks yet no directory is made for them."""
    rig.disks = rig.dir / "new" / "disks"
    with rig.cache() as cache:
        assert [fact.problem for fact in cache.check().facts if fact.problem] == []
    assert _roots(rig.dir) == []
    assert not rig.disks.parent.exists()
    assert in_child(lambda: rig.cache().check().ok, unprivileged=True)


def test_the_service_goes_on(rig: Rig, in_child: InChild) -> None:
    """Whatever root tried."""
    for attempt in (*CHANGES.values(), *LOOKS.values()):
        try:
            attempt(rig.cache())
        except ConfigError:
            continue

    def work() -> tuple[str, ...]:
        with rig.cache() as cache:
            cache.create_root_disk("b", "vm-3", size=2**26)
            for disk_id in ("vm", "vm-3"):
                cache.remove_root_disk(disk_id)
            return cache.cleanup(cache.plan_cleanup(max_idle=0)).removed

    assert in_child(work, unprivileged=True) == ("a", "b")
    rig.check_tidy("root was there")


def test_a_directory_of_a_user_becomes_his_root(open_path: Path, in_child: InChild) -> None:
    """Made for him by an administrator, and still empty: root does not take it, whatever it asks for."""
    rig = Rig(open_path, "link", {"a": raw("a")})
    rig.root.mkdir()
    os.chown(rig.root, NOBODY.pw_uid, NOBODY.pw_gid)
    for attempt in (CHANGES["ensure"], LOOKS["list"]):
        with pytest.raises(ConfigError, match="belongs to nobody"):
            attempt(rig.cache())
    assert list(rig.root.iterdir()) == []
    assert in_child(lambda: list(rig.cache().bases()), unprivileged=True) == []


def test_a_user_without_a_name_is_told_by_his_number(open_path: Path) -> None:
    """As in a container."""
    rig = Rig(open_path, "link", {})
    rig.root.mkdir()
    os.chown(rig.root, 54321, 54321)
    with pytest.raises(ConfigError) as caught:
        rig.cache().recover()
    assert caught.value.todo == "Run this as uid 54321, who owns the root: `sudo -u '#54321' nova-imagecache ...`"

"""What ``check()`` says of who can read a base: the same as a process of that user finds out."""

from __future__ import annotations

import grp
import os
import pwd
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import InChild
from harness import images
from harness.rig import Rig
from nova_imagecache import BackendPaths, CacheConfig, Fact, ImageCache
from nova_imagecache.backends.qcow2 import Qcow2Backend

NOBODY = pwd.getpwnam("nobody")

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user for a while")


class Host:
    """A cache below a directory that everybody may enter, and a hypervisor that runs as nobody."""

    def __init__(self, directory: Path, group: str | None = None) -> None:
        self.parent = directory / "nova"
        self.parent.mkdir()
        self.rig = Rig(self.parent, "path", {"img": images.raw("checked")})
        self.group = group

    def cache(self, user: str | None = "nobody") -> ImageCache:
        paths = BackendPaths(root=self.rig.root, disks_dir=self.rig.disks, group=self.group, qemu_user=user)
        config = CacheConfig(root=self.rig.root, disks_dir=self.rig.disks, group=self.group, qemu_user=user)
        return ImageCache(config, source=self.rig.source(), backend=Qcow2Backend(self.rig.options, paths))

    def fact(self, name: str = "qemu_user", user: str | None = "nobody") -> Fact:
        with self.cache(user) as cache:
            [fact] = [fact for fact in cache.check().facts if fact.name == name]
        return fact

    @property
    def base(self) -> Path:
        return self.rig.root / "bases" / "img"


def _nothing(host: Host) -> None:
    """As it is out of the box."""


def _parent(host: Host) -> None:
    host.parent.chmod(0o700)


def _root(host: Host) -> None:
    host.rig.root.chmod(0o700)


def _bases(host: Host) -> None:
    host.base.parent.chmod(0o700)


def _directory(host: Host) -> None:
    host.base.chmod(0o700)


def _file(host: Host) -> None:
    (host.base / "disk").chmod(0o400)


def _listing_only(host: Host) -> None:
    host.base.parent.chmod(0o744)


def _own_but_closed(host: Host) -> None:
    os.chown(host.base / "disk", NOBODY.pw_uid, NOBODY.pw_gid)
    (host.base / "disk").chmod(0o044)


def _by_group(host: Host) -> None:
    os.chown(host.base / "disk", 0, NOBODY.pw_gid)
    (host.base / "disk").chmod(0o440)


def _other_group(host: Host) -> None:
    os.chown(host.base / "disk", 0, 0)
    (host.base / "disk").chmod(0o440)


SPOILED = [_nothing, _parent, _root, _bases, _directory, _file, _listing_only, _own_but_closed, _by_group, _other_group]


@pytest.mark.parametrize("spoil", SPOILED, ids=lambda spoil: spoil.__name__.strip("_"))
def test_a_base_that_the_hypervisor_cannot_read(
    spoil: Callable[[Host], None], open_path: Path, in_child: InChild
) -> None:
    """A problem exactly where a process of that user cannot open the base, and it names what is in the way."""
    host = Host(open_path)
    host.cache().create_root_disk("img", "vm")
    spoil(host)

    def read() -> bool:
        try:
            (host.base / "disk").read_bytes()
        except PermissionError:
            return False
        return True

    fact = host.fact()
    assert (fact.problem is None) == in_child(read, unprivileged=True)
    if fact.problem is not None:
        assert str(host.parent) in fact.problem


@pytest.mark.parametrize("spoil", [_parent, _root, _bases], ids=["parent", "root", "bases"])
def test_an_empty_cache_is_judged_at_once(spoil: Callable[[Host], None], open_path: Path) -> None:
    """Not only when the first guest of a host does not start."""
    host = Host(open_path)
    assert host.fact().problem is None
    with host.cache() as cache:
        cache.ensure_base("img")
        cache.remove_base("img")
    spoil(host)
    assert "cannot read bases" in str(host.fact().problem)


def test_a_new_cache_in_a_closed_directory(open_path: Path) -> None:
    """Nothing was ever brought in: there is not even a directory for bases."""
    host = Host(open_path)
    _parent(host)
    assert str(host.parent) in str(host.fact().problem)
    assert not (host.rig.root / "bases").exists()


def test_a_path_to_the_disks_that_is_closed(open_path: Path) -> None:
    """A link in an instance's directory is reached through it."""
    host = Host(open_path)
    host.rig.disks = open_path / "elsewhere" / "instances"
    host.rig.disks.mkdir(parents=True)
    assert host.fact().problem is None
    host.rig.disks.parent.chmod(0o700)
    assert str(host.rig.disks.parent) in str(host.fact().problem)


@pytest.mark.parametrize("member", [True, False])
def test_a_group_that_the_hypervisor_is_in_or_not(member: bool, open_path: Path) -> None:
    """With ``group`` bases are that group's alone; an empty cache is judged by it as well."""
    name = grp.getgrgid(NOBODY.pw_gid).gr_name if member else grp.getgrgid(0).gr_name
    host = Host(open_path, group=name)
    assert (host.fact().problem is None) == member
    host.cache().ensure_base("img")
    assert (host.fact().problem is None) == member


def test_a_hypervisor_that_runs_as_root_reads_everything(open_path: Path) -> None:
    """No permission stops it."""
    host = Host(open_path)
    host.cache().ensure_base("img")
    _parent(host)
    _file(host)
    assert host.fact(user="root").problem is None


def test_a_user_that_is_not_there(open_path: Path) -> None:
    """Said by its name."""
    assert "no-such-user" in str(Host(open_path).fact(user="no-such-user").problem)


def test_nobody_is_asked_about_without_a_user(open_path: Path) -> None:
    """Then it is nobody's business."""
    host = Host(open_path)
    _parent(host)
    with host.cache(None) as cache:
        assert "qemu_user" not in {fact.name for fact in cache.check().facts}


def test_bases_of_another_owner(open_path: Path) -> None:
    """As libvirt leaves them: said, with what takes them back."""
    host = Host(open_path)
    host.cache().ensure_base("img")
    assert host.fact("bases of another owner").problem is None
    os.chown(host.base / "disk", NOBODY.pw_uid, NOBODY.pw_gid)
    assert "--repair" in str(host.fact("bases of another owner").problem)


# --- the units


UNITS = Path(__file__).parents[2] / "examples" / "systemd"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is missing; install systemd")
@pytest.mark.parametrize("unit", sorted(path.name for path in UNITS.iterdir()))
def test_the_units_are_good(unit: str, tmp_path: Path) -> None:
    """Systemd has nothing to say against them: no unknown option, nothing that is ignored."""
    for path in UNITS.iterdir():
        shutil.copy(path, tmp_path)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=yes", str(tmp_path / unit)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")

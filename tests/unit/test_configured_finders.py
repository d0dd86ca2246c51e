"""The finders that a configuration names are asked by every cache made of it, beside those that are handed to it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import images, places
from harness.images import qemu_img
from harness.rig import Rig
from nova_imagecache import BaseInUseError, CacheConfig, ConfigError, Fact, ImageCache, UsersUnknownError
from nova_imagecache.finders import ImagesInUse


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with places.quick(tmp_path) as directory:
        yield Rig(directory, "path", {"img": images.raw("asked for")})


def _strange(rig: Rig) -> Path:
    """An overlay on the base of "img", where nobody looks by himself."""
    rig.cache().ensure_base("img")
    overlay = rig.dir / "elsewhere" / "root.img"
    overlay.parent.mkdir()
    base = rig.root / "bases" / "img" / "disk"
    qemu_img("create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(base), str(overlay))
    return overlay


def _finders(cache: ImageCache) -> list[Fact]:
    return [fact for fact in cache.check().facts if fact.name.startswith(("users by ", "finders"))]


def test_a_disk_in_a_configured_directory_keeps_its_base(rig: Rig) -> None:
    """No finder is handed in: removal, cleanup and what is reclaimable ask the directory all the same."""
    overlay = _strange(rig)
    with rig.cache(disk_dirs=[str(overlay.parent)]) as cache:
        with pytest.raises(BaseInUseError):
            cache.remove_base("img")
        assert cache.cleanup(cache.plan_cleanup(max_idle=0)).removed == ()
        assert cache.usage().reclaimable == 0
        overlay.unlink()
        cache.remove_base("img")


def test_finders_that_are_handed_in_do_not_take_the_place_of_configured_ones(rig: Rig) -> None:
    """Each of the two keeps the base alone."""
    overlay = _strange(rig)
    in_use: list[str] = []
    with rig.cache(disk_dirs=[overlay.parent], user_finders=[ImagesInUse(lambda: in_use)]) as cache:
        assert [user.known_by for user in cache.users("img")] == ["disk directories"]
        overlay.unlink()
        in_use.append("img")
        assert [user.known_by for user in cache.users("img")] == ["driver"]
        assert [fact.name for fact in _finders(cache)] == ["users by driver", "users by disk directories"]


def test_a_configured_directory_that_is_not_there_is_doubt(rig: Rig) -> None:
    """A filesystem that is not mounted keeps every base, and a check tells, also before there is one."""
    with rig.cache(disk_dirs=[rig.dir / "nowhere"]) as cache:
        for _with_a_base in (False, True):
            [fact] = _finders(cache)
            assert f"{rig.dir}/nowhere cannot be listed" in str(fact.problem)
            cache.ensure_base("img")
        with pytest.raises(UsersUnknownError):
            cache.remove_base("img")


def test_a_check_tells_who_is_asked(rig: Rig) -> None:
    """Or that nobody is but the storage."""
    with rig.cache() as cache:
        [fact] = _finders(cache)
        assert (fact.name, fact.value, fact.problem) == ("finders", "none: users are known by the storage alone", None)
    with rig.cache(disk_dirs=[rig.dir]) as cache:
        [fact] = _finders(cache)
        assert (fact.name, fact.problem) == ("users by disk directories", None)
        assert fact.value == str(rig.dir)


def test_libvirt_that_is_configured_and_missing_is_told_at_construction(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What to install, before anything is done; not in the middle of a pass."""
    monkeypatch.setitem(sys.modules, "libvirt", None)
    with pytest.raises(ConfigError, match=r"libvirt_uri: .*Install nova-imagecache\[libvirt\]"):
        rig.cache(libvirt_uri="qemu:///system")
    with rig.cache() as cache:
        cache.ensure_base("img")
        cache.remove_base("img")


def test_libvirt_that_is_missing_is_told_with_all_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One error names it beside what the plug-ins refuse."""
    monkeypatch.setitem(sys.modules, "libvirt", None)
    options: dict[str, Any] = {"backend_options": {"colour": "red"}, "source_options": {"path": "relative"}}
    config = CacheConfig(root=tmp_path, source="directory", libvirt_uri="qemu:///system", **options)
    with pytest.raises(ConfigError) as caught:
        ImageCache.from_config(config)
    named = [problem.partition(":")[0] for problem in caught.value.problems]
    assert named == ["backend_options.colour", "source_options.path", "libvirt_uri"]


WITHOUT_LIBVIRT = """
import sys
from pathlib import Path
from nova_imagecache import CacheConfig, ImageCache
directory = Path(sys.argv[1])
options = {"path": str(directory)}
config = CacheConfig(root=directory / "root", source="directory", source_options=options, disk_dirs=[directory])
with ImageCache.from_config(config) as cache:
    cache.check()
assert not {"libvirt", "nova_imagecache.domains"} & set(sys.modules)
"""


def test_who_configures_no_libvirt_needs_none(tmp_path: Path) -> None:
    """A cache is made, used and checked without a look for the module."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", WITHOUT_LIBVIRT, str(tmp_path)], env=env, check=True)

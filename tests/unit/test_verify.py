"""A base whose bytes are damaged: out of the way, whatever others do with it while it is read."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness import places
from harness.images import raw
from harness.rig import Rig
from harness.upkeep import names
from nova_imagecache import BaseCorruptError, BaseImage, BaseNotFoundError, FileLocation

IMAGE = raw("verified")


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with places.quick(tmp_path) as directory:
        rig = Rig(directory, "link", {"img": IMAGE})
        _write(rig.cache().ensure_base("img"), b"damaged")
        yield rig


def _write(base: BaseImage, data: bytes) -> None:
    assert isinstance(base.location, FileLocation)
    base.location.path.chmod(0o644)
    with base.location.path.open("r+b") as file:
        file.write(data)
    base.location.path.chmod(0o444)


class Meanwhile(threading.Event):
    """A cancel that is never set, and does something once the first bytes are read."""

    def __init__(self, work: Callable[[], object]) -> None:
        super().__init__()
        self._work: Callable[[], object] | None = work

    def is_set(self) -> bool:
        work, self._work = self._work, None
        if work is not None:
            work()
        return False


def _verify(rig: Rig, work: Callable[[], object]) -> str:
    """What is said of the base, and that it was read while ``work`` was done."""
    meanwhile = Meanwhile(work)
    with pytest.raises(BaseCorruptError) as caught:
        rig.cache().verify_base("img", cancel=meanwhile)
    assert meanwhile._work is None
    return str(caught.value)


def test_a_base_in_use_goes_to_quarantine(rig: Rig) -> None:
    """Others get it, make disks of it and mark it while it is read: only its marks differ."""

    def use() -> None:
        with rig.cache() as other:
            other.ensure_base("img")
            other.create_root_disk("img", "vm")
            other.remove_root_disk("vm")
            other.cleanup()

    assert "in quarantine" in _verify(rig, use)
    assert names(rig.cache()) == set()
    assert len(list((rig.root / "quarantine").iterdir())) == 1
    rig.cache().verify_base(rig.cache().ensure_base("img").image_id)


def test_one_that_took_its_place_is_verified_instead(rig: Rig) -> None:
    """The bytes that were read are nobody's any more."""

    def replace() -> None:
        with rig.cache() as other:
            other.remove_base("img")
            other.ensure_base("img")

    assert rig.cache().verify_base("img", cancel=Meanwhile(replace)).image_id == "img"
    assert not (rig.root / "quarantine").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_one_that_was_re_owned_is_verified_instead(rig: Rig) -> None:
    """It has the same record, and bytes that were proved."""

    def repair() -> None:
        with rig.cache() as other:
            base = other.get_base("img")
            _write(base, IMAGE.served[: len(b"damaged")])
            assert isinstance(base.location, FileLocation)
            os.chown(base.location.path, 65534, 65534)
            assert other.repair_base("img")

    assert rig.cache().verify_base("img", cancel=Meanwhile(repair)).image_id == "img"
    assert not (rig.root / "quarantine").exists()


def test_one_that_is_gone_is_said_to_be_gone(rig: Rig) -> None:
    """It is in no quarantine."""
    with pytest.raises(BaseNotFoundError):
        rig.cache().verify_base("img", cancel=Meanwhile(lambda: rig.cache().remove_base("img")))
    assert not (rig.root / "quarantine").exists()

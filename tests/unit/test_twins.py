"""Images whose bytes the cache holds already under another id: copied from there, whole, and without a download."""

from __future__ import annotations

import hashlib
import os
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import InChild
from harness import images, places
from harness.images import MIB, Sample
from harness.rig import Rig
from harness.upkeep import allocated, dense, names, open_cache
from nova_imagecache import (
    BaseCorruptError,
    CancelledError,
    Digest,
    DiskTooSmallError,
    FileLocation,
    ImageCache,
    ImageRejectedError,
    NoSpaceError,
)
from nova_imagecache.testing import FakeSource, FaultPlan

FORMS = {
    "raw": ("link", images.raw("twins")),
    "converted": ("link", images.qcow2("twins")),
    "native": ("link-native", images.qcow2("twins")),
    "copies": ("file", images.raw("twins")),
}


def _rig(directory: Path, sample: Sample, kind: str = "link") -> Rig:
    return Rig(directory, kind, {"first": sample, "second": sample})


def _both(rig: Rig, source: FakeSource) -> ImageCache:
    cache = open_cache(rig, source=source)
    cache.ensure_base("first")
    cache.ensure_base("second")
    return cache


def _check(rig: Rig, cache: ImageCache) -> None:
    """Both are whole, of their own, and good for disks."""
    for image_id in ("first", "second"):
        cache.verify_base(image_id)
        cache.create_root_disk(image_id, f"vm-{image_id}", size=4 * MIB)
    paths = [rig.root / "bases" / image_id / "disk" for image_id in ("first", "second")]
    assert len({path.stat().st_ino for path in paths}) == 2
    assert paths[0].read_bytes() == paths[1].read_bytes()
    rig.check("twins")
    rig.check_tidy("twins")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("memory", [True, False], ids=["tmpfs", "disk"])
def test_a_twin_is_copied_without_a_download(form: str, memory: bool, tmp_path: Path) -> None:
    """One download for two ids, whatever the base's form; the record says where the bytes came from."""
    kind, sample = FORMS[form]
    with places.quick(tmp_path) if memory else nullcontext(tmp_path) as directory:
        rig = _rig(directory, sample, kind)
        source = rig.source()
        cache = _both(rig, source)
        assert source.opens == 1
        first, second = cache.get_base("first").record, cache.get_base("second").record
        assert second == replace(first, image_id="second", source="base first", fetched_at=second.fetched_at)
        assert second.source_digest == sample.digest
        _check(rig, cache)


def test_the_holes_of_a_twin_stay_holes(tmp_path: Path) -> None:
    """A copy takes what the twin takes, not its length."""
    rig = _rig(tmp_path, images.raw("twins", 16 * MIB))
    cache = _both(rig, rig.source())
    first, second = (cache.base_usage(image_id).allocated for image_id in ("first", "second"))
    assert second <= first + 64 * 1024 < 4 * MIB


def test_the_sums_of_a_converted_twin_come_along(tmp_path: Path) -> None:
    """They alone prove its bytes: a damaged copy is found out."""
    rig = _rig(tmp_path, FORMS["converted"][1])
    _both(rig, rig.source())
    bases = rig.root / "bases"
    sums = (bases / "first" / "disk.sums").read_bytes()
    assert sums
    assert (bases / "second" / "disk.sums").read_bytes() == sums


@pytest.mark.services
@pytest.mark.parametrize("form", ["raw", "converted"])
def test_blocks_are_shared_where_the_filesystem_can(form: str, xfs_path: Path) -> None:
    """On a filesystem with reflinks the second id takes next to nothing, and its extents are shared ones."""
    size = 48 * MIB
    sample = dense("shared", size)
    if form == "converted":
        packed = xfs_path / "packed"
        (xfs_path / "raw").write_bytes(sample.guest)
        images.qemu_img("convert", "-f", "raw", "-O", "qcow2", str(xfs_path / "raw"), str(packed))
        (xfs_path / "raw").unlink()
        sample = Sample(guest=sample.guest, served=packed.read_bytes(), disk_format="qcow2")
        packed.unlink()
    rig = _rig(xfs_path, sample)
    source = rig.source()
    cache = open_cache(rig, source=source)
    cache.ensure_base("first")
    before = _used(xfs_path)
    cache.ensure_base("second")
    assert source.opens == 1
    assert _used(xfs_path) - before < size // 8
    told = subprocess.run(
        ["filefrag", "-v", str(rig.root / "bases" / "second" / "disk")], capture_output=True, text=True, check=False
    )
    assert told.returncode != 0 or "shared" in told.stdout
    # each is as whole as if it were alone
    cache.remove_base("first")
    cache.verify_base("second")


def _used(path: Path) -> int:
    os.sync()
    figures = os.statvfs(path)
    return (figures.f_blocks - figures.f_bfree) * figures.f_frsize


# --- who is a twin


@pytest.mark.parametrize("algorithm", ["md5", "sha1"])
def test_weak_digests_make_no_twins(algorithm: str, tmp_path: Path) -> None:
    """Two images can be made to share them: each is fetched."""
    rig = _rig(tmp_path, FORMS["raw"][1])
    weak = Digest(algorithm, hashlib.new(algorithm, FORMS["raw"][1].served).hexdigest())
    source = FakeSource({image_id: replace(sample.fake, digest=weak) for image_id, sample in rig.samples.items()})
    _both(rig, source)
    assert source.opens == 2


def test_an_image_without_a_digest_has_no_twin(tmp_path: Path) -> None:
    """Nothing says that its bytes are the same."""
    rig = _rig(tmp_path, FORMS["raw"][1])
    source = rig.source()
    source.add("second", replace(FORMS["raw"][1].fake, digest=None))
    cache = open_cache(rig, source=source, allow_unverified=True)
    cache.ensure_base("first")
    cache.ensure_base("second")
    assert source.opens == 2


def test_the_same_bytes_in_another_format_are_no_twin(tmp_path: Path) -> None:
    """A qcow2 file that is served as raw would be refused; it is not served from the cache either."""
    sample = FORMS["converted"][1]
    rig = Rig(tmp_path, "link", {"first": sample, "second": replace(sample, disk_format="raw")})
    source = rig.source()
    cache = open_cache(rig, source=source)
    cache.ensure_base("first")
    with pytest.raises(ImageRejectedError):
        cache.ensure_base("second")
    assert source.opens == 2


def test_a_twin_in_another_form_is_no_twin(tmp_path: Path) -> None:
    """A native base does not serve a cache that wants raw ones."""
    rig = _rig(tmp_path, FORMS["native"][1], "link-native")
    rig.cache().ensure_base("first")
    rig.options = {"base_format": "raw"}
    source = rig.source()
    cache = open_cache(rig, source=source)
    assert cache.ensure_base("second").format == "raw"
    assert source.opens == 1


def test_a_twin_of_what_was_not_verified_is_verified_by_its_own_digest(tmp_path: Path) -> None:
    """The first came without a digest, its bytes were hashed all the same; the second's record says what is known."""
    rig = _rig(tmp_path, FORMS["raw"][1])
    source = rig.source()
    source.add("first", replace(FORMS["raw"][1].fake, digest=None))
    cache = open_cache(rig, source=source, allow_unverified=True)
    assert cache.ensure_base("first").record.evidence == "unverified"
    assert cache.ensure_base("second").record.evidence == "os_hash"
    assert source.opens == 1


def test_the_callers_digest_decides(tmp_path: Path) -> None:
    """A driver that knows another digest than the image announces gets a base by that one: there is no twin by it."""
    sample = FORMS["raw"][1]
    rig = _rig(tmp_path, sample)
    source = rig.source()
    cache = open_cache(rig, source=source)
    cache.ensure_base("first")
    known = Digest("sha256", hashlib.sha256(sample.served).hexdigest())
    base = cache.ensure_base("second", expect=known)
    assert (base.digest, base.record.evidence) == (known, "expected")
    assert source.opens == 2
    rig.samples["third"] = sample
    source.add("third", sample.fake)
    third = cache.ensure_base("third", expect=known)
    assert (third.digest, third.record.evidence, third.record.source) == (known, "expected", "base second")
    assert source.opens == 2


def test_a_disk_that_is_too_small_is_refused_before_the_copy(tmp_path: Path) -> None:
    """As of an image that is fetched; nothing is left."""
    sample = FORMS["converted"][1]
    rig = _rig(tmp_path, sample)
    cache = open_cache(rig)
    cache.ensure_base("first")
    with pytest.raises(DiskTooSmallError):
        cache.create_root_disk("second", "vm", size=MIB)
    assert names(cache) == {"first"}
    with pytest.raises(ImageRejectedError, match="max_virtual_size"):
        open_cache(rig, max_virtual_size=MIB).ensure_base("second")
    rig.check_tidy("refused")


# --- twins that are not to be trusted


def _spoil(rig: Rig, offset: int = 4096) -> None:
    """The twin's bytes are others than were published."""
    path = rig.root / "bases" / "first" / "disk"
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(offset if offset >= 0 else path.stat().st_size + offset)
        file.write(b"not what was published")
    path.chmod(0o444)


@pytest.mark.parametrize("offset", [0, 4096, -40])
@pytest.mark.parametrize("form", FORMS)
def test_a_damaged_twin_is_not_copied(form: str, offset: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its copy would carry a digest that it has not: the image is fetched, whole, and the damage is said."""
    kind, sample = FORMS[form]
    rig = _rig(tmp_path, sample, kind)
    source = rig.source()
    cache = open_cache(rig, source=source)
    cache.ensure_base("first")
    _spoil(rig, offset)
    second = cache.ensure_base("second")
    assert source.opens == 2
    assert second.record.source != "base first"
    cache.verify_base("second")
    assert any("first" in record.getMessage() and "damaged" in record.getMessage() for record in caplog.records)
    with pytest.raises(BaseCorruptError):
        cache.verify_base("first")


def test_a_converted_twin_without_its_sums_is_not_copied(tmp_path: Path) -> None:
    """Nothing proves its bytes."""
    rig = _rig(tmp_path, FORMS["converted"][1])
    source = rig.source()
    cache = open_cache(rig, source=source)
    cache.ensure_base("first")
    (rig.root / "bases" / "first" / "disk.sums").unlink()
    cache.ensure_base("second")
    assert source.opens == 2
    cache.verify_base("second")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_twin_of_another_owner_is_not_copied(tmp_path: Path) -> None:
    """Who owns a file can change it at any moment, also after it was looked at: libvirt gives bases to its guests."""
    rig = _rig(tmp_path, FORMS["raw"][1])
    source = rig.source()
    cache = open_cache(rig, source=source)
    cache.ensure_base("first")
    os.chown(rig.root / "bases" / "first" / "disk", 65534, 65534)
    cache.ensure_base("second")
    assert source.opens == 2


def test_the_caller_is_listened_to_while_a_copy_is_proved(tmp_path: Path) -> None:
    """A large twin takes a while to read: whoever cancels does not wait for it."""
    rig = _rig(tmp_path, dense("twins to prove", 4 * MIB))
    source = rig.source()
    cache = open_cache(rig, source=source)
    cache.ensure_base("first")
    cancel = threading.Event()
    plan = FaultPlan()
    copying = plan.pause("fs.copy_range", when="after")
    with plan, ThreadPoolExecutor(1) as pool:
        second = pool.submit(cache.ensure_base, "second", cancel=cancel)
        copying.wait()
        cancel.set()
        copying.release()
        with pytest.raises(CancelledError):
            second.result(60)
    assert source.opens == 1
    assert names(cache) == {"first"}
    rig.check_tidy("cancelled")


# --- space


def test_a_copy_is_admitted_by_what_it_takes(tmp_path: Path) -> None:
    """A packed image of few bytes, whose unpacked twin takes many: the limit is kept."""
    packed = images.bomb(8 * MIB)
    assert len(packed) < MIB
    sample = Sample(guest=b"a" * (8 * MIB), served=packed, disk_format="qcow2")
    rig = _rig(tmp_path, sample)
    cache = open_cache(rig, max_bytes=12 * MIB)
    cache.ensure_base("first")
    with pytest.raises(NoSpaceError) as caught:
        cache.ensure_base("second")
    assert caught.value.limit == "max_bytes"
    assert allocated(rig.root / "bases") <= 12 * MIB
    rig.check_tidy("refused")


# --- a twin that goes away


def _removed(rig: Rig) -> None:
    rig.cache().remove_base("first")


@pytest.mark.parametrize("form", FORMS)
def test_a_twin_that_goes_meanwhile_is_fetched(form: str, tmp_path: Path) -> None:
    """Removed after it was found: the second is downloaded, and is as whole as any."""
    kind, sample = FORMS[form]
    rig = _rig(tmp_path, sample, kind)
    source = rig.source()
    cache = open_cache(rig, source=source)
    cache.ensure_base("first")
    # the last step before the copy is the reservation's
    trace = _trace(tmp_path / "trace", sample, kind)
    reserved = max(number for number, name in enumerate(trace) if name == "reserved")
    plan = FaultPlan()
    pause = plan.pause("fs.write", nth=1 + trace[:reserved].count("reserved"), match="reserved", when="after")
    with plan, ThreadPoolExecutor(1) as pool:
        copying = pool.submit(cache.ensure_base, "second")
        pause.wait()
        _removed(rig)
        pause.release()
        copying.result(60)
    assert source.opens == 2
    cache.verify_base("second")
    cache.create_root_disk("second", "vm", size=4 * MIB)
    rig.check("fetched after all")
    rig.check_tidy("fetched after all")


def _trace(directory: Path, sample: Sample, kind: str) -> list[str]:
    """What is written, in order, while a twin is copied: the names of the files."""
    directory.mkdir()
    rig = _rig(directory, sample, kind)
    rig.cache().ensure_base("first")
    with FaultPlan() as plan:
        rig.cache().ensure_base("second")
    return [Path(step.targets[0]).name for step in plan.trace if step.name == "fs.write" and step.targets]


@pytest.mark.parametrize("step", ["fs.clone_file", "fs.copy_range"])
def test_a_twin_removed_while_it_is_copied_gives_all_its_bytes(step: str, tmp_path: Path) -> None:
    """Its name goes, its bytes stay until the copy is done; the sums came before them."""
    rig = _rig(tmp_path, FORMS["converted"][1])
    source = rig.source()
    cache = open_cache(rig, source=source)
    cache.ensure_base("first")
    plan = FaultPlan()
    pause = plan.pause(step)
    with plan, ThreadPoolExecutor(1) as pool:
        copying = pool.submit(cache.ensure_base, "second")
        pause.wait()
        _removed(rig)
        pause.release()
        copying.result(60)
    assert source.opens == 1
    cache.verify_base("second")
    rig.check("copied from what was removed")
    rig.check_tidy("copied from what was removed")


def test_a_twin_that_cannot_be_read_is_fetched(open_path: Path, in_child: InChild) -> None:
    """A hypervisor gave it to another user: the image comes from its source."""
    open_path.chmod(0o777)
    rig = _rig(open_path, FORMS["raw"][1])

    def fetch(image_id: str) -> Callable[[], int]:
        def work() -> int:
            source = rig.source()
            open_cache(rig, source=source).ensure_base(image_id)
            return source.opens

        return work

    assert in_child(fetch("first"), unprivileged=True) == 1
    disk = rig.root / "bases" / "first" / "disk"
    disk.chmod(0)
    if os.geteuid() == 0:
        os.chown(disk, 0, 0)
    assert in_child(fetch("second"), unprivileged=True) == 1
    with rig.cache() as cache:
        cache.verify_base("second")


def test_a_full_storage_while_a_twin_is_copied(tmp_path: Path) -> None:
    """The error comes out and nothing is left."""
    rig = _rig(tmp_path, FORMS["raw"][1])
    cache = open_cache(rig)
    cache.ensure_base("first")
    with FaultPlan().fail("fs.copy_range", nth=0).fail("fs.write", match="second", nth=0), pytest.raises(NoSpaceError):
        cache.ensure_base("second")
    assert names(cache) == {"first"}
    rig.check_tidy("full")
    assert isinstance(cache.ensure_base("second").location, FileLocation)

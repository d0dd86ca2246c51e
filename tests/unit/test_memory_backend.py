"""What MemoryBackend offers to tests beyond the contract."""

from __future__ import annotations

import pytest

from nova_imagecache.backends import BaseImage, BaseRecord, Digest, ImageInfo
from nova_imagecache.exceptions import (
    BackendError,
    BaseInUseError,
    ConfigError,
    DiskInUseError,
    DiskTooSmallError,
    NoSpaceError,
    UsersUnknownError,
)
from nova_imagecache.testing import MemoryBackend
from nova_imagecache.testing._memory_store import BLOCK, Blocks

MIB = 2**20


def publish(backend: MemoryBackend, image_id: str = "img", data: bytes = b"x" * 8192) -> BaseImage:
    writer = backend.stage_base(image_id, "raw")
    writer.write_at(0, data)
    return writer.publish(record(image_id, len(data)))


def record(image_id: str, size: int, base_format: str = "raw") -> BaseRecord:
    return BaseRecord(
        image_id=image_id,
        format=base_format,
        virtual_size=size,
        size=size,
        source_format="raw",
        source_size=size,
        source_digest=None,
        evidence="none",
        made_by="stored",
        source="test",
        fetched_at=0.0,
    )


def test_options_are_checked() -> None:
    """All problems of the options come in one error."""
    with pytest.raises(ConfigError) as caught:
        MemoryBackend({"capacity": 0, "colour": "red"})
    assert len(caught.value.problems) == 2
    assert MemoryBackend({"capacity": MIB}).capacity().total == MIB


def test_contents_can_be_looked_at() -> None:
    """A test sees the bytes of bases and disks, and writes as a guest does."""
    backend = MemoryBackend()
    base = publish(backend)
    backend.create_root_disk(base, "vm", "disk", 12288)
    backend.write_disk("vm", "disk", 100, b"guest")
    assert backend.contents("img") == b"x" * 8192
    assert backend.disk_contents("vm")[:110] == b"x" * 100 + b"guest" + b"x" * 5
    assert backend.disk_contents("vm", "disk")[8192:] == bytes(4096)


def test_large_disks_cost_nothing() -> None:
    """A disk takes what is written to it, however large it is."""
    backend = MemoryBackend({"capacity": MIB})
    base = publish(backend)
    backend.create_root_disk(base, "vm", "disk", 2**44)
    assert backend.capacity().free == MIB - 8192 - BLOCK
    backend.write_disk("vm", "disk", 2**43, b"1")
    assert backend.capacity().free == MIB - 8192 - 2 * BLOCK


def test_full_storage_refuses_bases() -> None:
    """Writing beyond the capacity is NoSpaceError, and discarding gives the space back."""
    backend = MemoryBackend({"capacity": 4 * BLOCK})
    writer = backend.stage_base("img", "raw")
    writer.write_at(0, bytes(3 * BLOCK))
    with pytest.raises(NoSpaceError) as caught:
        writer.write_at(3 * BLOCK, bytes(2 * BLOCK))
    assert (caught.value.needed, caught.value.free) == (2 * BLOCK, BLOCK)
    assert backend.capacity().staging == 3 * BLOCK
    writer.discard()
    assert backend.capacity().free == 4 * BLOCK


def test_full_storage_refuses_disks() -> None:
    """A disk that finds no room is not made; flattening needs room for what was shared."""
    backend = MemoryBackend({"capacity": 4 * BLOCK})
    base = publish(backend)
    backend.create_root_disk(base, "vm-1", "disk", 8192)
    with pytest.raises(NoSpaceError):
        backend.flatten_root_disk("vm-1", "disk")
    backend.create_root_disk(base, "vm-2", "disk", 8192)
    with pytest.raises(NoSpaceError):
        backend.create_root_disk(base, "vm-3", "disk", 8192)
    assert backend.get_root_disk("vm-3", "disk") is None
    assert len(list(backend.iter_users(base))) == 2


def test_base_with_users_is_not_purged() -> None:
    """As a pool of clones says: children first."""
    backend = MemoryBackend()
    base = publish(backend)
    backend.create_root_disk(base, "vm", "disk", 8192)
    retired = backend.retire_base(base)
    with pytest.raises(BaseInUseError) as caught:
        backend.purge_base(retired)
    assert [(user.disk_id, user.name) for user in caught.value.users] == [("vm", "disk")]
    backend.remove_root_disk("vm", "disk")
    backend.purge_base(retired)
    backend.purge_base(retired)
    assert backend.capacity().trash == 0


def test_users_can_be_made_unknown() -> None:
    """A test can make the storage unable to tell; a base that is nowhere is unknown as well."""
    backend = MemoryBackend()
    base = publish(backend)
    backend.users_unknown = True
    with pytest.raises(UsersUnknownError):
        backend.iter_users(base)
    backend.users_unknown = False
    backend.purge_base(backend.retire_base(base))
    with pytest.raises(UsersUnknownError):
        backend.iter_users(base)


def test_busy_disk() -> None:
    """While a guest has it open a disk is not removed, resized or flattened; a disk never shrinks."""
    backend = MemoryBackend()
    backend.create_root_disk(publish(backend), "vm", "disk", 8192)
    with backend.held_open("vm"):
        for call in (backend.remove_root_disk, backend.flatten_root_disk):
            with pytest.raises(DiskInUseError):
                call("vm", "disk")
        with pytest.raises(DiskInUseError):
            backend.resize_root_disk("vm", "disk", MIB)
    with pytest.raises(DiskTooSmallError):
        backend.resize_root_disk("vm", "disk", 4096)
    backend.remove_root_disk("vm", "disk")


def test_offered_image_is_adopted() -> None:
    """An image that lies in the storage already becomes a base that is not ours, and takes no space."""
    backend = MemoryBackend()
    backend.offer("img", b"y" * 4096)
    info = ImageInfo(image_id="img", disk_format="raw", digest=Digest("md5", "0" * 32))
    base = backend.adopt_base(info)
    assert base is not None
    assert (base.managed, base.virtual_size, base.record.evidence, base.digest) == (False, 4096, "none", info.digest)
    assert backend.contents("img") == b"y" * 4096
    assert backend.capacity().free == backend.capacity().total
    assert backend.adopt_base(ImageInfo(image_id="other", disk_format="raw")) is None
    assert backend.adopt_base(ImageInfo(image_id="img", disk_format="qcow2")) is None


def test_recover_after_a_death() -> None:
    """What is abandoned is swept: writers go, retired bases go unless a disk depends on them."""
    backend = MemoryBackend()
    backend.stage_base("half", "raw")
    backend.create_root_disk(publish(backend, "used"), "vm", "disk", 8192)
    for image_id in ("used", "idle"):
        backend.retire_base(backend.find_base(image_id) or publish(backend, image_id))
    assert backend.recover().alive == ("half",)
    backend.abandon()
    alive = backend.stage_base("alive", "raw")
    report = backend.recover()
    assert report.removed[0] == "staging/half"
    assert report.removed[1].startswith("trash/idle.")
    assert (report.restored, report.alive) == (("used",), ("alive",))
    assert [base.image_id for base in backend.iter_bases()] == ["used"]
    alive.discard()
    assert backend.recover().removed == ()


def test_two_backends_over_one_storage() -> None:
    """A second object stands for a second process."""
    one = MemoryBackend(clock=lambda: 42.0)
    two = MemoryBackend(storage=one.storage)
    base = publish(one)
    one.touch_base(base)
    found = two.find_base("img")
    assert found is not None
    assert found.last_used == 42.0


def test_misuse_is_an_error() -> None:
    """A writer is closed once; a record must be of what was staged; only raw bases can be cloned."""
    backend = MemoryBackend()
    with pytest.raises(BackendError, match="cannot be 'qcow2'"):
        backend.stage_base("img", "qcow2")
    writer = backend.stage_base("img", "raw")
    with pytest.raises(BackendError, match="staged was img"):
        writer.publish(record("other", 0))
    writer.discard()
    with pytest.raises(BackendError, match="closed"):
        writer.write_at(0, b"x")
    with pytest.raises(BackendError, match="closed"):
        writer.publish(record("img", 0))


def test_blocks_shrink_and_grow() -> None:
    """What is cut off comes back as zeros."""
    blocks = Blocks()
    blocks.write(10, b"a" * (2 * BLOCK))
    blocks.resize(BLOCK + 5)
    blocks.resize(3 * BLOCK)
    assert blocks.contents() == bytes(10) + b"a" * (BLOCK - 5) + bytes(2 * BLOCK - 5)
    assert blocks.allocated == 2 * BLOCK
    blocks.resize(0)
    assert (blocks.contents(), blocks.allocated, blocks.owned) == (b"", 0, 0)


def test_extents_never_cross_a_mib() -> None:
    """Runs of blocks are joined up to the next MiB boundary."""
    blocks = Blocks()
    blocks.write(MIB - BLOCK, b"a" * 2 * BLOCK)
    blocks.write(3 * MIB, b"b" * 10)
    assert [(extent.offset, len(extent.data)) for extent in blocks.extents()] == [
        (MIB - BLOCK, BLOCK),
        (MIB, BLOCK),
        (3 * MIB, 10),
    ]

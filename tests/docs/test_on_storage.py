"""The page on the storage format is enough for a second implementation: one that has nothing else reads a real root."""

from __future__ import annotations

import ast
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import xxhash

from harness.images import qcow2, raw, vdi
from harness.rig import Rig
from nova_imagecache import FileLocation, ImageCache, Pin

from . import reader

MIB = 1 << 20


@pytest.fixture(params=["link", "path", "link-native", "file"])
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Rig:
    """A cache with bases, users, pins, marks, something in staging and something in quarantine."""
    return furnished(tmp_path, request.param)


def furnished(directory: Path, kind: str) -> Rig:
    used, idle, spoiled, other = "used", "idle", "spoiled", "other"
    samples = {used: qcow2("used"), idle: raw("idle"), spoiled: raw("spoiled"), other: vdi("other", 5 * MIB // 2)}
    rig = Rig(directory, kind, samples)
    with rig.cache() as cache:
        for disk_id in ("vm-1", "vm.2"):
            cache.create_root_disk(used, disk_id, size=64 * MIB)
        cache.create_root_disk(used, "vm-1", name="disk.rescue")
        for image_id in (idle, spoiled, other):
            cache.ensure_base(image_id)
        cache.pin(idle, "me", until=time.time() + 3600)
        cache.pin(idle, "them")
        # one that is over by now
        cache._engine.root.pin(Pin(image_id=idle, owner="late", until=time.time() - 1))
        cache.cleanup()
        base = cache.get_base(spoiled)
        spoil(base.location)
        with pytest.raises(Exception, match="damaged"):
            cache.verify_base(spoiled)
    (rig.root / "staging" / f"made.{'0' * 16}").mkdir()
    (rig.root / "staging" / f"made.{'0' * 16}" / "disk").write_bytes(b"x" * MIB)
    return rig


def spoil(location: object) -> None:
    assert isinstance(location, FileLocation)
    location.path.chmod(0o644)
    with location.path.open("r+b") as file:
        file.write(b"spoiled")


@pytest.fixture
def cache(rig: Rig) -> Iterator[ImageCache]:
    with rig.cache() as cache:
        yield cache


def test_a_reader_of_the_page_sees_the_bases(rig: Rig, cache: ImageCache) -> None:
    """The same bases, records, marks and sizes."""
    seen = reader.read(rig.root, rig.disks)
    bases = {base.image_id: base for base in cache.bases()}
    assert set(bases) == {"used", "idle", "other"}
    assert set(seen.bases) == set(bases)
    for image_id, base in bases.items():
        record = seen.bases[image_id].record
        assert (record["format"], record["virtual_size"]) == (base.format, base.virtual_size)
        assert base.digest is not None
        assert record["source_digest"] == {"algorithm": base.digest.algorithm, "value": base.digest.value}
        assert (seen.bases[image_id].last_used, seen.bases[image_id].unused_since) == (
            base.last_used,
            base.unused_since,
        )
        assert seen.bases[image_id].allocated == cache.base_usage(image_id).allocated


def test_a_reader_of_the_page_sees_the_users(rig: Rig, cache: ImageCache) -> None:
    """As many users of each base, and the same names."""
    seen = reader.read(rig.root, rig.disks)
    counts = {image_id: len(cache.users(image_id)) for image_id in seen.bases}
    assert {image_id: base.users for image_id, base in seen.bases.items()} == counts
    assert sum(counts.values()) == (3 if rig.references else 0)
    for image_id in seen.bases:
        assert seen.named(image_id) == {(user.disk_id, user.name) for user in cache.users(image_id)}


def test_a_reader_of_the_page_sees_the_pins(rig: Rig, cache: ImageCache) -> None:
    """The pins that hold now, and none whose time is over."""
    time.sleep(0.02)
    seen = reader.read(rig.root, rig.disks)
    for image_id, base in seen.bases.items():
        assert sorted(base.pins) == sorted(pin.owner for pin in cache.pins(image_id))
    assert sorted(owner for base in seen.bases.values() for owner in base.pins) == ["me", "them"]


def test_a_reader_of_the_page_sees_the_root_disks(rig: Rig, cache: ImageCache) -> None:
    """The same disks, of the same images, formats, sizes and references."""
    seen = reader.read(rig.root, rig.disks)
    disks = {(disk.disk_id, disk.name): disk for disk in cache.root_disks()}
    assert set(seen.disks) == set(disks)
    assert len(disks) == 3
    for key, disk in disks.items():
        facts = (disk.image_id, disk.format, disk.virtual_size, disk.reference)
        assert tuple(seen.disks[key][name] for name in ("image_id", "format", "virtual_size", "reference")) == facts


def test_a_reader_of_the_page_counts_the_same_bytes(rig: Rig, cache: ImageCache) -> None:
    """Bases, staging, trash and the rest, to the byte; together what du says of the root without the root disks."""
    seen = reader.read(rig.root, rig.disks)
    usage = cache.usage()
    assert usage.complete
    assert sum(base.allocated for base in seen.bases.values()) == usage.bases
    assert (seen.staging, seen.trash, seen.overhead) == (usage.staging, usage.trash, usage.overhead)
    assert usage.staging > MIB
    assert usage.trash > 0


def test_checksums_are_as_the_page_says(rig: Rig, cache: ImageCache) -> None:
    """xxh3 of each MiB where the bytes are not the source's; else the digest is that of the base itself."""
    for base in cache.bases():
        assert isinstance(base.location, FileLocation)
        data = base.location.path.read_bytes()
        sums = base.location.path.with_name("disk.sums")
        if base.record.made_by == "stored":
            assert not sums.exists()
            assert base.digest is not None
            assert hashlib.new(base.digest.algorithm, data).hexdigest() == base.digest.value
        else:
            pieces = [data[at : at + MIB] for at in range(0, len(data), MIB)]
            summed = [xxhash.xxh3_64_digest(piece) if any(piece) else bytes(8) for piece in pieces]
            assert sums.read_bytes() == b"".join(summed)


def test_what_a_second_implementation_publishes_is_a_base(tmp_path: Path) -> None:
    """The library finds it, verifies it, makes a disk of it, and leaves an entry alone that the other one holds."""
    rig = furnished(tmp_path, "link")
    content = bytes(range(256)) * 8192
    record = {
        "version": 1,
        "image_id": "theirs",
        "format": "raw",
        "virtual_size": len(content),
        "size": len(content),
        "source_format": "raw",
        "source_size": len(content),
        "source_digest": {"algorithm": "sha256", "value": hashlib.sha256(content).hexdigest()},
        "evidence": "os_hash",
        "made_by": "stored",
        "source": "another implementation",
        "fetched_at": 1.5,
        "inspector": 1,
        "something of a later version": True,
    }
    assert reader.publish(rig.root, "theirs", content, record)
    assert not reader.publish(rig.root, "theirs", content, record)
    with rig.cache() as cache:
        assert cache.verify_base("theirs").record.source == "another implementation"
        assert cache.create_root_disk("theirs", "vm-9").virtual_size == len(content)
        held = rig.root / "staging" / f"theirs.{'1' * 16}"
        held.mkdir()
        fd = os.open(held, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(fd, fcntl.LOCK_EX)
        assert f"staging/{held.name}" in cache.recover().alive
        os.close(fd)
        assert f"staging/{held.name}" in cache.recover().removed
    assert reader.read(rig.root, rig.disks).bases["theirs"].links == 1


def test_a_reader_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    """A newer layout and another storage are refused, by both."""
    rig = furnished(tmp_path, "link")
    for about in ({"layout": 2, "storage": "files"}, {"layout": 1, "storage": "rbd"}):
        (rig.root / "cache.json").write_text(json.dumps(about))
        with pytest.raises(ValueError, match="layout"):
            reader.read(rig.root, rig.disks)
        with rig.cache() as cache, pytest.raises(ValueError, match=r"layout|storage"):
            list(cache.bases())


def test_the_reader_knows_nothing_of_the_library() -> None:
    """It would prove nothing if it did."""
    tree = ast.parse(Path(reader.__file__).read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {name for name in imported if name.startswith(("nova_imagecache", "harness"))}

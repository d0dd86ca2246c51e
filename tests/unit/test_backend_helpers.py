"""What the contract of a backend hands to its author: records, holds, and a writer that writes to its path."""

from __future__ import annotations

import inspect
import logging
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from nova_imagecache import CacheConfig, ImageCache
from nova_imagecache.backends import (
    BackendPaths,
    BaseImage,
    BaseRecord,
    BaseWriter,
    Digest,
    dump_record,
    hold,
    load_record,
    new_entry,
    read_record,
)
from nova_imagecache.testing import FakeSource, MemoryBackend

RECORD = BaseRecord(
    image_id="img",
    format="raw",
    virtual_size=4096,
    size=4096,
    source_format="vmdk",
    source_size=123,
    source_digest=Digest("md5", "0" * 32),
    evidence="checksum",
    made_by="qemu-img convert",
    source="test",
    fetched_at=1.5,
)


@dataclass
class Writer(BaseWriter):
    """As little as a writer with a path needs."""

    path: Path | None

    def publish(self, record: BaseRecord) -> BaseImage:
        raise NotImplementedError

    def discard(self) -> None:
        pass


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    """An author keeps the bytes, and need not know what is in them."""
    (tmp_path / "record").write_bytes(dump_record(RECORD))
    assert read_record(tmp_path / "record") == RECORD


def test_a_record_need_not_be_a_file() -> None:
    """An attribute, a row, an object: bytes are enough."""
    assert load_record(dump_record(RECORD), "vms/base.img") == RECORD


@pytest.mark.parametrize("place", ["missing", "missing/record", "file/record"])
def test_a_record_that_is_not_there_is_none(place: str, tmp_path: Path) -> None:
    """So that looking for a base is one call."""
    (tmp_path / "file").touch()
    assert read_record(tmp_path / place) is None


@pytest.mark.parametrize(
    "damaged", [b"", b"{}", dump_record(RECORD)[:-20], dump_record(RECORD).replace(b"4096", b'"x"')]
)
def test_a_damaged_record_is_logged_and_left_out(
    damaged: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One base that cannot be read hides no other."""
    (tmp_path / "record").write_bytes(damaged)
    with caplog.at_level(logging.WARNING):
        assert read_record(tmp_path / "record") is None
        assert load_record(damaged, "vms/base.img") is None
    assert str(tmp_path / "record") in caplog.text
    assert "vms/base.img is left alone" in caplog.text


def test_a_record_that_may_not_be_read_is_an_error(tmp_path: Path) -> None:
    """What cannot be told is not "no such base"."""
    (tmp_path / "record").mkdir()
    with pytest.raises(IsADirectoryError):
        read_record(tmp_path / "record")


def test_staging_is_shared_with_the_core(tmp_path: Path) -> None:
    """What nobody holds goes, whoever made it; other names in the root are the backend's."""
    cache = ImageCache(CacheConfig(root=tmp_path), source=FakeSource(), backend=MemoryBackend())
    cache.recover()
    held = new_entry(tmp_path / "staging", "mine", 0o700)
    (tmp_path / "staging" / "mine-too").mkdir()
    (tmp_path / "index").mkdir()
    assert cache.recover().removed == ("staging/mine-too",)
    assert held.path.is_dir()
    held.release()
    assert cache.recover().removed == (f"staging/{held.path.name}",)
    assert (tmp_path / "index").is_dir()
    documented = inspect.getdoc(BackendPaths) or ""
    assert all(f"``{path.name}``" in documented for path in tmp_path.iterdir() if path.name != "index")


def test_a_writer_with_a_path_inherits_the_rest(tmp_path: Path) -> None:
    """Sizes, writes at any place, reads, syncs: of the file at its path."""
    path = tmp_path / "disk"
    path.touch()
    writer = Writer(path)
    writer.set_size(8192)
    writer.write_at(4096, memoryview(b"data"))
    writer.write_at(9000, bytearray(b"more"))
    writer.sync()
    assert path.read_bytes() == bytes(4096) + b"data" + bytes(4900) + b"more"
    assert writer.read_at(4096, 4) == b"data"


def test_a_writer_without_a_path_says_what_it_lacks() -> None:
    """An author who forgot to override is told so."""
    writer = Writer(None)
    for call in (partial(writer.set_size, 1), partial(writer.write_at, 0, b"x"), writer.sync):
        with pytest.raises(NotImplementedError, match="has its own set_size, write_at and sync"):
            call()
    assert writer.read_at(0, 1) is None


def test_an_entry_is_held_until_its_process_ends(tmp_path: Path) -> None:
    """Also when that is killed: nobody has to guess by ages or process ids."""
    code = """
import sys, time
from pathlib import Path
from nova_imagecache.backends import new_entry
held = new_entry(Path(sys.argv[1]), "img", 0o700)
print("held", flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        (entry,) = tmp_path.iterdir()
        assert hold(entry, wait=False) is None
        child.kill()
    held = hold(entry, wait=False)
    assert held is not None
    assert held.path == entry
    held.release()

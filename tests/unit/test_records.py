"""Records on storage: what is written comes back, and what cannot be read is told."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from nova_imagecache import _records
from nova_imagecache._models import BaseRecord, Digest
from nova_imagecache._records import DiskRecord, RecordError

DIGEST = Digest("sha256", "ab" * 32)
BASE = BaseRecord(
    image_id="img",
    format="qcow2",
    virtual_size=1 << 40,
    size=12345,
    source_format="qcow2",
    source_size=12345,
    source_digest=DIGEST,
    evidence="os_hash",
    made_by="stored",
    source="glance",
    fetched_at=1700000000.25,
    inspector=1,
)
DISK = DiskRecord(
    image_id="img",
    format="qcow2",
    reference="link",
    created_size=1 << 30,
    digest=DIGEST,
    base_format="raw",
    made_at=1700000000.5,
)


def base_json(**changes: Any) -> bytes:
    return json.dumps({**json.loads(_records.dump_base(BASE)), **changes}).encode()


def disk_json(**changes: Any) -> bytes:
    return json.dumps({**json.loads(_records.dump_disk(DISK)), **changes}).encode()


def test_base_records_come_back_as_they_were() -> None:
    """With and without a digest."""
    for record in (BASE, replace(BASE, source_digest=None, evidence="none")):
        assert _records.load_base(_records.dump_base(record)) == record


def test_disk_records_come_back_as_they_were() -> None:
    """With and without a digest, and whatever ties the disk to its base."""
    for record in (DISK, replace(DISK, digest=None), replace(DISK, reference="path"), replace(DISK, reference="none")):
        assert _records.load_disk(_records.dump_disk(record)) == record


def test_records_are_json_that_people_read() -> None:
    """One field a line, sorted, ending in a newline: part of layout 1."""
    text = _records.dump_base(BASE).decode()
    assert text.endswith("}\n")
    keys = [line.split('"')[1] for line in text.splitlines() if line.startswith(' "')]
    assert keys == sorted(json.loads(text))
    assert ' "version": 1,\n' in text


def test_fields_that_a_later_release_adds_are_left_alone() -> None:
    """Records of the same version may grow."""
    assert _records.load_base(base_json(colour="red")) == BASE
    assert _records.load_disk(disk_json(colour="red")) == DISK


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"7", b"\xff", b'"x"', b"{}", b"\0" * 100])
def test_bytes_that_are_no_record_are_told(data: bytes) -> None:
    """A torn or foreign file."""
    for load in (_records.load_base, _records.load_disk):
        with pytest.raises(RecordError):
            load(data)


@pytest.mark.parametrize("version", [0, 2, "1", None, [1]])
def test_other_versions_are_told(version: Any) -> None:
    """What a newer library wrote is not guessed at."""
    with pytest.raises(RecordError, match="version"):
        _records.load_base(base_json(version=version))
    with pytest.raises(RecordError, match="version"):
        _records.load_disk(disk_json(version=version))


@pytest.mark.parametrize(
    "changes",
    [
        {"image_id": 7},
        {"format": None},
        {"virtual_size": "4096"},
        {"size": 1.5},
        {"source_format": []},
        {"source_size": None},
        {"inspector": "1"},
        {"source_digest": {"algorithm": "sha256"}},
        {"source_digest": {"algorithm": "sha256", "value": "x"}},
        {"source_digest": {"algorithm": "sha256", "value": 7}},
        {"source_digest": {"algorithm": "crc", "value": "00"}},
        {"source_digest": {"algorithm": ["sha256"], "value": "00"}},
        {"source_digest": "sha256:00"},
        {"source_digest": 7},
        {"fetched_at": "yesterday"},
        {"evidence": 7},
    ],
    ids=repr,
)
def test_base_records_of_the_wrong_types_are_told(changes: dict[str, Any]) -> None:
    """Nothing later trips over them."""
    with pytest.raises(RecordError):
        _records.load_base(base_json(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"image_id": 7},
        {"format": None},
        {"reference": 1},
        {"base_format": {}},
        {"digest": {"algorithm": "md5", "value": None}},
        {"digest": "md5:00"},
        {"created_size": "1"},
    ],
    ids=repr,
)
def test_disk_records_of_the_wrong_types_are_told(changes: dict[str, Any]) -> None:
    """Nothing later trips over them."""
    with pytest.raises(RecordError):
        _records.load_disk(disk_json(**changes))


@pytest.mark.parametrize("name", ["image_id", "format", "virtual_size", "made_by", "source_digest", "fetched_at"])
def test_a_missing_field_is_told_by_name(name: str) -> None:
    """So that an operator sees what is wrong."""
    values = json.loads(_records.dump_base(BASE))
    del values[name]
    with pytest.raises(RecordError, match=name):
        _records.load_base(json.dumps(values).encode())

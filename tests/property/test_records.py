"""Properties of records: whatever is written comes back, whatever is read is a record or told."""

from __future__ import annotations

import contextlib
import hashlib
import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from nova_imagecache import _records
from nova_imagecache._config import CacheConfig
from nova_imagecache._models import DIGEST_ALGORITHMS, BaseRecord, Digest
from nova_imagecache._records import DiskRecord, RecordError
from nova_imagecache.exceptions import ConfigError, InvalidRequestError

TEXT = st.text(max_size=30)
SIZES = st.integers(0, 1 << 63)
TIMES = st.floats(0, 1e12)
DIGESTS = st.none() | st.builds(
    lambda algorithm, data: Digest(algorithm, hashlib.new(algorithm, data, usedforsecurity=False).hexdigest()),
    st.sampled_from(list(DIGEST_ALGORITHMS)),
    st.binary(max_size=8),
)
BASES = st.builds(
    BaseRecord,
    image_id=TEXT,
    format=TEXT,
    virtual_size=SIZES,
    size=SIZES,
    source_format=TEXT,
    source_size=SIZES,
    source_digest=DIGESTS,
    evidence=st.sampled_from(["expected", "os_hash", "checksum", "unverified", "none"]),
    made_by=TEXT,
    source=TEXT,
    fetched_at=TIMES,
    inspector=st.integers(0, 100),
    version=st.just(1),
)
DISKS = st.builds(
    DiskRecord,
    image_id=TEXT,
    format=TEXT,
    reference=st.sampled_from(["link", "path", "clone", "none"]),
    created_size=SIZES,
    digest=DIGESTS,
    base_format=TEXT,
    made_at=TIMES,
    version=st.just(1),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)


class TestRoundTrip:
    """Written and read."""

    @given(BASES)
    def test_base_records(self, record: BaseRecord) -> None:
        """Equal, field by field."""
        assert _records.load_base(_records.dump_base(record)) == record

    @given(DISKS)
    def test_disk_records(self, record: DiskRecord) -> None:
        """Equal, field by field."""
        assert _records.load_disk(_records.dump_disk(record)) == record


class TestFuzz:
    """Nothing but RecordError comes out of a damaged record."""

    @given(st.binary(max_size=200))
    def test_any_bytes(self, data: bytes) -> None:
        """Not even text."""
        for load in (_records.load_base, _records.load_disk):
            with contextlib.suppress(RecordError):
                load(data)

    @given(BASES, st.integers(0), st.binary(min_size=1, max_size=4))
    def test_damaged_bytes(self, record: BaseRecord, place: int, new: bytes) -> None:
        """A few of them changed."""
        data = bytearray(_records.dump_base(record))
        at = place % len(data)
        data[at : at + len(new)] = new
        with contextlib.suppress(RecordError):
            _records.load_base(bytes(data))

    @given(BASES, st.data())
    def test_changed_fields(self, record: BaseRecord, data: st.DataObject) -> None:
        """One field of any other type; what is taken has the types that it says."""
        values = json.loads(_records.dump_base(record))
        name = data.draw(st.sampled_from(sorted(values)))
        values[name] = data.draw(JSON)
        try:
            taken = _records.load_base(json.dumps(values).encode())
        except RecordError:
            return
        assert isinstance(taken.size, int)
        assert isinstance(taken.fetched_at, int | float)
        assert taken.source_digest is None or isinstance(taken.source_digest, Digest)

    @given(DISKS, st.data())
    def test_changed_fields_of_disks(self, record: DiskRecord, data: st.DataObject) -> None:
        """As for bases."""
        values = json.loads(_records.dump_disk(record))
        name = data.draw(st.sampled_from(sorted(values)))
        values[name] = data.draw(JSON)
        try:
            taken = _records.load_disk(json.dumps(values).encode())
        except RecordError:
            return
        assert isinstance(taken.reference, str)
        assert taken.digest is None or isinstance(taken.digest, Digest)


class TestOtherInput:
    """Values that people write."""

    @given(JSON, JSON)
    def test_digests_of_anything(self, algorithm: Any, value: Any) -> None:
        """A Digest, or an InvalidRequestError."""
        with contextlib.suppress(InvalidRequestError):
            Digest(algorithm, value)

    @given(st.dictionaries(st.sampled_from(sorted(CacheConfig.__dataclass_fields__)) | TEXT, JSON, max_size=6))
    def test_configurations_of_anything(self, values: dict[str, Any]) -> None:
        """A CacheConfig, or a ConfigError."""
        with contextlib.suppress(ConfigError):
            assert CacheConfig.from_mapping(values).root.is_absolute()

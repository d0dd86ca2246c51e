"""Records to JSON and back: what is written beside a base and beside a root disk (layout 1)."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import TypeVar

from nova_imagecache._models import BaseRecord, Digest, Reference

RECORD_VERSION = 1


class RecordError(ValueError):
    """A record that cannot be read: damaged, or of a version this library does not know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskRecord:
    """What is written down about a root disk when it is made. ``created_size`` in bytes; ``made_at`` POSIX seconds.

    ``own_directory``: the disk's directory was made for it, and goes with it when it is empty. ``attaching``: the image
    to whose base it is being attached; of the two, the disk's header tells which one it reads.
    """

    image_id: str
    format: str
    reference: Reference
    created_size: int
    digest: Digest | None
    base_format: str
    made_at: float
    own_directory: bool = False
    attaching: str | None = None
    version: int = RECORD_VERSION


class LaterRecordError(RecordError):
    """A record of a later release, which may keep more than this library knows of."""


_Record = TypeVar("_Record", BaseRecord, DiskRecord)


def dump_base(record: BaseRecord) -> bytes:
    """The record as ``base.json``."""
    return _dump(record)


def dump_disk(record: DiskRecord) -> bytes:
    """The record as ``<name>.json``."""
    return _dump(record)


def load_base(data: bytes) -> BaseRecord:
    """The record in ``base.json``.

    Raises:
        RecordError: it cannot be read.
    """
    return _load(data, BaseRecord, "source_digest")


def load_disk(data: bytes) -> DiskRecord:
    """The record in ``<name>.json``.

    Raises:
        RecordError: it cannot be read.
    """
    return _load(data, DiskRecord, "digest")


def _dump(record: BaseRecord | DiskRecord) -> bytes:
    # a line for each field, without the encoder's indent: with it JSON is made in Python, and every warm disk waits
    values = {name: getattr(record, name) for name in sorted(_KINDS[type(record)])}
    lines = [f' "{name}": {json.dumps(value, default=_digest)}' for name, value in values.items()]
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _digest(value: Digest) -> dict[str, str]:
    return {"algorithm": value.algorithm, "value": value.value}


def _load(data: bytes, cls: type[_Record], digest: str) -> _Record:
    try:
        values = json.loads(data.decode())  # of text, nothing is to be guessed
    except ValueError as err:
        raise RecordError(f"not JSON: {err}") from err
    if not isinstance(values, dict):
        raise RecordError("not a JSON object")
    if (version := values.get("version")) != RECORD_VERSION:
        later = isinstance(version, int) and version > RECORD_VERSION
        error = LaterRecordError if later else RecordError
        raise error(f"record version {version!r}; this library reads {RECORD_VERSION}")
    kinds = _KINDS[cls]
    if not values.keys() <= kinds.keys():  # fields that a later minor release adds are left alone
        values = {name: value for name, value in values.items() if name in kinds}
    if isinstance(values.get(digest), dict):
        try:
            values[digest] = Digest(**values[digest])
        except (TypeError, ValueError) as err:
            raise RecordError(f"{digest}: {err}") from err
    for name, value in values.items():
        if not isinstance(value, kinds[name]):
            raise RecordError(f"{name} is no {' or '.join(each.__name__ for each in kinds[name])}")
    try:
        return cls(**values)
    except TypeError as err:
        raise RecordError(str(err)) from err


_TYPES = {
    "str": (str,),
    "str | None": (str, type(None)),
    "int": (int,),
    "bool": (bool,),
    "float": (int, float),
    "Digest | None": (Digest, type(None)),
    "Reference": (str,),
    "Evidence": (str,),
}
_KINDS = {cls: {f.name: _TYPES[str(f.type)] for f in fields(cls)} for cls in (BaseRecord, DiskRecord)}
"""Of each record's fields, what their values may be."""

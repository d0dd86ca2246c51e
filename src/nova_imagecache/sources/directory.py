"""Images from a directory: for tests, for air-gapped hosts, and as the shortest example of a source."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Self

from nova_imagecache._models import ImageInfo
from nova_imagecache.exceptions import (
    ConfigError,
    ImageNotActiveError,
    ImageNotFoundError,
    InvalidRequestError,
    SourceError,
    SourceForbiddenError,
    SourceUnavailableError,
)
from nova_imagecache.sources._metadata import GIB, announced_digest, is_plain_id

_CHUNK = 2**20

_TEXTS = ("disk_format", "status", "os_hash_algo", "os_hash_value", "checksum")
_NUMBERS = ("size", "min_disk")


class DirectorySource:
    """The images below ``path``, an absolute path: ``<image-id>.img`` with ``<image-id>.json`` beside it.

    The JSON is an object with ``disk_format``, and if wanted ``size`` (bytes; else the file's), ``status`` (else
    "active"), ``os_hash_algo`` and ``os_hash_value``, ``checksum`` (md5), ``min_disk`` (GiB), as Glance names them.

    Raises:
        ConfigError: ``path`` is no absolute path. The directory itself is looked at when an image is asked for.
    """

    def __init__(self, path: str | Path) -> None:
        problems = _path_problems(path)
        if problems:
            raise ConfigError(problems)
        self._path = Path(path)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """A source made from ``source_options``: ``path`` alone.

        Raises:
            ConfigError: with all problems of the options at once.
        """
        problems = [f"{name}: unknown option; known: path" for name in options if name != "path"]
        problems += _path_problems(options["path"]) if "path" in options else ["path: must be given"]
        if problems:
            raise ConfigError(problems)
        return cls(options["path"])

    def __repr__(self) -> str:
        return f"<DirectorySource at {self._path}>"

    @property
    def name(self) -> str:
        """``directory``."""
        return "directory"

    def get(self, image_id: str) -> ImageInfo:
        """What the image's JSON says of it.

        Raises:
            ImageNotFoundError: no ``<image-id>.json``, or an id that is no plain file name.
            SourceForbiddenError: a file may not be read.
            SourceUnavailableError: a file cannot be read at this time.
            SourceError: the JSON is not as it must be, or the ``.img`` of an active image is missing.
        """
        if not is_plain_id(image_id):
            raise ImageNotFoundError(f"no image has the id {image_id!r}", image_id=image_id, stage="metadata")
        path = self._path / f"{image_id}.json"
        try:
            text = path.read_bytes()
        except OSError as err:
            raise _os_error(err, path, image_id, "metadata") from err
        values = _properties(text, path, image_id)
        size = values.get("size")
        status = values.get("status", "active")
        if status == "active":
            length = self._length(image_id)
            size = length if size is None else size
        digest, evidence = announced_digest(
            values.get("os_hash_algo"), values.get("os_hash_value"), values.get("checksum")
        )
        return ImageInfo(
            image_id=image_id,
            disk_format=values["disk_format"],
            status=status,
            size=size,
            min_disk=values.get("min_disk", 0) * GIB,
            digest=digest,
            digest_evidence=evidence,
        )

    @contextmanager
    def open(self, image: ImageInfo, offset: int = 0) -> Iterator[Iterator[bytes]]:
        """The image file's bytes from ``offset`` to its end, in chunks of 1 MiB.

        Raises, on entering and while iterating:
            ImageNotActiveError: as the image's JSON is now.
            InvalidRequestError: ``offset`` is negative.
            the same as ``get``.
        """
        if offset < 0:
            raise InvalidRequestError(f"no byte {offset}", image_id=image.image_id, stage="fetch")
        status = self.get(image.image_id).status
        if status != "active":
            raise ImageNotActiveError(status, image_id=image.image_id, stage="fetch")
        path = self._path / f"{image.image_id}.img"
        try:
            file = path.open("rb", buffering=0)
        except OSError as err:
            raise _missing_data(err, path, image.image_id, "fetch") from err
        with file:
            yield _chunks(file, offset, path, image.image_id)

    def _length(self, image_id: str) -> int:
        path = self._path / f"{image_id}.img"
        try:
            result = path.stat()
        except OSError as err:
            raise _missing_data(err, path, image_id, "metadata") from err
        if not stat.S_ISREG(result.st_mode):
            # opening a FIFO would wait for its writer
            raise _wrong(path, "is no regular file", image_id)
        return result.st_size


def _chunks(file: BinaryIO, offset: int, path: Path, image_id: str) -> Iterator[bytes]:
    try:
        file.seek(offset)
        while chunk := file.read(_CHUNK):
            yield chunk
    except OSError as err:
        raise _os_error(err, path, image_id, "fetch") from err


def _path_problems(path: object) -> list[str]:
    if isinstance(path, str | Path) and "\0" not in str(path) and Path(path).is_absolute():
        return []
    return [f"path: {path!r} is no absolute path"]


def _properties(text: bytes, path: Path, image_id: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError as err:
        raise _wrong(path, f"is no JSON: {err}", image_id) from err
    if not isinstance(values, dict):
        raise _wrong(path, "is no JSON object", image_id)
    # null stands for a property that is not set, as in Glance's own answers
    values = {name: value for name, value in values.items() if value is not None}
    problems = [] if "disk_format" in values else ["disk_format must be given"]
    problems += [
        f"{name} must be a text, not {values[name]!r}"
        for name in _TEXTS
        if name in values and not (isinstance(values[name], str) and values[name])
    ]
    problems += [
        f"{name} must be a whole number from 0, not {values[name]!r}"
        for name in _NUMBERS
        if name in values and (type(values[name]) is not int or values[name] < 0)
    ]
    if problems:
        raise _wrong(path, "; ".join(problems), image_id)
    return values


def _wrong(path: Path, what: str, image_id: str) -> SourceError:
    return SourceError(f"{path}: {what}", image_id=image_id, stage="metadata", todo="Correct the file and call again")


def _missing_data(err: OSError, path: Path, image_id: str, stage: str) -> SourceError:
    if isinstance(err, FileNotFoundError):
        return SourceError(f"{path} is missing", image_id=image_id, stage=stage, todo="Put the image's data there")
    return _os_error(err, path, image_id, stage)


def _os_error(err: OSError, path: Path, image_id: str, stage: str) -> SourceError:
    if isinstance(err, FileNotFoundError):
        return ImageNotFoundError(f"{path} does not exist", image_id=image_id, stage=stage, todo="Check the image id")
    if isinstance(err, PermissionError):
        todo = "Give this user the right to read it"
        return SourceForbiddenError(f"{path} may not be read", image_id=image_id, stage=stage, todo=todo)
    return SourceUnavailableError(f"{path}: {err.strerror or err}", image_id=image_id, stage=stage)

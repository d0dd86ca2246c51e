"""DirectorySource beyond the contract: its files, their defaults, and what is wrong with them."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from nova_imagecache import (
    ConfigError,
    Digest,
    DirectorySource,
    ImageInfo,
    ImageNotActiveError,
    ImageNotFoundError,
    InvalidRequestError,
    SourceError,
    SourceForbiddenError,
    SourceUnavailableError,
)

DATA = b"twelve bytes"


@pytest.fixture
def source(tmp_path: Path) -> DirectorySource:
    return DirectorySource(tmp_path)


def put(directory: Path, image_id: str = "img", data: bytes | None = DATA, **properties: Any) -> None:
    (directory / f"{image_id}.json").write_text(json.dumps(properties))
    if data is not None:
        (directory / f"{image_id}.img").write_bytes(data)


def read(source: DirectorySource, image: ImageInfo, offset: int = 0) -> bytes:
    with source.open(image, offset) as chunks:
        return b"".join(chunks)


def test_disk_format_is_enough(source: DirectorySource, tmp_path: Path) -> None:
    """All but disk_format may be left out: size is the file's, and the image is active and unverified."""
    put(tmp_path, disk_format="qcow2")
    assert source.get("img") == ImageInfo(image_id="img", disk_format="qcow2", size=len(DATA))


def test_all_properties(source: DirectorySource, tmp_path: Path) -> None:
    """What the JSON says goes before what the file shows."""
    value = hashlib.sha512(DATA).hexdigest()
    put(
        tmp_path,
        disk_format="raw",
        size=99,
        min_disk=2,
        os_hash_algo="sha512",
        os_hash_value=value,
        checksum="0" * 32,
        status="active",
    )
    assert source.get("img") == ImageInfo(
        image_id="img",
        disk_format="raw",
        size=99,
        min_disk=2 * 2**30,
        digest=Digest("sha512", value),
        digest_evidence="os_hash",
    )


def test_null_is_not_set(source: DirectorySource, tmp_path: Path) -> None:
    """A null, as Glance writes it, is a property that is not set."""
    put(tmp_path, disk_format="raw", size=None, os_hash_algo=None, os_hash_value=None, checksum="0" * 32)
    image = source.get("img")
    assert (image.size, image.digest, image.digest_evidence) == (len(DATA), Digest("md5", "0" * 32), "checksum")


def test_inactive_image_needs_no_data(source: DirectorySource, tmp_path: Path) -> None:
    """An image with another status needs no .img, and is not opened even with one."""
    put(tmp_path, disk_format="raw", status="deactivated", data=None)
    assert source.get("img").status == "deactivated"
    (tmp_path / "img.img").write_bytes(DATA)
    with pytest.raises(ImageNotActiveError, match="deactivated"):
        read(source, ImageInfo(image_id="img", disk_format="raw"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"{", "is no JSON"),
        (b"\xff\xfe", "is no JSON"),
        (b"[]", "is no JSON object"),
        (b"{}", "disk_format must be given"),
        (b'{"disk_format": 3}', "disk_format must be a text"),
        (b'{"disk_format": "raw", "status": ""}', "status must be a text"),
        (b'{"disk_format": "raw", "size": "9"}', "size must be a whole number"),
        (b'{"disk_format": "raw", "size": -1}', "size must be a whole number"),
        (b'{"disk_format": "raw", "min_disk": true}', "min_disk must be a whole number"),
        (b'{"min_disk": 1.5}', r"disk_format must be given; min_disk must be"),
    ],
)
def test_wrong_json(source: DirectorySource, tmp_path: Path, text: bytes, words: str) -> None:
    """Wrong JSON is a SourceError that names the file and all that is wrong in it."""
    put(tmp_path)
    (tmp_path / "img.json").write_bytes(text)
    with pytest.raises(SourceError, match=words) as caught:
        source.get("img")
    assert str(tmp_path / "img.json") in str(caught.value)
    assert (caught.value.image_id, caught.value.stage) == ("img", "metadata")


def test_missing_files(source: DirectorySource, tmp_path: Path) -> None:
    """Without .json there is no image; an active image without .img is an error that names the file."""
    (tmp_path / "img.img").write_bytes(DATA)
    with pytest.raises(ImageNotFoundError, match=r"img\.json does not exist"):
        source.get("img")
    put(tmp_path, "other", None, disk_format="raw")
    with pytest.raises(SourceError, match=r"other\.img is missing") as caught:
        source.get("other")
    assert not isinstance(caught.value, ImageNotFoundError)


def test_data_that_goes_away(source: DirectorySource, tmp_path: Path) -> None:
    """An .img that is gone when it is opened is named."""
    put(tmp_path, disk_format="raw")
    image = source.get("img")
    (tmp_path / "img.img").unlink()
    with pytest.raises(SourceError, match=r"img\.img is missing"):
        read(source, image)


def test_only_regular_files(source: DirectorySource, tmp_path: Path) -> None:
    """A FIFO in the image's place is refused: opening it would wait for ever."""
    put(tmp_path, disk_format="raw", data=None)
    os.mkfifo(tmp_path / "img.img")
    with pytest.raises(SourceError, match="no regular file"):
        source.get("img")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_files(source: DirectorySource, tmp_path: Path) -> None:
    """A file that may not be read is SourceForbiddenError."""
    put(tmp_path, disk_format="raw")
    (tmp_path / "img.json").chmod(0)
    with pytest.raises(SourceForbiddenError, match="may not be read"):
        source.get("img")


def test_ids_stay_in_the_directory(tmp_path: Path) -> None:
    """No id reaches a file outside the directory, whatever lies there."""
    inside = tmp_path / "inside"
    inside.mkdir()
    put(tmp_path, "out", disk_format="raw")
    source = DirectorySource(inside)
    for image_id in ("../out", f"{tmp_path}/out", "x/../../out", "..", "."):
        with pytest.raises(ImageNotFoundError):
            source.get(image_id)
        with pytest.raises(ImageNotFoundError):
            read(source, ImageInfo(image_id=image_id, disk_format="raw"))


def test_read_errors_are_retryable(source: DirectorySource, tmp_path: Path) -> None:
    """A file that cannot be read just now is SourceUnavailableError."""
    (tmp_path / "img.json").mkdir()
    with pytest.raises(SourceUnavailableError, match=r"img\.json: Is a directory"):
        source.get("img")


def test_offsets(source: DirectorySource, tmp_path: Path) -> None:
    """Behind the end lies nothing; a negative offset is the caller's mistake."""
    put(tmp_path, disk_format="raw")
    image = source.get("img")
    assert read(source, image, 7) == b"bytes"
    assert read(source, image, 1000) == b""
    with pytest.raises(InvalidRequestError):
        read(source, image, -1)


def test_chunks_are_a_mebibyte(source: DirectorySource, tmp_path: Path) -> None:
    """A large file comes in chunks of 1 MiB."""
    put(tmp_path, disk_format="raw", data=bytes(2**21 + 1))
    with source.open(source.get("img")) as chunks:
        assert [len(chunk) for chunk in chunks] == [2**20, 2**20, 1]


@pytest.mark.parametrize("options", [{}, {"path": "relative"}, {"path": 5}, {"path": ""}, {"path": "/a\0b"}])
def test_path_must_be_absolute(options: dict[str, Any]) -> None:
    """The path is given, and absolute."""
    with pytest.raises(ConfigError, match="path"):
        DirectorySource.from_options(options)


def test_options(tmp_path: Path) -> None:
    """All problems come at once; good options make a source, without looking at the directory."""
    with pytest.raises(ConfigError) as caught:
        DirectorySource.from_options({"pth": "/a", "path": "b"})
    assert len(caught.value.problems) == 2
    source = DirectorySource.from_options({"path": "/does/not/exist"})
    assert repr(source) == "<DirectorySource at /does/not/exist>"
    assert source.name == "directory"
    with pytest.raises(ConfigError):
        DirectorySource("relative")

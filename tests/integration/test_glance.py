"""GlanceSource against a real Glance."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
from pathlib import Path

import pytest
from keystoneauth1.session import Session
from keystoneauth1.token_endpoint import Token

from nova_imagecache import (
    Digest,
    GlanceSource,
    ImageInfo,
    ImageNotActiveError,
    ImageNotFoundError,
    SourceError,
)
from nova_imagecache.testing import SourceContract
from nova_imagecache.testing._source_contract import SourceHarness
from services.glance import ADMIN, MEMBER, STRANGER, GlanceServer

pytestmark = pytest.mark.services

GIB = 2**30
DATA = random.Random(7).randbytes(2**20 + 77)


class GlanceHarness:
    def __init__(self, server: GlanceServer) -> None:
        self.server = server
        self.source = GlanceSource(endpoint=server.url, token=MEMBER)

    def add_image(self, data: bytes | None, *, disk_format: str = "raw", min_disk: int = 0) -> str:
        if data is None:
            return self.server.create(disk_format=disk_format, min_disk=min_disk // GIB)
        return self.server.upload(data, disk_format=disk_format, min_disk=min_disk // GIB)

    def remove_image(self, image_id: str) -> None:
        self.server.delete(image_id)


class TestGlanceSource(SourceContract):
    """GlanceSource keeps the contract with a real Glance behind it."""

    @pytest.fixture
    def harness(self, glance: GlanceServer) -> GlanceHarness:
        return GlanceHarness(glance)

    def kept(self, harness: SourceHarness, tmp_path: Path) -> dict[str, object]:
        del tmp_path
        assert isinstance(harness, GlanceHarness)
        images = harness.server.call("GET", "/v2/images?limit=1000")["images"]
        return {image["id"]: image for image in images}


@pytest.fixture(scope="module")
def image_id(glance: GlanceServer) -> str:
    return glance.upload(DATA, min_disk=1)


@pytest.fixture(params=["token", "session"])
def source(request: pytest.FixtureRequest, glance: GlanceServer) -> GlanceSource:
    if request.param == "token":
        return GlanceSource(endpoint=glance.url, token=MEMBER)
    return GlanceSource(session=Session(auth=Token(glance.url, MEMBER)))


def read(source: GlanceSource, image: ImageInfo, offset: int = 0) -> bytes:
    with source.open(image, offset) as chunks:
        return b"".join(chunks)


def test_get(source: GlanceSource, glance: GlanceServer, image_id: str) -> None:
    """Get reads all that Glance says, by one request."""
    with glance.recorded() as requests:
        image = source.get(image_id)
    assert [(request.method, request.path) for request in requests] == [("GET", f"/v2/images/{image_id}")]
    assert image == ImageInfo(
        image_id=image_id,
        disk_format="raw",
        status="active",
        size=len(DATA),
        min_disk=GIB,
        digest=Digest("sha512", hashlib.sha512(DATA).hexdigest()),
        digest_evidence="os_hash",
        locations=(f"file://{glance.dir}/images/{image_id}",),
        stores=("s0",),
    )


def test_open(source: GlanceSource, glance: GlanceServer, image_id: str) -> None:
    """Open is one request, and not one more for properties."""
    image = source.get(image_id)
    with glance.recorded() as requests:
        assert read(source, image) == DATA
    assert [(request.path, request.range, request.status) for request in requests] == [
        (f"/v2/images/{image_id}/file", None, 200)
    ]


def test_open_in_the_middle(source: GlanceSource, glance: GlanceServer, image_id: str) -> None:
    """An offset is one request for a part, which the file store answers with 206."""
    image = source.get(image_id)
    with glance.recorded() as requests:
        assert read(source, image, 1000) == DATA[1000:]
    assert [(request.range, request.status) for request in requests] == [("bytes=1000-", 206)]


def test_offset_behind_an_unknown_end(source: GlanceSource, glance: GlanceServer, image_id: str) -> None:
    """Where the size is not known, Glance's own 416 is read right."""
    image = ImageInfo(image_id=image_id, disk_format="raw")
    assert read(source, image, len(DATA) - 1) == DATA[-1:]
    assert read(source, image, len(DATA)) == b""


def test_connections_are_kept(glance: GlanceServer, image_id: str, caplog: pytest.LogCaptureFixture) -> None:
    """A fetch that was read to its end gives its connection back."""
    caplog.set_level(logging.DEBUG, "urllib3")
    source = GlanceSource(endpoint=glance.url, token=MEMBER)
    for _ in range(5):
        read(source, source.get(image_id))
    assert caplog.text.count("Starting new HTTP connection") == 1


def test_unknown_image(source: GlanceSource) -> None:
    """An id that Glance does not know is ImageNotFoundError."""
    missing = "00000000-0000-4000-8000-000000000000"
    with pytest.raises(ImageNotFoundError):
        source.get(missing)
    with pytest.raises(ImageNotFoundError):
        read(source, ImageInfo(image_id=missing, disk_format="raw"))


def test_another_projects_image(glance: GlanceServer, image_id: str) -> None:
    """Glance hides an image from another project; to us it does not exist."""
    stranger = GlanceSource(endpoint=glance.url, token=STRANGER)
    with pytest.raises(ImageNotFoundError):
        stranger.get(image_id)
    with pytest.raises(ImageNotFoundError):
        read(stranger, ImageInfo(image_id=image_id, disk_format="raw"))


def test_queued_image(source: GlanceSource, glance: GlanceServer) -> None:
    """A queued image comes back with its status; Glance's 204 for its data is ImageNotActiveError."""
    image = source.get(glance.create())
    assert (image.status, image.size, image.digest) == ("queued", None, None)
    with pytest.raises(ImageNotActiveError) as caught:
        read(source, image)
    assert caught.value.status == "queued"


def test_image_without_format(source: GlanceSource, glance: GlanceServer) -> None:
    """A queued image need not have a format yet."""
    body = json.dumps({"name": "bare"}).encode()
    image_id = glance.call("POST", "/v2/images", body, "application/json")["id"]
    image = source.get(image_id)
    assert (image.status, image.disk_format) == ("queued", "")


def test_deactivated_image(source: GlanceSource, glance: GlanceServer) -> None:
    """A deactivated image comes back with its status; Glance's 403 for its data is ImageNotActiveError."""
    image_id = glance.upload(DATA)
    before = source.get(image_id)
    glance.deactivate(image_id)
    assert source.get(image_id).status == "deactivated"
    with pytest.raises(ImageNotActiveError) as caught:
        read(source, before)
    assert caught.value.status == "deactivated"
    glance.reactivate(image_id)
    assert read(source, before) == DATA


def test_deleted_image(source: GlanceSource, glance: GlanceServer) -> None:
    """A deleted image is ImageNotFoundError, to an admin too."""
    image_id = glance.upload(DATA)
    before = source.get(image_id)
    glance.delete(image_id)
    for reader in (source, GlanceSource(endpoint=glance.url, token=ADMIN)):
        with pytest.raises(ImageNotFoundError):
            reader.get(image_id)
        with pytest.raises(ImageNotFoundError):
            read(reader, before)


def test_lost_data(source: GlanceSource, glance: GlanceServer) -> None:
    """An active image whose file is gone from the store (Glance answers 204) is said to be that."""
    image = source.get(glance.upload(DATA))
    (glance.dir / "images" / image.image_id).unlink()
    with pytest.raises(SourceError, match="its store has no data"):
        read(source, image)


def test_image_of_no_bytes(source: GlanceSource, glance: GlanceServer) -> None:
    """An active image of zero bytes is read as such."""
    image = source.get(glance.upload(b""))
    assert (image.status, image.size) == ("active", 0)
    assert read(source, image) == b""


def test_upload_from_a_file(source: GlanceSource, glance: GlanceServer, tmp_path: Path) -> None:
    """The server's helpers take files, of any content if told so, and count downloads."""
    path = tmp_path / "image"
    path.write_bytes(DATA)
    image_id = glance.upload(path, disk_format="qcow2", container_format="ovf", name="named")
    assert glance.show(image_id)["name"] == "named"
    assert glance.downloads(image_id) == 0
    image = source.get(image_id)
    assert read(source, image) == DATA
    assert read(source, image, 5) == DATA[5:]
    assert glance.downloads(image_id) == 2


def test_environment(glance: GlanceServer, image_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The OS_* environment with a token and an endpoint reaches Glance."""
    for name in os.environ:
        if name.startswith("OS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("OS_AUTH_TYPE", "admin_token")
    monkeypatch.setenv("OS_ENDPOINT", glance.url)
    monkeypatch.setenv("OS_TOKEN", MEMBER)
    source = GlanceSource.from_options({})
    assert read(source, source.get(image_id)) == DATA

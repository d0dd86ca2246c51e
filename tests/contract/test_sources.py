"""The built-in sources that need no service keep the promises of ImageSource; Glance's part is in integration."""

from __future__ import annotations

import hashlib
import json
import uuid
from pathlib import Path

from nova_imagecache import DirectorySource
from nova_imagecache.testing import FakeImage, FakeSource, SourceContract
from nova_imagecache.testing._source_contract import SourceHarness

GIB = 2**30


class DirectoryHarness:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.source = DirectorySource(directory)

    def add_image(self, data: bytes | None, *, disk_format: str = "raw", min_disk: int = 0) -> str:
        image_id = str(uuid.uuid4())
        properties: dict[str, object] = {"disk_format": disk_format, "min_disk": min_disk // GIB}
        if data is None:
            properties["status"] = "queued"
        else:
            (self.directory / f"{image_id}.img").write_bytes(data)
            properties |= {"os_hash_algo": "sha256", "os_hash_value": hashlib.sha256(data).hexdigest()}
        (self.directory / f"{image_id}.json").write_text(json.dumps(properties))
        return image_id

    def remove_image(self, image_id: str) -> None:
        for path in self.directory.glob(f"{image_id}.*"):
            path.unlink()


class FakeHarness:
    def __init__(self) -> None:
        self.source = FakeSource()

    def add_image(self, data: bytes | None, *, disk_format: str = "raw", min_disk: int = 0) -> str:
        image_id = str(uuid.uuid4())
        status = "queued" if data is None else "active"
        image = FakeImage(data=data or b"", status=status, disk_format=disk_format, min_disk=min_disk)
        self.source.add(image_id, image)
        return image_id

    def remove_image(self, image_id: str) -> None:
        del self.source.images[image_id]


class TestDirectorySource(SourceContract):
    """DirectorySource keeps the contract."""

    def make_harness(self, tmp_path: Path) -> DirectoryHarness:
        return DirectoryHarness(tmp_path)


class TestFakeSource(SourceContract):
    """FakeSource keeps the contract."""

    def make_harness(self, tmp_path: Path) -> FakeHarness:
        return FakeHarness()

    def kept(self, harness: SourceHarness, tmp_path: Path) -> dict[str, object]:
        del tmp_path
        assert isinstance(harness, FakeHarness)
        return dict(harness.source.images)

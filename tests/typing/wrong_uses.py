"""Uses of the public API that a type checker refuses. Checked, never run.

Each wrong line carries mypy's name of the error: an ignore that ignores nothing is an error of its own. Pyright reads
none of these comments, and must complain of the same lines.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import nova_imagecache
import nova_imagecache.testing
from nova_imagecache import (
    Backend,
    BaseImage,
    BaseWriter,
    CacheConfig,
    Digest,
    DirectorySource,
    GlanceSource,
    ImageCache,
    ImageInfo,
    ImageSource,
    RootDisk,
    UserFinder,
)


def names() -> None:
    from nova_imagecache import NoSuchName  # type: ignore[attr-defined]
    from nova_imagecache.testing import NoSuchDouble  # type: ignore[attr-defined]

    assert NoSuchName
    assert NoSuchDouble
    assert nova_imagecache.no_such_name  # type: ignore[attr-defined]
    assert nova_imagecache.testing.no_such_double  # type: ignore[attr-defined]
    length: int = nova_imagecache.__version__  # type: ignore[assignment]
    assert length


def arguments(cache: ImageCache) -> None:
    cache.ensure_base(7)  # type: ignore[arg-type]
    cache.ensure_base("image", 30)  # type: ignore[call-arg, arg-type]
    cache.ensure_base("image", deadline="30s")  # type: ignore[arg-type]
    cache.ensure_base("image", expect="sha512:00")  # type: ignore[arg-type]
    cache.ensure_base("image", retries=3)  # type: ignore[call-arg]
    cache.create_root_disk("image")  # type: ignore[call-arg]
    cache.create_root_disk("image", "instance", size="20G")  # type: ignore[arg-type]
    cache.create_root_disk("image", "instance", 20)  # type: ignore[call-arg, arg-type]
    cache.resize_root_disk("instance")  # type: ignore[call-arg]
    cache.pin("image")  # type: ignore[call-arg]
    cache.cleanup(max_idle=0)  # type: ignore[call-arg]
    cache.remove_bases("image")  # type: ignore[attr-defined]


def results(cache: ImageCache) -> None:
    size: str = cache.usage().free  # type: ignore[assignment]
    path: Path = cache.create_root_disk("image", "instance").location.path  # type: ignore[union-attr]
    base: BaseImage = cache.ensure_bases(["image"])[0].base  # type: ignore[assignment]
    assert size
    assert path
    assert base


def values(disk: RootDisk) -> None:
    CacheConfig()  # type: ignore[call-arg]
    CacheConfig(Path("/x"))  # type: ignore[call-arg]
    CacheConfig(root=Path("/x"), max_idel=7)  # type: ignore[call-arg]
    CacheConfig(root=Path("/x")).backend = "file"  # type: ignore[misc]
    Digest(algorithm="sha512")  # type: ignore[call-arg]
    disk.virtual_size = 0  # type: ignore[misc]
    GlanceSource("http://a:9292")  # type: ignore[call-arg, arg-type]
    GlanceSource(endpoints=["http://a:9292"])  # type: ignore[call-arg]
    DirectorySource(7)  # type: ignore[arg-type]


class Half(BaseWriter):
    """A writer without most of its methods."""

    def sync(self) -> None: ...


class Wrong(Backend):
    """A backend with a method of another shape."""

    def find_base(self, image_id: int) -> BaseImage | None: ...  # type: ignore[override]


class NoSource:
    """Its chunks are text."""

    name = "text"

    def get(self, image_id: str) -> ImageInfo:
        return ImageInfo(image_id=image_id, disk_format="raw")

    def open(self, image: ImageInfo, offset: int = 0) -> Iterator[str]:
        yield ""


class NoFinder:
    """It has no name."""

    def find(self, bases: object) -> list[Any]:
        return [bases]


def plugged(config: CacheConfig, backend: Backend, options: Mapping[str, Any]) -> None:
    Half()  # type: ignore[abstract]
    source: ImageSource = NoSource()  # type: ignore[assignment]
    finder: UserFinder = NoFinder()  # type: ignore[assignment]
    ImageCache(config, backend=backend)  # type: ignore[call-arg]
    ImageCache(config, source, backend)  # type: ignore[call-arg]
    ImageCache(config, source=source, backend="qcow2")  # type: ignore[arg-type]
    ImageCache.from_config(options)  # type: ignore[arg-type]
    ImageCache.from_config(config, user_finders=finder)  # type: ignore[arg-type]

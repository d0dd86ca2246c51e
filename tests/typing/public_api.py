"""The public API as callers and authors of plug-ins use it, with the type that each call gives. Checked, never run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar, Self, assert_type

from oslo_config import cfg

from nova_imagecache import (
    Backend,
    BackendPaths,
    BackendProperties,
    BaseImage,
    BaseInUseError,
    BaseRecord,
    BaseWriter,
    BlockLocation,
    CacheConfig,
    CacheUsage,
    Capacity,
    CheckReport,
    CleanupItem,
    CleanupPlan,
    CleanupReport,
    ConfigError,
    Digest,
    DirectorySource,
    DiskUsage,
    DiskUser,
    EnsureResult,
    Event,
    Fact,
    FileLocation,
    GlanceSource,
    ImageCache,
    ImageCacheError,
    ImageInfo,
    ImageNotActiveError,
    ImageSource,
    NoSpaceError,
    Pin,
    Progress,
    RbdLocation,
    RecoveryReport,
    Retired,
    RootDisk,
    UserFinder,
    __version__,
    available_backends,
    available_sources,
)
from nova_imagecache.finders import DiskDirectories, ImagesInUse
from nova_imagecache.oslo import config_from_oslo, explain, list_opts, register_opts

# --- a virt driver


def configured() -> CacheConfig:
    config = CacheConfig(
        root=Path("/var/cache/images"), max_idle=timedelta(hours=1), backend_options={"base_format": "raw"}
    )
    assert_type(config.root, Path)
    assert_type(config.disks_dir, Path | None)
    assert_type(config.max_idle, timedelta)
    assert_type(config.max_bytes, int | None)
    assert_type(config.libvirt_uri, str | None)
    assert_type(config.disk_dirs, tuple[Path, ...])
    assert_type(config.backend_options, Mapping[str, Any])
    assert_type(CacheConfig.from_mapping({"root": "/x", "max_idle": "24h"}), CacheConfig)
    return assert_type(CacheConfig.from_toml("/etc/nova-imagecache.toml"), CacheConfig)


def opened(finder: UserFinder, backend: Backend) -> None:
    with ImageCache.from_config(configured(), user_finders=[finder], on_event=on_event) as cache:
        assert_type(cache, ImageCache)
    assert_type(ImageCache(configured(), source=DirectorySource("/srv/images"), backend=backend), ImageCache)


def on_event(event: Event) -> None:
    assert_type(event.kind, str)
    assert_type(event.image_id, str | None)
    assert_type(event.details, dict[str, Any])


def on_progress(progress: Progress) -> None:
    assert_type(progress.done, int)
    assert_type(progress.total, int | None)


def bases(cache: ImageCache, cancel: threading.Event) -> None:
    source = GlanceSource(endpoint=["http://a:9292", "http://b:9292"], token="token")
    base = cache.ensure_base(
        "image",
        source=source,
        expect=Digest(algorithm="sha512", value="00"),
        deadline=30,
        cancel=cancel,
        progress=on_progress,
    )
    assert_type(base, BaseImage)
    assert_type(base.record, BaseRecord)
    assert_type(base.location, FileLocation | BlockLocation | RbdLocation)
    assert_type(base.unused_since, float | None)
    for result in assert_type(cache.ensure_bases(["image", "other"]), list[EnsureResult]):
        assert_type(result.base, BaseImage | None)
        assert_type(result.error, ImageCacheError | None)
    assert_type(cache.bases(), Iterator[BaseImage])
    assert_type(cache.get_base("image"), BaseImage)
    assert_type(cache.users("image"), list[DiskUser])
    assert_type(cache.verify_base("image"), BaseImage)
    assert_type(cache.base_usage("image"), DiskUsage)
    assert_type(cache.copy_base("kernel", Path("/boot/kernel")), Path)
    cache.pin("image", "me", until=datetime.now(UTC))
    assert_type(cache.pins("image"), tuple[Pin, ...])
    cache.unpin("image", "me")
    cache.remove_base("image")


def disks(cache: ImageCache) -> str:
    disk = cache.create_root_disk("image", "instance", name="rescue", size=20 << 30)
    assert_type(disk, RootDisk)
    assert_type(disk.virtual_size, int)
    assert_type(cache.get_root_disk("instance"), RootDisk)
    assert_type(cache.root_disks(), Iterator[RootDisk])
    assert_type(cache.resize_root_disk("instance", size=30 << 30), RootDisk)
    assert_type(cache.flatten_root_disk("instance"), RootDisk)
    assert_type(cache.attach_root_disk("image", "instance"), RootDisk)
    cache.remove_root_disk("instance", name="rescue")
    # no other kind of location is left over
    if isinstance(disk.location, RbdLocation):
        assert_type(disk.location.secret_uuid, str | None)
        return f"{disk.location.pool}/{disk.location.name}"
    assert_type(disk.location, FileLocation | BlockLocation)
    return str(assert_type(disk.location.path, Path))


def upkeep(cache: ImageCache) -> int:
    usage = assert_type(cache.usage(), CacheUsage)
    assert_type(usage.complete, bool)
    plan = assert_type(cache.plan_cleanup(max_idle=timedelta(0), in_use={"image"}), CleanupPlan)
    assert_type(plan.items, tuple[CleanupItem, ...])
    assert_type(cache.cleanup(plan), CleanupReport)
    assert_type(cache.check(), CheckReport)
    assert_type(cache.recover(), RecoveryReport)
    return assert_type(cache.reserved_disk_mb(512), int)


def errors(cache: ImageCache) -> int:
    try:
        cache.ensure_base("image")
    except ImageNotActiveError as err:
        assert_type(err.status, str)
        assert_type(err.image_id, str | None)
    except NoSpaceError as err:
        assert_type(err.needed, int | None)
    except BaseInUseError as err:
        assert_type(err.users, tuple[DiskUser, ...])
    except ConfigError as err:
        assert_type(err.problems, tuple[str, ...])
    except ImageCacheError as err:
        assert_type(err.retryable, bool)
        return assert_type(err.exit_code, int)
    return 0


def names() -> tuple[str, ...]:
    assert_type(available_sources(), tuple[str, ...])
    assert_type(__version__, str)
    return assert_type(available_backends(), tuple[str, ...])


# --- a driver with a nova.conf, and with finders


def from_nova(conf: cfg.ConfigOpts) -> CacheConfig:
    register_opts(conf)
    assert_type(list_opts(), list[tuple[str | None, list[cfg.Opt]]])
    assert_type(explain(conf), tuple[str, ...])
    return assert_type(config_from_oslo(conf), CacheConfig)


def found() -> list[UserFinder]:
    return [ImagesInUse(lambda: ["image"]), DiskDirectories([Path("/var/lib/nova/instances")])]


# --- plug-ins


class Writer(BaseWriter):
    """A writer has these methods and a path."""

    path: Path | None = None

    def set_size(self, size: int) -> None: ...
    def write_at(self, offset: int, buffer: bytes | bytearray | memoryview) -> None: ...
    def sync(self) -> None: ...
    def publish(self, record: BaseRecord) -> BaseImage:
        raise NotImplementedError

    def discard(self) -> None: ...


class Storage(Backend):
    """A backend has these methods and no others."""

    api_version: ClassVar[int] = 1
    properties = BackendProperties(base_formats=("raw",), disk_kind="copy", storage="mine")

    def __init__(self, options: Mapping[str, Any], paths: BackendPaths) -> None:
        self.paths = paths

    def check(self) -> list[Fact]:
        return [Fact(name="root", value=str(self.paths.root), problem=None)]

    def find_base(self, image_id: str) -> BaseImage | None: ...
    def iter_bases(self) -> Iterator[BaseImage]:
        yield from ()

    def stage_base(self, image_id: str, format: str) -> BaseWriter:  # noqa: A002 - the contract's name
        return Writer()

    def touch_base(self, base: BaseImage) -> None: ...
    def mark_unused(self, base: BaseImage, when: float | None) -> None: ...
    def iter_users(self, base: BaseImage) -> Iterator[DiskUser]:
        yield DiskUser(image_id=base.image_id, known_by="link", disk_id="instance", name="disk")

    def retire_base(self, base: BaseImage) -> Retired:
        return Retired(base=base, token="")

    def restore_base(self, retired: Retired) -> None: ...
    def purge_base(self, retired: Retired) -> None: ...
    def usage(self, base: BaseImage) -> DiskUsage:
        return DiskUsage(virtual_size=base.record.virtual_size, allocated=0)

    def capacity(self) -> Capacity:
        return Capacity(total=0, free=0)

    def create_root_disk(self, base: BaseImage, disk_id: str, name: str, size: int) -> RootDisk:
        raise NotImplementedError

    def get_root_disk(self, disk_id: str, name: str) -> RootDisk | None: ...
    def iter_root_disks(self) -> Iterator[RootDisk]:
        yield from ()

    def remove_root_disk(self, disk_id: str, name: str) -> None: ...
    def resize_root_disk(self, disk_id: str, name: str, size: int) -> RootDisk:
        raise NotImplementedError

    def flatten_root_disk(self, disk_id: str, name: str) -> RootDisk:
        raise NotImplementedError

    def attach_root_disk(self, base: BaseImage, disk_id: str, name: str) -> RootDisk:
        raise NotImplementedError

    def recover(self) -> RecoveryReport:
        return RecoveryReport()


class Images:
    """A source needs no base class."""

    name = "mine"

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        return cls()

    def get(self, image_id: str) -> ImageInfo:
        return ImageInfo(image_id=image_id, disk_format="raw", size=512)

    @contextmanager
    def open(self, image: ImageInfo, offset: int = 0) -> Generator[Iterator[bytes]]:
        yield iter([b""])


class Hypervisor:
    """Nor does a finder."""

    name = "hypervisor"

    def find(self, bases: Sequence[BaseImage]) -> Iterable[DiskUser]:
        return [DiskUser(image_id=base.image_id, known_by=self.name, certain=False) for base in bases]


def plugged(config: CacheConfig, paths: BackendPaths) -> ImageCache:
    source: ImageSource = Images()
    finder: UserFinder = Hypervisor()
    clock: Callable[[], float] = float
    return ImageCache(config, source=source, backend=Storage({}, paths), user_finders=[finder], clock=clock)

"""From an image in Glance to the root disk of an instance.

    from nova_imagecache import CacheConfig, ImageCache

    with ImageCache.from_config(CacheConfig.from_toml("/etc/nova-imagecache.toml")) as cache:
        cache.ensure_base(image_id)
        disk = cache.create_root_disk(image_id, instance_uuid, size=20 * 2**30)

The names in ``__all__`` are the public API; everything else may change. ``nova_imagecache.backends`` and
``nova_imagecache.sources`` hold the contracts for plug-in authors, ``nova_imagecache.testing`` what checks them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nova_imagecache._cache import ImageCache
from nova_imagecache._config import CacheConfig
from nova_imagecache._models import (
    BaseImage,
    BaseRecord,
    BlockLocation,
    CacheUsage,
    Capacity,
    CheckReport,
    CleanupItem,
    CleanupPlan,
    CleanupReport,
    Digest,
    DiskUsage,
    DiskUser,
    EnsureResult,
    Event,
    Extent,
    Fact,
    FileLocation,
    ImageInfo,
    Pin,
    Progress,
    RbdLocation,
    RecoveryReport,
    Retired,
    RootDisk,
)
from nova_imagecache._plugins import available_backends, available_sources
from nova_imagecache._users import UserFinder
from nova_imagecache.backends import Backend, BackendPaths, BackendProperties, BaseWriter
from nova_imagecache.exceptions import (
    BackendError,
    BackendNotFoundError,
    BackendUnavailableError,
    BaseCorruptError,
    BaseInUseError,
    BaseNotFoundError,
    BasePinnedError,
    CancelledError,
    CommandError,
    ConfigError,
    DeadlineError,
    DiskExistsError,
    DiskInUseError,
    DiskNotFoundError,
    DiskTooSmallError,
    ImageCacheError,
    ImageCorruptError,
    ImageNotActiveError,
    ImageNotFoundError,
    ImageRejectedError,
    InvalidRequestError,
    LockTimeoutError,
    NoSpaceError,
    SourceError,
    SourceForbiddenError,
    SourceUnavailableError,
    UsersUnknownError,
)
from nova_imagecache.sources import ImageSource

__all__ = [
    "Backend",
    "BackendError",
    "BackendNotFoundError",
    "BackendPaths",
    "BackendProperties",
    "BackendUnavailableError",
    "BaseCorruptError",
    "BaseImage",
    "BaseInUseError",
    "BaseNotFoundError",
    "BasePinnedError",
    "BaseRecord",
    "BaseWriter",
    "BlockLocation",
    "CacheConfig",
    "CacheUsage",
    "CancelledError",
    "Capacity",
    "CheckReport",
    "CleanupItem",
    "CleanupPlan",
    "CleanupReport",
    "CommandError",
    "ConfigError",
    "DeadlineError",
    "Digest",
    "DirectorySource",
    "DiskExistsError",
    "DiskInUseError",
    "DiskNotFoundError",
    "DiskTooSmallError",
    "DiskUsage",
    "DiskUser",
    "EnsureResult",
    "Event",
    "Extent",
    "Fact",
    "FileLocation",
    "GlanceSource",
    "ImageCache",
    "ImageCacheError",
    "ImageCorruptError",
    "ImageInfo",
    "ImageNotActiveError",
    "ImageNotFoundError",
    "ImageRejectedError",
    "ImageSource",
    "InvalidRequestError",
    "LockTimeoutError",
    "NoSpaceError",
    "Pin",
    "Progress",
    "RbdLocation",
    "RecoveryReport",
    "Retired",
    "RootDisk",
    "SourceError",
    "SourceForbiddenError",
    "SourceUnavailableError",
    "UserFinder",
    "UsersUnknownError",
    "available_backends",
    "available_sources",
]


if TYPE_CHECKING:
    from nova_imagecache.sources.directory import DirectorySource
    from nova_imagecache.sources.glance import GlanceSource

    __version__: str
else:  # a type checker that saw this would take every name for one of ours

    def __getattr__(name: str) -> object:
        # what costs milliseconds and few callers ask for
        if name == "__version__":
            from importlib.metadata import version

            return version("nova-imagecache")
        if name == "DirectorySource":
            from nova_imagecache.sources.directory import DirectorySource

            return DirectorySource
        if name == "GlanceSource":
            from nova_imagecache.sources.glance import GlanceSource

            return GlanceSource
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

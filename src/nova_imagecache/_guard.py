"""Stands around backends: whatever plug-ins raise comes out as one of our errors that names the plug-in and the call.

The only place that catches ``Exception``: a plug-in may raise anything, and the caller is promised our types.
"""

from __future__ import annotations

import errno
import logging
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from nova_imagecache.backends import Backend, BaseWriter
from nova_imagecache.exceptions import BackendError, ImageCacheError, NoSpaceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from nova_imagecache._models import (
        BaseImage,
        BaseRecord,
        Capacity,
        DiskUsage,
        DiskUser,
        Extent,
        Fact,
        ImageInfo,
        RecoveryReport,
        Retired,
        RootDisk,
    )
    from nova_imagecache.backends import Claim, Survey, Unreadable

_log = logging.getLogger(__name__)


@contextmanager
def translated(make: Callable[[str], ImageCacheError]) -> Iterator[None]:
    """Run the block; ours pass, a full storage becomes NoSpaceError, anything else what ``make`` builds of its text."""
    try:
        yield
    except ImageCacheError as err:
        place = make("")
        err.image_id = err.image_id or place.image_id
        err.disk_id = err.disk_id or place.disk_id
        raise
    except OSError as err:
        if err.errno in (errno.ENOSPC, errno.EDQUOT):
            place = make("")
            raise NoSpaceError(image_id=place.image_id, disk_id=place.disk_id, stage=place.stage) from err
        raise make(f"{type(err).__name__}: {err}") from err
    except Exception as err:  # reason: the guard's whole purpose
        raise make(f"{type(err).__name__}: {err}") from err


class _Call:
    """Around one call of a backend. A pass makes tens of thousands, so it is no generator's context."""

    __slots__ = ("_backend", "_disk_id", "_image_id", "_operation", "_start")

    def __init__(self, backend: str, operation: str, image_id: str | None, disk_id: str | None) -> None:
        self._backend = backend
        self._operation = operation
        self._image_id = image_id
        self._disk_id = disk_id

    def __enter__(self) -> None:
        self._start = time.monotonic()

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, trace: object) -> None:
        if _log.isEnabledFor(logging.DEBUG):
            took = (time.monotonic() - self._start) * 1000
            _log.debug("%s.%s %s: %.1f ms", self._backend, self._operation, self._image_id, took)
        if not isinstance(err, Exception):
            return
        try:
            with translated(self._error):
                raise err
        except ImageCacheError as ours:
            # plug-ins need not repeat what the core knows
            ours.image_id = ours.image_id or self._image_id
            ours.disk_id = ours.disk_id or self._disk_id
            ours.stage = ours.stage or self._operation
            if isinstance(ours, BackendError):
                ours.backend = ours.backend or self._backend
            if ours is not err:
                raise

    def _error(self, text: str) -> ImageCacheError:
        detail = f"backend {self._backend} failed in {self._operation}: {text}"
        ids = {"image_id": self._image_id, "disk_id": self._disk_id}
        return BackendError(detail, backend=self._backend, stage=self._operation, **ids)


class _Guard:
    def __init__(self, name: str) -> None:
        self._name = name

    def _call(self, operation: str, image_id: str | None = None, disk_id: str | None = None) -> _Call:
        return _Call(self._name, operation, image_id, disk_id)


class GuardedWriter(_Guard, BaseWriter):
    """A plug-in's writer whose errors are ours."""

    def __init__(self, name: str, image_id: str, inner: BaseWriter) -> None:
        super().__init__(name)
        self._image_id = image_id
        self._inner = inner
        self.path = inner.path

    def set_size(self, size: int) -> None:
        with self._call("set_size", self._image_id):
            self._inner.set_size(size)

    def write_at(self, offset: int, buffer: bytes | bytearray | memoryview) -> None:
        with self._call("write_at", self._image_id):
            self._inner.write_at(offset, buffer)

    def read_at(self, offset: int, length: int) -> bytes | None:
        with self._call("read_at", self._image_id):
            return self._inner.read_at(offset, length)

    def write_sums(self, sums: bytes | memoryview) -> None:
        with self._call("write_sums", self._image_id):
            self._inner.write_sums(sums)

    def sync(self) -> None:
        with self._call("sync", self._image_id):
            self._inner.sync()

    def publish(self, record: BaseRecord) -> BaseImage:
        with self._call("publish", self._image_id):
            return self._inner.publish(record)

    def discard(self) -> None:
        with self._call("discard", self._image_id):
            self._inner.discard()


class GuardedBackend(_Guard, Backend):
    """A plug-in's backend whose errors are ours. Every method is the contract's own."""

    def __init__(self, name: str, inner: Backend) -> None:
        super().__init__(name)
        self._inner = inner
        self.properties = inner.properties  # type: ignore[misc]  # per instance here: it is the inner's

    @property
    def name(self) -> str:
        """The entry point's name."""
        return self._name

    @property
    def wanted_base_format(self) -> str | None:
        with self._call("wanted_base_format"):
            return self._inner.wanted_base_format

    def check(self) -> list[Fact]:
        with self._call("check"):
            return list(self._inner.check())

    def close(self) -> None:
        with self._call("close"):
            self._inner.close()

    def find_base(self, image_id: str) -> BaseImage | None:
        with self._call("find_base", image_id):
            return self._inner.find_base(image_id)

    def iter_bases(self) -> Iterator[BaseImage]:
        with self._call("iter_bases"):
            yield from self._inner.iter_bases()

    def survey(self) -> Iterator[Survey]:
        with self._call("survey"):
            yield from self._inner.survey()

    def find_unreadable(self, image_id: str) -> Unreadable | None:
        with self._call("find_unreadable", image_id):
            return self._inner.find_unreadable(image_id)

    def stage_base(self, image_id: str, format: str) -> BaseWriter:  # noqa: A002 - the contract's name
        with self._call("stage_base", image_id):
            return GuardedWriter(self._name, image_id, self._inner.stage_base(image_id, format))

    def touch_base(self, base: BaseImage) -> None:
        with self._call("touch_base", base.image_id):
            self._inner.touch_base(base)

    def mark_unused(self, base: BaseImage, when: float | None) -> None:
        with self._call("mark_unused", base.image_id):
            self._inner.mark_unused(base, when)

    def mark_inspected(self, base: BaseImage, version: int) -> None:
        with self._call("mark_inspected", base.image_id):
            self._inner.mark_inspected(base, version)

    def iter_users(self, base: BaseImage) -> Iterator[DiskUser]:
        with self._call("iter_users", base.image_id):
            yield from self._inner.iter_users(base)

    def retire_base(self, base: BaseImage) -> Retired:
        with self._call("retire_base", base.image_id):
            return self._inner.retire_base(base)

    def restore_base(self, retired: Retired) -> None:
        with self._call("restore_base", retired.base.image_id):
            self._inner.restore_base(retired)

    def purge_base(self, retired: Retired) -> None:
        with self._call("purge_base", retired.base.image_id):
            self._inner.purge_base(retired)

    def quarantine_base(self, base: BaseImage) -> None:
        with self._call("quarantine_base", base.image_id):
            self._inner.quarantine_base(base)

    def reown_base(self, base: BaseImage, damage: Callable[[BaseImage], str | None]) -> bool:
        with self._call("reown_base", base.image_id):
            return self._inner.reown_base(base, damage)

    def read_base(self, base: BaseImage) -> Iterator[Extent]:
        with self._call("read_base", base.image_id):
            yield from self._inner.read_base(base)

    @property
    def keeps_sums(self) -> bool:
        """Whether the backend gives back what ``write_sums`` is given: the contract's default does not."""
        return type(self._inner).read_sums is not Backend.read_sums

    def read_sums(self, base: BaseImage) -> bytes | memoryview | None:
        with self._call("read_sums", base.image_id):
            return self._inner.read_sums(base)

    def usage(self, base: BaseImage) -> DiskUsage:
        with self._call("usage", base.image_id):
            return self._inner.usage(base)

    def capacity(self) -> Capacity:
        with self._call("capacity"):
            return self._inner.capacity()

    def wanted_store(self, image: ImageInfo) -> str | None:
        with self._call("wanted_store", image.image_id):
            return self._inner.wanted_store(image)

    def claim_import(self, image_id: str) -> Claim | None:
        with self._call("claim_import", image_id):
            return self._inner.claim_import(image_id)

    def adopt_base(self, image: ImageInfo) -> BaseImage | None:
        with self._call("adopt_base", image.image_id):
            return self._inner.adopt_base(image)

    def create_root_disk(self, base: BaseImage, disk_id: str, name: str, size: int) -> RootDisk:
        with self._call("create_root_disk", base.image_id, disk_id):
            return self._inner.create_root_disk(base, disk_id, name, size)

    def get_root_disk(self, disk_id: str, name: str) -> RootDisk | None:
        with self._call("get_root_disk", None, disk_id):
            return self._inner.get_root_disk(disk_id, name)

    def iter_root_disks(self) -> Iterator[RootDisk]:
        with self._call("iter_root_disks"):
            yield from self._inner.iter_root_disks()

    def remove_root_disk(self, disk_id: str, name: str) -> None:
        with self._call("remove_root_disk", None, disk_id):
            self._inner.remove_root_disk(disk_id, name)

    def resize_root_disk(self, disk_id: str, name: str, size: int) -> RootDisk:
        with self._call("resize_root_disk", None, disk_id):
            return self._inner.resize_root_disk(disk_id, name, size)

    def flatten_root_disk(self, disk_id: str, name: str) -> RootDisk:
        with self._call("flatten_root_disk", None, disk_id):
            return self._inner.flatten_root_disk(disk_id, name)

    def attach_root_disk(self, base: BaseImage, disk_id: str, name: str) -> RootDisk:
        with self._call("attach_root_disk", base.image_id, disk_id):
            return self._inner.attach_root_disk(base, disk_id, name)

    def recover(self) -> RecoveryReport:
        with self._call("recover"):
            return self._inner.recover()

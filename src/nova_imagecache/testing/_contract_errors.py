"""The part of ``BackendContract`` about what is refused, and in which words."""

from __future__ import annotations

import pickle
from functools import partial
from typing import TYPE_CHECKING

import pytest

from nova_imagecache.backends import Backend, BackendPaths
from nova_imagecache.exceptions import (
    BaseNotFoundError,
    ConfigError,
    DiskExistsError,
    DiskInUseError,
    DiskNotFoundError,
    ImageCacheError,
    UsersUnknownError,
)
from nova_imagecache.testing._contract_kit import DISK_SIZE, MIB, ContractKit, promise, refused, same
from nova_imagecache.testing._promises import chapter

if TYPE_CHECKING:
    from collections.abc import Callable


@chapter("errors", "backends.Backend", "exceptions.ImageCacheError")
class ErrorContract(ContractKit):
    """Refusals are of the documented types and tell of the right thing."""

    def test_unknown_options_are_refused(self, backend: Backend, paths: BackendPaths) -> None:
        """Options that a backend does not know are ConfigError, all of them at once, without I/O."""
        options = {"no-such-option": 1, "nor-this-one": 2}
        error = refused(ConfigError, lambda: type(backend)(options, paths), "an unknown option is ConfigError")
        for name in options:
            promise(any(name in text for text in error.problems), f"ConfigError.problems names the option {name!r}")

    def test_errors_name_what_they_are_about(self, backend: Backend) -> None:
        """An error names the image and the disk it is about, or leaves that to the core, and never names another."""
        base, other = self.publish(backend, "img"), self.publish(backend, "other", "two")
        self.create(backend, base)
        self._names(refused(DiskExistsError, partial(self.create, backend, other), "a disk is made once"), "other")
        resize = partial(backend.resize_root_disk, "never", "disk", DISK_SIZE)
        self._names(refused(DiskNotFoundError, resize, "a disk that is not there cannot be resized"), None, "never")
        backend.purge_base(backend.retire_base(other))
        for call in (partial(backend.retire_base, other), partial(backend.usage, other)):
            self._names(refused(BaseNotFoundError, call, "a base that is gone is BaseNotFoundError"), "other", None)
        create = partial(self.create, backend, other, "vm-2")
        self._names(refused(BaseNotFoundError, create, "no disk is made of a gone base"), "other", "vm-2")

    def test_users_that_cannot_be_counted(self, backend: Backend, paths: BackendPaths) -> None:
        """Storage that cannot count users says so; it never says that there are none."""
        base = self.publish(backend, "img")
        self.create(backend, base)
        hidden = self.hidden_users(backend, paths)
        if hidden is None:
            pytest.skip("the hook hidden_users() gives no storage that cannot count")
        with hidden:
            refused(
                UsersUnknownError,
                lambda: list(backend.iter_users(base)),
                "users that cannot be counted are UsersUnknownError",
            )
            surveyed = {survey.users for survey in backend.survey()}
            promise(surveyed <= {None}, f"users that cannot be counted are None in a survey: {surveyed}")
        self.check_users(backend, base, 1, "users are counted again once the storage can tell")

    def test_disk_that_is_open(self, backend: Backend) -> None:
        """A disk that a guest has open is changed as if it were not, or refused with DiskInUseError and left alone."""
        base = self.publish(backend, "img")
        disk = self.create(backend, base)
        opened = self.held_open(backend, disk)
        if opened is None:
            pytest.skip("the hook held_open() gives no guest")
        calls: dict[str, Callable[[], object]] = {
            "resize": partial(backend.resize_root_disk, "vm", "disk", DISK_SIZE + MIB),
            "flatten": partial(backend.flatten_root_disk, "vm", "disk"),
            "attach": partial(backend.attach_root_disk, base, "vm", "disk"),
            "remove": partial(backend.remove_root_disk, "vm", "disk"),
        }
        with opened:
            for name, call in calls.items():
                before = backend.get_root_disk("vm", "disk")
                try:
                    call()
                except DiskInUseError as err:
                    self._names(err, "img", "vm")
                    now = backend.get_root_disk("vm", "disk")
                    same(now, before, f"{name} of an open disk that is refused changes nothing")
        left = backend.get_root_disk("vm", "disk")
        if left is not None:
            self.check_disk(backend, left, self.sample(backend), "a disk that was open is whole")
        backend.remove_root_disk("vm", "disk")
        self.check_users(backend, base, 0, "a disk that was open can be removed when it is closed")

    def _names(self, error: ImageCacheError, image_id: str | None, disk_id: str | None = "vm") -> None:
        if image_id is not None:
            promise(error.image_id in (None, image_id), f"{error!r} is about image {image_id}, not {error.image_id}")
        promise(error.disk_id in (None, disk_id), f"{error!r} is about disk {disk_id}, not {error.disk_id}")
        same(str(pickle.loads(pickle.dumps(error))), str(error), "an error crosses processes whole")  # noqa: S301  # ours

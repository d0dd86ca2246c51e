"""Every error: its family, fields, message, exit code, and its way through a process pool."""

from __future__ import annotations

import inspect
import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

import nova_imagecache
from nova_imagecache import exceptions as e
from nova_imagecache._models import Digest, DiskUser

DIGESTS = Digest("md5", "0" * 32), Digest("md5", "1" * 32)
USERS = [DiskUser(image_id="img", known_by="link", disk_id=f"vm-{n}", name="disk") for n in range(7)]
WHERE = {"image_id": "img", "disk_id": "vm", "name": "rescue", "stage": "testing", "todo": "Do this"}

SAMPLES: list[e.ImageCacheError] = [
    e.ImageCacheError("it broke", **WHERE),
    e.InvalidRequestError("no such size", **WHERE),
    e.ConfigError(["a: wrong", "b: unknown"]),
    e.SourceError("it broke", image_id="img", stage="get"),
    e.ImageNotFoundError(image_id="img", stage="metadata"),
    e.ImageNotActiveError("deactivated", image_id="img"),
    e.ImageRejectedError("it has a backing file", image_id="img"),
    e.ImageCorruptError(*DIGESTS, image_id="img"),
    e.SourceUnavailableError("connection refused", image_id="img", stage="fetch"),
    e.SourceForbiddenError("401", image_id="img", stage="metadata"),
    e.BackendError("it broke", backend="qcow2", **WHERE),
    e.BackendNotFoundError("zfs", ["file", "qcow2"]),
    e.BackendUnavailableError("no monitor answers", backend="rbd", stage="check"),
    e.NoSpaceError(needed=7, free=3, pinned=1, in_use=2, recent=4, limit="max_bytes", image_id="img", stage="x"),
    e.NoSpaceError(backend="file", disk_id="vm", stage="create_root_disk"),
    e.CommandError(["qemu-img", "info"], 1, "cannot open\n", backend="qcow2", image_id="img", stage="measure"),
    e.BaseNotFoundError(image_id="img", stage="users"),
    e.BaseInUseError(USERS, image_id="img", stage="removal"),
    e.BasePinnedError(["nova", "me"], image_id="img", stage="removal"),
    e.BaseCorruptError("MiB 7 differs", image_id="img", stage="verify"),
    e.UsersUnknownError("libvirt does not answer", image_id="img", stage="removal"),
    e.DiskNotFoundError(disk_id="vm", name="disk", stage="resize"),
    e.DiskExistsError(image_id="img", disk_id="vm", name="disk", stage="create"),
    e.DiskInUseError(disk_id="vm", name="disk", stage="resize"),
    e.DiskTooSmallError(1024, 2048, image_id="img", disk_id="vm", name="disk"),
    e.LockTimeoutError("/locks/base.img.lock", 3.25, image_id="img"),
    e.DeadlineError(image_id="img", stage="fetch"),
    e.CancelledError(image_id="img", stage="fetch"),
]

CODES = {
    "ImageCacheError": 1,
    "InvalidRequestError": 2,
    "ConfigError": 2,
    "SourceError": 1,
    "ImageNotFoundError": 4,
    "ImageNotActiveError": 3,
    "ImageRejectedError": 3,
    "ImageCorruptError": 1,
    "SourceUnavailableError": 75,
    "SourceForbiddenError": 1,
    "BackendError": 1,
    "BackendNotFoundError": 2,
    "BackendUnavailableError": 75,
    "NoSpaceError": 75,
    "CommandError": 1,
    "BaseNotFoundError": 4,
    "BaseInUseError": 3,
    "BasePinnedError": 3,
    "BaseCorruptError": 1,
    "UsersUnknownError": 3,
    "DiskNotFoundError": 4,
    "DiskExistsError": 3,
    "DiskInUseError": 3,
    "DiskTooSmallError": 3,
    "LockTimeoutError": 75,
    "DeadlineError": 75,
    "CancelledError": 1,
}
RETRYABLE = {"SourceUnavailableError", "BackendUnavailableError", "LockTimeoutError"}
FAMILIES: dict[type, set[str]] = {
    e.SourceError: {
        "ImageNotFoundError",
        "ImageNotActiveError",
        "ImageRejectedError",
        "ImageCorruptError",
        "SourceUnavailableError",
        "SourceForbiddenError",
    },
    e.BackendError: {"BackendNotFoundError", "BackendUnavailableError", "NoSpaceError", "CommandError"},
    ValueError: {"InvalidRequestError", "ConfigError"},
    FileExistsError: {"DiskExistsError"},
    TimeoutError: {"LockTimeoutError", "DeadlineError"},
}

every_error = pytest.mark.parametrize("error", SAMPLES, ids=lambda error: type(error).__name__)


def fields(error: e.ImageCacheError) -> dict[str, object]:
    """All that an error carries."""
    return dict(vars(error))


def throw(error: e.ImageCacheError) -> None:
    raise error


def test_every_error_of_the_module_has_a_sample() -> None:
    """A new error cannot be forgotten here, nor in the public names."""
    classes = {
        name
        for name, cls in inspect.getmembers(e, inspect.isclass)
        if issubclass(cls, e.ImageCacheError) and cls.__module__ == e.__name__
    }
    assert {type(error).__name__ for error in SAMPLES} == classes == set(CODES)
    assert classes <= set(nova_imagecache.__all__)


@every_error
def test_errors_pickle_whole(error: e.ImageCacheError) -> None:
    """Type, fields and message survive."""
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert fields(again) == fields(error)
    assert str(again) == str(error)


def test_errors_cross_a_process_pool() -> None:
    """As they do when a driver fetches in workers."""
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        for error in SAMPLES:
            with pytest.raises(type(error)) as caught:
                pool.submit(throw, error).result()
            assert fields(caught.value) == fields(error)
            assert str(caught.value) == str(error)


@every_error
def test_messages_name_the_thing_the_stage_and_what_to_do(error: e.ImageCacheError) -> None:
    """All that is known stands in the message, and every error says what to do next."""
    text = str(error)
    for value in (error.image_id, error.disk_id, error.stage, error.todo):
        assert value is None or value in text
    if error.disk_id is not None and error.name is not None:
        assert f"{error.disk_id}/{error.name}" in text
    # a cancelled call is what the caller asked for
    assert error.todo or isinstance(error, e.CancelledError)
    assert error.summary() in text
    assert "None" not in text


@every_error
def test_exit_codes_and_retryable_are_fixed(error: e.ImageCacheError) -> None:
    """Scripts and drivers build on them."""
    name = type(error).__name__
    assert error.exit_code == CODES[name]
    assert error.retryable is (name in RETRYABLE)


@every_error
def test_families_are_as_documented(error: e.ImageCacheError) -> None:
    """By who must act, and by the built-in errors that callers catch already."""
    name = type(error).__name__
    for family, members in FAMILIES.items():
        assert isinstance(error, family) is (name in members or name == family.__name__), family
    assert error.__doc__ or type(error).__doc__


def test_messages_are_made_from_the_fields() -> None:
    """What a reader of a log sees."""
    error = e.DiskTooSmallError(1024, 2048, image_id="img", disk_id="vm", name="disk")
    assert str(error) == (
        "a disk of 1024 bytes is too small: at least 2048 are needed [image img, disk vm/disk, stage size check]. "
        "Ask for a larger disk"
    )
    error.image_id = "other"
    assert "image other" in str(error)


def test_fields_hold_what_was_given() -> None:
    """Typed fields, not prose."""
    command = e.CommandError(["qemu-img", "x"], None, "words")
    assert (command.argv, command.returncode, command.stderr) == (("qemu-img", "x"), None, "words")
    assert "timed out" in str(command)
    assert e.ConfigError(["a", "b"]).problems == ("a", "b")
    assert e.BackendNotFoundError("zfs", []).available == ()
    assert e.ImageNotActiveError("queued").status == "queued"
    assert e.ImageRejectedError("why").reason == "why"
    corrupt = e.ImageCorruptError(*DIGESTS)
    assert (corrupt.expected, corrupt.actual) == DIGESTS
    full = e.NoSpaceError(needed=7, free=3, pinned=1, in_use=2, recent=4, left_alone=5)
    assert (full.needed, full.free, full.pinned, full.in_use, full.recent, full.left_alone) == (7, 3, 1, 2, 4, 5)
    late = e.LockTimeoutError("/lock", 3.0)
    assert (late.path, late.waited) == ("/lock", 3.0)
    small = e.DiskTooSmallError(1, 2)
    assert (small.size, small.virtual_size) == (1, 2)
    assert e.BasePinnedError(["a"]).owners == ("a",)
    used = e.BaseInUseError(USERS)
    assert used.users == tuple(USERS)
    assert "7 root disk(s)" in str(used)
    assert "and 2 more" in str(used)


@pytest.mark.parametrize("status", ["queued", "saving", "deactivated", "deleted", "killed", "pending_delete"])
def test_an_image_that_is_not_active_says_its_status(status: str) -> None:
    """Each state asks for another deed."""
    assert status in str(e.ImageNotActiveError(status, image_id="img"))

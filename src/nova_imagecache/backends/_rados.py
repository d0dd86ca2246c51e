"""The only importer of Ceph's bindings (``rados``, ``rbd``): every step that changes images, and errors of ours.

The functions named in ``SEAMS`` are the steps; whoever wants to count, fail or hold them replaces these attributes
(``FaultPlan(modules=["nova_imagecache.backends._rados"])``), so they are called as attributes of this module.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from nova_imagecache.backends._rados_errors import NotThereError, RefusedError, error_of
from nova_imagecache.exceptions import BackendError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

SEAMS = (
    "make_trash",
    "create",
    "resize",
    "write",
    "flush",
    "create_snapshot",
    "protect",
    "unprotect",
    "remove_snapshot",
    "clone",
    "flatten",
    "set_metadata",
    "trash_move",
    "trash_restore",
    "trash_remove",
    "remove",
    "put_object",
    "remove_object",
)
"""Functions of this module that change a pool. ``_rados_claims`` has a few more."""

TRASH = "rbd_trash"
"""The object that lists what is in a pool's trash."""

_GREATER = 3  # LIBRADOS_CMPXATTR_OP_GT
_TURN = 120.0
"""Seconds: more than Ceph's own time limit for the read."""

_PACKAGES = "Install Ceph's bindings for this Python (Debian: python3-rados and python3-rbd; they are not on PyPI)"


class Ioctx(Protocol):
    """A pool, open."""

    def get_pool_id(self) -> int: ...
    def read(self, key: str, length: int = ..., offset: int = ...) -> bytes: ...
    def aio_read(self, key: str, length: int, offset: int, oncomplete: Callable[..., None]) -> object: ...
    def close(self) -> None: ...


class Image(Protocol):
    """An RBD image, open."""

    def id(self) -> str: ...
    def size(self) -> int: ...
    def features(self) -> int: ...
    def flags(self) -> int: ...
    def read(self, offset: int, length: int) -> bytes: ...
    def close(self) -> None: ...


@functools.cache
def bindings() -> tuple[Any, Any]:
    """The modules rados and rbd.

    Raises:
        BackendError: they are not installed; says what to install.
    """
    try:
        import rados  # type: ignore[import-not-found]  # Debian's bindings ship no types
        import rbd  # type: ignore[import-not-found]  # likewise
    except ImportError as err:
        raise BackendError(f"Ceph's bindings cannot be imported: {err}", stage="loading", todo=_PACKAGES) from err
    return rados, rbd


@contextmanager
def answers(what: str) -> Iterator[None]:
    """Run calls of the bindings; what they raise comes out as ours, and says ``what`` was tried."""
    rados, rbd = bindings()
    try:
        yield
    except (rados.Error, rbd.Error) as err:
        raise error_of(getattr(err, "errno", None), f"{what}: {err}") from err


# --- opening ---------------------------------------------------------------------------------------------------------


def open_for_writing(ioctx: Ioctx, *, name: str | None = None, image_id: str | None = None) -> Image:
    """The image by name or by id; the caller closes it. Ceph counts it as in use until then."""
    _, rbd = bindings()
    with answers(f"open {name or image_id} for writing"):
        image: Image = rbd.Image(ioctx, name, image_id=image_id)
        return image


@contextmanager
def changing(ioctx: Ioctx, *, name: str | None = None, image_id: str | None = None) -> Iterator[Image]:
    """The image, open for writing while the block runs."""
    image = open_for_writing(ioctx, name=name, image_id=image_id)
    try:
        yield image
    finally:
        close_image(image, name or image_id)


def close_image(image: Image, name: str | None = None) -> None:
    """Close the image; what was written before is flushed."""
    with answers(f"close {name or 'an image'}"):
        image.close()


def close_unwritten(ioctx: Ioctx, image: Image) -> None:
    """Close an image of this pool that was opened for reading only.

    librbd looks at an image once more after it has said that it is open (16.2, ImageState::complete_action_unlock):
    closed at once it would be freed under that look, and the process aborts. What opens images and what calls back take
    turns on a connection, so that when a callback comes the look is over. Closing an image that is open for writing
    waits for its turn without that.
    """
    over = threading.Event()
    with answers("wait for a turn"):
        ioctx.aio_read(TRASH, 1, 0, lambda *_: over.set())
    if over.wait(_TURN):
        close_image(image)
    else:
        abandon(image)


def abandon(image: Image) -> None:
    """Have Python never close the image: while an operation hangs librbd would wait for it, perhaps for ever."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(image))


@contextmanager
def header(ioctx: Any, image_id: str) -> Iterator[Any]:
    """A write operation on the image's header, filled in the block and made after it; ENOENT: there is no such image.

    A plain one would make a header, of an image that somebody has just removed, and nobody would ever take it away.
    """
    rados, _ = bindings()
    with rados.WriteOpCtx() as operation:
        operation.omap_cmp("features", "", _GREATER)  # every header has them
        yield operation
        ioctx.operate_write_op(operation, f"rbd_header.{image_id}")


# --- changing: the steps ---------------------------------------------------------------------------------------------


def make_trash(ioctx: Any) -> None:
    """The pool's trash as Ceph makes it when something is first moved there, which it cannot in a pool that is full.

    ``remove`` needs it as well.
    """
    rados, _ = bindings()
    with answers("make the trash"), rados.WriteOpCtx() as operation:
        operation.new(rados.LIBRADOS_CREATE_IDEMPOTENT)
        ioctx.operate_write_op(operation, TRASH)


def create(ioctx: Ioctx, name: str, size: int, features: int) -> None:
    """A new image of zeros; ExistsError if there is one of that name."""
    _, rbd = bindings()
    with answers(f"create {name}"):
        rbd.RBD().create(ioctx, name, size, features=features, old_format=False)


def resize(image: Any, size: int, *, shrink: bool = False) -> None:
    """Make the image ``size`` bytes long. RefusedError: it is longer, and ``shrink`` was not asked for."""
    _, rbd = bindings()
    with answers(f"resize to {size}"):
        try:
            image.resize(size, allow_shrink=shrink)
        except rbd.InvalidArgument as err:  # the bindings' refusal to shrink tells no errno
            raise RefusedError(f"resize to {size}: {err}") from err


def write(image: Any, offset: int, data: bytes, done: Callable[[int], None]) -> None:
    """Start writing; ``done`` is called with 0 or a negative errno from a thread of librbd."""

    def ended(completion: Any, data: bytes = data) -> None:
        del data  # kept until here: a pool may tell librbd (rbd_disable_zero_copy_writes) to write from where they lie
        done(completion.get_return_value())

    with answers(f"write at {offset}"):
        image.aio_write(data, offset, ended)


def flush(image: Any, done: Callable[[int], None]) -> None:
    """Start putting what was written on stable storage; ``done`` as of ``write``."""
    with answers("flush"):
        image.aio_flush(lambda completion: done(completion.get_return_value()))


def create_snapshot(image: Any, name: str) -> None:
    """A snapshot of the image as it is."""
    with answers(f"create snapshot {name}"):
        image.create_snap(name)


def protect(image: Any, snapshot: str) -> None:
    """Protect the snapshot, as clones of format 1 need it."""
    with answers(f"protect snapshot {snapshot}"):
        image.protect_snap(snapshot)


def unprotect(image: Any, snapshot: str) -> None:
    """Take the protection away; BusyError while clones of format 1 depend on it."""
    with answers(f"unprotect snapshot {snapshot}"):
        image.unprotect_snap(snapshot)


def remove_snapshot(image: Any, snapshot: str) -> None:
    """Remove the snapshot. With clones of format 2 it stays, hidden, until the last of them is gone."""
    with answers(f"remove snapshot {snapshot}"):
        image.remove_snap(snapshot)


def clone(source: Ioctx, name: str, snapshot: str, target: Ioctx, clone_name: str, *, features: int) -> None:
    """A clone. NotThereError: no such parent; RefusedError: Ceph wants the snapshot protected."""
    _, rbd = bindings()
    with answers(f"clone {name}@{snapshot} to {clone_name}"):
        rbd.RBD().clone(source, name, snapshot, target, clone_name, features=features)


def flatten(image: Any) -> None:
    """Copy all that the parent holds into the image; it stands alone afterwards."""
    with answers("flatten"):
        image.flatten()


def set_metadata(ioctx: Any, image_id: str, values: Mapping[str, str | None]) -> None:
    """Set values of the image's metadata, and take away those that are None, in one atomic step that opens no image.

    A clone begins with a copy of its parent's. NotThereError: there is no such image.
    """
    with answers(f"set metadata {', '.join(values)} of {image_id}"), header(ioctx, image_id) as operation:
        for key, value in values.items():
            if value is None:
                operation.execute("rbd", "metadata_remove", encoded(key))
            else:  # a map of one
                operation.execute("rbd", "metadata_set", struct.pack("<I", 1) + encoded(key) + encoded(value))


def trash_move(ioctx: Ioctx, name: str, delay: int) -> None:
    """Take the image's name away; for ``delay`` seconds nobody removes it from the trash without force.

    Of several who move one name all may be told that it worked.
    """
    _, rbd = bindings()
    with answers(f"move {name} to the trash"):
        rbd.RBD().trash_move(ioctx, name, delay)


def trash_restore(ioctx: Ioctx, image_id: str, name: str) -> None:
    """Give an image in the trash this name in one atomic step; ExistsError if the name is taken.

    A second try for the same id and name is safe, and completes a first one that died half-way.
    """
    _, rbd = bindings()
    with answers(f"restore {image_id} as {name}"):
        rbd.RBD().trash_restore(ioctx, image_id, name)


def trash_remove(ioctx: Ioctx, image_id: str) -> None:
    """Free what an image in the trash takes. BusyError: somebody has it open; SnapshotsError: it has some."""
    _, rbd = bindings()
    with answers(f"remove {image_id} from the trash"):
        # by force: the delay keeps others away, not us
        rbd.RBD().trash_remove(ioctx, image_id, True)


def remove(ioctx: Ioctx, name: str) -> None:
    """Remove an image by name."""
    _, rbd = bindings()
    with answers(f"remove {name}"):
        rbd.RBD().remove(ioctx, name)


def put_object(ioctx: Any, key: str, data: bytes) -> None:
    """A rados object of exactly this content."""
    with answers(f"write object {key}"):
        ioctx.write_full(key, data)


def remove_object(ioctx: Any, key: str) -> None:
    """Remove a rados object; one that is not there is fine."""
    try:
        with answers(f"remove object {key}"):
            ioctx.remove_object(key)
    except NotThereError:
        return


def encoded(text: str) -> bytes:
    """A string as Ceph writes it."""
    return struct.pack("<I", len(data := text.encode())) + data

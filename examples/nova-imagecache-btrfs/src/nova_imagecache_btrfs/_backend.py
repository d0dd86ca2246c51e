"""The backend ``btrfs``: a base is a read-only subvolume, a root disk a writable snapshot of it.

::

    <root>/bases/<image-id>/volume/disk base.json    marks     complete, since it is renamed to here as a whole
           trash/<image-id>.<random>/...                       retired
           staging/<id>.<random>/volume/...                    in the making, held by its maker; or going
    <disks_dir>/<disk-id>/<name>/disk base.json                a root disk; the record came with the snapshot

``marks`` is empty: its atime is when the base was last used, its mtime since when it is unused (0: it is not).
"""

import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from nova_imagecache import backends
from nova_imagecache.backends import BaseImage, BaseRecord, FileLocation, Retired, RootDisk
from nova_imagecache_btrfs import _volumes

_TIE = "user.nova-imagecache.base"


class BtrfsWriter(backends.BaseWriter):
    """A subvolume in the making, whose file is written through ``path``."""

    def __init__(self, backend: "BtrfsBackend", image_id: str) -> None:
        self._backend, self._image_id = backend, image_id
        with ExitStack() as undo:
            self._entry = undo.enter_context(backend.making(image_id))
            _volumes.create_volume(self._entry / "volume")
            self.path = self._entry / "volume" / "disk"
            _volumes.mknod(self.path, 0o600)  # of a root disk, as this file will be
            self._undo = undo.pop_all()

    def publish(self, record: BaseRecord) -> BaseImage:
        self.sync()
        _volumes.write_bytes(self._entry / "volume" / "base.json", backends.dump_record(record))
        _volumes.sync(self._entry / "volume" / "base.json")
        _volumes.mknod(self._entry / "marks", 0o600)
        _volumes.utime(self._entry / "marks", (time.time(), 0))
        _volumes.freeze(self._entry / "volume")
        self._backend.give_name(self._entry, self._image_id)
        self.discard()
        if (base := self._backend.find_base(self._image_id)) is None:
            raise backends.BackendError("retired while it was published, or its name is taken", image_id=self._image_id)
        return base

    def discard(self) -> None:
        self._undo.close()


class BtrfsBackend(backends.Backend):
    """A root disk costs one snapshot, whatever its size. No guest ever opens a base: it is this user's alone."""

    properties = backends.BackendProperties(base_formats=("raw",), disk_kind="clone", storage="btrfs")

    def __init__(self, options: Mapping[str, object], paths: backends.BackendPaths) -> None:
        if options:
            raise backends.ConfigError([f"backend_options.{name}: btrfs has no options" for name in sorted(options)])
        self._root, self._disks = paths.root, paths.disks_dir
        self._bases, self._staging, self._trash = (paths.root / name for name in ("bases", "staging", "trash"))

    def check(self) -> list[backends.Fact]:
        with suppress(OSError):
            if _volumes.identify(self._root.resolve()) == _volumes.identify(self._disks.resolve()):
                return [backends.Fact(name="disks_dir", value=str(self._disks))]
        problem = f"it must be there, in the same subvolume of a btrfs as {self._root}"
        return [backends.Fact(name="disks_dir", value=str(self._disks), problem=problem)]

    @contextmanager
    def making(self, stem: str) -> Iterator[Path]:
        """A new directory in staging that this process holds. What is in it when the block ends is removed."""
        for directory in (self._bases, self._staging, self._trash):
            _volumes.makedirs(directory, 0o700, exist_ok=True)
        held = backends.new_entry(self._staging, stem, 0o700)
        with ExitStack() as undo:
            undo.callback(held.release)
            undo.callback(_remove, held.path)
            yield held.path

    # --- bases

    def find_base(self, image_id: str) -> BaseImage | None:
        return _base(image_id, self._bases / image_id)

    def iter_bases(self) -> Iterator[BaseImage]:
        return (base for path in _below(self._bases) if (base := self.find_base(path.name)))

    def stage_base(self, image_id: str, format: str) -> backends.BaseWriter:  # noqa: A002, ARG002 - it is raw
        return BtrfsWriter(self, image_id)

    def give_name(self, directory: Path, image_id: str) -> None:
        """A base is there from one moment to the next; unless one of that name is there, or this one is gone."""
        with suppress(FileExistsError, FileNotFoundError):
            _volumes.rename_new(directory, self._bases / image_id)
        _volumes.sync(self._bases)

    def touch_base(self, base: BaseImage) -> None:
        with suppress(FileNotFoundError):  # retired meanwhile
            _volumes.utime(self._bases / base.image_id / "marks", (time.time(), 0))

    def mark_unused(self, base: BaseImage, when: float | None) -> None:
        marks = self._bases / base.image_id / "marks"
        with suppress(FileNotFoundError):  # retired meanwhile
            _volumes.utime(marks, ns=(marks.stat().st_atime_ns, int((when or 0) * 1e9)))

    def iter_users(self, base: BaseImage) -> Iterator[backends.DiskUser]:
        assert isinstance(base.location, FileLocation)  # noqa: S101 - for the type checker
        try:
            own, _ = _volumes.identify(base.location.path.parent)
            making = (entry / "volume" for entry in _below(self._staging))
            # one after the other: a disk that is published meanwhile is seen here or there
            users = [volume for some in (making, self._root_volumes()) for volume in some if _tie(volume) == own]
        except OSError as err:
            raise backends.UsersUnknownError(f"btrfs cannot tell: {err}", image_id=base.image_id) from err
        return (backends.DiskUser(image_id=base.image_id, known_by="clone", detail=str(user)) for user in users)

    def retire_base(self, base: BaseImage) -> Retired:
        gone = self._trash / f"{base.image_id}.{time.time_ns()}"
        try:
            _volumes.rename(self._bases / base.image_id, gone)
        except FileNotFoundError:
            raise backends.BaseNotFoundError(image_id=base.image_id) from None
        _volumes.sync(self._bases)
        return Retired(base=_base(base.image_id, gone) or base, token=gone.name)

    def restore_base(self, retired: Retired) -> None:
        self.give_name(self._trash / retired.token, retired.base.image_id)

    def purge_base(self, retired: Retired) -> None:
        # out of the reach of restore in one step: onto an empty directory, which goes with what is in it
        with self.making(retired.token) as entry, suppress(FileNotFoundError):
            _volumes.rename(self._trash / retired.token, entry)

    def usage(self, base: BaseImage) -> backends.DiskUsage:
        self._still_there(base)
        return backends.DiskUsage(virtual_size=base.virtual_size, allocated=_allocated(self._bases / base.image_id))

    def capacity(self) -> backends.Capacity:
        disk = shutil.disk_usage(self._root)
        staging, trash = (sum(map(_allocated, _below(where))) for where in (self._staging, self._trash))
        return backends.Capacity(total=disk.total, free=disk.free, staging=staging, trash=trash)

    def _still_there(self, base: BaseImage) -> None:
        now = self.find_base(base.image_id)
        if now is None or now.record != base.record:
            raise backends.BaseNotFoundError(image_id=base.image_id)

    # --- root disks

    def create_root_disk(self, base: BaseImage, disk_id: str, name: str, size: int) -> RootDisk:
        place = self._disks / disk_id / name
        _volumes.makedirs(place.parent, 0o755, exist_ok=True)
        with self.making(disk_id) as entry:
            try:
                # a user from its first moment on: whoever retires the base now sees it, or is seen
                _volumes.snapshot(self._bases / base.image_id / "volume", entry / "volume")
                self.touch_base(base)
                self._still_there(base)
                _volumes.truncate(entry / "volume" / "disk", size)
                _volumes.rename_new(entry / "volume", place)
            except FileNotFoundError:
                raise backends.BaseNotFoundError(image_id=base.image_id) from None
            except FileExistsError:
                raise backends.DiskExistsError(image_id=base.image_id, disk_id=disk_id, name=name) from None
        _volumes.sync(place.parent)
        return self._existing(disk_id, name)

    def get_root_disk(self, disk_id: str, name: str) -> RootDisk | None:
        volume = self._disks / disk_id / name
        record, tie, file = backends.read_record(volume / "base.json"), _tie(volume), _stat(volume / "disk")
        if record is None or tie is None or file is None:
            return None
        known = {"disk_id": disk_id, "name": name, "image_id": record.image_id, "format": "raw"}
        location, size = FileLocation(path=volume / "disk"), file.st_size
        return RootDisk(**known, location=location, virtual_size=size, reference="clone" if tie else "none")

    def _existing(self, disk_id: str, name: str) -> RootDisk:
        if (disk := self.get_root_disk(disk_id, name)) is None:
            raise backends.DiskNotFoundError(disk_id=disk_id, name=name)
        return disk

    def _root_volumes(self) -> Iterator[Path]:
        for directory in _below(self._disks):
            yield from _below(directory)

    def iter_root_disks(self) -> Iterator[RootDisk]:
        return (disk for path in self._root_volumes() if (disk := self.get_root_disk(path.parent.name, path.name)))

    def remove_root_disk(self, disk_id: str, name: str) -> None:
        with suppress(FileNotFoundError):
            _volumes.destroy(self._disks / disk_id / name)
            _volumes.sync(self._disks / disk_id)

    def resize_root_disk(self, disk_id: str, name: str, size: int) -> RootDisk:
        self._existing(disk_id, name)
        _volumes.truncate(self._disks / disk_id / name / "disk", size)
        _volumes.sync(self._disks / disk_id / name / "disk")
        return self._existing(disk_id, name)

    def flatten_root_disk(self, disk_id: str, name: str) -> RootDisk:
        # nothing to copy: btrfs counts who shares a block, and keeps it for the last one
        return self._tied(disk_id, name, b"")

    def attach_root_disk(self, base: BaseImage, disk_id: str, name: str) -> RootDisk:
        disk, record = self._existing(disk_id, name), backends.read_record(self._disks / disk_id / name / "base.json")
        one, other = base.digest, record and record.source_digest
        if record is None or not (one == other if one and other else base.image_id == record.image_id):
            raise backends.DiskExistsError("made of other bytes", image_id=base.image_id, disk_id=disk_id, name=name)
        if disk.reference == "clone":
            self._still_there(base)
            disk = self._tied(disk_id, name, _volumes.identify(self._bases / base.image_id / "volume")[0])
            self._still_there(base)
        return disk

    def _tied(self, disk_id: str, name: str, own: bytes) -> RootDisk:
        self._existing(disk_id, name)
        _volumes.setxattr(self._disks / disk_id / name, _TIE, own)
        _volumes.sync(self._disks / disk_id / name)
        return self._existing(disk_id, name)

    # --- after a crash

    def recover(self) -> backends.RecoveryReport:
        removed, restored, alive = list[str](), list[str](), list[str]()
        for entry in _below(self._staging):
            if held := backends.hold(entry, wait=False):
                held.release()  # a dead one's: nobody takes it up again
                _remove(entry)
            (removed if held else alive).append(f"staging/{entry.name}")
        for entry in _below(self._trash):
            if (base := _base(entry.name.rpartition(".")[0], entry)) is not None:
                retired = Retired(base=base, token=entry.name)
                if any(self.iter_users(base)):
                    self.restore_base(retired)
                (removed if entry.exists() else restored).append(f"trash/{entry.name}")
                self.purge_base(retired)
        return backends.RecoveryReport(removed=tuple(removed), restored=tuple(restored), alive=tuple(alive))


def _below(directory: Path) -> list[Path]:
    with suppress(FileNotFoundError, NotADirectoryError):
        return sorted(directory.iterdir())
    return []


def _base(image_id: str, directory: Path) -> BaseImage | None:
    record, marks = backends.read_record(directory / "volume" / "base.json"), _stat(directory / "marks")
    if record is None or marks is None:
        return None
    location = FileLocation(path=directory / "volume" / "disk")
    used, unused = marks.st_atime or None, marks.st_mtime or None
    return BaseImage(image_id=image_id, location=location, record=record, last_used=used, unused_since=unused)


def _tie(volume: Path) -> bytes | None:
    """The UUID of the base that a root disk is tied to: its origin's, or what is noted since; empty: of none; None: no
    root disk is there."""
    with suppress(FileNotFoundError, NotADirectoryError):
        if volume.lstat().st_ino == 256:  # as every subvolume's directory, and no other
            return os.getxattr(volume, _TIE) if _TIE in os.listxattr(volume) else _volumes.identify(volume)[1]
    return None


def _allocated(directory: Path) -> int:
    return file.st_blocks * 512 if (file := _stat(directory / "volume" / "disk")) else 0


def _stat(path: Path) -> os.stat_result | None:
    with suppress(FileNotFoundError, NotADirectoryError):
        return path.stat()
    return None


def _remove(entry: Path) -> None:
    with suppress(FileNotFoundError):
        _volumes.destroy(entry / "volume")
    _volumes.rmtree(entry, ignore_errors=True)  # an empty shell: what is left of it goes with the next recover

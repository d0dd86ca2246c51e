"""A cache in a directory of its own, over images with known bytes, and what must be true of it at every moment."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.images import Sample
from nova_imagecache import (
    BackendPaths,
    BaseImage,
    CacheConfig,
    FileLocation,
    ImageCache,
    ImageSource,
    RootDisk,
)
from nova_imagecache._qcow2 import HEADER_BYTES, parse_header
from nova_imagecache.backends.file import FileBackend
from nova_imagecache.backends.qcow2 import Qcow2Backend
from nova_imagecache.testing import FakeSource

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "link": ("qcow2", {"reference": "link"}),
    "path": ("qcow2", {"reference": "path"}),
    "link-native": ("qcow2", {"reference": "link", "base_format": "native"}),
    "path-native": ("qcow2", {"reference": "path", "base_format": "native"}),
    "file": ("file", {}),
    "file-native": ("file", {"base_format": "native"}),
}
"""Backends and options, by how a disk refers to its base."""


class Rig:
    """A cache below ``directory``, of one of ``KINDS``.

    ``samples`` are the images that its FakeSource serves; ``truth`` says by disk id which one a disk was made of, where
    the image's id does not. ``scratch`` is where files to compare with are put.
    """

    def __init__(self, directory: Path, kind: str, samples: Mapping[str, Sample]) -> None:
        self.dir = directory
        self.scratch = directory
        self.root = directory / "root"
        self.disks = directory / "disks"
        self.kind = kind
        self.backend_name, self.options = KINDS[kind]
        self.samples = dict(samples)
        self.truth: dict[str, Sample] = {}
        self._compared: set[tuple[object, ...]] = set()

    @property
    def references(self) -> bool:
        """Whether disks of this kind depend on their base."""
        return self.backend_name == "qcow2"

    def source(self) -> FakeSource:
        """A source of the samples as they are now."""
        return FakeSource({image_id: sample.fake for image_id, sample in self.samples.items()})

    def backend(self) -> FileBackend | Qcow2Backend:
        """The backend by itself, without the core's locks."""
        paths = BackendPaths(root=self.root, disks_dir=self.disks)
        if self.backend_name == "file":
            return FileBackend(self.options, paths)
        return Qcow2Backend(self.options, paths)

    def cache(
        self, source: ImageSource | None = None, *, on_event: Any = None, user_finders: Any = (), **config: Any
    ) -> ImageCache:
        """A cache as another process would have it."""
        return ImageCache(
            CacheConfig(
                root=self.root,
                disks_dir=self.disks,
                backend=self.backend_name,
                backend_options=self.options,
                **config,
            ),
            source=self.source() if source is None else source,
            backend=self.backend(),
            user_finders=user_finders,
            on_event=on_event,
        )

    # --- what must be true

    def check(self, when: str) -> None:
        """Every base is what was published; every disk opens and reads its own image; everything can be counted."""
        with self.cache() as cache:
            for base in list(cache.bases()):
                cache.verify_base(base.image_id)
            for disk in list(cache.root_disks()):
                self.check_disk(disk, when)
            usage = cache.usage()
            assert usage.complete, f"{when}: usage() is not complete"

    def check_disk(self, disk: RootDisk, when: str) -> None:
        """The disk opens and reads as its image, and as zeros behind it."""
        assert isinstance(disk.location, FileLocation)
        path = disk.location.path
        sample = self.truth.get(disk.disk_id, self.samples[disk.image_id])
        named = backing_name(path) if disk.format == "qcow2" else None
        backing = _digest(path.parent / named) if named else b""
        seen = (sample.guest, _digest(path), backing, disk.virtual_size)
        if seen in self._compared:
            return
        check_disk_file(path, disk.format, sample.guest, self.scratch, f"{when}: disk {disk.disk_id}/{disk.name}")
        self._compared.add(seen)

    def check_tidy(self, when: str, *, arrived: bool = False) -> None:
        """Nothing is left of what did not come to its end; nothing stands for a disk that is not there.

        ``arrived``: a disk came from elsewhere and is not attached yet.
        """
        for name in ("staging", "trash"):
            left = _names(self.root / name)
            assert left == [], f"{when}: {name}/ holds {left}"
        with self.cache() as cache:
            disks = {(disk.disk_id, disk.name): disk for disk in cache.root_disks()}
            bases = {base.image_id: base for base in cache.bases()}
        for disk_id in _names(self.disks):
            assert (self.disks / disk_id).is_dir(), f"{when}: disks/{disk_id} is left"
            self._check_disk_directory(disk_id, disks, when)
        recorded = {}
        for path in sorted(self.root.glob("users/*/*.json")):
            values = json.loads(path.read_bytes())
            recorded[values["disk_id"], values["name"]] = path.parent.name
            disk = disks.get((values["disk_id"], values["name"]))
            assert disk is not None, f"{when}: {path.parent.name}/{path.name} stands for a disk that is not there"
            assert disk.reference == "path", f"{when}: {path.name} stands for a disk with reference {disk.reference}"
            assert disk.image_id == path.parent.name, f"{when}: {path} is below another image"
        for key, disk in disks.items():
            if disk.reference == "path" and not arrived:
                assert recorded.get(key) == disk.image_id, f"{when}: {key} has no path reference in users/"
        if not arrived:
            self._check_counts(disks, bases, when)

    def _check_disk_directory(self, disk_id: str, disks: Mapping[tuple[str, str], RootDisk], when: str) -> None:
        for name in _names(self.disks / disk_id):
            where = f"{when}: disks/{disk_id}/{name}"
            if name.endswith(".base"):
                disk = disks.get((disk_id, name.removesuffix(".base")))
                assert disk is not None, f"{where} is left without its disk"
                assert disk.reference == "link", f"{where} is left beside a disk with reference {disk.reference}"
                named = backing_name(self.disks / disk_id / disk.name)
                assert named == name, f"{where} is left: the disk names {named!r}"
            elif name.endswith(".json"):
                assert (disk_id, name.removesuffix(".json")) in disks, f"{where} is left without its disk"
            else:
                assert (disk_id, name) in disks, f"{where} is left"

    def _check_counts(
        self, disks: Mapping[tuple[str, str], RootDisk], bases: Mapping[str, BaseImage], when: str
    ) -> None:
        with self.cache() as cache:
            for image_id, base in bases.items():
                users = cache.users(image_id)
                assert isinstance(base.location, FileLocation)
                links = sum(
                    _same_file(self.disks / disk.disk_id / f"{disk.name}.base", base.location.path)
                    for disk in disks.values()
                )
                paths = sum(disk.reference == "path" and disk.image_id == image_id for disk in disks.values())
                counted = (
                    sum(user.known_by == "link" for user in users),
                    sum(user.known_by == "path" for user in users),
                )
                assert counted == (links, paths), f"{when}: users of {image_id} by (link, path)"


def check_disk_file(path: Path, image_format: str, guest: bytes, scratch: Path, when: str) -> None:
    """The disk opens with its whole backing chain, is consistent, and reads as ``guest`` and then zeros."""
    truth = truth_file(guest, scratch)
    compare(path, image_format, truth, when)
    if image_format == "qcow2":
        checked = _run("check", "-q", "-f", "qcow2", str(path))
        assert checked.returncode == 0, f"{when}: qemu-img check: {checked.stdout}{checked.stderr}"


def compare(path: Path, image_format: str, truth: Path, when: str) -> None:
    """The disk reads as the raw file ``truth``, and as zeros behind it."""
    done = _run("compare", "-f", image_format, "-F", "raw", str(path), str(truth))
    assert done.returncode == 0, f"{when}: qemu-img compare: {done.stdout}{done.stderr}"


def truth_file(guest: bytes, scratch: Path) -> Path:
    """A raw file of these bytes."""
    path = scratch / f"truth.{hashlib.blake2b(guest, digest_size=8).hexdigest()}"
    if not path.exists():
        # by rename: threads and children may ask for the same one
        part = path.with_name(f"{path.name}.{os.urandom(8).hex()}")
        part.write_bytes(guest)
        part.rename(path)
    return path


def backing_name(path: Path) -> str | None:
    """The backing file's name in the header of a qcow2 file, None: it has none."""
    with path.open("rb") as file:
        header = parse_header(file.read(HEADER_BYTES))
        if not header.backing_offset:
            return None
        file.seek(header.backing_offset)
        return file.read(header.backing_length).decode()


def _digest(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, hashlib.blake2b).digest()
    except FileNotFoundError:
        return b""


def _names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []


def _same_file(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except FileNotFoundError:
        return False


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["qemu-img", *arguments], capture_output=True, text=True, check=False)

"""What dead processes left on files, and how it is told from what live ones work on."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from nova_imagecache import _entries, _fs, _qcow2
from nova_imagecache.backends import RecoveryReport
from nova_imagecache.backends._disks import FileDisks, reader_of

if TYPE_CHECKING:
    from pathlib import Path


class RecoverableDisks(FileDisks):
    """The last third of a backend on files: ``recover``."""

    def recover(self) -> RecoveryReport:
        stuck: dict[str, str] = {}
        removed, alive = _entries.sweep(self.staging, stuck)
        failed = {f"staging/{name}": reason for name, reason in stuck.items()}
        purged, restored, stuck = self.sweep_trash()
        failed |= {f"trash/{name}": reason for name, reason in stuck.items()}
        removed = [f"staging/{name}" for name in removed] + [f"trash/{name}" for name in purged]
        alive = [f"staging/{name}" for name in alive]
        for disk_id in _entries.names(self.paths.disks_dir):
            held = _entries.hold(self._directory(disk_id), wait=False)
            if held is None:
                if self._directory(disk_id).is_dir():
                    alive.append(f"disks/{disk_id}")
                elif disk_id.startswith(".check."):  # of a check() that died
                    _fs.unlink(self._directory(disk_id))
                    removed.append(f"disks/{disk_id}")
                continue
            try:
                removed += [f"disks/{disk_id}/{name}" for name in self._sweep_disk(disk_id)]
            except OSError as err:  # one directory that cannot be read stops no other
                failed[f"disks/{disk_id}"] = str(err)
            finally:
                held.release()
        return RecoveryReport(removed=tuple(removed), restored=tuple(restored), alive=tuple(alive), failed=failed)

    def _sweep_disk(self, disk_id: str) -> list[str]:
        """Remove what dead makers left in a disk id's directory; the directory is held."""
        directory = self._directory(disk_id)
        names = set(_entries.names(directory))
        gone = []
        for name in sorted(names):
            if name.startswith(".") and _is_making(directory / name):
                _fs.rmtree(directory / name)
            elif name.endswith(".base") and name.removesuffix(".base") not in names:
                if reader_of(directory / name):
                    continue  # its disk is gone, a snapshot of it is not
                self._forget(directory, disk_id, name.removesuffix(".base"))
            elif name.endswith(".json") and name.removesuffix(".json") not in names:
                stem = name.removesuffix(".json")
                if self._load(directory, stem) is None or reader_of(directory / f"{stem}.base"):
                    continue  # not a record of ours, or a snapshot's
                self._forget(directory, disk_id, stem)
            elif name.endswith(".json"):
                gone += self._settle(directory, disk_id, name.removesuffix(".json"))
                continue
            else:
                continue
            gone.append(name)
        if gone:
            _fs.rmdir(directory)
        return gone

    def _settle(self, directory: Path, disk_id: str, name: str) -> list[str]:
        """Take away the reference of a disk that stands alone by now: a flatten that died, a blockPull of libvirt."""
        record = self._load(directory, name)
        if record is None or record.format != "qcow2":
            return []
        try:
            with (directory / name).open("rb", buffering=0) as file:
                depends = bool(_qcow2.read_backing_name(file))
        except OSError:  # the guest's user owns it now, or it was removed: nothing can be told
            return []
        link = directory / f"{name}.base"
        if depends or reader_of(link):
            return []
        if record.reference != "none":
            self._rewrite(disk_id, name, replace(record, reference="none"))
        self._drop_path_reference(record, disk_id, name)
        if not os.path.lexists(link):
            return []
        _fs.unlink(link)
        return [link.name]


def _is_making(path: Path) -> bool:
    stem, _dot, suffix = path.name.rpartition(".")
    return len(suffix) == 16 and bool(stem) and path.is_dir()

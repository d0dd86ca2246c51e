"""Path references: the records in ``users/<image-id>/`` of root disks that name their base by its path (layout 1).

A record and its disk know each other by the moment in which the disk was made, whatever the disk's directory is
called by now. One whose disk is not where it says is doubt, and keeps the base.
"""

from __future__ import annotations

import json
import os
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from nova_imagecache import _entries, _fs, _records

if TYPE_CHECKING:
    from collections.abc import Iterator

_LOOKS = 10
"""Times that an image's references are listed until none is renamed meanwhile."""


def host_record(disk_id: str, name: str, path: Path, made_at: float) -> bytes:
    """What is written down of a path reference: whose it is, where, and on which host."""
    values = {"disk_id": disk_id, "name": name, "path": str(path), "host": os.uname().nodename, "made_at": made_at}
    return (json.dumps(values, indent=1, sort_keys=True) + "\n").encode()


UNFINISHED = "~unfinished.json"


def unfinished(written: Path) -> Path:
    """How a reference is called while its disk is made or removed: what a death leaves is told from a disk that
    was moved away."""
    return written.with_name(f"{written.stem}{UNFINISHED}")


def finished(written: Path) -> Path:
    """How an unfinished reference is called in the end."""
    return written.with_name(written.name.removesuffix(UNFINISHED) + ".json")


def is_unfinished(written: Path) -> bool:
    """Whether the disk of this reference is being made or removed."""
    return written.name.endswith(UNFINISHED)


def finish(written: Path, own: float) -> None:
    """The disk has its name: so has its reference from now on. The disk's directory is held."""
    with _held(written.parent):
        _set_aside(written, own)
        _fs.rename(unfinished(written), written)
    _fs.fsync_dir(written.parent)


def write(written: Path, data: bytes, own: float, *, staging: Path) -> None:
    """A disk that is there gets this reference, durably. The disk's directory is held."""
    with _held(written.parent):
        _set_aside(written, own)
        _entries.replace_file(written, data, 0o644, staging=staging)


def end(written: Path, known: bytes) -> bool:
    """Take away the reference that was read as ``known``; whether it was there still. Another's of that name stays."""
    with _held(written.parent):
        there = read(written) == known
        if there:
            _fs.unlink(written)
            _fs.rmdir(written.parent)
    return there


def rename(written: Path, known: bytes, name: Path) -> bool:
    """Give the reference that was read as ``known`` another name; whether it was there still."""
    with _held(written.parent):
        there = read(written) == known
        if there:
            _fs.rename(written, name)
    return there


@contextmanager
def _held(users: Path) -> Iterator[None]:
    """One at a time looks what has a name there and changes it: who holds one disk's directory may meet the reference
    of another disk that was called like it. Nothing else is waited for meanwhile."""
    held = _entries.hold(users, wait=True, follow=True)
    try:
        yield
    finally:
        if held is not None:
            held.release()


def read(written: Path) -> bytes | None:
    """A path reference as it is written down; None: it is not there, or cannot be read."""
    try:
        return written.read_bytes()
    except OSError:
        return None


def made_at(written: Path) -> float | None:
    """When the disk of a path reference was made; None: the reference is not there, or cannot be read."""
    data = read(written)
    return None if data is None else moment(data)


def moment(data: bytes) -> float | None:
    """When the disk of the reference that was read was made; None: it is damaged."""
    try:
        values = json.loads(data)
    except ValueError:
        return None
    found = values.get("made_at") if isinstance(values, dict) else None
    return float(found) if isinstance(found, int | float) else None


def _set_aside(written: Path, own: float) -> None:
    """Keep the path reference of an earlier disk of this name: its directory may have moved, and come back."""
    if (found := made_at(written)) is not None and found != own:
        _fs.rename(written, aside(written))


def aside(written: Path) -> Path:
    """Another name for the path reference of an earlier disk of the same name."""
    return written.with_name(f"{written.stem}~{_fs.random_suffix()}.json")


def of_moment(users: Path, own: float) -> list[Path]:
    """An image's path references to disks that were made then. Reads all."""
    for _look in range(_LOOKS):
        found = {one: made_at(one) for one in map(users.joinpath, _entries.names(users))}
        if all(made is not None or os.path.lexists(one) for one, made in found.items()):
            break
    return [one for one, made in found.items() if made == own]


def others(users: Path, own: float, disk: Path) -> list[Path]:
    """An image's path references to the disk that was made then and is at ``disk`` now, whatever it was called."""
    return [one for one in of_moment(users, own) if is_of(one, own, disk)]


def is_of(written: Path, own: float, disk: Path) -> bool:
    """Whether a path reference is of the disk made then that is at ``disk``. One that leads to another disk is of that
    one: a copy, or the original."""
    if made_at(written) != own:
        return False
    path = refers_to(written)
    if path is None or path == disk:
        return True
    with suppress(OSError):  # one of them is not there
        if path.samefile(disk):
            return True
    return not leads_to(written, own)


def leads_to(written: Path, own: float) -> bool:
    """Whether the disk made then is where the path reference says, by the record beside it."""
    if (path := refers_to(written)) is None:
        return False
    try:
        record = _records.load_disk(path.with_name(f"{path.name}.json").read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return False
    except _records.RecordError:  # damaged, or of a newer version: the disk may be that one
        return os.path.lexists(path)
    except OSError:  # not to be seen: it may be there
        return True
    return record.made_at == own and os.path.lexists(path)


def refers_to(written: Path) -> Path | None:
    """Where the disk of a path reference was; None: the reference is not there, or cannot be read."""
    try:
        return Path(json.loads(written.read_bytes())["path"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def asides(written: Path) -> list[Path]:
    """The path references of earlier disks of the same name."""
    names = _entries.names(written.parent)
    return [written.with_name(name) for name in names if name.startswith(f"{written.stem}~")]

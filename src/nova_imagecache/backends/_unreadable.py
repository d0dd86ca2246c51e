"""What stands in a base's place on files and cannot be read as one, as something that can be retired."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

from nova_imagecache import _records
from nova_imagecache.backends import BaseImage, BaseRecord, FileLocation, Unreadable

if TYPE_CHECKING:
    from pathlib import Path


def unreadable(image_id: str, reason: str, directory: Path) -> Unreadable:
    """What stands at ``directory``, and why it is no base.

    Raises:
        OSError: it cannot be seen now, which is no damage.
    """
    # what is no directory is not ours, and a later release may count users where nobody looks here
    ours = stat.S_ISDIR(directory.lstat().st_mode) and not _is_later(directory / "base.json")
    return Unreadable(reason=reason, base=of_nothing_known(image_id, directory) if ours else None)


def of_nothing_known(image_id: str, directory: Path) -> BaseImage:
    """What stands at ``directory`` as a base, whose record tells nothing."""
    record = BaseRecord(
        image_id=image_id,
        format="raw",
        virtual_size=0,
        size=0,
        source_format="raw",
        source_size=0,
        source_digest=None,
        evidence="none",
        made_by="unknown",
        source="unknown",
        fetched_at=0.0,
    )
    return BaseImage(image_id=image_id, location=FileLocation(path=directory / "disk"), record=record)


def _is_later(path: Path) -> bool:
    try:
        _records.load_base(path.read_bytes())
    except _records.LaterRecordError:
        return True
    except (FileNotFoundError, _records.RecordError):
        pass
    return False

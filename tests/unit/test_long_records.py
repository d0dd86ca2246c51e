"""Records longer than any that we write: a later release may add fields."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.images import raw
from harness.rig import Rig


@pytest.mark.parametrize("length", [8191, 8192, 8193, 3 * 8192])
def test_a_long_record_is_read_whole(tmp_path: Path, length: int) -> None:
    """Fields that we do not know make a record long; it is read to its end."""
    rig = Rig(tmp_path, "link", {"img": raw("one")})
    base = rig.cache().ensure_base("img")
    path = rig.root / "bases" / "img" / "base.json"
    values = json.loads(path.read_bytes())
    text = json.dumps({"a_later_field": "", **values})
    text = json.dumps({"a_later_field": "x" * (length - len(text)), **values})
    assert len(text) == length
    path.chmod(0o644)
    path.write_text(text)
    assert rig.cache().get_base("img").record == base.record

"""A nova.conf on disk, read by the real oslo.config."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import pytest
from oslo_config import cfg

from nova_imagecache.oslo import register_opts


class Read(Protocol):
    """What oslo.config makes of a nova.conf of this text; ``registered``: with the bridge's options."""

    def __call__(self, text: str, *, registered: bool = False) -> cfg.ConfigOpts: ...


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """nova.conf is ``tmp_path / "nova.conf"``; the lines' common indentation does not count."""

    def conf(text: str, *, registered: bool = False) -> cfg.ConfigOpts:
        path = tmp_path / "nova.conf"
        path.write_text("\n".join(line.strip() for line in text.splitlines()))
        made = cfg.ConfigOpts()
        if registered:
            register_opts(made)
        made([], project="nova", default_config_files=[str(path)])
        return made

    return conf

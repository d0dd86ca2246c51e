"""How much memory a fetch takes: the same for an image of any size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from services.flaky import FlakyGlance

MIB, GIB = 2**20, 2**30
SIZE = 10 * GIB
DATA_EVERY = 32
LIMIT = 100 * MIB


class MostlyZeros:
    """``size`` bytes: of every 32 MiB one is data."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._data = bytes(range(1, 256)) * (MIB // 255 + 1)
        self._zeros = bytes(MIB)

    def read(self, offset: int, length: int) -> bytes:
        number, start = divmod(offset, MIB)
        block = self._zeros if number % DATA_EVERY else self._data
        return block[start : min(MIB, start + length, start + self.size - offset)]


@pytest.mark.slow
@pytest.mark.services
@pytest.mark.timeout(300)
def test_memory_of_a_ten_gib_fetch(tmp_path: Path) -> None:
    """A process that fetches 10 GiB stays below 100 MiB above where it was."""
    with FlakyGlance() as glance:
        glance.add("small", b"small" * 1000)
        glance.add("large", MostlyZeros(SIZE))
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        command = [sys.executable, "-m", "harness.fetcher", str(tmp_path / "root"), glance.url, "large"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["size"] == SIZE
    grown = (answer["peak"] - answer["start"]) * 1024
    assert grown < LIMIT, f"it grew by {grown / MIB:.0f} MiB"
    assert answer["usage"] < SIZE // DATA_EVERY * 2, "zeros take no space"

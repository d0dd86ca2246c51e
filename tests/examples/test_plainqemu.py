"""The driver without libvirt: QEMU alone, on each backend."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from services.libvirtd_hosts import Host
from services.libvirtd_rig import says

pytestmark = pytest.mark.services

EXAMPLE = Path(__file__).resolve().parents[2] / "examples/plainqemu/plainqemu.py"


def _plainqemu(host: Host, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", str(EXAMPLE), str(host.cache), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_it_is_short() -> None:
    """It is there to be read: about 60 lines."""
    assert len(EXAMPLE.read_text().splitlines()) <= 60


def test_a_guest_boots(host: Host) -> None:
    """It reads the image and says DONE; started again it finds what it wrote, and another guest does not."""
    for name, again in (("vm-1", False), ("vm-1", True), ("vm-2", False)):
        done = _plainqemu(host, "one", name)
        assert (done.stdout.split("\n")[:-1], done.returncode) == (says("ONE", again=again), 0), done.stderr


def test_what_does_not_boot(host: Host) -> None:
    """An image that is not there is an error, and makes no disk."""
    done = _plainqemu(host, "nowhere", "vm")
    assert done.returncode != 0
    assert "ImageNotFoundError" in done.stderr
    assert not (host.dir / "disks/vm").exists()

"""The benchmarks run: a little of each, without the peers, whose environments tests do not make."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from services import ceph_bindings
from services import glance as glance_service
from services.require import require

REPO = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


def _run(directory: Path, *options: str) -> tuple[dict[str, Any], str]:
    """The figures of a quick run with these options, and what it said."""
    out = directory / "figures.json"
    command = [sys.executable, "-m", "benchmarks", "--quick", "--rounds", "1", "--no-peers", "--dir", str(directory)]
    command += ["--out", str(out), *options]
    environment = {**os.environ, "PYTHONPATH": str(REPO / "tests")}
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()), done.stdout


def test_what_needs_no_service(tmp_path: Path) -> None:
    """Hits, warm root disks and cleanup passes are measured, and the tables have them."""
    figures, said = _run(tmp_path, *(f"--only={name}" for name in ("start-up", "hit", "warm", "at-once", "cleanup")))
    warm = figures["works"]["warm"]
    assert set(warm) == {"1 GiB", "10 TiB"}
    for case in warm.values():
        assert set(case) == {"ours", "qemu-img create"}
        assert case["ours"][0]["children"] == 0
        assert case["ours"][0]["p50"] > 0
    assert figures["works"]["cleanup"].keys() == {"50", "100"}
    assert "| warm disk 10 TiB, p50 |" in said
    assert not list(tmp_path.glob("run-*")), "roots are left"


@pytest.mark.services
def test_what_needs_glance(tmp_path: Path) -> None:
    """A cold image is measured beside the physical terms and, if it is not compressed, beside a bare pass; its disk is
    watched once. A crowd downloads once.
    """
    require(glance_service.missing())
    figures, said = _run(tmp_path, "--only=cold", "--only=crowd", "--image=qcow2-zlib", "--image=small")
    assert set(figures["works"]["cold"]) == {"qcow2-zlib", "small"}
    small = figures["works"]["cold"]["small"]
    assert set(small) == {"ours", "download", "hash", "decode", "write", "bare pass"}
    assert ["disk_peak" in one for one in small["ours"]] == [True, False, False]
    assert all(one["written"] and one["cpu_servers"] for one in small["bare pass"])
    case = figures["works"]["cold"]["qcow2-zlib"]
    assert set(case) == {"ours", "download", "hash", "decode", "write"}
    assert case["ours"][0]["cpu_servers"] > 0, "Glance's CPU time counts"
    assert case["ours"][0]["base_allocated"] <= case["write"][0]["written"] * 1.02 + 2**20
    assert all(one["ours"][0]["downloads"] == 1 for one in figures["works"]["crowd"].values())
    assert "ours / floor" in said
    assert "; a bare pass: " in said


@pytest.mark.services
def test_what_needs_ceph(tmp_path: Path) -> None:
    """An import is measured beside the tools and the physical terms, a short one thrice; a clone beside librbd."""
    require(glance_service.missing())
    require(ceph_bindings.missing())
    figures, said = _run(tmp_path, "--only=rbd-import", "--only=rbd-clone", "--image=small")
    assert set(figures["works"]["rbd-import"]) == {"small"}
    case = figures["works"]["rbd-import"]["small"]
    assert set(case) == {"ours", "tools", "tools, unverified", "download", "hash", "decode", "write"}
    assert len(case["ours"]) == len(case["write"]) == 3
    assert case["write"][0]["written"] >= 8 * 2**20
    assert case["write"][0]["cpu_servers"] > 0, "Ceph's CPU time counts"
    assert set(figures["works"]["rbd-clone"]["clone"]) == {"ours", "librbd"}
    assert "| small into Ceph |" in said

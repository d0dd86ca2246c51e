"""A daemon that a test has paused does nothing more, with none of its threads."""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from services.ceph_daemon import Daemon

BUSY = """
import hashlib, threading
def work():
    block = bytes(1 << 20)
    while True:
        hashlib.sha512(block)
for _ in range(4):
    threading.Thread(target=work).start()
print("ready", flush=True)
"""


def _states(pid: int) -> set[str]:
    stats = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    return {stat.rpartition(")")[2].split()[0] for stat in stats}


def test_all_threads_stand_when_pause_returns(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with ThreadPoolExecutor(1) as starter:
        daemon = Daemon("busy", [sys.executable, "-c", BUSY], log, starter)
        daemon.start()
        try:
            while not log.exists() or not log.read_text():
                daemon.check()
                time.sleep(0.01)
            assert daemon.pid is not None
            for _ in range(10):
                daemon.pause()
                assert _states(daemon.pid) == {"T"}
                daemon.resume()
        finally:
            daemon.kill()

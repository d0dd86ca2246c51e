"""Several hosts on one pool: processes with clients and roots of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import rbd as pool
from harness.images import raw
from nova_imagecache import BaseImage
from nova_imagecache.testing import FakeSource
from services.ceph import CephCluster

pytestmark = pytest.mark.services

MIB = 2**20

_HOST = """
import json, sys
from pathlib import Path
from harness import rbd as pool
from harness.images import raw
from nova_imagecache import CacheConfig, ImageCache
from nova_imagecache.testing import FakeSource
values = json.loads(sys.argv[1])
directory = Path(values["directory"])
config = CacheConfig(root=directory / "root", disks_dir=directory / "disks", backend="rbd")
source = FakeSource({"img": raw("hosts", 8 * 2**20).fake})
with ImageCache(config, source=source, backend=pool.from_spec(sys.argv[1])) as cache:
    cache.recover()
    print("ready", flush=True)
    for line in sys.stdin:
        disk = cache.create_root_disk("img", line.strip(), size=12 * 2**20)
        print(json.dumps([disk.image_id, source.opens]), flush=True)
"""


@pytest.fixture(autouse=True)
def _empty(ceph: CephCluster) -> Iterator[None]:
    pool.empty(ceph)
    yield
    pool.empty(ceph)


class Host:
    """Another process that makes disks of "img" in the pool, named by lines."""

    def __init__(self, ceph: CephCluster, directory: Path, user: str) -> None:
        tests = str(Path(__file__).parents[1])
        code = f"import sys; sys.path.insert(0, {tests!r})\n{_HOST}"
        spec = pool.spec(ceph, directory, user=user)
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, spec], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def say(self, disk_id: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{disk_id}\n")
        self.process.stdin.flush()

    def hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


def test_two_hosts_import_at_once(ceph: CephCluster, tmp_path: Path) -> None:
    """Both get disks of one and the same base; whoever was second has left nothing."""
    ceph.create_user("nova2", mon="profile rbd", osd="profile rbd pool=vms, profile rbd-read-only pool=images")
    hosts = [Host(ceph, tmp_path / user, user) for user in ("nova", "nova2")]
    try:
        assert [host.hear() for host in hosts] == ["ready", "ready"]
        for number, host in enumerate(hosts):
            host.say(f"vm-{number}")
        for host in hosts:
            assert json.loads(host.hear())[0] == "img"
    finally:
        for host in hosts:
            host.close()
    assert [host.process.returncode for host in hosts] == [0, 0]
    assert pool.names(ceph) == ["base.img", "vm-0_disk", "vm-1_disk"]
    for number in range(2):
        with pool.opened(ceph, f"vm-{number}_disk") as image:
            assert image.read(0, 12 * MIB) == raw("hosts", 8 * MIB).guest + bytes(4 * MIB)
            assert image.parent_info() == ("vms", "base.img", "base")


def test_what_another_host_works_on_is_left_alone(ceph: CephCluster, tmp_path: Path) -> None:
    """Recover on one host does not sweep what another one stages, in whatever step of it that is."""
    mine = pool.make_backend(ceph, tmp_path / "mine")
    writer = mine.stage_base("img", "raw")
    writer.set_size(MIB)
    staged = [name for name in pool.names(ceph) if name.startswith("staging.img.")]
    assert len(staged) == 1
    theirs = _recovered_elsewhere(ceph, tmp_path / "theirs")
    assert theirs == {"removed": [], "alive": [f"staging/{staged[0]}"]}
    # between the two steps of publishing nobody has it open, and it lies in the trash
    writer._close()  # type: ignore[attr-defined]
    from nova_imagecache.backends import _rados

    _rados.trash_move(mine.store.io, staged[0], 60)
    theirs = _recovered_elsewhere(ceph, tmp_path / "theirs")
    assert theirs == {"removed": [], "alive": [f"trash/{staged[0]}"]}
    writer.discard()
    assert pool.names(ceph) == []
    mine.close()


def _recovered_elsewhere(ceph: CephCluster, directory: Path) -> dict[str, list[str]]:
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "import json\nfrom harness import rbd as pool\n"
        "backend = pool.from_spec(sys.argv[1])\nreport = backend.recover()\n"
        "print(json.dumps({'removed': report.removed, 'alive': report.alive}))\nbackend.close()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, pool.spec(ceph, directory)], capture_output=True, text=True, check=True
    )
    answer: dict[str, list[str]] = json.loads(done.stdout)
    return answer


def test_a_host_without_the_image_finds_the_others(ceph: CephCluster, tmp_path: Path) -> None:
    """A base that one host brought in is a hit on every other, with its record."""
    found: list[BaseImage | None] = []
    source = FakeSource({"img": raw("hosts").fake})
    from nova_imagecache import CacheConfig, ImageCache

    for directory in (tmp_path / "one", tmp_path / "two"):
        config = CacheConfig(root=directory / "root", disks_dir=directory / "disks", backend="rbd")
        with ImageCache(config, source=source, backend=pool.make_backend(ceph, directory)) as cache:
            found.append(cache.ensure_base("img"))
    assert found[0] == found[1]
    assert source.opens == 1

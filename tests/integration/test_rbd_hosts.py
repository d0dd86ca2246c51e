"""Several hosts on one pool: processes with clients and roots of their own."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import rbd as pool
from harness.hosts import Host
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
from harness.hosts import Host
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
    with pool.emptied(ceph):
        yield


@pytest.fixture
def two_users(ceph: CephCluster) -> tuple[str, str]:
    """The client ids of two hosts."""
    ceph.create_user("nova2", mon="profile rbd", osd="profile rbd pool=vms, profile rbd-read-only pool=images")
    return "nova", "nova2"


def test_two_hosts_import_at_once(ceph: CephCluster, two_users: tuple[str, str], tmp_path: Path) -> None:
    """Both get disks of one and the same base; whoever was second has left nothing."""
    with contextlib.ExitStack() as life:
        hosts = [life.enter_context(Host(_HOST, pool.spec(ceph, tmp_path / user, user=user))) for user in two_users]
        assert [host.hear() for host in hosts] == ["ready", "ready"]
        for number, host in enumerate(hosts):
            host.say(f"vm-{number}")
        for host in hosts:
            assert json.loads(host.hear())[0] == "img"
        assert [host.end() for host in hosts] == [0, 0]
    assert pool.names(ceph) == ["base.img", "vm-0_disk", "vm-1_disk"]
    for number in range(2):
        _is_of_the_base(ceph, f"vm-{number}_disk")


_RACER = """
import json, sys
from nova_imagecache.backends import Claim
from nova_imagecache.backends.rbd import RbdBackend
from nova_imagecache.backends._rbd_writer import RbdWriter
publish = RbdWriter.publish
def held(self, record):
    print("publishing", flush=True)
    sys.stdin.readline()
    return publish(self, record)
RbdWriter.publish = held
# as where the claim has ended under a slow holder: publishing alone decides
RbdBackend.claim_import = lambda self, image_id: Claim()
"""


@pytest.mark.parametrize("round_", range(3))
def test_two_hosts_publish_at_once(ceph: CephCluster, two_users: tuple[str, str], tmp_path: Path, round_: int) -> None:
    """Without a claim both fetch the image; one publishes it, the other drops its own and makes its disk of that."""
    with contextlib.ExitStack() as life:
        specs = [pool.spec(ceph, tmp_path / user, user=user) for user in two_users]
        hosts = [life.enter_context(Host(_RACER + _HOST, spec)) for spec in specs]
        assert [host.hear() for host in hosts] == ["ready", "ready"]
        for number, host in enumerate(hosts):
            host.say(f"vm-{number}")
        assert [host.hear() for host in hosts] == ["publishing", "publishing"]
        assert len([name for name in pool.names(ceph) if name.startswith("staging.img.")]) == 2
        for host in hosts[:: 1 if round_ % 2 else -1]:
            host.say("go")
        assert [json.loads(host.hear()) for host in hosts] == [["img", 1], ["img", 1]]
        assert [host.end() for host in hosts] == [0, 0]
    assert pool.names(ceph) == ["base.img", "vm-0_disk", "vm-1_disk"]
    assert pool.leftovers(ceph) == []
    for number in range(2):
        _is_of_the_base(ceph, f"vm-{number}_disk")


_ASKER = """
import sys
from nova_imagecache.testing import FakeSource
get = FakeSource.get
def held(self, image_id):
    image = get(self, image_id)
    print("asked", flush=True)
    sys.stdin.readline()
    return image
FakeSource.get = held
"""


def test_one_host_publishes_while_another_asks(ceph: CephCluster, two_users: tuple[str, str], tmp_path: Path) -> None:
    """What the first published, and uses already, is what the second makes its disk of; it fetches nothing."""
    with contextlib.ExitStack() as life:
        codes = (_ASKER + _HOST, _HOST)
        slow, quick = [
            life.enter_context(Host(code, pool.spec(ceph, tmp_path / user, user=user)))
            for code, user in zip(codes, two_users, strict=True)
        ]
        assert (slow.hear(), quick.hear()) == ("ready", "ready")
        slow.say("vm-0")
        assert slow.hear() == "asked"
        quick.say("vm-1")
        assert json.loads(quick.hear()) == ["img", 1]
        slow.say("go")
        assert json.loads(slow.hear()) == ["img", 0]
        assert [slow.end(), quick.end()] == [0, 0]
    assert pool.names(ceph) == ["base.img", "vm-0_disk", "vm-1_disk"]
    for number in range(2):
        _is_of_the_base(ceph, f"vm-{number}_disk")


def _is_of_the_base(ceph: CephCluster, name: str) -> None:
    with pool.opened(ceph, name) as image:
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
    writer._close()  # type: ignore[attr-defined]  # the rbd backend's writer
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

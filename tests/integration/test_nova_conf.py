"""The bridge beside the real Nova, whose definitions come out of its wheel, and over a real Ceph and Glance."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from oslo_config import cfg

from harness import rbd as pool
from nova_imagecache import FileLocation, ImageCache, RbdLocation
from nova_imagecache._nova_options import NOVA_OPTIONS, NovaOption
from nova_imagecache.oslo import config_from_oslo
from services.ceph import CephCluster
from services.glance import GlanceServer
from services.require import require

pytestmark = pytest.mark.services

REPO = Path(__file__).resolve().parents[2]
RELEASE = "nova==34.0.0"
ON_PURPOSE = {
    "DEFAULT.state_path",  # where Nova's modules lie: nobody keeps instances there
    "DEFAULT.my_ip",  # Nova looks it up; here an unknown address is an error
}
NOVA_CONF = """
[DEFAULT]
state_path = /srv/nova
timeout_nbd = 30
image_cache_subdirectory_name = _base_$my_ip
my_ip = 192.0.2.3
[image_cache]
remove_unused_original_minimum_age_seconds = 7200
[libvirt]
images_type = rbd
images_rbd_pool = vms
rbd_user = nova
[glance]
region_name = north
[nova_imagecache]
max_bytes = 10G
"""


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the bridge makes of a conf in which Nova has registered its options."""
    wheels = REPO / ".work/nova"
    argv = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(wheels),
    ]
    done = subprocess.run([*argv, RELEASE], check=False, capture_output=True, text=True, timeout=100)
    require(None if done.returncode == 0 else f"the wheel of {RELEASE} cannot be had: {done.stderr}")
    (wheel,) = wheels.glob("nova-*.whl")
    path = tmp_path_factory.mktemp("nova") / "nova.conf"
    path.write_text(NOVA_CONF)
    program = REPO / "tests/harness/real_nova.py"
    argv = [sys.executable, "-W", "error", str(program), str(wheel), str(path)]
    done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("row", NOVA_OPTIONS, ids=lambda row: row.key)
def test_the_table_says_of_an_option_what_nova_says(answer: dict[str, Any], row: NovaOption) -> None:
    """Its name, default, choices, lower limit, old name, and whether it is on its way out."""
    nova = answer["options"][row.key]
    assert nova is not None, "Nova has no such option"
    assert nova["choices"] == list(row.choices)
    assert nova["minimum"] == row.minimum
    assert nova["old"] == ([row.old] if row.old else [])
    assert nova["going"] == (row.going is not None)
    if row.key not in ON_PURPOSE:
        assert nova["default"] == row.default
        assert nova["kind"].lower().startswith(row.kind) or (row.kind, nova["kind"]) == ("str", "HostDomainOpt")


def test_what_nova_has_registered_is_read_from_it(answer: dict[str, Any]) -> None:
    """With Nova's substitutions and old names; what Nova does not know comes from the same file. Nothing collides."""
    assert answer["config"] == {
        "root": "/srv/nova/instances/_base_192.0.2.3.imagecache/rbd",
        "disks_dir": "/srv/nova/instances",
        "backend": "rbd",
        "max_idle": "2:00:00",
    }
    assert answer["backend_options"] == {"pool": "vms", "user": "nova", "when_not_clonable": "import"}
    assert answer["source_options"] == {"retries": 3, "region_name": "north", "copy_timeout": 600}
    assert [remark.partition(" ")[0] for remark in answer["remarks"]] == ["[DEFAULT]", "[DEFAULT]"]
    assert answer["again"]


@pytest.mark.parametrize("images_type", ["rbd", "qcow2"])
def test_a_nova_conf_is_enough_for_a_disk_from_glance(
    ceph: CephCluster, glance_rbd: GlanceServer, tmp_path: Path, images_type: str
) -> None:
    """Where Glance is, who works in which pool, where files lie: nothing but Nova's options, and a token."""
    path = tmp_path / "nova.conf"
    path.write_text(f"""
[DEFAULT]
instances_path = {tmp_path}/instances
[libvirt]
images_type = {images_type}
images_rbd_pool = vms
images_rbd_ceph_conf = {ceph.conf}
rbd_user = nova
rbd_connect_timeout = 5
[glance]
endpoint_override = {glance_rbd.url}
[nova_imagecache]
source_options = token = "admin:testproject:admin,member,reader,service"
""")
    conf = cfg.ConfigOpts()
    conf([], project="nova", default_config_files=[str(path)])
    image_id = glance_rbd.upload(os.urandom(1 << 20))
    pool.empty(ceph)
    try:
        with ImageCache.from_config(config_from_oslo(conf)) as cache:
            disk = cache.create_root_disk(image_id, "instance", size=2 << 20)
            location = cache.get_root_disk("instance").location
            if images_type == "rbd":
                assert isinstance(location, RbdLocation)
                assert (location.pool, location.user) == ("vms", "nova")
                assert glance_rbd.downloads(image_id) == 0
            else:
                assert isinstance(location, FileLocation)
                assert location.path == tmp_path / "instances/instance/disk"
                assert glance_rbd.downloads(image_id) == 1
            assert disk.virtual_size == 2 << 20
            cache.remove_root_disk("instance")
    finally:
        pool.empty(ceph)
        glance_rbd.delete(image_id)
        pool.empty(ceph, "images")

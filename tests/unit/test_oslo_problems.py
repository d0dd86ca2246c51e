"""What a nova.conf asks for and cannot have is explained: all at once, each with what to do."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import ModuleType

import pytest
from oslo_config import cfg

from nova_imagecache import ConfigError
from nova_imagecache.oslo import config_from_oslo, explain
from unit.novaconf import Read, read

__all__ = ["read"]  # a fixture


def problems(conf: cfg.ConfigOpts) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        config_from_oslo(conf)
    return caught.value.problems


def test_all_problems_come_at_once_each_with_what_to_do(read: Read) -> None:
    """From oslo.config's types, from the configuration, from backend and source, and from what contradicts."""
    text = """
[DEFAULT]
force_raw_images = false
instances_path = relative
[image_cache]
subdirectory_name = ../escaped
remove_unused_original_minimum_age_seconds = -5
[libvirt]
images_type = rbd
images_rbd_ceph_conf = ceph.conf
rbd_secret_uuid = secret
rbd_user = client.nova
[glance]
num_retries = many
api_servers = glance:9292
cafile = /ca.pem
insecure = true
verify_glance_signatures = true
[compute]
vmdk_allowed_types = streamOptimized
[ephemeral_storage_encryption]
enabled = true
[nova_imagecache]
max_bytes = 20Q
group =
backend_options = colour = "red"
source_options = retries
"""
    found = problems(read(text))
    assert [problem.partition(":")[0].partition(" = ")[0] for problem in found] == [
        "[glance] num_retries",
        "[image_cache] subdirectory_name",
        "[nova_imagecache] source_options",
        "[DEFAULT] force_raw_images",
        "[glance] verify_glance_signatures",
        "[ephemeral_storage_encryption] enabled",
        "[compute] vmdk_allowed_types",
        "[DEFAULT] instances_path",
        "[image_cache] remove_unused_original_minimum_age_seconds",
        "[nova_imagecache] max_bytes",
        "[nova_imagecache] group",
        "[nova_imagecache] backend_options",
        "[libvirt] images_rbd_ceph_conf",
        "[libvirt] rbd_secret_uuid",
        "[libvirt] rbd_user",
        "[glance] api_servers",
        "[glance] insecure",
    ]
    assert [problem for problem in found if "; " not in problem] == []


@pytest.mark.parametrize("kind", ["lvm", "ploop"])
def test_disks_that_no_backend_makes_are_refused(read: Read, kind: str) -> None:
    """With the way out: another kind, or a plug-in."""
    (problem,) = problems(read(f"[libvirt]\nimages_type = {kind}\n"))
    assert problem.startswith(f"[libvirt] images_type = {kind}: ")
    assert "[nova_imagecache] backend" in problem


def test_an_address_that_nobody_knows_never_becomes_a_path(read: Read) -> None:
    """$my_ip would be empty, and hosts on shared storage would meet in one cache."""
    (problem,) = problems(read("[image_cache]\nsubdirectory_name = _base_$my_ip\n"))
    assert problem == "[image_cache] subdirectory_name names $my_ip, which is not set; set [DEFAULT] my_ip too"
    own = "[image_cache]\nsubdirectory_name = _base_$my_ip\n[DEFAULT]\nmy_ip = 192.0.2.9\n"
    assert config_from_oslo(read(own)).root.parent.name == "_base_192.0.2.9.imagecache"


def test_a_plug_in_that_is_not_installed_is_a_problem(read: Read) -> None:
    """With the names of those that are."""
    (problem,) = problems(read("[nova_imagecache]\nbackend = zfs\n"))
    assert problem.startswith("[nova_imagecache] backend: no plug-in 'zfs'")
    assert "file, qcow2, rbd" in problem


def test_libvirt_that_cannot_be_imported_is_a_problem(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what to install; where it can be, it becomes part of the configuration."""
    conf = read("[nova_imagecache]\nlibvirt_uri = qemu:///system\n")
    monkeypatch.setitem(sys.modules, "libvirt", None)
    (problem,) = problems(conf)
    assert problem.startswith("[nova_imagecache] libvirt_uri: libvirt-python cannot be imported")
    assert "nova-imagecache[libvirt]" in problem
    monkeypatch.setitem(sys.modules, "libvirt", ModuleType("libvirt"))
    assert config_from_oslo(conf).libvirt_uri == "qemu:///system"


def test_what_has_no_effect_is_said_once_and_stops_nobody(read: Read, caplog: pytest.LogCaptureFixture) -> None:
    """Only what somebody has set, to another value than Nova's default."""
    text = """
[DEFAULT]
timeout_nbd = 20
resize_fs_using_block_device = false
preallocate_images = space
[libvirt]
images_type = rbd
rbd_user = nova
images_volume_group = vg
disk_cachemodes = network=writeback
volume_clear = nonsense
[workarounds]
disable_deep_image_inspection = true
[compute]
vmdk_allowed_types = streamOptimized, monolithicSparse, monolithicFlat
[glance]
valid_interfaces = admin, internal
"""
    conf = read(text)
    with caplog.at_level(logging.WARNING, "nova_imagecache.oslo"):
        assert config_from_oslo(conf).backend == "rbd"
    said = [record.getMessage() for record in caplog.records if record.name == "nova_imagecache.oslo"]
    assert tuple(said) == explain(conf)
    assert [remark.partition(" has no effect")[0].partition(":")[0] for remark in said] == [
        "[DEFAULT] timeout_nbd",
        "[libvirt] images_volume_group",
        "[workarounds] disable_deep_image_inspection",
        "[compute] vmdk_allowed_types",
        "[DEFAULT] preallocate_images",
        "[glance] valid_interfaces",
    ]
    assert explain(read("")) == ()


def test_options_of_ceph_without_ceph_have_no_effect(read: Read) -> None:
    """They were meant for a host that keeps its disks there."""
    (remark,) = explain(read("[libvirt]\nimages_rbd_glance_store_name = ceph\nrbd_user = cinder\n"))
    assert remark == ("[libvirt] images_rbd_glance_store_name has no effect: only with [libvirt] images_type = rbd")


def test_a_file_that_went_away_is_a_config_error(read: Read, tmp_path: Path) -> None:
    """Of ours, not of oslo.config's."""
    conf = read("")
    (tmp_path / "nova.conf").unlink()
    (problem,) = problems(conf)
    assert "nova.conf" in problem
    with pytest.raises(ConfigError):
        explain(conf)


def test_an_option_of_theirs_that_cannot_be_read_is_a_problem(read: Read) -> None:
    """instances_path registered, and not what its default names."""
    conf = read("")
    conf.register_opt(cfg.StrOpt("instances_path", default="$no_such_option/instances"))
    (problem,) = problems(conf)
    assert problem.startswith("[DEFAULT] instances_path: no such option no_such_option")
    assert problem.endswith("; give an absolute path")

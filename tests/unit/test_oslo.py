"""Nova's options in real files, read by the real oslo.config, become a CacheConfig."""

from __future__ import annotations

import dataclasses
import logging
from datetime import timedelta
from pathlib import Path

import pytest
from oslo_config import cfg

from nova_imagecache import CacheConfig, FileLocation, ImageCache
from nova_imagecache._nova_config import OPTIONS
from nova_imagecache.oslo import config_from_oslo, explain, list_opts, register_opts
from unit.novaconf import Read, read

__all__ = ["read"]  # a fixture


@pytest.mark.parametrize("registered", [False, True])
def test_an_empty_nova_conf_means_novas_defaults(read: Read, registered: bool) -> None:
    """Whether or not anybody has registered the options."""
    config = config_from_oslo(read("", registered=registered))
    assert config == CacheConfig(
        root=Path("/var/lib/nova/instances/_base.imagecache/files"),
        disks_dir=Path("/var/lib/nova/instances"),
        backend="qcow2",
        backend_options={"base_format": "raw", "preallocate": "none"},
        source="glance",
        source_options={"retries": 3},
        max_idle=timedelta(hours=24),
        remove_unused=True,
    )


def test_a_conf_that_was_never_called_means_the_defaults_too() -> None:
    """No file is looked for behind the caller's back."""
    assert config_from_oslo(cfg.ConfigOpts()).disks_dir == Path("/var/lib/nova/instances")


@pytest.mark.parametrize("registered", [False, True])
def test_files_on_local_storage(read: Read, registered: bool) -> None:
    """Paths with names in them, ages, formats and limits arrive where they belong."""
    text = """
        [DEFAULT]
        state_path = /srv/nova
        my_ip = 192.0.2.7
        force_raw_images = false
        preallocate_images = space
        [image_cache]
        subdirectory_name = _base_$my_ip
        remove_unused_base_images = false
        remove_unused_original_minimum_age_seconds = 3600
        [compute]
        max_concurrent_disk_ops = 2
        [nova_imagecache]
        max_bytes = 200G
        min_free_bytes = 1073741824
        max_virtual_size = 2T
        lock_timeout = 10m
        allow_unverified = true
        group = kvm
        qemu_user = libvirt-qemu
        nova_base_dir = /srv/nova/instances/_base_192.0.2.7
        disk_dirs = /srv/other, $state_path/more
        backend_options = reference = "path"
    """
    config = config_from_oslo(read(text.replace("        ", ""), registered=registered))
    assert config == CacheConfig(
        root=Path("/srv/nova/instances/_base_192.0.2.7.imagecache/files"),
        disks_dir=Path("/srv/nova/instances"),
        backend_options={"base_format": "native", "preallocate": "space", "reference": "path"},
        source_options={"retries": 3},
        max_idle=timedelta(hours=1),
        remove_unused=False,
        max_concurrent_fetches=2,
        max_bytes=200 << 30,
        min_free_bytes=1 << 30,
        max_virtual_size=2 << 40,
        lock_timeout=timedelta(minutes=10),
        allow_unverified=True,
        group="kvm",
        qemu_user="libvirt-qemu",
        nova_base_dir=Path("/srv/nova/instances/_base_192.0.2.7"),
        disk_dirs=(Path("/srv/other"), Path("/srv/nova/more")),
    )


@pytest.mark.parametrize(
    ("text", "backend"),
    [
        ("[DEFAULT]\nuse_cow_images = false", "file"),
        ("[libvirt]\nimages_type = raw", "file"),
        ("[libvirt]\nimages_type = flat", "file"),
        ("[libvirt]\nimages_type = qcow2\n[DEFAULT]\nuse_cow_images = false", "qcow2"),
        ("[libvirt]\nimages_type = rbd", "rbd"),
        ("[libvirt]\nimages_type = lvm\n[nova_imagecache]\nbackend = file", "file"),
    ],
)
def test_the_backend_follows_from_images_type(read: Read, text: str, backend: str) -> None:
    """As in Nova: use_cow_images speaks only where images_type does not. The library's own option is above both."""
    assert config_from_oslo(read(text)).backend == backend


def test_disks_in_ceph(read: Read) -> None:
    """The cluster, the pool, who works there, and how an image is got into it."""
    text = """
[libvirt]
images_type = rbd
images_rbd_pool = vms
images_rbd_ceph_conf = /etc/ceph/other.conf
images_rbd_glance_store_name = ceph
images_rbd_glance_copy_timeout = 60
rbd_user = nova
rbd_secret_uuid = 457eb676-33da-42ec-9a8c-9293d545c337
rbd_connect_timeout = 7
[workarounds]
never_download_image_if_on_rbd = true
"""
    config = config_from_oslo(read(text))
    assert config.backend_options == {
        "pool": "vms",
        "conf": "/etc/ceph/other.conf",
        "glance_store": "ceph",
        "user": "nova",
        "secret_uuid": "457eb676-33da-42ec-9a8c-9293d545c337",
        "connect_timeout": 7,
        "when_not_clonable": "refuse",
    }
    assert config.source_options == {"retries": 3, "copy_timeout": 60}


def test_ceph_by_default_is_what_librados_takes(read: Read) -> None:
    """client.admin, with a word about it; Nova's time limit for connecting does not become one for every operation."""
    conf = read("[libvirt]\nimages_type = rbd\n")
    assert config_from_oslo(conf).backend_options == {"pool": "rbd", "user": "admin", "when_not_clonable": "import"}
    assert [remark for remark in explain(conf) if "rbd_user" in remark]
    no_limit = read("[libvirt]\nimages_type = rbd\nrbd_user = nova\nrbd_connect_timeout = -1\n")
    assert "connect_timeout" not in config_from_oslo(no_limit).backend_options


def test_how_to_reach_glance(read: Read) -> None:
    """By api_servers, else by endpoint_override, else by the catalogue; a cloud of clouds.yaml has its own TLS."""
    common = (
        "[glance]\nnum_retries = 5\nregion_name = north\nvalid_interfaces = internal\ncafile = /ca.pem\ntimeout = 30\n"
    )
    options = {"retries": 5, "region_name": "north", "interface": "internal", "cafile": "/ca.pem", "read_timeout": 30.0}
    assert config_from_oslo(read(common)).source_options == options
    one = {**options, "endpoints": ["http://a:9292"]}
    assert config_from_oslo(read(common + "endpoint_override = http://a:9292\n")).source_options == one
    many = "endpoint_override = http://a:9292\napi_servers = http://b:9292, http://c:9292\n"
    assert config_from_oslo(read(common + many)).source_options["endpoints"] == ["http://b:9292", "http://c:9292"]
    cloud = "[nova_imagecache]\nsource_options = cloud = 'mine'\nsource_options = retry_delay = 2\n"
    del options["cafile"]
    assert config_from_oslo(read(common + cloud)).source_options == {**options, "cloud": "mine", "retry_delay": 2}


def test_another_source_gets_its_own_options_only(read: Read) -> None:
    """Nova knows Glance alone; a directory would refuse to hear of retries."""
    text = "[nova_imagecache]\nsource = directory\nsource_options = path = '/srv/images'\n"
    config = config_from_oslo(read(text))
    assert (config.source, config.source_options) == ("directory", {"path": "/srv/images"})


def test_every_field_of_a_configuration_can_be_set_from_nova_conf() -> None:
    """No field is left that only TOML can set."""
    told = " ".join(row.here for row in OPTIONS if row.use in ("mapped", "own"))
    assert [field.name for field in dataclasses.fields(CacheConfig) if f"`{field.name}`" not in told] == []


def test_old_names_are_read_as_nova_reads_them(read: Read) -> None:
    """And the new name is said; where both stand there the new one counts."""
    text = "[DEFAULT]\nimage_cache_subdirectory_name = old\nremove_unused_base_images = false\n"
    conf = read(text)
    config = config_from_oslo(conf)
    assert (config.root, config.remove_unused) == (Path("/var/lib/nova/instances/old.imagecache/files"), False)
    assert explain(conf) == (
        "[DEFAULT] image_cache_subdirectory_name is an old name; write [image_cache] subdirectory_name",
        "[DEFAULT] remove_unused_base_images is an old name; write [image_cache] remove_unused_base_images",
    )
    both = read(f"{text}[image_cache]\nsubdirectory_name = new\n")
    assert config_from_oslo(both).root == Path("/var/lib/nova/instances/new.imagecache/files")


def test_the_environment_counts_as_for_every_openstack_service(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    """oslo.config's own rule: above the file."""
    monkeypatch.setenv("OS_LIBVIRT__IMAGES_TYPE", "raw")
    assert config_from_oslo(read("[libvirt]\nimages_type = qcow2\n")).backend == "file"


def test_a_directory_of_files_is_read_as_well(read: Read, tmp_path: Path) -> None:
    """As distributions split nova.conf; what comes later counts."""
    path = tmp_path / "nova.conf"
    read("[libvirt]\nimages_type = qcow2\n[compute]\nmax_concurrent_disk_ops = 3\n")
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d/10-storage.conf").write_text("[libvirt]\nimages_type = raw\n")
    conf = cfg.ConfigOpts()
    conf(["--config-file", str(path), "--config-dir", str(tmp_path / "conf.d")], project="nova")
    config = config_from_oslo(conf)
    assert (config.backend, config.max_concurrent_fetches) == ("file", 3)


# --- who has registered what


def test_nothing_is_registered_with_the_callers_conf(read: Read) -> None:
    """So that nobody who registers the same names later is in its way."""
    conf = read("[libvirt]\nimages_type = raw\n")
    before = list(conf)
    config_from_oslo(conf)
    assert list(conf) == before
    conf.register_opt(cfg.StrOpt("images_type", default="default", help="Nova's words"), group="libvirt")
    assert config_from_oslo(conf).backend == "file"


def test_equal_definitions_may_be_registered_twice() -> None:
    """By this module, by a caller who takes them from list_opts, in either order."""
    conf = cfg.ConfigOpts()
    for group, opts in list_opts():
        conf.register_opts(opts, group=group)
    register_opts(conf)
    for group, opts in list_opts():
        conf.register_opts(opts, group=group)
    conf([], default_config_files=[])
    conf.set_override("images_type", "rbd", group="libvirt")
    conf.set_override("instances_path", "/elsewhere")
    config = config_from_oslo(conf)
    assert (config.backend, config.disks_dir) == ("rbd", Path("/elsewhere"))


def test_options_of_plug_ins_are_not_logged_with_the_others(read: Read, caplog: pytest.LogCaptureFixture) -> None:
    """A service logs its options at its start; a token among them stays out, also of what the configuration shows."""
    text = "source_options = endpoints = ['http://g:9292']\nsource_options = token = 'hidden-token'"
    conf = read(f"[nova_imagecache]\n{text}\nbackend_options = reference = 'path'", registered=True)
    with caplog.at_level(logging.DEBUG):
        conf.log_opt_values(logging.getLogger("service"), logging.DEBUG)
    assert "nova_imagecache.source_options" in caplog.text
    assert "hidden-token" not in caplog.text
    assert "reference = " not in caplog.text
    config = config_from_oslo(conf)
    assert config.source_options["token"] == "hidden-token"
    assert "hidden-token" not in repr(config)


def test_a_definition_of_somebody_else_stays_and_is_read(read: Read) -> None:
    """With its own default, its own type and its own choices."""
    conf = read("")
    conf.register_opt(cfg.StrOpt("images_type", choices=["raw", "other"], default="raw"), group="libvirt")
    conf.register_opt(cfg.StrOpt("instances_path", default="/theirs"))
    register_opts(conf)
    assert conf.libvirt.images_type == "raw"
    config = config_from_oslo(conf)
    assert (config.backend, config.disks_dir) == ("file", Path("/theirs"))


def test_a_group_named_default_is_no_group(read: Read) -> None:
    """oslo.config tells the two apart; whoever registers in the one is understood all the same."""
    conf = read("[DEFAULT]\nstate_path = /srv\n")
    for group, opts in list_opts():
        conf.register_opts(opts, group=group or "DEFAULT")
    assert config_from_oslo(conf).disks_dir == Path("/srv/instances")
    conf.set_override("instances_path", "/elsewhere", group="DEFAULT")
    assert config_from_oslo(conf).disks_dir == Path("/elsewhere")


# --- a cache of it


def test_a_cache_of_a_nova_conf_lives_in_novas_directories(read: Read, tmp_path: Path) -> None:
    """Disks lie where Nova's lie, Nova's own files beside them stay as they are, and cleanup goes by Nova's age."""
    instances, images = tmp_path / "instances", tmp_path / "images"
    for name in ("_base", "locks", "11111111-aaaa-4000-8000-000000000000"):
        (instances / name).mkdir(parents=True)
    (instances / "_base/0d5e6b61602d758984b3bf038267614d6016eb2a").write_bytes(b"Nova's own base")
    (instances / "compute_nodes").write_text("{}")
    images.mkdir()
    (images / "img.img").write_bytes(b"guest" * 1000)
    (images / "img.json").write_text('{"disk_format": "raw", "os_hash_algo": null}')
    text = f"""
[DEFAULT]
instances_path = {instances}
[image_cache]
remove_unused_original_minimum_age_seconds = 0
[nova_imagecache]
allow_unverified = true
nova_base_dir = $instances_path/_base
source = directory
source_options = path = "{images}"
"""
    config = config_from_oslo(read(text))
    before_names = sorted([*(path.name for path in instances.iterdir()), "_base.imagecache"])
    before = {path: path.read_bytes() for path in instances.rglob("*") if path.is_file()}
    with ImageCache.from_config(config) as cache:
        disk = cache.create_root_disk("img", "22222222-bbbb-4000-8000-000000000000", size=1 << 20)
        assert isinstance(disk.location, FileLocation)
        assert disk.location.path == instances / "22222222-bbbb-4000-8000-000000000000/disk"
        assert [one.disk_id for one in cache.root_disks()] == [disk.disk_id]
        assert [str(fact) for fact in cache.check().problems] == []
        assert cache.cleanup().removed == ()
        cache.remove_root_disk(disk.disk_id)
        assert cache.cleanup().removed == ("img",)
        cache.recover()
    assert sorted(path.name for path in instances.iterdir()) == before_names
    for path, content in before.items():
        assert path.read_bytes() == content
    assert (instances / "_base.imagecache/files/cache.json").is_file()

"""Nova's options, as far as they touch images and root disks, and what each of them is here. Data only.

``docs/reference/nova-options.md`` shows the same rows.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

Kind = Literal["str", "int", "float", "bool", "list", "multi"]

NO_ADDRESS = "<my_ip is not set>"
"""What ``$my_ip`` is where nobody says: it must never become part of a path."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NovaOption:
    """One option of nova.conf.

    Attributes:
        key: ``group.name``.
        kind, default, choices, minimum: Nova's own.
        use: "mapped": becomes part of a CacheConfig; "driver": the virt driver reads it itself; "refused": what it asks
            for is not done here, and to start without it would be worse than not to start; "nothing": has no meaning
            here; "own": one of the group ``nova_imagecache``, which Nova has not.
        here: what becomes of it, and why; in the reference's words.
        advice: what a value must be.
        old: the ``group.name`` that Nova reads in its place, as long as it does.
        going: Nova deprecates the option: what to write instead.
        sample: stands for a default that differs from host to host.
    """

    key: str
    kind: Kind
    default: Any
    use: Literal["mapped", "driver", "refused", "nothing", "own"]
    here: str
    advice: str
    choices: tuple[str, ...] = ()
    minimum: int | None = None
    old: str | None = None
    going: str | None = None
    sample: str | None = None

    @property
    def group(self) -> str:
        """The section of nova.conf."""
        return self.key.partition(".")[0]

    @property
    def name(self) -> str:
        """The name in its section."""
        return self.key.partition(".")[2]

    @property
    def label(self) -> str:
        """As it stands in nova.conf: ``[group] name``."""
        return label(self.key)


def label(key: str) -> str:
    """``[group] name`` for ``group.name``."""
    group, _, name = key.partition(".")
    return f"[{group}] {name}"


_ADVICE: dict[Kind, str] = {
    "str": "correct it, or leave it out",
    "int": "give a whole number",
    "float": "give a number",
    "bool": "give true or false",
    "list": "give a list with commas",
    "multi": 'give lines of TOML, such as name = "value"',
}
_KINDS: dict[type, Kind] = {bool: "bool", int: "int", list: "list"}


def option(use: Any, key: str, default: Any, here: str, *, kind: Kind | None = None, **rest: Any) -> NovaOption:
    """A row whose kind follows from its default, and its advice from kind, choices and minimum, unless given."""
    kind = kind or _KINDS.get(type(default), "str")
    advice = _ADVICE[kind]
    if rest.get("choices"):
        advice = f"give one of {', '.join(rest['choices'])}"
    elif rest.get("minimum") is not None:
        advice = f"give a whole number from {rest['minimum']} up"
    return NovaOption(key=key, default=default, use=use, here=here, **{"kind": kind, "advice": advice, **rest})


_mapped = partial(option, "mapped")
_driver = partial(option, "driver")
_refused = partial(option, "refused")
_nothing = partial(option, "nothing")

_PATH = "give an absolute path"
_URL = "give a URL such as https://glance.example:9292"
_INSIDE = "nothing here looks into a guest's filesystems; the guest grows them (cloud-init's growpart)"
_LIMITS = "every child process has limits of its own, by the size of what it works on"
_BUSY = "a disk that stays open is an error, and the driver calls again"
_LVM = "no backend makes logical volumes"
_EXPORT = "what is not cloned comes from Glance by HTTP"
_EXTRA = "swap and ephemeral disks are the driver's"
_SNAPSHOT = "snapshots are the driver's"
_RESCUE = "an image for `create_root_disk(..., name='rescue')`, or for `copy_base`"
_SIGNED = "only with signatures, which are not verified here"
_CERTIFICATE = "hand a keystoneauth session that has the certificate"
_CRYPT = "only with encrypted logical volumes"

NOVA_OPTIONS: tuple[NovaOption, ...] = (
    _mapped("DEFAULT.state_path", "/var/lib/nova", "what `$state_path` stands for; in Nova, where its modules lie"),
    _mapped(
        "DEFAULT.my_ip", NO_ADDRESS, "what `$my_ip` stands for; to be set where one names it", sample="<host_ipv4>"
    ),
    _mapped("DEFAULT.host", socket.gethostname(), "what `$host` stands for", sample="<current_hostname>"),
    _mapped(
        "DEFAULT.instances_path",
        "$state_path/instances",
        "`disks_dir`: root disks are `<instances_path>/<instance>/disk`; the cache lies below it too",
        advice=_PATH,
    ),
    _mapped("DEFAULT.use_cow_images", True, "`backend` where `images_type` is `default`: `qcow2`; false: `file`"),
    _mapped("DEFAULT.force_raw_images", True, "`base_format`: `raw`; false: `native`, which `rbd` cannot do"),
    _mapped(
        "DEFAULT.preallocate_images",
        "none",
        "`preallocate` of `file` and `qcow2`; nothing with `rbd`",
        choices=("none", "space"),
    ),
    _nothing("DEFAULT.resize_fs_using_block_device", False, _INSIDE),
    _nothing("DEFAULT.timeout_nbd", 10, _INSIDE, minimum=0),
    _driver("DEFAULT.default_ephemeral_format", None, _EXTRA),
    _driver("DEFAULT.virt_mkfs", [], _EXTRA, kind="multi"),
    _driver("DEFAULT.reserved_host_disk_mb", 0, "the argument of `reserved_disk_mb`", minimum=0),
    _driver("DEFAULT.max_concurrent_builds", 10, "how many instances are built at once", minimum=0),
    _driver("DEFAULT.max_concurrent_snapshots", 5, _SNAPSHOT, minimum=0),
    _driver("DEFAULT.update_resources_interval", 0, "how often the driver asks for `reserved_disk_mb`"),
    _mapped("compute.max_concurrent_disk_ops", 0, "`max_concurrent_fetches`; 0, no limit, leaves it at 4", minimum=0),
    _driver("compute.image_type_exclude_list", [], "what this host tells the scheduler"),
    _refused(
        "compute.vmdk_allowed_types",
        ["streamOptimized", "monolithicSparse"],
        "both of these and no others are taken; a list without one of them is refused",
        advice="list streamOptimized and monolithicSparse, and take vmdk out of Glance's disk_formats instead",
    ),
    # --- the cache
    _driver(
        "image_cache.manager_interval",
        2400,
        "how often the driver calls `cleanup`; -1: never",
        minimum=-1,
        old="DEFAULT.image_cache_manager_interval",
    ),
    _mapped(
        "image_cache.subdirectory_name",
        "_base",
        "`root` is `<instances_path>/<subdirectory_name>.imagecache/files` (or `/rbd`): beside Nova's, not in it",
        advice="give a name below instances_path, such as _base",
        old="DEFAULT.image_cache_subdirectory_name",
    ),
    _mapped("image_cache.remove_unused_base_images", True, "`remove_unused`", old="DEFAULT.remove_unused_base_images"),
    _mapped(
        "image_cache.remove_unused_original_minimum_age_seconds",
        86400,
        "`max_idle`, counted from when the last user went",
        advice="give seconds from 0 up",
        old="DEFAULT.remove_unused_original_minimum_age_seconds",
    ),
    _nothing(
        "image_cache.remove_unused_resized_minimum_age_seconds",
        3600,
        "one base serves disks of every size; `max_idle` is for all",
        old="libvirt.remove_unused_resized_minimum_age_seconds",
    ),
    _driver("image_cache.precache_concurrency", 1, "how many hosts the conductor asks at once", minimum=1),
    # --- storage
    _mapped(
        "libvirt.images_type",
        "default",
        "`backend`: `qcow2`, `rbd`; `file` for `raw` and `flat`; `lvm` and `ploop` are refused",
        choices=("raw", "flat", "qcow2", "lvm", "rbd", "ploop", "default"),
        advice="use qcow2, raw or rbd, or name a plug-in in [nova_imagecache] backend",
    ),
    _mapped("libvirt.images_rbd_pool", "rbd", "`pool` of `rbd`", advice="name a pool"),
    _mapped("libvirt.images_rbd_ceph_conf", "", "`conf` of `rbd`; empty: /etc/ceph/ceph.conf", advice=_PATH),
    _mapped(
        "libvirt.rbd_user",
        None,
        "`user` of `rbd`; unset: `admin`, as librados does",
        advice='name a user, without "client."',
    ),
    _mapped("libvirt.rbd_secret_uuid", None, "`secret_uuid` of `rbd`", advice="give a UUID"),
    _mapped(
        "libvirt.rbd_connect_timeout",
        5,
        "`connect_timeout` of `rbd` where it is set; else 20, since here each operation has this limit too",
        advice="give seconds from 1 to 3600",
    ),
    _nothing("libvirt.rbd_destroy_volume_retries", 12, _BUSY, minimum=0),
    _nothing("libvirt.rbd_destroy_volume_retry_interval", 5, _BUSY, minimum=0),
    _mapped(
        "libvirt.images_rbd_glance_store_name", "", "`glance_store` of `rbd`", advice="name a store as Glance does"
    ),
    _nothing("libvirt.images_rbd_glance_copy_poll_interval", 15, "Glance is asked at intervals that grow"),
    _mapped(
        "libvirt.images_rbd_glance_copy_timeout",
        600,
        "`copy_timeout` of the source `glance`, with `rbd`",
        advice="give seconds from 1 up",
    ),
    _mapped(
        "workarounds.never_download_image_if_on_rbd", False, "`when_not_clonable` of `rbd`: `import`; true: `refuse`"
    ),
    _nothing("libvirt.images_volume_group", None, _LVM),
    _nothing("libvirt.sparse_logical_volumes", False, _LVM, going="nothing"),
    _nothing("libvirt.volume_clear", "zero", _LVM, choices=("zero", "shred", "none")),
    _nothing("libvirt.volume_clear_size", 0, _LVM, minimum=0),
    _driver("libvirt.hw_disk_discard", None, "`discard` of `domains.disk_element`", choices=("ignore", "unmap")),
    _driver("libvirt.disk_cachemodes", [], "`cache` of `domains.disk_element`"),
    _nothing("libvirt.images_cpu_time_limit", 30, _LIMITS),
    _nothing("libvirt.images_address_space_limit", 2, _LIMITS),
    _nothing(
        "libvirt.remote_filesystem_transport", "ssh", "no image is copied from another host", choices=("ssh", "rsync")
    ),
    _driver("libvirt.snapshot_image_format", None, _SNAPSHOT, choices=("raw", "qcow2", "vmdk", "vdi")),
    _driver("libvirt.snapshot_compression", False, _SNAPSHOT),
    _driver("libvirt.snapshots_directory", "$instances_path/snapshots", _SNAPSHOT),
    _driver("libvirt.rescue_image_id", None, _RESCUE),
    _driver("libvirt.rescue_kernel_id", None, _RESCUE),
    _driver("libvirt.rescue_ramdisk_id", None, _RESCUE),
    _driver("libvirt.inject_partition", -2, "nothing is put into a guest here", minimum=-2),
    _driver(
        "workarounds.reserve_disk_resource_for_image_cache", False, "whether the driver asks for `reserved_disk_mb`"
    ),
    _driver("workarounds.ensure_libvirt_rbd_instance_dir_cleanup", False, "an instance's directory is the driver's"),
    _nothing(
        "workarounds.disable_deep_image_inspection", False, "every image is inspected, and that cannot be turned off"
    ),
    _refused(
        "ephemeral_storage_encryption.enabled",
        False,
        "root disks are not encrypted here; true is refused",
        advice="set it to false, and encrypt what lies below instances_path (dm-crypt)",
    ),
    _nothing("ephemeral_storage_encryption.cipher", "aes-xts-plain64", _CRYPT),
    _nothing("ephemeral_storage_encryption.key_size", 512, _CRYPT, minimum=1),
    _nothing("ephemeral_storage_encryption.default_format", "luks", _CRYPT, choices=("luks",)),
    # --- the image service
    _mapped("glance.num_retries", 3, "`retries` of the source `glance`: tries without any progress", minimum=0),
    _mapped(
        "glance.api_servers",
        None,
        "`endpoints` of the source `glance`",
        kind="list",
        advice=_URL,
        going="endpoint_override",
    ),
    _mapped("glance.endpoint_override", None, "`endpoints` of the source `glance`, without `api_servers`", advice=_URL),
    _mapped("glance.region_name", None, "`region_name` of the source `glance`"),
    _mapped("glance.valid_interfaces", ["internal", "public"], "the first is `interface` of `glance`, where it is set"),
    _mapped(
        "glance.cafile", None, "`cafile` of `glance`, without a cloud of clouds.yaml", advice=_PATH, old="ssl.ca_file"
    ),
    _mapped(
        "glance.insecure",
        False,
        "`insecure` of `glance`, without a cloud of clouds.yaml; contradicts `cafile`",
        advice="give true or false, and true only without cafile",
        old="glance.api_insecure",
    ),
    _mapped("glance.timeout", None, "`read_timeout` of `glance`: seconds without a byte", kind="float"),
    _nothing("glance.certfile", None, _CERTIFICATE, old="ssl.cert_file"),
    _nothing("glance.keyfile", None, _CERTIFICATE, old="ssl.key_file"),
    _refused(
        "glance.verify_glance_signatures",
        False,
        "digests are always compared, signatures are not verified; true is refused",
        advice="set it to false, and verify signatures in the driver before it asks for the disk",
    ),
    _nothing("glance.enable_certificate_validation", False, _SIGNED, going="verify_glance_signatures"),
    _nothing("glance.default_trusted_certificate_ids", [], _SIGNED),
    _nothing("glance.enable_rbd_download", False, _EXPORT),
    _nothing("glance.rbd_user", "", _EXPORT),
    _nothing("glance.rbd_pool", "", _EXPORT),
    _nothing("glance.rbd_ceph_conf", "", _EXPORT),
    _nothing("glance.rbd_connect_timeout", 5, _EXPORT),
)

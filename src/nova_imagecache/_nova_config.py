"""What Nova's options ask of an image cache: values in, the arguments of CacheConfig out. Pure.

What cannot be is a problem, what has no effect is a remark; each names its option as it stands in nova.conf.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from nova_imagecache._nova_options import NO_ADDRESS, NOVA_OPTIONS, NovaOption, label, option

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

OWN_OPTIONS: tuple[NovaOption, ...] = (
    option("own", "nova_imagecache.root", None, "`root`, instead of the one below `instances_path`"),
    option("own", "nova_imagecache.disks_dir", None, "`disks_dir`, instead of `instances_path`"),
    option("own", "nova_imagecache.backend", None, "`backend`, instead of what `images_type` says"),
    option(
        "own",
        "nova_imagecache.backend_options",
        [],
        '`backend_options` over those of Nova\'s options: a line of TOML each, such as `reference = "path"`',
        kind="multi",
    ),
    option("own", "nova_imagecache.source", "glance", "`source`"),
    option(
        "own",
        "nova_imagecache.source_options",
        [],
        '`source_options` over those of Nova\'s options: a line of TOML each, such as `cloud = "mycloud"`',
        kind="multi",
    ),
    option("own", "nova_imagecache.lock_timeout", "1h", "`lock_timeout`"),
    option("own", "nova_imagecache.max_virtual_size", None, "`max_virtual_size`"),
    option("own", "nova_imagecache.max_bytes", None, "`max_bytes`"),
    option("own", "nova_imagecache.min_free_bytes", "0", "`min_free_bytes`"),
    option("own", "nova_imagecache.allow_unverified", default=False, here="`allow_unverified`"),
    option("own", "nova_imagecache.group", None, "`group`"),
    option("own", "nova_imagecache.qemu_user", None, "`qemu_user`"),
    option("own", "nova_imagecache.nova_base_dir", None, "`nova_base_dir`: set it on a host where Nova left a `_base`"),
    option(
        "own",
        "nova_imagecache.libvirt_uri",
        None,
        "`libvirt_uri`: the libvirt that is asked for users of bases as well, such as `qemu:///system`",
    ),
    option(
        "own", "nova_imagecache.disk_dirs", [], "`disk_dirs`: directories that are looked at for users of bases as well"
    ),
)
OPTIONS = (*NOVA_OPTIONS, *OWN_OPTIONS)
BY_KEY = {row.key: row for row in OPTIONS}

_FILES = ("file", "qcow2")
_BACKENDS = {"raw": "file", "flat": "file", "qcow2": "qcow2", "rbd": "rbd"}
_VMDK = frozenset({"streamOptimized", "monolithicSparse"})
_LIMITS = ("lock_timeout", "max_virtual_size", "max_bytes", "min_free_bytes", "allow_unverified", "group", "qemu_user")
_ONLY_RBD = (
    "libvirt.images_rbd_pool",
    "libvirt.images_rbd_ceph_conf",
    "libvirt.images_rbd_glance_store_name",
    "libvirt.images_rbd_glance_copy_timeout",
    "workarounds.never_download_image_if_on_rbd",
)


@dataclass(frozen=True, slots=True)
class Value:
    """What an option says. ``given``: somebody set it; else it is the default."""

    value: Any
    given: bool


@dataclass(slots=True)
class Translation:
    """What came out.

    Attributes:
        settings: arguments of CacheConfig.
        origins: for each of them (``max_idle``, ``backend_options.pool``), the option that it comes from.
        problems: why there can be no cache of this configuration, and what to do.
        remarks: what was asked for and has no effect.
        unreadable: the problem of each option, by its label, that has no value at all.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)

    def renamed(self, problem: str, prefix: str = "") -> str:
        """A problem of CacheConfig or of a plug-in, told of the option that it comes from, with what to do."""
        name, colon, text = problem.partition(": ")
        target = name if name.startswith(prefix) else prefix + name
        if colon and (key := self.origins.get(target)) is not None:
            if BY_KEY[key].kind == "multi":
                return f"{label(key)}: {target.removeprefix(prefix)}: {text}; correct that line"
            return f"{label(key)}: {text}; {BY_KEY[key].advice}"
        return f"[nova_imagecache] {prefix.rstrip('.') or name}: {problem if prefix else text}; correct it"


def translate(values: Mapping[str, Value]) -> Translation:
    """The arguments of a CacheConfig, from a value for each of OPTIONS by its key."""
    return _Translator(values).translation()


class _Translator:
    def __init__(self, values: Mapping[str, Value]) -> None:
        self._values = values
        self._out = Translation()

    def translation(self) -> Translation:
        backend = self._backend()
        self._set("backend", backend, "nova_imagecache.backend" if self._own("backend") else "libvirt.images_type")
        self._paths(backend)
        self._limits()
        self._options("backend_options", self._backend_options(backend), self._lines("backend_options"))
        source, own = self._own("source"), self._lines("source_options")
        self._set("source", source, "nova_imagecache.source")
        mapped = self._glance_options(backend, cloud="cloud" in own) if source == "glance" else []
        self._options("source_options", mapped, own)
        self._refuse(backend)
        self._remark(backend)
        return self._out

    # --- values, and what is said of them

    def _get(self, key: str) -> Any:
        return self._values[key].value

    def _given(self, key: str) -> bool:
        return self._values[key].given

    def _own(self, name: str) -> Any:
        return self._get(f"nova_imagecache.{name}")

    def _set(self, name: str, value: Any, key: str) -> None:
        self._out.settings[name] = value
        self._out.origins[name] = key

    def _problem(self, key: str, text: str) -> None:
        value = self._get(key)
        shown = ", ".join(value) if isinstance(value, list) else str(value).lower() if value is True else value
        self._out.problems.append(f"{label(key)} = {shown}: {text}; {BY_KEY[key].advice}")

    # --- settings

    def _backend(self) -> str:
        if self._own("backend") is not None:
            return str(self._own("backend"))
        kind = self._get("libvirt.images_type")
        if kind == "default":
            return "qcow2" if self._get("DEFAULT.use_cow_images") else "file"
        if kind not in _BACKENDS:
            self._problem("libvirt.images_type", "no backend of the library makes such disks")
        return _BACKENDS.get(kind, "qcow2")

    def _paths(self, backend: str) -> None:
        instances, name = self._get("DEFAULT.instances_path"), self._get("image_cache.subdirectory_name")
        self._set("disks_dir", instances, "DEFAULT.instances_path")
        # one cache for each kind of storage, so that another images_type does not meet a cache of another kind; and two
        # levels down: files of the first level are an instance's
        root = Path(instances) / f"{name}.imagecache" / ("files" if backend in _FILES else backend)
        # one mistake is told once: as disks_dir
        told = self._own("disks_dir") is None and not root.is_absolute()
        self._set("root", "/" if told else str(root), "DEFAULT.instances_path")
        relative = PurePosixPath(name)
        if self._own("root") is None and (relative.is_absolute() or not relative.parts or ".." in relative.parts):
            self._problem("image_cache.subdirectory_name", "is no name below instances_path")
        for key in ("DEFAULT.instances_path", "image_cache.subdirectory_name"):
            if NO_ADDRESS in self._get(key):
                self._out.problems.append(f"{label(key)} names $my_ip, which is not set; set [DEFAULT] my_ip too")
        for own in ("root", "disks_dir", "nova_base_dir", "libvirt_uri", "disk_dirs"):
            if self._own(own) not in (None, []):
                self._set(own, self._own(own), f"nova_imagecache.{own}")

    def _limits(self) -> None:
        idle, remove = "image_cache.remove_unused_original_minimum_age_seconds", "image_cache.remove_unused_base_images"
        self._set("max_idle", self._get(idle), idle)
        self._set("remove_unused", self._get(remove), remove)
        if at_once := self._get("compute.max_concurrent_disk_ops"):
            self._set("max_concurrent_fetches", at_once, "compute.max_concurrent_disk_ops")
        for name in _LIMITS:
            if self._own(name) is not None:
                self._set(name, self._own(name), f"nova_imagecache.{name}")

    def _lines(self, name: str) -> dict[str, Any]:
        """The operator's own options of a plug-in."""
        key = f"nova_imagecache.{name}"
        try:
            return tomllib.loads("\n".join(self._get(key)))
        except tomllib.TOMLDecodeError as err:
            self._out.problems.append(f"{label(key)}: {err}; {BY_KEY[key].advice}")
            return {}

    def _options(self, name: str, mapped: Iterable[tuple[str, Any, str]], own: Mapping[str, Any]) -> None:
        """The options of a plug-in: those of Nova's options, and over them the operator's own."""
        options: dict[str, Any] = {}
        for option_name, value, key in mapped:
            options[option_name] = value
            self._out.origins[f"{name}.{option_name}"] = key
        self._out.origins |= {f"{name}.{option_name}": f"nova_imagecache.{name}" for option_name in own}
        self._out.settings[name] = {**options, **own}

    def _backend_options(self, backend: str) -> list[tuple[str, Any, str]]:
        if backend in _FILES:
            raw = self._get("DEFAULT.force_raw_images")
            return [
                ("base_format", "raw" if raw else "native", "DEFAULT.force_raw_images"),
                ("preallocate", self._get("DEFAULT.preallocate_images"), "DEFAULT.preallocate_images"),
            ]
        if backend != "rbd":
            return []
        refuse = self._get("workarounds.never_download_image_if_on_rbd")
        options: list[tuple[str, Any, str]] = [
            ("pool", self._get("libvirt.images_rbd_pool"), "libvirt.images_rbd_pool"),
            ("user", self._get("libvirt.rbd_user") or "admin", "libvirt.rbd_user"),
            ("when_not_clonable", "refuse" if refuse else "import", "workarounds.never_download_image_if_on_rbd"),
        ]
        for name, key in (
            ("conf", "libvirt.images_rbd_ceph_conf"),
            ("secret_uuid", "libvirt.rbd_secret_uuid"),
            ("glance_store", "libvirt.images_rbd_glance_store_name"),
        ):
            if self._get(key):
                options.append((name, self._get(key), key))
        timeout = "libvirt.rbd_connect_timeout"
        # below 1 Nova leaves the time limit to librados, which has none; here everything has one
        if self._given(timeout) and self._get(timeout) > 0:
            options.append(("connect_timeout", self._get(timeout), timeout))
        return options

    def _glance_options(self, backend: str, *, cloud: bool) -> list[tuple[str, Any, str]]:
        options: list[tuple[str, Any, str]] = [("retries", self._get("glance.num_retries"), "glance.num_retries")]
        wanted: list[tuple[str, str, Callable[[Any], Any]]] = [
            ("endpoints", "glance.endpoint_override", lambda url: [url]),
            ("endpoints", "glance.api_servers", list),
            ("region_name", "glance.region_name", str),
            ("read_timeout", "glance.timeout", float),
        ]
        if not cloud:  # clouds.yaml has its own
            wanted += [("cafile", "glance.cafile", str), ("insecure", "glance.insecure", bool)]
        for name, key, convert in wanted:
            if self._get(key):
                options.append((name, convert(self._get(key)), key))
        interfaces = "glance.valid_interfaces"
        if self._given(interfaces) and self._get(interfaces):
            options.append(("interface", self._get(interfaces)[0], interfaces))
        timeout = "libvirt.images_rbd_glance_copy_timeout"
        if backend == "rbd":
            options.append(("copy_timeout", self._get(timeout), timeout))
        return options

    # --- what cannot be, and what does nothing

    def _refuse(self, backend: str) -> None:
        if backend == "rbd" and not self._get("DEFAULT.force_raw_images"):
            text = "contradicts [libvirt] images_type = rbd, as in Nova: clones have raw bases; set it to true"
            self._out.problems.append(f"[DEFAULT] force_raw_images = false {text}")
        if self._get("glance.verify_glance_signatures"):
            self._problem("glance.verify_glance_signatures", "signatures are not verified here, only digests")
        if self._get("ephemeral_storage_encryption.enabled"):
            self._problem("ephemeral_storage_encryption.enabled", "root disks would not be encrypted")
        if missing := _VMDK - set(self._get("compute.vmdk_allowed_types")):
            self._problem("compute.vmdk_allowed_types", f"{', '.join(sorted(missing))} would be taken all the same")

    def _remark(self, backend: str) -> None:
        say = self._out.remarks.append
        for row in NOVA_OPTIONS:
            if not self._given(row.key) or self._get(row.key) == row.default:
                continue
            if row.use == "nothing":
                say(f"{row.label} has no effect: {row.here}")
            if row.going is not None:
                say(f"{row.label}: Nova deprecates it; write {row.going}")
            if row.key in _ONLY_RBD and backend != "rbd":
                say(f"{row.label} has no effect: only with [libvirt] images_type = rbd")
        if set(self._get("compute.vmdk_allowed_types")) > _VMDK:
            say(f"[compute] vmdk_allowed_types: only {' and '.join(sorted(_VMDK))} are taken")
        if backend == "rbd" and self._get("DEFAULT.preallocate_images") != "none":
            say("[DEFAULT] preallocate_images has no effect: a clone takes space as it is written")
        if backend == "rbd" and self._get("libvirt.rbd_user") is None:
            say("[libvirt] rbd_user is not set: disks are made as client.admin; name a user of their own")
        if len(self._get("glance.valid_interfaces")) > 1 and self._given("glance.valid_interfaces"):
            say(f"[glance] valid_interfaces: only the first, {self._get('glance.valid_interfaces')[0]}, is used")

"""The options of the backend ``rbd``."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Self

from nova_imagecache.backends import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

FEATURES = {"layering": 1, "striping": 2, "exclusive-lock": 4, "object-map": 8, "fast-diff": 16, "deep-flatten": 32}
"""RBD_FEATURE_* of the bindings by the names that ``rbd create --image-feature`` takes, as far as a clone has them."""

LAYERING = FEATURES["layering"]
_NEEDS = {"object-map": "exclusive-lock", "fast-diff": "object-map"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RbdOptions:
    """``backend_options`` of the backend ``rbd``.

    Attributes:
        conf: absolute path of the cluster's ceph.conf; it names the keyring.
        user: the cephx user, without "client.".
        pool: where bases and root disks are kept.
        secret_uuid: of the libvirt secret that holds the user's key; handed on in ``RbdLocation``.
        connect_timeout: seconds that the cluster may take to answer, when connecting and in each operation; rounded up.
        when_not_clonable: "import": an image that cannot be cloned where it lies is brought in once for the whole
            cluster; "refuse": it is an error.
        glance_store: the Glance store in this cluster, by the name it has in Glance: raw and iso images that are not
            in it are copied there by Glance, and cloned; None: Glance copies nothing.
        features: of new images, as ``rbd`` names them; None: the cluster's default.
    """

    conf: str = "/etc/ceph/ceph.conf"
    user: str = "nova"
    pool: str = "vms"
    secret_uuid: str | None = None
    connect_timeout: float = 20.0
    when_not_clonable: str = "import"
    glance_store: str | None = None
    features: tuple[str, ...] | None = None

    @classmethod
    def parse(cls, options: Mapping[str, Any]) -> Self:
        """The options, checked.

        Raises:
            ConfigError: with all problems at once.
        """
        known = [field.name for field in fields(cls)]
        problems = [f"{name}: unknown option; known: {', '.join(known)}" for name in options.keys() - set(known)]
        problems += [
            f"{name}: {problem}"
            for name, judge in _JUDGES.items()
            if name in options and (problem := judge(options[name])) is not None
        ]
        if problems:
            raise ConfigError(sorted(f"backend_options.{problem}" for problem in problems))
        given = dict(options)
        if given.get("features") is not None:
            given["features"] = tuple(given["features"])
        if "connect_timeout" in given:
            given["connect_timeout"] = float(given["connect_timeout"])
        return cls(**given)

    @property
    def feature_bits(self) -> int | None:
        """``features`` as the bindings take them."""
        return None if self.features is None else sum(FEATURES[name] for name in set(self.features))


def _word(value: object) -> str | None:
    if not isinstance(value, str) or not value or any(c in value for c in "/@\0") or value != value.strip():
        return f"{value!r} is no name"
    return None


def _user(value: object) -> str | None:
    if isinstance(value, str) and value.startswith("client."):
        return f'{value!r}: leave out "client."'
    return _word(value)


def _path(value: object) -> str | None:
    return None if isinstance(value, str) and value.startswith("/") else f"{value!r} is no absolute path"


def _uuid(value: object) -> str | None:
    try:
        if value is not None:
            uuid.UUID(str(value))
    except ValueError:
        return f"{value!r} is no UUID"
    return None


def _seconds(value: object) -> str | None:
    # an hour is no time-out any more
    fits = isinstance(value, int | float) and not isinstance(value, bool) and 1 <= value <= 3600
    return None if fits else f"{value!r} is no number of seconds from 1 to 3600"


def _choice(value: object) -> str | None:
    return None if value in ("import", "refuse") else f"{value!r} is none of import, refuse"


def _features(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, list | tuple) or not all(isinstance(one, str) and one in FEATURES for one in value):
        return f"{value!r} is no list of {', '.join(FEATURES)}"
    missing = [f"{one} needs {_NEEDS[one]}" for one in value if one in _NEEDS and _NEEDS[one] not in value]
    if "layering" not in value:
        missing.append("a clone needs layering")
    return "; ".join(missing) or None


_JUDGES: dict[str, Callable[[object], str | None]] = {
    "conf": _path,
    "user": _user,
    "pool": _word,
    "secret_uuid": _uuid,
    "connect_timeout": _seconds,
    "when_not_clonable": _choice,
    "glance_store": lambda value: None if value is None else _word(value),
    "features": _features,
}

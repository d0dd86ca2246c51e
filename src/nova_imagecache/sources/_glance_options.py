"""The glance source's options: parsed once, all problems at once, no I/O."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit

from nova_imagecache.exceptions import ConfigError

_SECONDS = re.compile(r"(\d+(?:\.\d+)?)\s*([smh])")
_UNITS = {"s": 1, "m": 60, "h": 3600}
_API_VERSION = re.compile(r"/v2(?:\.\d+)?$")


@dataclass(frozen=True, slots=True, kw_only=True)
class GlanceOptions:
    """How to reach the image service and how patient to be with it.

    Attributes:
        cloud: a cloud of clouds.yaml; needs openstacksdk.
        endpoints: base URLs of the image service, instead of the catalogue's; tried in random order.
        token: sent to the ``endpoints`` as it is; never renewed.
        region_name, interface: choose the endpoint in the catalogue.
        cafile, insecure: of TLS; not for a cloud of clouds.yaml, which has its own.
        read_timeout: seconds without a byte after which a request or stream counts as broken.
        connect_timeout: seconds for a connection to come about.
        retries: tries after the first, each without any progress; progress starts the count again.
        retry_delay: seconds before the first retry at most, doubled for each further one up to 30.
        copy_timeout: seconds for the service to copy an image into another of its stores.

    Without ``cloud`` and ``token`` the OS_* environment says how to authenticate.
    """

    cloud: str | None = None
    endpoints: tuple[str, ...] = ()
    token: str | None = field(default=None, repr=False)
    region_name: str | None = None
    interface: str | None = None
    cafile: str | None = None
    insecure: bool = False
    read_timeout: float = 60.0
    connect_timeout: float = 10.0
    retries: int = 3
    retry_delay: float = 0.5
    copy_timeout: float = 600.0


def parse_options(options: Mapping[str, Any], *, with_session: bool = False) -> GlanceOptions:
    """The options as values; ``endpoint`` is taken as another word for ``endpoints``.

    Raises:
        ConfigError: with every unknown name, every wrong value and every contradiction. A token is never repeated.
    """
    values: dict[str, Any] = {}
    problems: list[str] = []
    for name, value in options.items():
        target = "endpoints" if name == "endpoint" else name
        if target not in _CONVERTERS:
            problems.append(f"{name}: unknown option; known: endpoint, {', '.join(sorted(_CONVERTERS))}")
        elif name == "endpoint" and "endpoints" in options:
            problems.append("endpoint: give either endpoint or endpoints")
        else:
            try:
                values[target] = _CONVERTERS[target](value)
            except ValueError as err:
                problems.append(f"{name}: {err}")
    problems += _contradictions(values, with_session=with_session)
    if problems:
        raise ConfigError(problems)
    return GlanceOptions(**values)


def without_version(url: str) -> str:
    """The service's base URL: requests name the API version themselves, and catalogues are of two minds about it."""
    return _API_VERSION.sub("", url.rstrip("/"))


def _contradictions(values: Mapping[str, Any], *, with_session: bool) -> list[str]:
    problems = []
    if with_session:
        problems += [
            f"{name}: the session has its own" for name in ("cloud", "token", "cafile", "insecure") if values.get(name)
        ]
    if values.get("cloud") and values.get("token"):
        problems.append("token: the cloud's credentials make tokens; give either")
    if values.get("token") and not values.get("endpoints") and not with_session:
        problems.append("token: needs endpoints to send it to")
    if values.get("cafile") and values.get("insecure"):
        problems.append("insecure: contradicts cafile")
    if values.get("cloud"):
        problems += [f"{name}: set it in clouds.yaml" for name in ("cafile", "insecure") if values.get(name)]
        if not with_session and not _has_openstacksdk():
            problems.append("cloud: reading clouds.yaml needs openstacksdk: pip install 'nova-imagecache[clouds]'")
    return problems


def _has_openstacksdk() -> bool:
    try:
        return find_spec("openstack") is not None
    except ValueError:
        # a module blocked in sys.modules has no spec
        return False


def _text(value: object) -> str:
    if isinstance(value, str) and value.strip() and value.isprintable():
        return value
    raise ValueError("must be a text that is not empty")


def _flag(value: object) -> bool:
    if isinstance(value, bool):
        return value
    raise ValueError(f"{value!r} is neither true nor false")


def _count(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ValueError(f"{value!r} is no count")


def _seconds(value: object) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0:
        return float(value)
    if isinstance(value, str) and (match := _SECONDS.fullmatch(value.strip())):
        return float(match[1]) * _UNITS[match[2]]
    raise ValueError(f"{value!r} is neither a number of seconds nor a text such as '60s'")


def _timeout(value: object) -> float:
    seconds = _seconds(value)
    if not seconds:
        raise ValueError("must be above 0")
    return seconds


def _endpoints(value: object) -> tuple[str, ...]:
    urls = [value] if isinstance(value, str) else value
    if not isinstance(urls, list | tuple) or not urls:
        raise ValueError("must be a URL or a list of URLs")
    return tuple(_endpoint(url) for url in urls)


def _endpoint(value: object) -> str:
    parts = urlsplit(value) if isinstance(value, str) and value.isprintable() else None
    if parts is None or parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError("must be URLs such as https://glance.example:9292")
    if parts.username is not None or parts.password is not None:
        raise ValueError("must not carry a user name or password")
    if parts.query or parts.fragment:
        raise ValueError("must end with the path")
    return without_version(parts.geturl())


_CONVERTERS: dict[str, Callable[[object], Any]] = {
    "cloud": _text,
    "endpoints": _endpoints,
    "token": _text,
    "region_name": _text,
    "interface": _text,
    "cafile": _text,
    "insecure": _flag,
    "read_timeout": _timeout,
    "connect_timeout": _timeout,
    "retries": _count,
    "retry_delay": _seconds,
    "copy_timeout": _timeout,
}

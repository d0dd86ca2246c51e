"""How the glance source talks HTTP: sessions, single requests, and what stops them.

The only importer of glanceclient, keystoneauth1 and openstacksdk, each when first used.
"""

from __future__ import annotations

import logging
import os
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, NamedTuple

from nova_imagecache.exceptions import ConfigError, SourceError, SourceForbiddenError
from nova_imagecache.sources._glance_errors import TryAgainError, failure
from nova_imagecache.sources._glance_options import GlanceOptions, without_version

if TYPE_CHECKING:
    from collections.abc import Mapping

    import requests
    from keystoneauth1.exceptions import ClientException
    from keystoneauth1.session import Session

_log = logging.getLogger(__name__)


class _Access(NamedTuple):
    """A session and where in its catalogue the image service is."""

    session: Session
    region_name: str | None
    interface: str | None


class Transport:
    """Single requests to the image service, by any thread at once.

    ``session`` is the caller's keystoneauth session; None: one is made from the options when first needed.
    """

    def __init__(self, options: GlanceOptions, session: Session | None) -> None:
        self.options = options
        self._session = session
        self._accesses: dict[int, _Access] = {}

    def get(
        self,
        path: str,
        *,
        endpoint: str | None,
        image_id: str,
        stage: str,
        headers: Mapping[str, str] | None = None,
        stream: bool = False,
    ) -> requests.Response:
        """The answer to one GET, whatever its status; with ``stream`` its body is yet to be read, and to be closed.

        A keystoneauth session renews a token that has expired, or is refused, by itself.

        Raises:
            TryAgainError: no connection, no answer in time, or an authentication that may work later.
            SourceForbiddenError: the credentials were refused.
            SourceError: the catalogue has no such image service, or its certificate is not trusted.
            ConfigError: there are no credentials to work with.
        """
        sent = {"Accept-Encoding": "identity", **(headers or {})}
        return self._request("GET", path, endpoint, image_id, stage, headers=sent, stream=stream)

    def post(
        self, path: str, body: Mapping[str, Any], *, endpoint: str | None, image_id: str, stage: str
    ) -> requests.Response:
        """The answer to one POST of JSON, whatever its status.

        Raises:
            the same as ``get``; after a TryAgainError the service may have done what was asked.
        """
        return self._request("POST", path, endpoint, image_id, stage, json=dict(body))

    def _request(
        self, method: str, path: str, endpoint: str | None, image_id: str, stage: str, **rest: Any
    ) -> requests.Response:
        from keystoneauth1 import exceptions as ksa

        try:
            response = self._send(method, path, endpoint, **rest)
        except ksa.ClientException as err:
            raise _translated(err, image_id=image_id, stage=stage) from err
        _log.debug(
            "image %s: %s %s: HTTP %d, request id %s",
            image_id,
            method,
            path,
            response.status_code,
            response.headers.get("X-OpenStack-Request-ID"),
        )
        return response

    def _send(self, method: str, path: str, endpoint: str | None, **rest: Any) -> requests.Response:
        from glanceclient.common.http import get_http_client
        from keystoneauth1.adapter import Adapter

        session, region_name, interface = self._access()
        client = get_http_client(session=session, region_name=region_name, interface=interface)
        # What Client brings along beside it takes 3 MiB, and serves no request here. It is a keystoneauth adapter; its
        # own wrapper around ``request`` is stepped over: that quotes the "=" of a Range header, fails on an error page
        # without Content-Type, hides statuses it has no class for, and reads an image into memory whole if something on
        # the way has given it another Content-Type.
        response: requests.Response = Adapter.request(
            client,
            path,
            method,
            endpoint_override=endpoint or without_version(client.get_endpoint() or "") or None,
            timeout=(self.options.connect_timeout, self.options.read_timeout),
            raise_exc=False,
            # the retries are ours, and keystoneauth's debug log would read text bodies whole
            connect_retries=0,
            status_code_retries=0,
            log=False,
            **rest,
        )
        return response

    def _access(self) -> _Access:
        if self._session is not None:
            return _Access(self._session, self.options.region_name, self.options.interface)
        # One per process: a connection shared with a forked child would mix up the answers. Two threads may both make
        # one; the first stays, and the other has opened nothing.
        access = self._accesses.get(os.getpid())
        return access or self._accesses.setdefault(os.getpid(), _make_access(self.options))


def _make_access(options: GlanceOptions) -> _Access:
    from keystoneauth1.session import Session
    from keystoneauth1.token_endpoint import Token

    if options.token is not None:
        verify = False if options.insecure else options.cafile or True
        auth = Token(options.endpoints[0], options.token)
        return _Access(Session(auth=auth, verify=verify), None, None)
    cloud = options.cloud or (os.environ.get("OS_CLOUD") or None)
    return _from_cloud(cloud, options) if cloud else _from_environment(options)


def _from_environment(options: GlanceOptions) -> _Access:
    """Credentials as the OpenStack clients read them: OS_AUTH_TYPE (default password) and what that type asks for."""
    import argparse

    from keystoneauth1 import exceptions as ksa
    from keystoneauth1 import loading

    parser = argparse.ArgumentParser(add_help=False)
    try:
        loading.register_session_argparse_arguments(parser)
        loading.register_auth_argparse_arguments(parser, [], default="password")
        values = parser.parse_args([])
        auth = loading.load_auth_from_argparse_arguments(values)
        values.insecure = values.insecure or options.insecure
        values.os_cacert = options.cafile or values.os_cacert
        session = loading.load_session_from_argparse_arguments(values, auth=auth)
    except ksa.AuthPluginException as err:
        raise ConfigError(
            [f"the OS_* environment: {err}", "set it, or name a cloud, or endpoints and a token, in source_options"]
        ) from err
    interface = os.environ.get("OS_INTERFACE") or os.environ.get("OS_ENDPOINT_TYPE")
    return _Access(
        session,
        options.region_name or os.environ.get("OS_REGION_NAME") or None,
        options.interface or interface or None,
    )


def _from_cloud(cloud: str, options: GlanceOptions) -> _Access:
    try:
        from openstack.config import OpenStackConfig
        from openstack.exceptions import ConfigException
    except ImportError as err:
        raise ConfigError([f"cloud {cloud}: needs openstacksdk: pip install 'nova-imagecache[clouds]'"]) from err
    from keystoneauth1 import exceptions as ksa

    chosen: dict[str, Any] = {"region_name": options.region_name} if options.region_name else {}
    try:
        region = OpenStackConfig().get_one(cloud=cloud, **chosen)
        session = region.get_session()
    except (ConfigException, ksa.ClientException) as err:
        raise ConfigError([f"cloud {cloud}: {err}"]) from err
    interface = options.interface or region.get_interface("image")
    # clouds.yaml may list interfaces in order of preference; an endpoint is chosen by one
    if isinstance(interface, list):
        interface = interface[0] if interface else None
    return _Access(session, region.get_region_name(), interface)


def _translated(err: ClientException, *, image_id: str, stage: str) -> Exception:
    from keystoneauth1 import exceptions as ksa

    match err:
        case ksa.SSLError():
            return SourceError(
                f"no secure connection: {err}",
                image_id=image_id,
                stage=stage,
                todo="Check the server's certificate, or name the authority that signed it in cafile",
            )
        case ksa.ConnectionError() | ksa.DiscoveryFailure():
            return TryAgainError(str(err))
        case ksa.HttpError() | ksa.AuthorizationFailure():
            # only the identity service's answers come this way: Glance's are looked at by their status
            return _unauthenticated(err, getattr(err, "http_status", HTTPStatus.UNAUTHORIZED), image_id)
        case ksa.CatalogException():
            return SourceError(
                f"the catalogue has no image service: {err}",
                image_id=image_id,
                stage=stage,
                todo="Check region_name and interface, or name endpoints",
            )
        case ksa.AuthPluginException():
            return ConfigError([f"credentials: {err}"])
        case _:
            return SourceError(f"no answer: {err}", image_id=image_id, stage=stage)


def _unauthenticated(err: ClientException, status: int, image_id: str) -> Exception:
    kind = failure(status, image_id=image_id, stage="authentication")
    if isinstance(kind, TryAgainError):
        return TryAgainError(f"the identity service: {err}")
    cls = SourceForbiddenError if isinstance(kind, SourceForbiddenError) else SourceError
    return cls(
        f"the identity service gives no token: {err}",
        image_id=image_id,
        stage="authentication",
        todo="Check the credentials and the identity service's URL",
    )

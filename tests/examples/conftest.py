"""Hosts that run the examples: as root and as in production, with each backend."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest

from services.libvirtd_ground import Ground
from services.libvirtd_hosts import BACKENDS, Host
from services.libvirtd_hosts import host as new_host


@pytest.fixture(params=BACKENDS)
def host(request: pytest.FixtureRequest, libvirt_ground: Ground) -> Iterator[Host]:
    """A host where everything is root's, with each backend."""
    with new_host(libvirt_ground, request.param, partial(request.getfixturevalue, "ceph")) as made:
        yield made


@pytest.fixture(params=BACKENDS)
def production(request: pytest.FixtureRequest, owners_ground: Ground) -> Iterator[Host]:
    """A host as in production, with each backend: guests, driver and libvirtd are three users."""
    with new_host(owners_ground, request.param, partial(request.getfixturevalue, "ceph")) as made:
        yield made


@pytest.fixture
def apart(request: pytest.FixtureRequest, libvirt_ground: Ground) -> Iterator[Host]:
    """A host whose cache has a filesystem of its own."""
    with new_host(libvirt_ground, "qcow2", partial(request.getfixturevalue, "ceph"), apart=True) as made:
        yield made

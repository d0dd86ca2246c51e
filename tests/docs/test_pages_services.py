"""Pages about services run with real ones: Glance with clouds.yaml, Ceph from nothing."""

from __future__ import annotations

import json
import uuid

import pytest
import yaml  # type: ignore[import-untyped]  # its stubs are for one call
from keystoneauth1.loading import get_plugin_loader
from keystoneauth1.session import Session

from nova_imagecache import GlanceSource, ImageCache
from services.ceph import CephCluster
from services.glance import ADMIN, GlanceServer

from .ground import Ground
from .pages import DOCS, blocks

pytestmark = pytest.mark.services

GLANCE = DOCS / "how-to/glance.md"


def test_the_page_on_glance_runs(bare: Ground, glance: GlanceServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a cloud of that name, an image comes in, and one that is not there is exit code 4."""
    auth = {"endpoint": glance.url, "token": ADMIN}
    clouds = bare.directory / "clouds.yaml"
    clouds.write_text(json.dumps({"clouds": {"mycloud": {"auth_type": "admin_token", "auth": auth}}}))
    monkeypatch.setenv("OS_CLIENT_CONFIG_FILE", str(clouds))
    bare.environ["OS_CLIENT_CONFIG_FILE"] = str(clouds)
    image_id = glance.upload(b"page".ljust(2**20, b"\0"))
    config = bare.configure(source="glance", source_options={"cloud": "mycloud"})
    with ImageCache.from_config(config) as cache:
        bare.furnish(config, cache, image_id)
        bare.environ["NO_IMAGE"] = str(uuid.uuid4())
        assert bare.walk(GLANCE) >= 3
        session = Session(auth=get_plugin_loader("admin_token").load_from_options(**auth))
        digest = glance.show(image_id)["os_hash_value"]
        assert bare.names["fetch"](cache, image_id, session, digest).digest.value == digest


def test_the_cloud_on_the_page_is_one_that_openstacksdk_reads(bare: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its clouds.yaml, as it stands, is taken by the source that the page names it to."""
    [block] = [block for block in blocks(GLANCE) if block.language == "yaml"]
    assert list(yaml.safe_load(block.code)["clouds"]) == ["mycloud"]
    file = bare.directory / "clouds.yaml"
    authority = bare.directory / "cloud-ca.pem"
    authority.touch()
    file.write_text(block.code.replace("/etc/ssl/certs/cloud-ca.pem", str(authority)))
    monkeypatch.setenv("OS_CLIENT_CONFIG_FILE", str(file))
    source = GlanceSource.from_options({"cloud": "mycloud"})
    assert source.name == "glance"


def test_the_page_on_ceph_runs(bare: Ground, ceph: CephCluster) -> None:
    """From the pool and the user to a root disk that is a clone."""
    bare.replaced |= {
        "/etc/ceph/ceph.conf": str(ceph.conf),
        "/etc/ceph/ceph.client.nova.keyring": str(ceph.keyring("nova")),
    }
    bare.environ["CEPH_CONF"] = str(ceph.conf)
    bare.image("page")
    config = bare.configure(
        backend="rbd",
        backend_options={"conf": str(ceph.conf), "secret_uuid": str(uuid.uuid4())},
        source="directory",
        source_options={"path": str(bare.directory / "images")},
    )
    with ImageCache.from_config(config) as cache:
        bare.furnish(config, cache, "page")
        assert bare.walk(DOCS / "how-to/ceph.md") >= 3
        assert [base.image_id for base in cache.bases()] == ["page"]
        assert cache.cleanup(cache.plan_cleanup(max_idle=0)).removed == ("page",)

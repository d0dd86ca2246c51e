"""Where Glance says that an image lies, and the options of the backend ``rbd``: parsed without a cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from nova_imagecache import ConfigError
from nova_imagecache.backends import BackendPaths, _rbd_names
from nova_imagecache.backends._rbd_locations import Place, UnusableError, in_cluster, parse, shown
from nova_imagecache.backends.rbd import RbdBackend
from nova_imagecache.exceptions import InvalidRequestError

FSID = "0a1b2c3d-0000-4000-8000-000000000001"


@pytest.mark.parametrize(
    ("url", "place"),
    [
        (f"rbd://{FSID}/images/img/snap", Place(fsid=FSID, pool="images", image="img", snapshot="snap")),
        (f"rbd://{FSID}/a%2Fb/i%20m/s%40p", Place(fsid=FSID, pool="a/b", image="i m", snapshot="s@p")),
        (f"rbd://{FSID}/b%C3%BCcher/%25/snap", Place(fsid=FSID, pool="bücher", image="%", snapshot="snap")),
    ],
)
def test_places(url: str, place: Place) -> None:
    """Each of the four parts is percent-decoded by itself, after the slashes were told."""
    assert parse(url) == place
    in_cluster(place, FSID.upper())


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("file:///var/lib/glance/images/img", "another kind"),
        ("cinder://store/volume", "another kind"),
        ("", "another kind"),
        ("RBD-ish", "another kind"),
        ("rbd://img", "neither cluster nor pool"),
        ("rbd://", "neither cluster nor pool"),
        (f"rbd://{FSID}/images/img", "malformed"),
        (f"rbd://{FSID}/images/img/snap/more", "malformed"),
        (f"rbd://{FSID}//img/snap", "malformed"),
        (f"rbd://{FSID}/images/img/", "malformed"),
        (f"rbd://{FSID}/images/100%/snap", "percent-encoding is broken"),
        (f"rbd://{FSID}/images/%zz/snap", "percent-encoding is broken"),
        (f"rbd://{FSID}/images/%ff/snap", "not UTF-8"),
        (f"rbd://{FSID}/images/img%00.bak/snap", "zero byte"),
    ],
)
def test_unusable_places_are_told_apart(url: str, words: str) -> None:
    """Other stores, short forms and broken ones each have their own words."""
    with pytest.raises(UnusableError, match=words):
        parse(url)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        (f"rbd://{FSID}/images/img/snap", f"rbd://{FSID}/images/img/snap"),
        ("s3+https://ACCESS:SECRET@s3.example/bucket/img", "s3+https://..."),
        ("swift+config://ref/container/SECRET", "swift+config://..."),
        ("file:///var/lib/glance/SECRET", "file://..."),
        ("ACCESS:SECRET@somewhere", "a location without a scheme"),
        ("SECRET", "a location without a scheme"),
        ("", "a location without a scheme"),
    ],
)
def test_what_is_told_of_a_location(url: str, told: str) -> None:
    """Of other stores nothing but their kind: their URLs may carry keys."""
    assert shown(url) == told
    if "SECRET" in url:
        with pytest.raises(UnusableError) as caught:
            parse(url)
        assert "SECRET" not in str(caught.value)


def test_another_cluster() -> None:
    """A place in another cluster is not malformed, and not ours."""
    with pytest.raises(UnusableError, match="another cluster"):
        in_cluster(parse(f"rbd://{FSID}/images/img/snap"), "0a1b2c3d-0000-4000-8000-000000000002")


def _backend(tmp_path: Path, **options: object) -> RbdBackend:
    return RbdBackend(options, BackendPaths(root=tmp_path, disks_dir=tmp_path))


def test_options_have_defaults(tmp_path: Path) -> None:
    """Those of Ceph's own guide for OpenStack; constructing a backend imports and asks nothing."""
    options = _backend(tmp_path).options
    assert (options.conf, options.user, options.pool) == ("/etc/ceph/ceph.conf", "nova", "vms")
    assert (options.when_not_clonable, options.features, options.feature_bits) == ("import", None, None)
    assert _backend(tmp_path, features=["layering", "exclusive-lock"]).options.feature_bits == 5
    assert _backend(tmp_path, features=["layering", "layering"]).options.feature_bits == 1


def test_all_problems_of_the_options_come_at_once(tmp_path: Path) -> None:
    """One error lists every option that cannot be used, by its name."""
    wrong = {
        "conf": "ceph.conf",
        "user": "client.nova",
        "pool": "vms/ns",
        "secret_uuid": "secret",
        "connect_timeout": 0,
        "when_not_clonable": "panic",
        "glance_store": "",
        "features": ["fast-diff"],
        "colour": "blue",
    }
    with pytest.raises(ConfigError) as caught:
        _backend(tmp_path, **wrong)
    assert sorted(problem.split(":")[0] for problem in caught.value.problems) == sorted(
        f"backend_options.{name}" for name in wrong
    )
    assert "fast-diff needs object-map; a clone needs layering" in str(caught.value)


@pytest.mark.parametrize("prefix", ["base.", "staging.", "trash."])
def test_ids_that_read_like_our_own_names_are_refused(prefix: str, tmp_path: Path) -> None:
    """An id that begins like a name of ours is nobody's, before the cluster is asked."""
    backend = _backend(tmp_path)
    for call in (backend.find_base, lambda value: backend.get_root_disk(value, "disk")):
        with pytest.raises(InvalidRequestError, match="cannot be used on RBD"):
            call(f"{prefix}x")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("vm_disk", ("vm", "disk")),
        ("vm_a_disk.rescue", ("vm_a", "disk.rescue")),
        ("vm__disk", ("vm_", "disk")),
        ("volume-1", None),
        ("_disk", None),
        ("vm_", None),
        ("base.a_b", None),
        ("staging.a_b.0011223344556677", None),
    ],
)
def test_disk_names_split_at_the_last_underscore(name: str, parts: tuple[str, str] | None) -> None:
    """A disk's own name has no underscore; an id may have several."""
    assert _rbd_names.split_disk_name(name) == parts

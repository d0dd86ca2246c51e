"""GlanceSource.copy_to_store against answers of every kind; a real copy is in integration/test_rbd_copy_to_store.py."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from nova_imagecache import (
    CancelledError,
    ConfigError,
    GlanceSource,
    ImageInfo,
    ImageNotActiveError,
    ImageNotFoundError,
    SourceError,
    SourceForbiddenError,
    SourceUnavailableError,
)
from nova_imagecache.backends import BackendPaths
from nova_imagecache.backends.rbd import RbdBackend
from nova_imagecache.sources import CopyFailedError, CopyRefusedError, StoreCopier, _glance_copy
from nova_imagecache.sources._glance_errors import words
from services.flaky import Answer, FlakyGlance

IMAGE = ImageInfo(image_id="img", disk_format="raw", stores=("local",))
BUSY = Answer(status=409, body=b'{"message": "Image has active task<br /><br />", "title": "Conflict"}')

TASK = {"os_glance_import_task": "t"}
COMING = {"os_glance_importing_to_stores": "other,ceph", **TASK}
FAILED = {"os_glance_failed_import": "ceph"}
THERE = {"stores": "local,ceph", "os_glance_importing_to_stores": ""}


@pytest.fixture
def server() -> Iterator[FlakyGlance]:
    with FlakyGlance() as flaky:
        flaky.add("img", b"data", stores="local")
        yield flaky


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_glance_copy, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(_glance_copy, "MAX_PAUSE", 0.05)


def shows(server: FlakyGlance, *states: dict[str, Any]) -> None:
    """Let the image look like this, one after the other, and stay like the last."""
    known = server.images["img"][1]
    answers = [
        Answer(status=200, body=json.dumps({**known, **state}).encode(), content_type="application/json")
        for state in states
    ]
    server.get_answers.extend(answers)
    server.get_answer = answers[-1]


def copy(server: FlakyGlance, check: Callable[[], None] = lambda: None, **options: Any) -> ImageInfo:
    source = GlanceSource(endpoint=server.url, token="secret-token", **{"retry_delay": 0.001, **options})
    return source.copy_to_store(IMAGE, "ceph", check)


def refused(server: FlakyGlance, kind: type[SourceError], **options: Any) -> SourceError:
    with pytest.raises(kind) as caught:
        copy(server, **options)
    assert type(caught.value) is kind
    assert (caught.value.image_id, "secret" in str(caught.value)) == ("img", False)
    return caught.value


def test_asks_and_waits(server: FlakyGlance) -> None:
    """One request to copy; done when the store is listed and nothing is on its way there any more."""
    urls = [{"url": "file:///img"}, {"url": "rbd://f/p/img/snap"}]
    shows(server, TASK, COMING, {**COMING, "stores": "local,ceph"}, {**THERE, "locations": urls})
    image = copy(server)
    assert image.stores == ("local", "ceph")
    assert image.locations == ("file:///img", "rbd://f/p/img/snap")
    assert server.imports == [
        {"method": {"name": "copy-image"}, "stores": ["ceph"], "all_stores_must_succeed": True},
    ]
    assert server.requests[0].path == "/v2/images/img/import"
    assert len(server.requests) == 5


def test_another_asked_already(server: FlakyGlance) -> None:
    """A copy that is under way is waited for; so is one of which the service says that it is there."""
    server.import_answers.append(BUSY)
    shows(server, TASK, COMING, THERE)
    assert "ceph" in copy(server).stores
    server.import_answers.append(Answer(status=400, body=b"<h1>400</h1>Image is already present at store"))
    assert "ceph" in copy(server).stores
    assert len(server.imports) == 2


def test_another_store_is_first(server: FlakyGlance) -> None:
    """While the image is copied elsewhere no other copy can begin: it is asked for when that is done."""
    server.import_answers.extend([BUSY, BUSY])
    elsewhere = {"os_glance_importing_to_stores": "other", **TASK}
    # a failure of long ago is no news until our own copy has begun
    shows(server, *[elsewhere] * 4, FAILED, elsewhere, FAILED, COMING, THERE)
    assert "ceph" in copy(server).stores
    assert len(server.imports) == 3


def test_it_failed(server: FlakyGlance) -> None:
    """What the service lists as failed is an error, whoever asked for the copy."""
    shows(server, COMING, FAILED)
    assert "copy into store ceph: the service says that it failed" in str(refused(server, CopyFailedError))
    server.import_answers.append(BUSY)
    shows(server, COMING, FAILED)
    assert not refused(server, CopyFailedError).retryable
    assert len(server.imports) == 2


def test_it_ended_without_a_result(server: FlakyGlance) -> None:
    """A copy that vanishes is not waited for until the end of time."""
    shows(server, TASK, {})
    assert "says nothing of the result" in str(refused(server, CopyFailedError))


def test_refused(server: FlakyGlance) -> None:
    """An unknown store, or a service without copy-image: its own words, after a second try."""
    server.import_answers.extend([Answer(status=409, body=b'{"message": "Unknown scheme \'ceph\'"}')] * 2)
    assert "HTTP 409: Unknown scheme 'ceph'" in str(refused(server, CopyRefusedError))
    assert len(server.imports) == 2
    server.import_answers.append(Answer(status=413, body=b"<html><title>x</title><body>Over quota<br/></body></html>"))
    assert "refuses it: HTTP 413: Over quota" in str(refused(server, CopyRefusedError))
    assert len(server.imports) == 3


@pytest.mark.parametrize("status", ["deactivated", "queued", "pending_delete"])
def test_wrong_state(server: FlakyGlance, status: str) -> None:
    """An image that is not active cannot be copied, and the error says what it is."""
    server.import_answers.append(Answer(status=409, body=b"Only images with status active can be targeted"))
    shows(server, {"status": status})
    assert status in str(refused(server, ImageNotActiveError))


@pytest.mark.parametrize(
    ("status", "kind"), [(403, SourceForbiddenError), (401, SourceForbiddenError), (404, ImageNotFoundError)]
)
def test_not_allowed_or_gone(server: FlakyGlance, status: int, kind: type[SourceError]) -> None:
    """Final answers end it at once; a missing right is named."""
    server.import_answers.append(Answer(status=status, body=b"no"))
    assert ("copy_image" in str(refused(server, kind))) == (status == 403)
    assert len(server.requests) == 1


def test_gone_meanwhile(server: FlakyGlance) -> None:
    """An image that is deleted while it is copied is an image that is not there."""
    shows(server, COMING)
    server.get_answer = Answer(status=404)
    refused(server, ImageNotFoundError)


def test_a_busy_service_is_asked_again(server: FlakyGlance) -> None:
    """Asking twice is harmless, so that it is tried again like every request."""
    server.import_answers.extend([Answer(status=503)] * 2)
    shows(server, THERE)
    assert "ceph" in copy(server).stores
    assert len(server.imports) == 3
    server.import_answers.extend([Answer(status=503)] * 4)
    assert refused(server, SourceUnavailableError).retryable


def test_limit(server: FlakyGlance) -> None:
    """Longer than ``copy_timeout`` is not waited for, be it for the copy or for an answer."""
    shows(server, COMING)
    error = refused(server, SourceUnavailableError, copy_timeout=0.3)
    assert "not there after 0.3 s" in str(error)
    server.get_answer = Answer(stall_after=1)
    start = time.monotonic()
    refused(server, SourceUnavailableError, copy_timeout=0.3)
    assert time.monotonic() - start < 2


@pytest.mark.slow
def test_check_ends_it(server: FlakyGlance, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller's check is called at least ten times a second, between looks and while one hangs."""
    monkeypatch.setattr(_glance_copy, "FIRST_PAUSE", 5.0)
    shows(server, COMING)
    cancel = threading.Event()
    calls: list[float] = []

    def check() -> None:
        calls.append(time.monotonic())
        if cancel.is_set():
            raise CancelledError

    for answer in (server.get_answer, Answer(stall_after=1)):
        cancel.clear()
        calls.clear()
        server.get_answer = answer
        timer = threading.Timer(0.6, cancel.set)
        timer.start()
        with pytest.raises(CancelledError):
            copy(server, check)
        timer.join()
        assert len(calls) >= 5
        assert calls[-1] - calls[0] < 2


def test_back_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks come at half a second first, and at ten seconds later on."""
    monkeypatch.undo()
    assert list(itertools.islice(_glance_copy.pauses(), 7)) == [0.5, 1, 2, 4, 8, 10, 10]


def test_odd_ids_send_nothing(server: FlakyGlance) -> None:
    """An id that would name another resource is no request."""
    source = GlanceSource(endpoint=server.url, token="t")
    assert isinstance(source, StoreCopier)
    with pytest.raises(ImageNotFoundError):
        source.copy_to_store(ImageInfo(image_id="a/../img", disk_format="raw"), "ceph", lambda: None)
    assert server.requests == []


def test_option() -> None:
    """A limit of nothing is none."""
    with pytest.raises(ConfigError, match="copy_timeout"):
        GlanceSource.from_options({"endpoint": "http://a", "token": "t", "copy_timeout": 0})


@pytest.mark.parametrize(
    ("page", "text"),
    [
        (b'{"message": "No.<br /><br />\\n\\n", "code": "409 Conflict"}', "No."),
        (b"<html><head><title>409</title></head><body><h1>409 Conflict</h1>No.<br /></body></html>", "No."),
        (b"[]", "[]"),
        (b"\xff", "\ufffd"),
        (b"", ""),
        (b"x" * 1000, "x" * 300),
    ],
)
def test_words(page: bytes, text: str) -> None:
    """Error pages become one line."""
    assert words(page) == text


@pytest.mark.parametrize(
    ("disk_format", "stores", "locations", "store", "wanted"),
    [
        ("raw", ("local",), ("file:///i",), "ceph", "ceph"),
        ("iso", ("local",), ("file:///i",), "ceph", "ceph"),
        ("raw", (), ("file:///i",), "ceph", "ceph"),
        ("raw", ("local",), ("file:///i",), None, None),
        ("qcow2", ("local",), ("file:///i",), "ceph", None),
        ("iso", ("local", "ceph"), ("rbd://f/p/i/s",), "ceph", None),
        ("raw", ("local",), (), "ceph", None),
    ],
)
def test_rbd_asks_for_useful_copies_only(
    tmp_path: Any,
    disk_format: str,
    stores: tuple[str, ...],
    locations: tuple[str, ...],
    store: str | None,
    wanted: str | None,
) -> None:
    """Only what can be cloned, is not in the store, and would be seen there, is worth a copy."""
    backend = RbdBackend({"glance_store": store}, BackendPaths(root=tmp_path, disks_dir=tmp_path))
    image = ImageInfo(image_id="i", disk_format=disk_format, stores=stores, locations=locations)
    assert backend.wanted_store(image) == wanted

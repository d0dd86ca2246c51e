"""GlanceSource against a server that fails on purpose; what a real Glance can show is in integration/test_glance.py."""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import os
import pickle
import random
import socket
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from keystoneauth1.identity.v3 import Password
from keystoneauth1.session import Session
from keystoneauth1.token_endpoint import Token

from nova_imagecache import (
    ConfigError,
    Digest,
    GlanceSource,
    ImageCorruptError,
    ImageInfo,
    ImageNotActiveError,
    ImageNotFoundError,
    InvalidRequestError,
    SourceError,
    SourceForbiddenError,
    SourceUnavailableError,
)
from services.content import Fixed, Pattern
from services.flaky import Answer, FlakyGlance

MIB = 2**20
DATA = random.Random(1).randbytes(3 * MIB + 4321)
TOKEN = "secret-token-of-a-user"


@pytest.fixture
def server() -> Iterator[FlakyGlance]:
    with FlakyGlance() as flaky:
        flaky.add("img", DATA)
        yield flaky


@pytest.fixture(params=["token", "session"])
def source(request: pytest.FixtureRequest, server: FlakyGlance) -> GlanceSource:
    """A quick source, by endpoint and token, and by a session of the caller's."""
    quick: dict[str, Any] = {"retry_delay": 0.001, "read_timeout": 5}
    if request.param == "token":
        return GlanceSource(endpoint=server.url, token=TOKEN, **quick)
    return GlanceSource(session=Session(auth=Token(server.url, TOKEN)), **quick)


def make(server: FlakyGlance, **options: Any) -> GlanceSource:
    return GlanceSource(endpoint=server.url, token=TOKEN, **{"retry_delay": 0.001, **options})


def password(server: FlakyGlance) -> Password:
    return Password(
        server.keystone_url,
        username="u",
        password="secret-password",
        user_domain_id="d",
        project_name="p",
        project_domain_id="d",
    )


def read(source: GlanceSource, image: ImageInfo | None = None, offset: int = 0) -> bytes:
    with source.open(image or source.get("img"), offset) as chunks:
        return b"".join(chunks)


def unknown_size(source: GlanceSource) -> ImageInfo:
    known = source.get("img")
    return ImageInfo(image_id="img", disk_format="raw", digest=known.digest, digest_evidence=known.digest_evidence)


class TestMetadata:
    """What get makes of Glance's properties."""

    def test_one_request(self, source: GlanceSource, server: FlakyGlance) -> None:
        """Get is exactly one request."""
        assert source.get("img").size == len(DATA)
        assert [(seen.method, seen.path) for seen in server.requests] == [("GET", "/v2/images/img")]

    def test_fields(self, source: GlanceSource, server: FlakyGlance) -> None:
        """Each property finds its field, in bytes."""
        server.add(
            "full",
            b"x",
            disk_format="qcow2",
            min_disk=3,
            direct_url="rbd://a/images/full/snap",
            locations=[{"url": "rbd://a/images/full/snap", "metadata": {}}, {"url": "file:///full"}],
            stores="ceph, local",
        )
        assert source.get("full") == ImageInfo(
            image_id="full",
            disk_format="qcow2",
            size=1,
            min_disk=3 * 2**30,
            digest=Digest("sha512", server.images["full"][1]["os_hash_value"]),
            digest_evidence="os_hash",
            locations=("rbd://a/images/full/snap", "file:///full"),
            stores=("ceph", "local"),
        )

    @pytest.mark.parametrize(
        ("properties", "digest", "evidence"),
        [
            ({"os_hash_algo": "sha256", "os_hash_value": "A" * 64}, Digest("sha256", "a" * 64), "os_hash"),
            ({"os_hash_value": None, "checksum": "b" * 32}, Digest("md5", "b" * 32), "checksum"),
            ({"os_hash_algo": "whirlpool", "checksum": "b" * 32}, Digest("md5", "b" * 32), "checksum"),
            ({"os_hash_value": "zz", "checksum": "b" * 32}, Digest("md5", "b" * 32), "checksum"),
            ({"os_hash_value": None, "checksum": None}, None, "unverified"),
            ({"os_hash_algo": "whirlpool", "checksum": "c"}, None, "unverified"),
        ],
    )
    def test_digest(
        self, server: FlakyGlance, properties: dict[str, Any], digest: Digest | None, evidence: str
    ) -> None:
        """The best known digest is taken, and the evidence says which that is."""
        server.add("some", b"x", **properties)
        image = make(server).get("some")
        assert (image.digest, image.digest_evidence) == (digest, evidence)

    @pytest.mark.parametrize("status", ["queued", "saving", "importing", "deactivated", "killed", "deleted"])
    def test_status_is_no_error(self, server: FlakyGlance, status: str) -> None:
        """An image that is not active comes back with its status."""
        server.add("some", b"", status=status, size=None, disk_format=None, os_hash_value=None)
        image = make(server).get("some")
        assert (image.status, image.size, image.disk_format, image.digest) == (status, None, "", None)

    @pytest.mark.parametrize(
        "body",
        [
            b"<html>login</html>",
            b"[]",
            b"{}",
            json.dumps({"id": "other", "status": "active", "disk_format": "raw"}).encode(),
            json.dumps({"id": "img", "disk_format": "raw"}).encode(),
            json.dumps({"id": "img", "status": "active"}).encode(),
            json.dumps({"id": "img", "status": "active", "disk_format": "raw", "size": "big"}).encode(),
        ],
    )
    def test_nonsense_is_an_error(self, server: FlakyGlance, body: bytes) -> None:
        """An answer that is no image is a SourceError that says so."""
        server.get_answer = Answer(status=200, body=body, content_type="application/json")
        with pytest.raises(SourceError, match="not an image's properties") as caught:
            make(server).get("img")
        assert not caught.value.retryable

    def test_odd_ids_send_nothing(self, server: FlakyGlance) -> None:
        """An id that would name another resource is no request."""
        with pytest.raises(ImageNotFoundError):
            make(server).get("../v2/images/img")
        with pytest.raises(ImageNotFoundError), make(server).open(ImageInfo(image_id="a/../img", disk_format="raw")):
            pass
        assert server.requests == []


class TestFailures:
    """Which answers are which errors, and which are tried again."""

    @pytest.mark.parametrize(
        ("status", "error"),
        [(404, ImageNotFoundError), (401, SourceForbiddenError), (403, SourceForbiddenError), (400, SourceError)],
    )
    def test_final_answers(self, source: GlanceSource, server: FlakyGlance, status: int, error: type) -> None:
        """An answer that stays the same is not asked for again."""
        server.get_answer = Answer(status=status, body=b"no", content_type="text/html")
        with pytest.raises(SourceError) as caught:
            source.get("img")
        assert type(caught.value) is error
        assert caught.value.image_id == "img"
        assert not caught.value.retryable
        assert len(server.requests) == 1

    @pytest.mark.parametrize("status", [500, 502, 503, 504, 429, 408])
    def test_busy_server_is_tried_again(self, source: GlanceSource, server: FlakyGlance, status: int) -> None:
        """A server that is busy for a while is waited for."""
        server.get_answers.extend([Answer(status=status, body=b"busy")] * 3)
        server.data_answers.extend([Answer(status=status)] * 3)
        assert read(source) == DATA
        assert len(server.requests) == 8

    def test_busy_server_is_given_up(self, source: GlanceSource, server: FlakyGlance) -> None:
        """A server that stays busy is SourceUnavailableError after one try and all retries."""
        server.get_answer = Answer(status=503)
        with pytest.raises(SourceUnavailableError, match="4 tries: HTTP 503") as caught:
            source.get("img")
        assert caught.value.retryable
        assert len(server.requests) == 4

    def test_no_server(self) -> None:
        """An endpoint where nothing listens is SourceUnavailableError."""
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{unused.getsockname()[1]}"
            source = GlanceSource(endpoint=url, token=TOKEN, retries=1, retry_delay=0)
            with pytest.raises(SourceUnavailableError, match="2 tries"):
                source.get("img")

    def test_no_tls(self, server: FlakyGlance) -> None:
        """A server that cannot be trusted is an error that says so, and is not tried again."""
        source = GlanceSource(endpoint=server.url.replace("http:", "https:"), token=TOKEN)
        with pytest.raises(SourceError, match=r"no secure connection.*cafile") as caught:
            source.get("img")
        assert not caught.value.retryable

    def test_delays_grow_and_differ(
        self, server: FlakyGlance, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The delay before a retry is random below a limit that doubles up to 30 s."""
        delays: list[float] = []
        monkeypatch.setattr(time, "sleep", delays.append)
        server.get_answer = Answer(status=503)
        with pytest.raises(SourceUnavailableError):
            make(server, retries=12, retry_delay=0.5).get("img")
        limits = [min(30, 0.5 * 2**n) for n in range(12)]
        assert len(delays) == 12
        assert all(0 <= delay <= limit for delay, limit in zip(delays, limits, strict=True))
        assert len(set(delays)) == 12
        assert caplog.text.count("image img: metadata: HTTP 503; trying again") == 12

    def test_all_endpoints_are_tried(self, server: FlakyGlance) -> None:
        """Where one endpoint fails the next is asked, in the middle of a stream too; the first one is random."""
        with FlakyGlance() as broken:
            broken.get_answer = broken.data_answer = Answer(status=503)
            broken.add("img", DATA)
            source = GlanceSource(endpoint=[broken.url, server.url], token=TOKEN, retries=1, retry_delay=0)
            for _ in range(20):
                assert source.get("img").size == len(DATA)
            assert 0 < len(broken.requests) < 20
            server.data_answers.append(Answer(close_after=MIB))
            broken.data_answer = Answer()
            assert read(source) == DATA

    def test_urls_may_name_the_version(self, server: FlakyGlance) -> None:
        """An endpoint with /v2 at its end is the same endpoint."""
        for url in (server.url + "/", server.url + "/v2", server.url + "/v2/", server.url + "/v2.9"):
            assert GlanceSource(endpoint=url, token=TOKEN).get("img").size == len(DATA)


class TestStream:
    """How open goes on where a stream breaks."""

    def test_one_request(self, source: GlanceSource, server: FlakyGlance) -> None:
        """A stream that does not break is one request, without a Range."""
        image = source.get("img")
        assert read(source, image) == DATA
        assert [seen.range for seen in server.downloads("img")] == [None]
        assert len(server.requests) == 2

    def test_chunks_come_as_they_arrive(self, source: GlanceSource) -> None:
        """None is empty, and none is waited for to be large."""
        with source.open(source.get("img")) as chunks:
            sizes = [len(chunk) for chunk in chunks if isinstance(chunk, bytes)]
        assert sum(sizes) == len(DATA)
        assert all(0 < size <= MIB for size in sizes)

    @pytest.mark.parametrize("reset", [False, True])
    def test_resumes_by_range(self, source: GlanceSource, server: FlakyGlance, reset: bool) -> None:
        """A stream that breaks goes on where it broke."""
        server.data_answers.extend([Answer(close_after=MIB + 77, reset=reset)] * 2)
        assert read(source) == DATA
        whole, *ranges = [seen.range for seen in server.downloads("img")]
        assert whole is None
        assert all(text is not None and text.startswith("bytes=") for text in ranges)
        if not reset:
            assert ranges == [f"bytes={MIB + 77}-", f"bytes={2 * (MIB + 77)}-"]

    @pytest.mark.parametrize("ranges", ["400", "416", "ignore", "shifted"])
    def test_resumes_without_ranges(self, source: GlanceSource, server: FlakyGlance, ranges: str) -> None:
        """Where the server knows no ranges, or gives a wrong one, the whole is read again and its start dropped."""
        server.data_answers.append(Answer(close_after=2 * MIB + 5))
        server.data_answer = Answer(ranges=ranges)
        assert read(source) == DATA
        assert read(source, offset=12345) == DATA[12345:]

    def test_no_second_range_after_a_refusal(self, source: GlanceSource, server: FlakyGlance) -> None:
        """A server that refused a range is asked for the whole from then on."""
        server.data_answers.append(Answer(close_after=MIB))
        server.data_answers.append(Answer(ranges="400"))
        server.data_answers.append(Answer(close_after=2 * MIB))
        assert read(source) == DATA
        assert [seen.range for seen in server.downloads("img")] == [None, f"bytes={MIB}-", None, None]

    def test_progress_starts_the_count_again(self, server: FlakyGlance) -> None:
        """Any number of breaks is survived as long as each try brings something."""
        server.data_answer = Answer(close_after=99_999)
        assert read(make(server, retries=1)) == DATA
        assert len(server.downloads("img")) == -(-len(DATA) // 99_999)

    def test_no_progress_is_given_up(self, source: GlanceSource, server: FlakyGlance) -> None:
        """Tries that bring nothing new end in SourceUnavailableError; what came before was handed out."""
        server.data_answers.append(Answer(close_after=MIB))
        server.data_answer = Answer(close_after=0)
        got: list[bytes] = []
        with pytest.raises(SourceUnavailableError) as caught, source.open(source.get("img")) as chunks:
            got.extend(chunks)
        assert b"".join(got) == DATA[:MIB]
        assert (caught.value.image_id, caught.value.stage) == ("img", "fetch")
        assert len(server.downloads("img")) == 4

    def test_dropping_again_is_no_progress(self, server: FlakyGlance) -> None:
        """Bytes that are read a second time do not keep a hopeless stream alive."""
        server.data_answer = Answer(ranges="ignore", close_after=MIB)
        with pytest.raises(SourceUnavailableError, match="given up after 4 tries"):
            read(make(server))

    def test_short_body_is_resumed(self, source: GlanceSource, server: FlakyGlance) -> None:
        """A body that ends before its Content-Length, or without one before the image's size, is gone on with."""
        server.data_answers.extend([Answer(close_after=MIB), Answer(close_after=MIB, declare=-1)])
        assert read(source) == DATA

    def test_short_body_of_unknown_size_is_resumed(self, source: GlanceSource, server: FlakyGlance) -> None:
        """The answer's Content-Length stands in where the image announces no size."""
        server.data_answers.append(Answer(close_after=MIB))
        assert read(source, unknown_size(source)) == DATA

    def test_chunked_answers(self, source: GlanceSource, server: FlakyGlance) -> None:
        """A body in HTTP chunks is read, and gone on with, like any other."""
        server.data_answers.append(Answer(chunked=True, close_after=MIB + 5))
        server.data_answer = Answer(chunked=True)
        assert read(source) == DATA
        assert len(server.downloads("img")) == 2
        assert read(source, unknown_size(source)) == DATA

    def test_other_length_is_corrupt(self, source: GlanceSource, server: FlakyGlance) -> None:
        """A service that goes on serving another length than announced serves another image."""
        server.images["img"] = (Fixed(DATA[:-5]), server.images["img"][1])
        with pytest.raises(ImageCorruptError) as caught:
            read(source)
        assert (caught.value.expected, caught.value.actual) == (len(DATA), len(DATA) - 5)

    def test_other_length_once_is_survived(self, source: GlanceSource, server: FlakyGlance) -> None:
        """One answer of another length is tried again."""
        server.data_answers.append(Answer(declare=MIB))
        assert read(source) == DATA

    @pytest.mark.parametrize("after", [0, MIB])
    def test_stall_is_resumed(self, server: FlakyGlance, after: int) -> None:
        """A stream that brings no byte for read_timeout is broken, and gone on with."""
        server.data_answers.append(Answer(stall_after=after))
        assert read(make(server, read_timeout=0.2)) == DATA
        assert len(server.downloads("img")) == 2

    def test_stall_is_resumed_with_a_session(self, server: FlakyGlance) -> None:
        """The caller's session obeys read_timeout too, in the middle of a stream and for properties."""
        server.data_answers.append(Answer(stall_after=MIB))
        server.get_answers.append(Answer(stall_after=3))
        session = Session(auth=Token(server.url, TOKEN))
        assert read(GlanceSource(session=session, read_timeout=0.2, retry_delay=0)) == DATA

    def test_slow_reader_is_no_stall(self, server: FlakyGlance) -> None:
        """Time that the reader takes does not count."""
        source = make(server, read_timeout=0.2)
        with source.open(source.get("img")) as chunks:
            got = [next(chunks)]
            time.sleep(0.5)
            got.extend(chunks)
        assert b"".join(got) == DATA
        assert len(server.downloads("img")) == 1

    def test_offset(self, source: GlanceSource, server: FlakyGlance) -> None:
        """An offset is a Range; at or behind the end nothing is asked."""
        image = source.get("img")
        assert read(source, image, MIB + 1) == DATA[MIB + 1 :]
        assert [seen.range for seen in server.downloads("img")] == [f"bytes={MIB + 1}-"]
        assert read(source, image, len(DATA)) == b""
        assert len(server.downloads("img")) == 1

    def test_offset_at_unknown_end(self, source: GlanceSource) -> None:
        """Where no size is announced the server says that nothing lies behind the offset."""
        assert read(source, unknown_size(source), len(DATA)) == b""
        assert read(source, unknown_size(source), len(DATA) - 1) == DATA[-1:]

    def test_negative_offset(self, source: GlanceSource) -> None:
        """A negative offset is the caller's mistake."""
        with pytest.raises(InvalidRequestError), source.open(source.get("img"), -1):
            pass

    def test_part_where_the_whole_was_asked_for(self, source: GlanceSource, server: FlakyGlance) -> None:
        """A partial answer to a request for the whole is tried again."""
        server.data_answers.append(Answer(status=206, body=b"part"))
        assert read(source) == DATA

    def test_encoded_answers(self, source: GlanceSource, server: FlakyGlance) -> None:
        """An encoding that something on the way has put on is taken off; its ranges and lengths are not believed."""
        encoded = Answer(status=200, body=gzip.compress(DATA), encoding="gzip")
        server.data_answers.append(encoded)
        assert read(source) == DATA
        server.data_answers.extend([Answer(close_after=MIB), replace(encoded, status=206), encoded])
        assert read(source) == DATA

    def test_no_encoding_is_asked_for(self) -> None:
        """Ranges and lengths would count encoded bytes."""
        seen = raw_request(lambda url: GlanceSource(endpoint=url, token=TOKEN, retries=0))
        assert b"accept-encoding: identity\r\n" in seen.lower()

    def test_leaving_closes_the_connection(self, source: GlanceSource, server: FlakyGlance) -> None:
        """Leaving in the middle ends the request at the server."""
        server.add("big", Pattern(2**40))
        with source.open(source.get("big")) as chunks:
            next(chunks)
            assert server.sending == 1
        with pytest.raises(SourceUnavailableError, match="closed"):
            list(chunks)
        assert len(server.downloads("big")) == 1
        deadline = time.monotonic() + 10
        while server.sending:
            assert time.monotonic() < deadline, "the server still sends"
            time.sleep(0.01)

    def test_memory_stays_small(self, source: GlanceSource, server: FlakyGlance) -> None:
        """An image is never in memory whole, whatever Content-Type something on the way has given it."""
        server.add("large", Pattern(64 * MIB))
        server.data_answer = Answer(content_type="text/plain")
        image = source.get("large")
        logging.getLogger("keystoneauth").setLevel(logging.DEBUG)
        tracemalloc.start()
        try:
            with source.open(image) as chunks:
                assert sum(map(len, chunks)) == 64 * MIB
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
            logging.getLogger("keystoneauth").setLevel(logging.NOTSET)
        assert peak < 16 * MIB

    def test_many_threads(self, source: GlanceSource, server: FlakyGlance) -> None:
        """One source serves many breaking streams at once."""
        server.data_answer = Answer(close_after=MIB)
        image = source.get("img")
        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(lambda _: read(source, image), range(16)))
        assert results == [DATA] * 16


class TestStateChanges:
    """An image that is not what it was when get saw it."""

    def test_no_data_yet(self, source: GlanceSource, server: FlakyGlance) -> None:
        """204 of a queued image is ImageNotActiveError."""
        server.add("q", b"", status="queued", size=None)
        server.data_answer = Answer(status=204)
        with pytest.raises(ImageNotActiveError) as caught:
            read(source, ImageInfo(image_id="q", disk_format="raw"))
        assert caught.value.status == "queued"

    @pytest.mark.parametrize("declare", [None, -1])
    def test_empty_body(self, source: GlanceSource, server: FlakyGlance, declare: int | None) -> None:
        """So is an empty body, with or without a length."""
        server.add("q", b"", status="queued", size=None)
        server.data_answer = Answer(declare=declare)
        with pytest.raises(ImageNotActiveError):
            read(source, ImageInfo(image_id="q", disk_format="raw"))

    def test_lost_data(self, source: GlanceSource, server: FlakyGlance) -> None:
        """204 of an active image says that its store has lost it."""
        server.data_answer = Answer(status=204)
        with pytest.raises(SourceError, match="its store has no data"):
            read(source)

    @pytest.mark.parametrize("answer", [Answer(), Answer(status=204)])
    def test_image_of_no_bytes(self, source: GlanceSource, server: FlakyGlance, answer: Answer) -> None:
        """An active image of zero bytes is served as such."""
        server.add("empty", b"")
        server.data_answer = answer
        assert read(source, source.get("empty")) == b""

    def test_deactivated(self, source: GlanceSource, server: FlakyGlance) -> None:
        """403 of a deactivated image is ImageNotActiveError, found out by one more request."""
        image = source.get("img")
        server.images["img"][1]["status"] = "deactivated"
        server.data_answer = Answer(status=403)
        with pytest.raises(ImageNotActiveError) as caught:
            read(source, image)
        assert caught.value.status == "deactivated"
        assert len(server.requests) == 3

    def test_forbidden(self, source: GlanceSource, server: FlakyGlance) -> None:
        """403 of an active image is SourceForbiddenError."""
        server.data_answer = Answer(status=403)
        with pytest.raises(SourceForbiddenError):
            read(source)

    def test_deleted_in_the_middle(self, source: GlanceSource, server: FlakyGlance) -> None:
        """An image deleted between two parts of a stream is ImageNotFoundError."""
        server.data_answers.extend([Answer(close_after=MIB), Answer(status=404)])
        with pytest.raises(ImageNotFoundError):
            read(source)


class TestTokens:
    """Tokens are renewed by those who can, and shown to nobody."""

    def test_session_renews(self, server: FlakyGlance) -> None:
        """A session whose token is refused authenticates again, before and in the middle of a stream."""
        source = GlanceSource(session=Session(auth=password(server)), retry_delay=0.001)
        image = source.get("img")
        server.valid_tokens = set()
        assert source.get("img") == image
        server.data_answers.append(Answer(close_after=2 * MIB))
        with source.open(image) as chunks:
            got = [next(chunks)]
            server.valid_tokens = set()
            got.extend(chunks)
        assert b"".join(got) == DATA
        used = [seen.token for seen in server.downloads("img")]
        assert used[0] == used[1] != used[2], "the second part was asked for again with a new token"

    def test_bare_token_ends(self, server: FlakyGlance) -> None:
        """A bare token that expires in the middle is SourceForbiddenError."""
        source = make(server)
        server.valid_tokens = {TOKEN}
        server.data_answers.append(Answer(close_after=2 * MIB))
        with source.open(source.get("img")) as chunks:
            next(chunks)
            server.valid_tokens = set()
            with pytest.raises(SourceForbiddenError):
                list(chunks)

    def test_environment(self, server: FlakyGlance, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without options the OS_* environment says how to authenticate, and the catalogue where Glance is."""
        clear_environment(monkeypatch)
        for name, value in {
            "AUTH_TYPE": "v3password",
            "AUTH_URL": server.keystone_url,
            "USERNAME": "u",
            "PASSWORD": "secret-password",
            "USER_DOMAIN_ID": "d",
            "PROJECT_NAME": "p",
            "PROJECT_DOMAIN_ID": "d",
            "REGION_NAME": "one",
        }.items():
            monkeypatch.setenv(f"OS_{name}", value)
        source = GlanceSource.from_options({})
        assert read(source) == DATA
        assert repr(source) == "<GlanceSource by environment>"

        monkeypatch.setenv("OS_REGION_NAME", "two")
        with pytest.raises(SourceError, match=r"catalogue has no image service.*region_name"):
            GlanceSource.from_options({}).get("img")
        at = GlanceSource.from_options({"endpoint": server.url})
        assert at.get("img").size == len(DATA), "an endpoint goes before the catalogue"
        assert GlanceSource.from_options({"region_name": "one"}).get("img").size == len(DATA)

    def test_empty_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """No credentials at all is a ConfigError, and not before they are needed."""
        clear_environment(monkeypatch)
        source = GlanceSource.from_options({})
        with pytest.raises(ConfigError, match=r"OS_\* environment.*auth_url"):
            source.get("img")

    # openstacksdk warns of its own metrics code whenever it reads a cloud
    @pytest.mark.filterwarnings("ignore::PendingDeprecationWarning", "ignore::DeprecationWarning")
    @pytest.mark.skipif(find_spec("openstack") is None, reason="openstacksdk is an extra")
    def test_cloud(self, server: FlakyGlance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A cloud of clouds.yaml brings credentials, region and interface."""
        clear_environment(monkeypatch)
        auth = {
            "auth_url": server.keystone_url,
            "username": "u",
            "password": "secret-password",
            "user_domain_id": "d",
            "project_name": "p",
            "project_domain_id": "d",
        }
        clouds = {"clouds": {"here": {"auth_type": "v3password", "auth": auth, "region_name": "one"}}}
        (tmp_path / "clouds.yaml").write_text(json.dumps(clouds))
        monkeypatch.setenv("OS_CLIENT_CONFIG_FILE", str(tmp_path / "clouds.yaml"))
        assert read(GlanceSource.from_options({"cloud": "here"})) == DATA
        with pytest.raises(ConfigError, match="cloud elsewhere"):
            GlanceSource(cloud="elsewhere").get("img")
        monkeypatch.setenv("OS_CLOUD", "here")
        assert GlanceSource().get("img").size == len(DATA)

    def test_refused_credentials(self, server: FlakyGlance) -> None:
        """Credentials that the identity service refuses are SourceForbiddenError; one that is away is unavailable."""
        auth = password(server)
        auth.auth_url = server.url + "/nowhere"
        with pytest.raises(SourceError, match="gives no token"):
            GlanceSource(session=Session(auth=auth)).get("img")
        auth.auth_url = "http://127.0.0.1:1/v3"
        with pytest.raises(SourceUnavailableError):
            GlanceSource(session=Session(auth=auth), retries=0).get("img")

    def test_identity_service_that_is_busy(self, server: FlakyGlance) -> None:
        """An identity service that is busy for a while is waited for; one that refuses is SourceForbiddenError."""
        source = GlanceSource(session=Session(auth=password(server)), retry_delay=0)
        server.token_answers.append(Answer(status=503))
        assert source.get("img").size == len(DATA)
        refused = GlanceSource(session=Session(auth=password(server)), retry_delay=0)
        server.token_answers.append(Answer(status=401))
        with pytest.raises(SourceForbiddenError, match="gives no token"):
            refused.get("img")

    def test_session_without_credentials(self, server: FlakyGlance) -> None:
        """A session that cannot authenticate is the caller's mistake."""
        with pytest.raises(ConfigError, match="credentials"):
            GlanceSource(session=Session()).get("img")

    def test_secrets_are_not_shown(self, server: FlakyGlance, caplog: pytest.LogCaptureFixture) -> None:
        """No error, repr or log line, at any level, holds a token or password."""
        caplog.set_level(logging.DEBUG)
        server.get_answers.extend([Answer(status=503), Answer(status=401), Answer(status=400, body=TOKEN.encode())])
        session = Session(auth=password(server))
        sources = [make(server), GlanceSource(session=session, retry_delay=0)]
        shown = [repr(sources), str(vars(sources[0])["_options"])]
        for source in sources:
            for _ in range(2):
                with contextlib.suppress(SourceError):
                    source.get("img")
        dead = GlanceSource(endpoint="http://127.0.0.1:1", token=TOKEN, retries=0)
        for failing in (dead, sources[0]):
            server.get_answer = Answer(status=401)
            with pytest.raises(SourceError) as caught:
                failing.get("img")
            shown += [str(caught.value), repr(caught.value), str(pickle.dumps(caught.value))]
        with pytest.raises(ConfigError) as refused:
            GlanceSource(endpoint="http://user:secret-in-url@host", token=TOKEN, retries=-1)
        shown += [str(refused.value), caplog.text]
        assert "secret" not in "\n".join(shown)

    def test_fork_gets_connections_of_its_own(self, server: FlakyGlance) -> None:
        """A forked child does not share its parent's connections."""
        source = make(server)
        source.get("img")
        before = source._transport._access().session
        ours, theirs = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.write(theirs, b"new" if source._transport._access().session is not before else b"old")
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert os.read(ours, 3) == b"new"
        os.close(ours)
        os.close(theirs)


class TestOptions:
    """What can be said, and what is refused."""

    def test_all_problems_at_once(self) -> None:
        """Every problem of the options is in one ConfigError."""
        with pytest.raises(ConfigError) as caught:
            GlanceSource.from_options(
                {
                    "endpoint": "glance",
                    "read_timeout": 0,
                    "connect_timeout": "soon",
                    "retries": -1,
                    "insecure": "no",
                    "cafile": "",
                    "tokn": "x",
                }
            )
        names = [problem.split(":")[0] for problem in caught.value.problems]
        assert names == ["endpoint", "read_timeout", "connect_timeout", "retries", "insecure", "cafile", "tokn"]

    @pytest.mark.parametrize(
        "options",
        [
            {"token": "t"},
            {"endpoint": "http://a", "endpoints": ["http://b"], "token": "t"},
            {"endpoints": [], "token": "t"},
            {"endpoints": ["ftp://a"], "token": "t"},
            {"endpoint": "http://u:p@a", "token": "t"},
            {"endpoint": "http://a?b=c", "token": "t"},
            {"endpoint": "http://a", "token": "t", "cloud": "c"},
            {"endpoint": "https://a", "token": "t", "cafile": "/ca", "insecure": True},
            {"token": 5, "endpoint": "http://a"},
            {"retries": True},
            {"read_timeout": float("inf")},
            {"cloud": "c", "insecure": True},
        ],
    )
    def test_refused(self, options: dict[str, Any]) -> None:
        """Options that contradict each other, or mean nothing, are refused."""
        with pytest.raises(ConfigError):
            GlanceSource.from_options(options)

    def test_durations(self) -> None:
        """Seconds are numbers or texts with a unit."""
        source = GlanceSource.from_options(
            {"endpoints": ["http://a:1/v2", "http://b"], "token": "t", "read_timeout": "2m", "retry_delay": 0}
        )
        assert (source._options.read_timeout, source._options.retry_delay) == (120, 0)
        assert repr(source) == "<GlanceSource by token at http://a:1, http://b>"
        assert source.name == "glance"

    def test_session_excludes_credentials(self) -> None:
        """A session has its own credentials and TLS settings."""
        with pytest.raises(ConfigError, match="the session has its own"):
            GlanceSource(session=Session(), endpoint="http://a", token="t")
        assert repr(GlanceSource(session=Session())) == "<GlanceSource by session>"

    def test_missing_openstacksdk(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without openstacksdk a cloud is refused at once, with the way to install it."""
        monkeypatch.setitem(sys.modules, "openstack", None)
        with pytest.raises(ConfigError, match=r"pip install 'nova-imagecache\[clouds\]'"):
            GlanceSource(cloud="here")


def clear_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("OS_"):
            monkeypatch.delenv(name)


def raw_request(make_source: Any) -> bytes:
    """The bytes of the request that a source sends."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        got: list[bytes] = []

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                got.append(connection.recv(65536))

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(SourceUnavailableError):
            make_source(url).get("img")
        thread.join()
    return got[0]

"""An imitation of the Glance v2 API that fails as it is told to, for what a real Glance cannot be made to show.

It can also serve images that are larger than memory, such as ``content.Pattern(10 * 2**30)``. And it is a Keystone, as
far as issuing tokens goes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import struct
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self, cast

from services.content import Content, Fixed, digest

_MIB = 2**20
_DATA = re.compile(r"/v2/images/([^/]+)/file")
_IMAGE = re.compile(r"/v2/images/([^/]+)")
_IMPORT = re.compile(r"/v2/images/([^/]+)/import")
_RANGE = re.compile(r"bytes=(\d+)-")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """How one request is answered; everything as it should be unless told otherwise.

    Attributes:
        status: this HTTP status, without the data.
        body: with ``status``: these bytes.
        close_after: bytes of the body after which the connection is closed.
        reset: close by a TCP reset.
        stall_after: bytes of the body after which nothing more comes until the server is stopped or ``release`` set.
        declare: the Content-Length to announce; None: the true one; -1: none at all (the body ends by closing).
        chunked: send the body in chunks, without a Content-Length.
        ranges: "yes" (206), "ignore" (200 and the whole), "400", "416", or "shifted": 206 for a byte too early.
        content_type, encoding: of the body.
    """

    status: int | None = None
    body: bytes = b""
    close_after: int | None = None
    reset: bool = False
    stall_after: int | None = None
    declare: int | None = None
    chunked: bool = False
    ranges: str = "yes"
    content_type: str = "application/octet-stream"
    encoding: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A request that came."""

    method: str
    path: str
    range: str | None
    token: str | None = field(repr=False)


class FlakyGlance:
    """A context manager. Put images in by ``add``; say what goes wrong in ``data_answers``, ``get_answers`` (for
    properties), ``import_answers`` (202, and nothing happens, unless told otherwise) and ``token_answers``.

    Each of these is a queue, one Answer for one request; ``data_answer`` and ``get_answer`` are for requests that find
    their queue empty. ``valid_tokens`` None believes any token. ``requests`` lists what came, ``imports`` what was to
    be imported; ``sending`` counts the answers whose bytes are on their way.
    """

    def __init__(self) -> None:
        self.data_answers: deque[Answer] = deque()
        self.get_answers: deque[Answer] = deque()
        self.import_answers: deque[Answer] = deque()
        self.imports: list[dict[str, Any]] = []
        self.token_answers: deque[Answer] = deque()
        self.data_answer = Answer()
        self.get_answer = Answer()
        self.valid_tokens: set[str] | None = None
        self.requests: list[Seen] = []
        self.release = threading.Event()
        self.images: dict[str, tuple[Content, dict[str, Any]]] = {}
        self.sending = 0
        self._counting = threading.Lock()
        self._issued = 0
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.glance = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        """The image service's endpoint."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def keystone_url(self) -> str:
        """The identity service's v3 URL; any user and password get a token, and it makes all earlier ones invalid."""
        return f"{self.url}/identity/v3"

    def add(self, image_id: str, content: bytes | Content, **properties: Any) -> None:
        """Serve this image; ``properties`` go over what Glance would say of it, e.g. os_hash_value=None.

        For a Pattern no digest is announced unless given, since it takes a while.
        """
        stored = Fixed(content) if isinstance(content, bytes) else content
        known: dict[str, Any] = {
            "id": image_id,
            "status": "active",
            "disk_format": "raw",
            "container_format": "bare",
            "size": stored.size,
            "min_disk": 0,
        }
        if isinstance(content, bytes):
            known |= {"os_hash_algo": "sha512", "os_hash_value": digest(stored)}
        self.images[image_id] = (stored, known | properties)

    def downloads(self, image_id: str) -> list[Seen]:
        """The requests for the image's data, in order."""
        return [seen for seen in self.requests if seen.path == f"/v2/images/{image_id}/file"]

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count the block in ``sending``."""
        with self._counting:
            self.sending += 1
        try:
            yield
        finally:
            with self._counting:
                self.sending -= 1

    def issue_token(self) -> str:
        """A new token, and the only valid one from now on."""
        self._issued += 1
        token = f"secret-token-{self._issued}"
        self.valid_tokens = {token}
        return token


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # threads that stall are let go by ``release``; waiting for the others would make each test slower
    block_on_close = False
    glance: FlakyGlance

    def handle_error(self, *_: object) -> None:
        """Say nothing: clients of this server leave in the middle."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # without a buffer headers and body are two packets: the second must not wait for the first one's acknowledgement
    disable_nagle_algorithm = True
    wbufsize = 0

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    @property
    def glance(self) -> FlakyGlance:
        return cast("_Server", self.server).glance

    def do_POST(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._note()
        if _IMPORT.fullmatch(self.path):
            self.glance.imports.append(json.loads(sent))
            answer = self.glance.import_answers.popleft() if self.glance.import_answers else Answer()
            self._send(answer.status or 202, answer.body, {"Content-Type": answer.content_type})
            return
        if self.path != "/identity/v3/auth/tokens":
            self._send(404, b"")
            return
        if self.glance.token_answers and (status := self.glance.token_answers.popleft().status):
            self._send(status, b"")
            return
        token = self.glance.issue_token()
        endpoint = {"id": "e", "interface": "public", "region": "one", "region_id": "one", "url": self.glance.url}
        catalog = [{"type": "image", "id": "s", "name": "glance", "endpoints": [endpoint]}]
        body = {
            "token": {
                "methods": ["password"],
                "expires_at": "2999-01-01T00:00:00.000000Z",
                "issued_at": "2020-01-01T00:00:00.000000Z",
                "user": {"id": "u", "name": "u", "domain": {"id": "d", "name": "d"}},
                "project": {"id": "p", "name": "p", "domain": {"id": "d", "name": "d"}},
                "catalog": catalog,
            }
        }
        self._send(201, json.dumps(body).encode(), {"Content-Type": "application/json", "X-Subject-Token": token})

    def do_GET(self) -> None:
        self._note()
        glance = self.glance
        if glance.valid_tokens is not None and self.headers.get("X-Auth-Token") not in glance.valid_tokens:
            self._send(401, b"<html>no</html>", {"Content-Type": "text/html"})
            return
        is_data = _DATA.fullmatch(self.path)
        match = is_data or _IMAGE.fullmatch(self.path)
        if match is None or match[1] not in glance.images:
            self._send(404, b"")
            return
        queue, rest = (glance.data_answers, glance.data_answer) if is_data else (glance.get_answers, glance.get_answer)
        answer = queue.popleft() if queue else rest
        content, properties = glance.images[match[1]]
        if answer.status is not None:
            headers = {"Content-Type": answer.content_type} if answer.body else {}
            headers |= {"Content-Encoding": answer.encoding} if answer.encoding else {}
            self._send(answer.status, answer.body, headers)
        elif is_data:
            self._send_data(content, answer)
        else:
            self._send_content(Fixed(json.dumps(properties).encode()), answer, 200, 0, {}, "application/json")

    def _send_data(self, content: Content, answer: Answer) -> None:
        match = _RANGE.fullmatch(self.headers.get("Range", ""))
        start = int(match[1]) if match else 0
        headers: dict[str, str] = {}
        status = 200
        if match and answer.ranges in {"400", "416"}:
            self._send(int(answer.ranges), b"")
            return
        if match and answer.ranges != "ignore":
            if start >= content.size:
                self._send(416, b"", {"Content-Range": f"bytes */{content.size}"})
                return
            status = 206
            start -= answer.ranges == "shifted"
            headers["Content-Range"] = f"bytes {start}-{content.size - 1}/{content.size}"
        else:
            start = 0
        self._send_content(content, answer, status, start, headers, answer.content_type)

    def _send_content(
        self, content: Content, answer: Answer, status: int, start: int, headers: dict[str, str], content_type: str
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        for name, value in headers.items():
            self.send_header(name, value)
        length = content.size - start if answer.declare is None else answer.declare
        if answer.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif length < 0:
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        limits = [content.size - start, answer.close_after, answer.stall_after, None if length < 0 else length]
        stop = start + min(limit for limit in limits if limit is not None)
        with self.glance.counted():
            while start < stop:
                data = content.read(start, min(_MIB, stop - start))
                if answer.chunked:
                    self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
                    start += len(data)
                else:
                    start += self.connection.send(data)
            if answer.chunked and start == content.size:
                self.wfile.write(b"0\r\n\r\n")
            if answer.stall_after is not None:
                self.glance.release.wait(60)
        if answer.reset:
            # SO_LINGER of zero seconds: closing sends RST; detached, so that the server's own FIN does not come first
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())
        self.close_connection = length < 0 or start < content.size or answer.reset

    def _note(self) -> None:
        token = self.headers.get("X-Auth-Token")
        self.glance.requests.append(
            Seen(method=self.command, path=self.path, range=self.headers.get("Range"), token=token)
        )

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

"""A real Glance for tests and demonstrations: glance-api under gunicorn, sqlite, no Keystone.

Glance runs from a virtual environment of its own, named by NOVA_IMAGECACHE_GLANCE_VENV (default: .venv-glance in the
repository). In keystonemiddleware's place stands a filter that believes any token: ``user:project:role,role`` chooses
who asks, any other token is the admin of one project.
"""

from __future__ import annotations

import atexit
import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

from services import glance_files

ADMIN = "admin:testproject:admin,member,reader,service"
MEMBER = "member:testproject:member,reader"
STRANGER = "stranger:otherproject:member,reader"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request that Glance has answered, or has begun to."""

    method: str
    path: str
    range: str | None
    user: str
    status: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """A place for images that glance_store calls ``kind``, such as "file", with its options."""

    name: str
    kind: str
    options: Mapping[str, str]


def default_venv() -> Path:
    """Where Glance is looked for."""
    return Path(os.environ.get("NOVA_IMAGECACHE_GLANCE_VENV") or Path(__file__).parents[2] / ".venv-glance")


def missing(venv: Path | None = None) -> str | None:
    """What keeps a GlanceServer from running here, None: nothing."""
    gunicorn = (venv or default_venv()) / "bin" / "gunicorn"
    return None if gunicorn.exists() else f"no Glance: {gunicorn} is missing; tools/setup.sh installs it"


class GlanceServer:
    """A Glance of its own below ``directory``; a context manager, or ``start`` and ``stop``.

    ``store`` and ``store_options`` are glance_store's, the file store by default, under the name "s0";
    ``python_path`` holds modules that the store needs from outside the virtual environment. ``more_stores`` can be
    named in uploads and copied to and from.
    """

    def __init__(
        self,
        directory: Path,
        *,
        venv: Path | None = None,
        store: str = "file",
        store_options: Mapping[str, str] | None = None,
        python_path: Path | None = None,
        more_stores: Sequence[Store] = (),
    ) -> None:
        self.dir = directory.absolute()
        self.port = 0
        self._venv = (venv or default_venv()).absolute()
        self._store = store
        self._store_options = store_options or {"filesystem_store_datadir": str(self.dir / "images")}
        self._python_path = python_path
        self._more_stores = tuple(more_stores)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<GlanceServer at {self.url}>"

    @property
    def url(self) -> str:
        """The endpoint, for any token."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def requests_log(self) -> Path:
        """The file with a line of JSON for each request."""
        return self.dir / "log" / "requests"

    def start(self) -> None:
        """Return when Glance answers; RuntimeError with the end of its log if it does not."""
        for name in ("etc", "images", "staging", "tasks", "log", "tmp"):
            (self.dir / name).mkdir(parents=True, exist_ok=True)
        with socket.socket() as listener:
            # handed on open: the port cannot be lost to another process in between
            listener.bind(("127.0.0.1", 0))
            listener.listen(128)
            self.port = listener.getsockname()[1]
            self._configure()
            self._make_database()
            self._spawn(listener.fileno())
        atexit.register(self.stop)
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End Glance, by its process id; idempotent."""
        atexit.unregister(self.stop)
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            # its own session: the group holds it and its workers alone
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    # --- what a test does with it

    def create(self, *, disk_format: str = "raw", **properties: Any) -> str:
        """The id of a new image without data: it is queued."""
        body = {"name": "test", "disk_format": disk_format, "container_format": "bare", **properties}
        image: dict[str, Any] = self.call("POST", "/v2/images", json.dumps(body).encode(), "application/json")
        return str(image["id"])

    def upload(
        self, data: bytes | Path, *, disk_format: str = "raw", store: str | None = None, **properties: Any
    ) -> str:
        """The id of a new image with this data, or this file's, in the first store or the one named; ``properties`` as
        Glance names them.

        Glance refuses (RuntimeError, HTTP 415) data that are unsafe or not of ``disk_format``, as long as the
        container_format is "bare"; with "ovf" it takes anything, as Glance did before it looked.
        """
        image_id = self.create(disk_format=disk_format, **properties)
        path = f"/v2/images/{image_id}/file"
        if isinstance(data, bytes):
            self.call("PUT", path, data, "application/octet-stream", store=store)
        else:
            with data.open("rb") as file:
                self.call("PUT", path, file, "application/octet-stream", store=store)
        return image_id

    def delete(self, image_id: str) -> None:
        """Delete the image."""
        self.call("DELETE", f"/v2/images/{image_id}")

    def deactivate(self, image_id: str) -> None:
        """Forbid the image's data to all but admins."""
        self.call("POST", f"/v2/images/{image_id}/actions/deactivate")

    def reactivate(self, image_id: str) -> None:
        """Take ``deactivate`` back."""
        self.call("POST", f"/v2/images/{image_id}/actions/reactivate")

    def show(self, image_id: str) -> dict[str, Any]:
        """The image's properties."""
        image: dict[str, Any] = self.call("GET", f"/v2/images/{image_id}")
        return image

    def call(
        self,
        method: str,
        path: str,
        body: bytes | IO[bytes] | None = None,
        content_type: str | None = None,
        *,
        store: str | None = None,
    ) -> Any:
        """The answer's JSON, None if it is empty; as admin; RuntimeError for an HTTP error."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            headers = {"X-Auth-Token": ADMIN, "Content-Type": content_type, "X-Image-Meta-Store": store}
            connection.request(method, path, body, {name: value for name, value in headers.items() if value})
            answer = connection.getresponse()
            text = answer.read()
        finally:
            connection.close()
        if answer.status >= 400:
            raise RuntimeError(f"{method} {path}: HTTP {answer.status}: {text[:500]!r}")
        return json.loads(text) if text else None

    def requests(self) -> list[Request]:
        """The requests so far, in order, including the helpers' own."""
        if not self.requests_log.exists():
            return []
        return [Request(**json.loads(line)) for line in self.requests_log.read_text().splitlines()]

    @contextlib.contextmanager
    def recorded(self) -> Iterator[list[Request]]:
        """A list that holds, after the block, the requests that came during the block."""
        seen: list[Request] = []
        before = len(self.requests())
        yield seen
        seen += self.requests()[before:]

    def downloads(self, image_id: str) -> int:
        """How many requests for the image's data there were, refused ones and those for a part included."""
        path = f"/v2/images/{image_id}/file"
        return sum(request.method == "GET" and request.path == path for request in self.requests())

    # --- how it comes up

    def _configure(self) -> None:
        lines = [f"{name} = {value}" for name, value in self._store_options.items()]
        kinds = self._store
        for store in self._more_stores:
            kinds += f",{store.name}:{store.kind}"
            lines += [f"[{store.name}]", *(f"{name} = {value}" for name, value in store.options.items())]
        options = "\n".join(lines)
        conf = glance_files.CONF.format(dir=self.dir, url=self.url, store=kinds, store_options=options)
        etc = self.dir / "etc"
        (etc / "glance-api.conf").write_text(conf)
        (etc / "glance-api-paste.ini").write_text(glance_files.PASTE.format(dir=self.dir))
        (etc / "policy.yaml").write_text("{}\n")
        (etc / "imagecache_anyone.py").write_text(glance_files.ANYONE)

    def _make_database(self) -> None:
        """Copy the template; the migrations that make it take seconds, once for each release of Glance."""
        database = self.dir / "glance.sqlite"
        if database.exists():
            return
        releases = sorted(self._venv.glob("lib/python*/site-packages/glance-*.dist-info"))
        release = releases[0].name.removesuffix(".dist-info") if releases else "glance"
        template = self._venv / f"{release}.sqlite"
        if not template.exists():
            command = [str(self._venv / "bin" / "glance-manage")]
            command += ["--config-file", str(self.dir / "etc" / "glance-api.conf"), "db_sync"]
            with (self.dir / "log" / "db_sync").open("ab") as log:
                subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            # random name and rename: two test runs may make it at once
            part = template.with_name(f"{template.name}.{uuid.uuid4().hex}")
            shutil.copyfile(database, part)
            part.replace(template)
        else:
            shutil.copyfile(template, database)

    def _spawn(self, listener: int) -> None:
        etc, tmp = self.dir / "etc", self.dir / "tmp"
        python_path = os.pathsep.join(str(path) for path in (etc, self._python_path) if path is not None)
        command = [
            *(str(self._venv / "bin" / name) for name in ("python", "gunicorn")),
            "glance.wsgi.api:application",
            *("--bind", f"fd://{listener}"),
            *("--workers", "1", "--worker-class", "gthread", "--threads", "8"),
            *("--timeout", "600", "--graceful-timeout", "1", "--no-control-socket"),
            *("--worker-tmp-dir", str(tmp), "--chdir", str(etc)),
        ]
        environment = {
            **os.environ,
            "OS_GLANCE_CONFIG_DIR": str(etc),
            "PYTHONPATH": python_path,
            "TMPDIR": str(tmp),
        }
        with (self.dir / "log" / "gunicorn").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[listener],
                start_new_session=True,
            )

    def _wait(self) -> None:
        deadline = time.monotonic() + 60
        while True:
            try:
                self.call("GET", "/v2/images?limit=1")
            except (OSError, http.client.HTTPException, RuntimeError) as err:
                alive = self._process is not None and self._process.poll() is None
                if not alive or time.monotonic() > deadline:
                    end = (self.dir / "log" / "gunicorn").read_text(errors="replace")[-2000:]
                    raise RuntimeError(f"Glance does not answer ({err}):\n{end}") from err
                time.sleep(0.05)
            else:
                return

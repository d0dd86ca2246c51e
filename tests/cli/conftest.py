"""A cache of its own for each test, with a directory of images, and two ways to run the command line on it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import pytest

from nova_imagecache import cli

MIB = 2**20
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
OPTIONAL_TEXT = (str, NoneType)
OPTIONAL_INT = (int, NoneType)

DRIP = '''
import contextlib, time
from nova_imagecache import ImageInfo, SourceForbiddenError, SourceUnavailableError

class DripSource:
    """Gives 64 KiB every 20 ms for a minute; some image ids fail at once or hang, as their names say."""
    name = "drip"
    @classmethod
    def from_options(cls, options):
        return cls()
    def get(self, image_id):
        if image_id == "unavailable":
            raise SourceUnavailableError("nobody answers", image_id=image_id)
        if image_id == "forbidden":
            raise SourceForbiddenError("the token is refused", image_id=image_id)
        if image_id == "broken":
            raise RuntimeError("a line\\nand another")
        return ImageInfo(image_id=image_id, disk_format="raw", size=3000 * 65536)
    @contextlib.contextmanager
    def open(self, image, offset=0):
        yield self._chunks(300 if image.image_id == "stuck" else 0.02)
    def _chunks(self, pause):
        for _ in range(3000):
            time.sleep(pause)
            yield bytes(65536)
'''


@dataclass(frozen=True)
class Answer:
    """What one run of the command line gave."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        return json.loads(self.out)


class Site:
    """A compute host's worth of files."""

    def __init__(self, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.path = path
        self.images = path / "images"
        self.images.mkdir()
        self.config = path / "config.toml"
        self.env = {"NOVA_IMAGECACHE_CONFIG": str(self.config), "XDG_CACHE_HOME": str(path / "home")}
        self._capsys = capsys
        self.configure()

    def configure(self, text: str = "", *, source: str = "directory") -> None:
        """Write the configuration; ``text`` is TOML that comes before its tables."""
        options = f'[source_options]\npath = "{self.images}"\n' if source == "directory" else ""
        head = f'root = "{self.path}/cache"\ndisks_dir = "{self.path}/disks"\nsource = "{source}"\n'
        self.config.write_text(head + text + "\n" + options)

    def image(self, image_id: str, content: bytes = b"\xeb\x3c" + bytes(MIB - 2), **properties: Any) -> str:
        """An image, raw and with its digest unless ``properties`` say otherwise."""
        facts = {"disk_format": "raw", "size": len(content), "os_hash_algo": "sha512"}
        facts |= {"os_hash_value": hashlib.sha512(content).hexdigest(), **properties}
        (self.images / f"{image_id}.img").write_bytes(content)
        (self.images / f"{image_id}.json").write_text(json.dumps(facts))
        return image_id

    def qcow2(self, image_id: str, size: int = 8 * MIB, backing: Path | None = None, **properties: Any) -> str:
        """A qcow2 image made by qemu-img."""
        made = self.path / f"{image_id}.qcow2"
        chain = ["-b", str(backing), "-F", "raw", "-u"] if backing else []
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *chain, str(made), str(size)], check=True)
        return self.image(image_id, made.read_bytes(), disk_format="qcow2", **properties)

    def drip(self) -> None:
        """Install a slow source as a third party would, and configure it."""
        info = self.path / "plugins" / "nova_imagecache_drip-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nova-imagecache-drip\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[nova_imagecache.sources]\ndrip = drip_source:DripSource\n")
        (info.parent / "drip_source.py").write_text(DRIP)
        self.env["PYTHONPATH"] = os.pathsep.join([str(info.parent), *sys.path])
        self.configure("allow_unverified = true", source="drip")

    def argv(self, *arguments: str) -> list[str]:
        """The command line for a child process."""
        return [sys.executable, "-m", "nova_imagecache", *arguments]

    def child_env(self) -> dict[str, str]:
        """The environment for a child process; this process's import path, so that no installation is needed."""
        return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm", **self.env}

    def spawn(self, *arguments: str, **options: Any) -> Answer:
        """One run of the real command line in a process of its own."""
        done = subprocess.run(
            self.argv(*arguments),
            env=self.child_env(),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            **options,
        )
        return Answer(done.returncode, done.stdout, done.stderr)

    def run(self, *arguments: str) -> Answer:
        """One run of the command line inside this process."""
        self._capsys.readouterr()
        code = cli.main(arguments)
        captured = self._capsys.readouterr()
        return Answer(code, captured.out, captured.err)

    def ok(self, *arguments: str) -> Any:
        """The data of a run that must succeed and say nothing else."""
        answer = self.run(*arguments, "-f", "json")
        assert (answer.code, answer.err) == (0, "")
        return answer.data


def matches(answer: dict[str, Any], shape: dict[str, Any]) -> None:
    assert list(answer) == list(shape)
    for key, kind in shape.items():
        kinds = kind if isinstance(kind, tuple) else (kind,)
        # a bool is an int for isinstance
        assert type(answer[key]) in kinds, key


@pytest.fixture
def site(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Site:
    made = Site(tmp_path, capsys)
    for name, value in made.env.items():
        monkeypatch.setenv(name, value)
    return made

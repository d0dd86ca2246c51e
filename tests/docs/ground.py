"""Where the code of a page runs: a directory, an environment, and the names that its text speaks of."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

from nova_imagecache import CacheConfig, ImageCache

from .pages import Block, blocks, commands, shown

END = "\x1e"
RUNNING = ("python", "console", "text")


class Ground:
    """A directory, an environment for shells, and a namespace for Python. ``replaced`` maps places that a page names to
    places that there are."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.names: dict[str, Any] = {"__name__": "page"}
        self.replaced: dict[str, str] = {}
        self.environ = {
            **{key: value for key, value in os.environ.items() if not key.startswith("NOVA_IMAGECACHE")},
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }
        self._said = ""

    def walk(self, page: Path) -> int:
        """Run the page from top to bottom; how many of its blocks ran. What it marks as not run is left out."""
        ran = 0
        before = ""
        for block in blocks(page):
            runs = block.reason is None and block.language in RUNNING
            # a text shows what the Python before it prints; after anything else it is only a text
            if runs and (block.language != "text" or before == "python"):
                self.run(block)
                ran += 1
            before = block.language if runs else ""
        return ran

    def run(self, block: Block) -> None:
        """Run a block as a reader would; AssertionError where it fails, or prints what the page does not show."""
        code = block.code
        for named, real in self.replaced.items():
            code = code.replace(named, real)
        if block.language == "python":
            self._said = self._python(code, str(block))
        elif block.language == "console":
            self._console(code, str(block))
        elif block.language == "text":
            # what the Python before it prints
            assert shown(code, self._said), f"{block}: the page shows\n{code}\nbut it printed\n{self._said}"

    def _python(self, code: str, where: str) -> str:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(code, where, "exec"), self.names)
        return out.getvalue()

    def _console(self, code: str, where: str) -> None:
        wanted = [command for command in commands(code) if not _installs(command.text)]
        saved = self.directory / ".environment"
        script = "".join(f"{command.text}\nprintf '{END}'\n" for command in wanted)
        done = subprocess.run(
            ["bash", "-euc", f"trap 'env -0 > {saved}' EXIT\nexec 2>&1\n{script}"],
            cwd=self.directory,
            env=self.environ,
            capture_output=True,
            text=True,
            check=False,
            timeout=100,
        )
        assert done.returncode == 0, f"{where} ended with {done.returncode}:\n{code}\n{done.stdout}"
        for command, real in zip(wanted, done.stdout.split(END), strict=False):
            assert shown(command.output, real), f"{where}: the page shows\n{command.output}\nbut it printed\n{real}"
        self.environ = dict(pair.split("=", 1) for pair in saved.read_text().split("\0") if "=" in pair)

    # --- what a page may find there

    def image(self, image_id: str, size: int = 2**20, **facts: Any) -> None:
        """An image in the directory of images: a raw file that begins with its id, and its digest."""
        images = self.directory / "images"
        images.mkdir(exist_ok=True)
        content = image_id.encode().ljust(size, b"\0")
        (images / f"{image_id}.img").write_bytes(content)
        facts = {
            "disk_format": "raw",
            "os_hash_algo": "sha512",
            "os_hash_value": hashlib.sha512(content).hexdigest(),
            **facts,
        }
        (images / f"{image_id}.json").write_text(json.dumps(facts))

    def configure(self, **options: Any) -> CacheConfig:
        """A configuration that shells find by NOVA_IMAGECACHE_CONFIG, and pages under the name they give it."""
        values = {"root": str(self.directory / "cache"), **options}
        file = self.directory / "nova-imagecache.toml"
        file.write_text("".join(f"{key} = {_toml(value)}\n" for key, value in values.items()))
        self.environ["NOVA_IMAGECACHE_CONFIG"] = str(file)
        self.replaced["/etc/nova-imagecache.toml"] = str(file)
        return CacheConfig.from_toml(file)

    def furnish(self, config: CacheConfig, cache: ImageCache, image_id: str) -> None:
        """The names that pages use without making them."""
        self.names |= {"config": config, "cache": cache, "image_id": image_id, "instance_uuid": "6cb5fa6a"}
        self.environ |= {"IMAGE": image_id}


def _installs(command: str) -> bool:
    """Whether the command is one that installs this library; then its extras must be some that there are."""
    found = re.fullmatch(r"pip install '?nova-imagecache(?:\[([\w,]+)\])?'?", command)
    if found is None:
        return False
    extras = metadata("nova-imagecache").get_all("Provides-Extra") or []
    assert set((found[1] or extras[0]).split(",")) <= set(extras), command
    return True


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
    return json.dumps(value)

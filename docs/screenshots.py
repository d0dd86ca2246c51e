"""Makes the pictures in docs/terminal/: what real commands print on a real terminal, as SVG.

    python docs/screenshots.py             write them
    python docs/screenshots.py --text      print the same as JSON, {name: lines}, without the picture of a fetch

A cache is made below /tmp, with images, disks and a pin; each command runs in a terminal of its own. The places are
written as a compute host has them: names of the same length, so that nothing moves.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

HERE = Path(__file__).parent
COLUMNS = 120
MIB = 1 << 20
PLACES = {"imagecache-": "/var/lib/nova/imagecache", "instances-": "/var/lib/nova/instances"}
"""Prefixes of temporary directories, and what they are called in the pictures: eight letters are random."""

SCENES = {
    "list": "list",
    "show": "show debian-12 --fit-width",
    "usage": "usage --static-mb 512",
    "cleanup": "cleanup --dry-run",
    "check": "check",
}
FETCH = "ensure windows-2022"

_MOVES = re.compile(r"\x1b\[(\d*)A|\x1b\[\d*K|\x1b\[\?\d+[hl]|\r\n|\r|\n")


# --- a terminal


def screen(raw: str) -> list[str]:
    """The lines that a terminal shows after it was sent ``raw``; their colours are still escape codes.

    Programs here write whole lines: one that is begun anew is cleared first.
    """
    lines = [""]
    row = position = 0
    for move in _MOVES.finditer(raw):
        lines[row] += raw[position : move.start()]
        position = move.end()
        said = move[0]
        if said.endswith("A"):
            row = max(row - int(move[1] or 1), 0)
        elif said in ("\r\n", "\n"):
            row += 1
            if row == len(lines):
                lines.append("")
        elif said == "\r" or said.endswith("K"):
            lines[row] = ""
    lines[row] += raw[position:]
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def plain(line: str) -> str:
    """The line without its colours."""
    return Text.from_ansi(line).plain


def run(arguments: str, env: Mapping[str, str], until: str = "(?!)") -> list[str]:
    """What the command shows when ``until`` is to be seen, or at its end; then it is waited for."""
    main, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 30, COLUMNS, 0, 0))
    argv = [sys.executable, "-m", "nova_imagecache", *arguments.split()]
    process = subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, stdout=child, stderr=child)
    os.close(child)
    raw, kept = "", None
    with os.fdopen(main, "rb", buffering=0) as terminal:
        while True:
            select.select([terminal], [], [])
            try:
                data = terminal.read(65536)
            except OSError:  # EIO: the command is gone
                break
            if not data:
                break
            raw += data.decode()
            lines = screen(raw)
            if kept is None and any(re.search(until, plain(line)) for line in lines):
                kept = lines
    if process.wait():
        raise RuntimeError(f"{arguments}: {raw}")
    return [f"\x1b[1;92m$\x1b[0m \x1b[1mnova-imagecache {arguments}\x1b[0m", *(kept or screen(raw))]


# --- a compute host


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """Where things are, and the environment of commands."""

    images: Path
    env: dict[str, str]
    places: dict[str, str]

    def image(self, image_id: str, data: int, virtual: int, disk_format: str = "qcow2") -> None:
        """An image of a disk of ``virtual`` bytes, of which ``data`` are written."""
        path = self.images / f"{image_id}.img"
        with tempfile.NamedTemporaryFile(dir=self.images) as file:
            file.write(os.urandom(MIB) * (data // MIB))
            file.truncate(virtual)
            argv = ["qemu-img", "convert", "-f", "raw", "-O", disk_format, file.name, str(path)]
            subprocess.run(argv, check=True)
        with path.open("rb") as file_:
            digest = hashlib.file_digest(file_, "sha512").hexdigest()
        facts = {"disk_format": disk_format, "os_hash_algo": "sha512", "os_hash_value": digest}
        (self.images / f"{image_id}.json").write_text(json.dumps(facts))

    def do(self, *commands: str) -> None:
        """Run commands that no picture is made of."""
        for command in commands:
            argv = [sys.executable, "-m", "nova_imagecache", *command.split()]
            subprocess.run(argv, env=self.env, check=True, capture_output=True)


@contextmanager
def host() -> Iterator[Host]:
    """A cache with three bases: one in use, one pinned, one that nobody used for a day."""
    with (
        tempfile.TemporaryDirectory(prefix="imagecache-", dir="/tmp") as root,
        tempfile.TemporaryDirectory(prefix="instances-", dir="/tmp") as disks,
        tempfile.TemporaryDirectory() as work,
    ):
        images = Path(work) / "images"
        images.mkdir()
        config = Path(work) / "config.toml"
        config.write_text(
            f'root = "{root}"\ndisks_dir = "{disks}"\nsource = "directory"\nsource_options = {{ path = "{images}" }}\n'
        )
        env = {**os.environ, "NOVA_IMAGECACHE_CONFIG": str(config), "TERM": "xterm-256color"}
        env |= {"COLUMNS": str(COLUMNS), "LINES": "30", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        env.pop("NO_COLOR", None)
        made = Host(images=images, env=env, places=dict(zip((root, disks), PLACES.values(), strict=True)))
        made.image("debian-12", 96 * MIB, 2048 * MIB)
        made.image("ubuntu-24.04", 128 * MIB, 3584 * MIB)
        made.image("cirros-0.6", 16 * MIB, 112 * MIB)
        made.do("ensure debian-12 ubuntu-24.04 cirros-0.6", "pin ubuntu-24.04 web-farm --for 7d")
        made.do(*(f"create-disk debian-12 {name} --size 20G" for name in ("vm-1", "vm-2", "vm-3")), "cleanup")
        long_ago = time.time() - 90000
        for mark in ("unused-since", "last-used"):
            os.utime(Path(root) / "bases" / "cirros-0.6" / mark, (long_ago, long_ago))
        yield made


def play(*, fetch: bool) -> dict[str, list[str]]:
    """The lines of every scene, by its name."""
    with host() as made:
        shown = {name: run(arguments, made.env) for name, arguments in SCENES.items()}
        if fetch:
            made.image("windows-2022", 64 * MIB, 4096 * MIB, "raw")
            shown["ensure"] = run(FETCH, made.env, until=r"[3-6]\d% .*iB/s")
        for name, lines in shown.items():
            for real, told in made.places.items():
                lines[:] = [line.replace(real, told) for line in lines]
            shown[name] = lines
        return shown


# --- a picture

_WIDTH, _HEIGHT, _MARGIN = 8.4, 18, 14
_FONTS = "ui-monospace,DejaVu Sans Mono,Menlo,Consolas,monospace"
_SPACE = "\N{NO-BREAK SPACE}"
_GROUND, _INK = "#1b1f24", "#d5d9de"


def picture(lines: list[str]) -> str:
    """The lines as SVG, each run of one style as text of a fixed length, so that columns stay columns in any font."""
    console = Console(color_system="truecolor", width=1000)
    rows = [Text.from_ansi(line) for line in lines]
    width = max(row.cell_len for row in rows) * _WIDTH + 2 * _MARGIN
    height = len(rows) * _HEIGHT + 2 * _MARGIN
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" width="{width:.0f}">',
        f'<rect width="100%" height="100%" rx="6" fill="{_GROUND}"/>',
        f'<g font-family="{_FONTS}" font-size="14" fill="{_INK}">',
    ]
    for number, row in enumerate(rows):
        column = 0
        for segment in row.render(console):
            text, style = segment.text.rstrip("\n"), segment.style
            if text.strip():
                look = ""
                if style and style.color and not style.color.is_default:
                    look += f' fill="{style.color.get_truecolor(MONOKAI).hex}"'
                if style and style.bold:
                    look += ' font-weight="bold"'
                left, top = _MARGIN + column * _WIDTH, _MARGIN + number * _HEIGHT + 13
                length = len(text) * _WIDTH
                out.append(
                    f'<text x="{left:.1f}" y="{top}" textLength="{length:.1f}" lengthAdjust="spacingAndGlyphs"{look}>'
                    # viewers do not agree on when spaces count; these always do
                    f"{escape(text).replace(' ', _SPACE)}</text>"
                )
            column += len(text)
    return "\n".join([*out, "</g>", "</svg>"]) + "\n"


def main() -> int:
    """Write the pictures, or print what they show."""
    if "--text" in sys.argv[1:]:
        shown = {name: [plain(line) for line in lines] for name, lines in play(fetch=False).items()}
        sys.stdout.write(json.dumps(shown, indent=1) + "\n")
        return 0
    (HERE / "terminal").mkdir(exist_ok=True)
    for name, lines in play(fetch=True).items():
        (HERE / "terminal" / f"{name}.svg").write_text(picture(lines), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

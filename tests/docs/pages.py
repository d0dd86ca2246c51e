"""The pages as data: their blocks, and the commands of a console block with what they print."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

REPO = Path(__file__).resolve().parents[2]
DOCS = REPO / "docs"
LANGUAGES = ("python", "console", "toml", "text", "yaml", "json", "xml", "ini")
"""What a block may be in; one without a language is a drawing or a layout, and says nothing that could run."""

_NOT_RUN = re.compile(r"<!--\s*not run:\s*(.*?)\s*-->", re.DOTALL)
_HEREDOC = re.compile(r"<<-?\s*['\"]?(\w+)['\"]?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A fenced block: its language, its text, the line it begins in, and why it is not run (None: it is)."""

    page: Path
    line: int
    language: str
    code: str
    reason: str | None = None

    def __str__(self) -> str:
        return f"{name(self.page)}:{self.line}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A command of a console block, with the lines that continue it, and what it prints (""; nothing is shown)."""

    text: str
    output: str


def pages() -> list[Path]:
    """Every page for readers of the project; what a build makes is none."""
    found = [path for path in DOCS.rglob("*.md") if "_build" not in path.parts]
    return sorted([REPO / "README.md", REPO / "CONTRIBUTING.md", *found])


def name(page: Path) -> str:
    """The page as it is called in messages."""
    return str(page.relative_to(REPO))


def blocks(page: Path) -> list[Block]:
    """The page's blocks in order; directives of MyST are none."""
    found = []
    reason = None
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        if token.type == "html_block" and (mark := _NOT_RUN.search(token.content)):
            reason = mark[1]
            continue
        if token.type == "fence" and not token.info.startswith("{"):
            line = token.map[0] + 1 if token.map else 0
            found.append(Block(page=page, line=line, language=token.info.strip(), code=token.content, reason=reason))
        if token.level == 0:
            reason = None
    return found


def commands(code: str) -> Iterator[Command]:
    """The commands of a console block. A line after a command continues it where the shell would wait for more."""
    lines = code.splitlines()
    while lines:
        line = lines.pop(0)
        if not line.startswith("$ "):
            raise ValueError(f"a console block begins with a command after a prompt, not with {line!r}")
        text = [line.removeprefix("$ ")]
        while lines and _waits("\n".join(text)):
            text.append(lines.pop(0))
        output = []
        while lines and not lines[0].startswith("$ "):
            output.append(lines.pop(0))
        yield Command(text="\n".join(text), output="\n".join(output))


def _waits(text: str) -> bool:
    """Whether the shell would wait for more: a loop, a here-document, a line that is continued."""
    here = _HEREDOC.search(text)
    if text.endswith("\\") or (here is not None and f"\n{here[1]}" not in text):
        return True
    return subprocess.run(["bash", "-n", "-c", text], capture_output=True, check=False).returncode != 0


def shown(expected: str, real: str) -> bool:
    """Whether ``real`` holds what the page shows: ``...`` stands for anything, and spaces are all alike."""
    words = [".*?" if word == "..." else re.escape(word) for word in expected.split()]
    pattern = r"\s+".join(words).replace(r"\s+.*?", r"\s*.*?").replace(r".*?\s+", r".*?\s*")
    return re.search(pattern.replace(r"\.\.\.", ".*?"), real, re.DOTALL) is not None

"""Docstrings as the library writes them, for Sphinx: plain text with sections "Args:", "Attributes:" and "Raises:".

A section's items begin in its first column; an item ends with a full stop. ``A, B: why`` and ``name: meaning`` become
points of a list, and names of the public API become links. What stands indented by itself is code.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from sphinx.directives.code import LiteralInclude

import nova_imagecache
from nova_imagecache import backends, sources

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sphinx.application import Sphinx

_SECTION = re.compile(r"(Args|Attributes|Raises)\b.*:")
_NAMES = re.compile(r"((?:\w+, )*\w+)(?=[:.]|$)")
_PRIVATE = re.compile(r"\b(?:nova_imagecache\.)?_[a-z]\w*\.([A-Z]\w*)")
_PUBLIC = {
    **dict.fromkeys(backends.__all__, "nova_imagecache.backends"),
    **dict.fromkeys(sources.__all__, "nova_imagecache.sources"),
    **dict.fromkeys(nova_imagecache.__all__, "nova_imagecache"),
}


def items(lines: list[str]) -> Iterator[str]:
    """The items of a section, each on one line."""
    said = ""
    for line in lines:
        said = f"{said} {line.strip()}".strip()
        if said.endswith("."):
            yield said
            said = ""
    if said:
        yield said


def linked(item: str) -> str:
    """The item with its leading names as links, or as code where they are not of the public API."""
    found = _NAMES.match(item)
    if found is None:
        return item
    names = found[1].split(", ")
    if not item[found.end() :].startswith(":") and not all(name in _PUBLIC for name in names):
        return item
    links = [f":py:exc:`~{_PUBLIC[name]}.{name}`" if name in _PUBLIC else f"``{name}``" for name in names]
    return ", ".join(links) + item[found.end() :]


def sections(lines: list[str]) -> list[str]:
    """The docstring's lines, with its sections as fields that hold a list."""
    done: list[str] = []
    waiting = list(lines)
    while waiting:
        line = waiting.pop(0)
        if not _SECTION.fullmatch(line.strip()) or not (waiting and waiting[0].startswith(" ")):
            done.append(line)
            continue
        body = []
        while waiting and waiting[0].startswith(" "):
            body.append(waiting.pop(0))
        done += ["", f":{line.strip()}", *(f"    * {linked(item)}" for item in items(body)), ""]
    return done


def code(lines: list[str]) -> list[str]:
    """The lines, with a mark before what stands indented by itself."""
    done: list[str] = []
    for number, line in enumerate(lines):
        before = [each for each in done if each.strip()][-1:]
        begins = number > 0 and not lines[number - 1].strip() and line.startswith("    ")
        if begins and before and not before[0].startswith((" ", ":")) and not before[0].rstrip().endswith("::"):
            done += [".. code-block:: python", ""]
        done.append(line)
    return done


def tables(lines: list[str]) -> list[str]:
    """The lines, with tables that are drawn with bars as tables of reStructuredText."""
    done: list[str] = []
    before = ""
    for line in lines:
        if line.startswith("|") and set(line) > set("|- "):
            if not before.startswith("|"):
                done += [".. list-table::", "   :header-rows: 1", ""]
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            done += [f"   {'* -' if number == 0 else '  -'} {cell}" for number, cell in enumerate(cells)]
        elif not line.startswith("|"):
            done.append(line)
        before = line
    return done


def _process(_app: Sphinx, _what: str, _name: str, _obj: object, _options: object, lines: list[str]) -> None:
    lines[:] = tables(code(sections(lines)))


def _sign(
    _app: Sphinx, what: str, _name: str, obj: object, _options: object, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """The signature with names of the public API as they are imported: where they are defined is nobody's business.

    A protocol has none: nobody makes one.
    """
    if what == "class" and getattr(obj, "_is_protocol", False):
        return "", None

    def public(found: re.Match[str]) -> str:
        return found[1] if found[1] in _PUBLIC else found[0]

    return signature and _PRIVATE.sub(public, signature), returns and _PRIVATE.sub(public, returns)


class _Included(LiteralInclude):
    """Code that is included from its file, in the language of the file."""

    def run(self) -> list[Any]:
        if self.arguments[0].endswith(".py"):
            self.options.setdefault("language", "python")
        return super().run()


def setup(app: Sphinx) -> dict[str, Any]:
    """Registers this extension."""
    app.add_directive("literalinclude", _Included, override=True)
    app.connect("autodoc-process-docstring", _process)
    app.connect("autodoc-process-signature", _sign)
    return {"parallel_read_safe": True}

"""How Sphinx builds the pages: `make docs`."""

from __future__ import annotations

import sys
from importlib.metadata import version as installed_version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "nova-imagecache"
author = copyright = "the nova-imagecache authors"  # noqa: A001 - the name that Sphinx reads
version = release = installed_version(project)
language = "en"

# plain_docstrings is in _ext; no intersphinx: a build needs no network
extensions = ["myst_parser", "sphinx.ext.autodoc", "plain_docstrings"]
exclude_patterns = ["_build", "_ext", "_static"]
source_suffix = {".md": "markdown"}

# --- pages

myst_enable_extensions = ["attrs_block", "colon_fence", "deflist"]
myst_heading_anchors = 3
highlight_language = "text"

# --- the API: what docstrings say

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True}
add_module_names = False
python_maximum_signature_line_length = 90
python_display_short_literal_types = True
toc_object_entries = False

# Every reference must lead somewhere. The standard library's pages are elsewhere; what begins with an underscore is
# not public, though a signature may name it.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(abc|collections|contextlib|dataclasses|datetime|logging|pathlib|threading|types|typing|xml)\..*"),
    ("py:.*", r"(bool|bytearray|bytes|dict|float|frozenset|int|list|memoryview|object|set|str|tuple|type|None)(\[.*)?"),
    (
        "py:.*",
        r"(AbstractContextManager|Any|Callable|Iterator|Mapping|ModuleType|Path|Sequence|datetime|timedelta)(\[.*)?",
    ),
    ("py:.*", r"(ET\.Element|Session|oslo_config\..*)"),
    ("py:.*", r"(Exception|FileExistsError|OSError|RuntimeError|TimeoutError|ValueError)"),
    ("py:.*", r"nova_imagecache\.(.*\.)?_.*"),
]

# --- looks

html_theme = "furo"
html_title = f"nova-imagecache {version}"
html_static_path = ["_static"]
html_css_files = ["nova-imagecache.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
pygments_style = "friendly"
pygments_dark_style = "monokai"

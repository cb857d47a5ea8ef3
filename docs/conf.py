# SPDX-License-Identifier: Apache-2.0
"""The site, built by docs/build: Markdown by myst-parser, the theme furo."""

from __future__ import annotations

import re
from importlib.metadata import version as installed
from typing import TYPE_CHECKING

from docutils.nodes import Text, literal_block

if TYPE_CHECKING:
    from docutils.nodes import document
    from sphinx.application import Sphinx

project = "pyploop"
author = "the pyploop authors"
copyright = author
version = release = installed("pyploop")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.intersphinx", "sphinx_argparse_cli"]
exclude_patterns: list[str] = []
nitpicky = True

# ---- Markdown
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 4
# Quotes become curly, but `--option` stays as one types it.
smartquotes_action = "q"
# What is written in several languages, or as a sketch, need not be highlighted.
highlight_language = "none"

# ---- The API, from its docstrings
# As `code` in Markdown.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_class_signature = "separated"
nitpick_ignore_regex = [
    # Types that a signature names, and that are no part of the public API.
    (r"py:.*", r"pyploop\..*"),
    (r"py:.*", r"(Path|Any|Callable|Iterator|Sequence|Self|T)"),
]
# Names of the standard library are links only where its index can be had (docs/build --external).
intersphinx_mapping: dict[str, tuple[str, None]] = {}
nitpick_ignore_regex += [(r"py:.*", r"(?!pyploop\b).*")]

# ---- Links to other sites: docs/build --external
linkcheck_timeout = 30
linkcheck_retries = 2
linkcheck_ignore = [r"https?://localhost.*"]

# ---- HTML
html_theme = "furo"
html_title = f"pyploop {release}"
html_static_path: list[str] = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}


# ---- What the pages are read as elsewhere, too

OUTSIDE = {"SECURITY.md": "/project/security.md", "CHANGELOG.md": "/project/changes.md"}
"""Files of the repository that are pages here.  On a code host they are found where they lie."""


def lead_to_pages(text: str) -> str:
    for file, page in OUTSIDE.items():
        text = re.sub(rf"\]\((?:\.\./)*{re.escape(file)}\)", f"]({page})", text)
    return text


def on_read(_app: Sphinx, _page: str, source: list[str]) -> None:
    source[0] = lead_to_pages(source[0])


def on_include(_app: Sphinx, _path: object, _parent: str, source: list[str]) -> None:
    source[0] = lead_to_pages(source[0])


def on_docstring(_app: Sphinx, *words: object) -> None:
    """Docstrings are plain text: a name like `async_` is no reference in them, and what
    is indented by four spaces is code."""
    lines = words[-1]
    assert isinstance(lines, list)
    made: list[str] = []
    for line in lines:
        begins = line.startswith("    ") and made and not made[-1]
        if begins and not made[-2].startswith("    "):
            made += ["::", ""]
        made.append(line if line.startswith("    ") else re.sub(r"(?<=\w)_(?!\w)", r"\\_", line))
    lines[:] = made


def on_page(_app: Sphinx, doctree: document) -> None:
    """A usage of several lines begins each at the left: argparse has them below `usage: `."""
    for block in doctree.findall(literal_block):
        lined_up = re.sub(r"\n +(?=pyploop )", "\n", block.astext())
        if lined_up != block.astext():
            block.children = [Text(lined_up)]
            block.rawsource = lined_up


def setup(app: Sphinx) -> None:
    app.connect("doctree-read", on_page)
    app.connect("source-read", on_read)
    app.connect("include-read", on_include)
    app.connect("autodoc-process-docstring", on_docstring)

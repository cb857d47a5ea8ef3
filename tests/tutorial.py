# SPDX-License-Identifier: Apache-2.0
"""The commands of a tutorial, as its page has them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from support import ROOT

TUTORIAL = ROOT / "docs" / "tutorial"
_BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[str]:
    """The fenced shell blocks, in order."""
    return _BLOCK.findall(page.read_text())


_INSTALLS = ("debian/install-host", "apt-get install")


def installs(block: str) -> bool:
    """Whether a block installs something, from Debian or PyPI."""
    return any(words in block for words in _INSTALLS)


def steps(page: Path, *, installed: bool = True) -> Iterator[tuple[str, str]]:
    """(`a` or `b`, the block that is typed there), in order.  installed: leave out the blocks
    that install something."""
    for block in blocks(page):
        where = re.match(r"# on (a|b|both)\n", block)
        assert where, f"it does not say on which host: {block}"
        if installed and installs(block):
            continue
        yield from ((host, block) for host in (("a", "b") if where[1] == "both" else where[1]))

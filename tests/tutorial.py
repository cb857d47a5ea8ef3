# SPDX-License-Identifier: Apache-2.0
"""The commands of a tutorial, as its page has them."""

from __future__ import annotations

import re
from pathlib import Path

from support import ROOT

TUTORIAL = ROOT / "docs" / "tutorial"
_BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[str]:
    """The fenced shell blocks, in order."""
    return _BLOCK.findall(page.read_text())

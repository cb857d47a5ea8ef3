# SPDX-License-Identifier: Apache-2.0
"""The hint of an agent's error.  On the wire an error has one text: the message, and then the
hint, so that a source that does not know hints shows both."""

from __future__ import annotations

from pyploop.errors import HINT


def parted(text: str) -> tuple[str, str | None]:
    """The message and the hint of such a text.  None: it has no hint."""
    message, mark, hint = text.rpartition(HINT)
    return (message, hint) if mark else (text, None)

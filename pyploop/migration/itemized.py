# SPDX-License-Identifier: Apache-2.0
"""What rsync prints (`--out-format=%i %n`) of the files that it sends.

What its peer says is printed among it, as much as the peer likes: so it is read as it
comes, and of the names no more is kept than KEPT_NAMES bytes.
"""

from __future__ import annotations

import re

from pyploop.system.stderr_tail import LastWords
from pyploop.units import KIB, MIB

LONGEST_LINE = 32 * KIB
"""Of an item: a path of PATH_MAX bytes, each of which may be printed as five."""
KEPT_NAMES = 64 * MIB
EACH = 100
"""Bytes in memory that a name takes beyond its own."""
_ITEM = re.compile(rb"(\S{11}) (.+)", re.DOTALL)
_ESCAPED = re.compile(rb"\\#([0-7]{3})")


class Itemized(LastWords):
    """As it is read; whole when the program has ended."""

    def __init__(self) -> None:
        super().__init__()
        self._line = b""
        self._too_long = False
        self._room = KEPT_NAMES
        self.sent = 0
        """Files whose contents were sent, as rsync says."""
        self.linked = False
        """A second name was made for a file."""
        self.names: set[bytes] = set()
        """Of these files: paths below the tree.  Not all of very many."""

    def took(self, data: bytes) -> None:
        *lines, rest = data.split(b"\n")
        for line in lines:
            if not self._too_long:
                self._item(self._line + line)
            self._line, self._too_long = b"", False
        self._line += rest
        if len(self._line) > LONGEST_LINE:
            self._line, self._too_long = b"", True

    def _item(self, line: bytes) -> None:
        if (item := _ITEM.fullmatch(line)) is None:
            return
        if item[1].startswith(b"h"):
            self.linked = True
        if not item[1].startswith(b"<f"):
            return
        self.sent += 1
        name = _ESCAPED.sub(lambda m: bytes([int(m[1], 8) & 0xFF]), item[2])
        if len(name) + EACH <= self._room and name not in self.names:
            self._room -= len(name) + EACH
            self.names.add(name)

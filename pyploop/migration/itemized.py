# SPDX-License-Identifier: Apache-2.0
"""What rsync prints (`--out-format=%i %n`) about the files that it sends.

The peer's own output is mixed with it, and may be of any length.  So it is read as it
comes, and at most KEPT_NAMES bytes of names are stored.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Set

from pyploop.system.stderr_tail import LastWords
from pyploop.units import KIB, MIB

LONGEST_LINE = 32 * KIB
"""Bytes: a path of PATH_MAX bytes, each of which may be printed as five."""
KEPT_NAMES = 64 * MIB
EACH = 100
"""Bytes in memory that each name takes in addition to its length."""
_ITEM = re.compile(rb"(\S{11}) (.+)", re.DOTALL)
_ESCAPED = re.compile(rb"\\#([0-7]{3})")


class Names(set[bytes]):
    """A set of paths below the tree that takes KEPT_NAMES bytes of memory at most."""

    def __init__(self) -> None:
        super().__init__()
        self._room = KEPT_NAMES
        self.complete = True
        """No name was left out."""

    def add(self, name: bytes) -> None:
        if name in self:
            return
        if len(name) + EACH <= self._room:
            self._room -= len(name) + EACH
            super().add(name)
        else:
            self.complete = False

    def forget(self) -> None:
        """Remove all names, and take no more: it is not known any more which they are."""
        self.clear()
        self._room = 0
        self.complete = False


class Itemized(LastWords):
    """rsync's output, parsed as it is read.  It is complete when rsync has ended."""

    def __init__(self) -> None:
        super().__init__()
        self._line = b""
        self._too_long = False
        self._lock = threading.Lock()
        self._wanted: Set[bytes] | None = None
        self.sent = 0
        """Number of files whose contents were sent, as rsync says."""
        self.linked = False
        """Whether a file got a second name."""
        self.names = Names()
        """Names of files that were sent.  It may be incomplete when there are very many."""
        self.second_names: Names | None = None
        """Gets the names that became a second name of another file.  None: they are not
        needed."""

    def only(self, wanted: Set[bytes]) -> None:
        """Store only these of the names that are sent, because there may be millions.  From
        any thread, at any time."""
        with self._lock:
            before, self.names, self._wanted = self.names, Names(), wanted
            for name in before & wanted:
                self.names.add(name)

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
            if self.second_names is not None:
                self.second_names.add(_name(item[2]))
        if not item[1].startswith(b"<f"):
            return
        self.sent += 1
        with self._lock:
            name = _name(item[2])
            if self._wanted is None or name in self._wanted:
                self.names.add(name)


def _name(printed: bytes) -> bytes:
    return _ESCAPED.sub(lambda m: bytes([int(m[1], 8) & 0xFF]), printed)

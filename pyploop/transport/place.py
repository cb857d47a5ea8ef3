# SPDX-License-Identifier: Apache-2.0
"""`[user@]host:path`, as scp and rsync read it.  No I/O."""

from __future__ import annotations

import re
from typing import NamedTuple

_PLACE = re.compile(
    r"(?P<user>[^@:/\[\]]+@)?(?:\[(?P<six>[^\]/]+)\]|(?P<host>[^:/\[\]]+)):(?P<path>.*)", re.S
)


class Place(NamedTuple):
    """host: as ssh takes it, with the user; empty: this host."""

    host: str
    path: str


def place(text: str) -> Place:
    """A colon before the first slash makes it a place on another host.  So `./a:b` is here.
    ValueError: there is no path."""
    found = _PLACE.fullmatch(text)
    if found is None:
        return Place("", text)
    if not found["path"]:
        raise ValueError(
            f"{text!r} names no path on that host (HOST:PATH; ./{text} is a file here)"
        )
    return Place((found["user"] or "") + (found["six"] or found["host"]), found["path"])

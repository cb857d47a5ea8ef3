# SPDX-License-Identifier: Apache-2.0
"""`[user@]host:path`, as scp and rsync read it.  No I/O."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

_PLACE = r"(?s)(?P<user>[^@:/\[\]]+@)?(?:\[(?P<six>[^\]/]+)\]|(?P<host>[^:/\[\]]+)):(?P<path>.*)"
"""Compiled when it is needed: each copy loads this module."""


_SHELL = frozenset("'`\"$;&<>|(){} ")
"""Characters that are in no name of a host or user, and that a shell would understand: ssh runs
its ProxyCommand and `Match exec` by one, with the names that it was given.  Newer OpenSSH refuses
the same."""


def is_host(text: str) -> bool:
    """Whether ssh may be given this as `[user@]host`."""
    user, at, host = text.rpartition("@")
    names = [user, host] if at else [host]
    return "\\" not in host and all(
        name and name[0] != "-" and name.isprintable() and not _SHELL & {*name} for name in names
    )


class Place(NamedTuple):
    """host: as ssh takes it, with the user; empty: this host."""

    host: str
    path: str


def host_of(text: str) -> str:
    """The host that such a text names; empty: this one."""
    found = re.fullmatch(_PLACE, text)
    return "" if found is None else (found["user"] or "") + (found["six"] or found["host"])


class Here(os.PathLike[str]):
    """A path on this host, whatever it looks like.  (A Path would change how it is written.)"""

    def __init__(self, path: str) -> None:
        self._path = path

    def __fspath__(self) -> str:
        return self._path


def place(text: str) -> Place:
    """A colon before the first slash makes it a place on another host.  So `./a:b` is here.
    ValueError: there is no path."""
    found = re.fullmatch(_PLACE, text)
    if found is None:
        return Place("", text)
    if not found["path"]:
        raise ValueError(
            f"{text!r} names no path on that host (HOST:PATH; ./{text} is a file here)"
        )
    return Place(host_of(text), found["path"])

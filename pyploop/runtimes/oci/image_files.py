# SPDX-License-Identifier: Apache-2.0
"""The files of a dump, read within limits: what comes from another host may be of any
size, and have any number of entries.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from pyploop.errors import MigrateError, VzExitCode
from pyploop.runtimes.oci import json_shapes
from pyploop.wire import criu
from pyploop.wire.protobuf import Message

LARGEST = 64 << 20
"""Bytes of an image that is looked into.  That of 10,000 open files has one MiB."""
STREAMS = "descriptors.json"
ALL = 256 << 20
"""Bytes of all that are looked into: a minute's work."""
MOST_ENTRIES = 1 << 20
"""Of all of them: open files, processes, mounts."""
MOST_LISTED = 1 << 17
"""Of one that is kept in memory: processes, mounts."""
_NEVER = {"creds", "apparmor", "binfmt-misc", "autofs", "bpfmap-file", "bpfmap-data"}
"""Credentials of old images, profiles that CRIU loads into the kernel, programs by
which the host would run files, mounts that wait for a process, BPF."""


class Images:
    """Those of one dump.  MigrateError(15) names the file that is being looked into."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.name = ""
        self._bytes = self._count = 0
        """What was looked into so far."""

    def refuse(self, why: str) -> NoReturn:
        raise MigrateError(
            VzExitCode.BAD_CONFIG,
            f"the memory images are not restored here: {self.name} {why}",
        )

    def names(self) -> dict[str, str]:
        """Image file -> its kind."""
        found = {}
        for entry in os.scandir(self._folder):
            known = criu.kind_of(entry.name)
            self.name = entry.name
            if known is None:
                continue  # nor does CRIU open it
            if known in _NEVER:
                self.refuse("is of a kind that is never restored")
            if not entry.is_file(follow_symlinks=False):
                self.refuse("is no regular file")
            found[entry.name] = known
        self.name = "the dump"
        for name in ("inventory.img", "pstree.img"):
            if name not in found:
                self.refuse(f"has no {name}")
        if "mountpoints" not in found.values():
            self.refuse("has no mountpoints-*.img")
        return found

    def check_streams(self) -> None:
        """runc's own file: each name of a pipe in it stands for the descriptor of runc's
        that has its place in the list, and the container gets that."""
        self.name = STREAMS
        try:
            found = json_shapes.loads(self.read(STREAMS))
        except FileNotFoundError:
            return
        except ValueError:
            found = None
        if not isinstance(found, list) or len(found) > 3:
            self.refuse("has more than the standard input, output and error")

    def read(self, name: str) -> bytes:
        self.name = name
        with (self._folder / name).open("rb", buffering=0) as f:
            size = os.fstat(f.fileno()).st_size
            if size > LARGEST:
                self.refuse(f"has {size} bytes, more than any real one")
            self._bytes += size
            if self._bytes > ALL:
                self.refuse(f"is one of those that have more than {ALL} bytes together")
            return f.readall()

    def entries(self, name: str, kind: str) -> Iterator[Message]:
        for entry in criu.entries(kind, self.read(name)):
            self._count += 1
            if self._count > MOST_ENTRIES:
                self.refuse(f"is one of those that have more than {MOST_ENTRIES} entries")
            yield entry

    def listed(self, name: str, kind: str) -> list[Message]:
        found = list(itertools.islice(self.entries(name, kind), MOST_LISTED + 1))
        if len(found) > MOST_LISTED:
            self.refuse(f"has more than {MOST_LISTED} entries")
        return found

    def only(self, name: str, kind: str) -> Message:
        return criu.only(kind, self.read(name))

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
"""Bytes of one image that is read.  The image of 10,000 open files has 1 MiB."""
STREAMS = "descriptors.json"
ALL = 256 << 20
"""Bytes of all images that are read together: a minute's work."""
MOST_ENTRIES = 1 << 20
"""Entries of all images together: open files, processes, mounts."""
MOST_LISTED = 1 << 17
"""Entries of one image that are kept in memory: processes, mounts."""
_NEVER = {"creds", "apparmor", "binfmt-misc", "autofs", "bpfmap-file", "bpfmap-data"}
"""Kinds that are refused: credentials of old images, profiles that CRIU loads into the
kernel, interpreters that the host would run, mounts that wait for a process, BPF."""


class Images:
    """The images of one dump.  MigrateError(15) names the file that is being read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.name = ""
        self._bytes = self._count = 0
        """Of what was read so far."""

    def refuse(self, why: str) -> NoReturn:
        raise MigrateError(
            VzExitCode.BAD_CONFIG,
            f"the memory images are not restored: {self.name} {why}",
        )

    def names(self) -> dict[str, str]:
        """Image file -> its kind."""
        found = {}
        for entry in os.scandir(self._folder):
            known = criu.kind_of(entry.name)
            self.name = entry.name
            if known is None:
                continue  # CRIU does not open it either
            if known in _NEVER:
                self.refuse("is of a kind that is never restored")
            if not entry.is_file(follow_symlinks=False):
                self.refuse("is not a regular file")
            found[entry.name] = known
        self.name = "the dump"
        for name in ("inventory.img", "pstree.img"):
            if name not in found:
                self.refuse(f"has no {name}")
        if "mountpoints" not in found.values():
            self.refuse("has no mountpoints-*.img")
        return found

    def check_streams(self) -> None:
        """runc's own file, a list.  For the name of a pipe in it the container gets the
        descriptor of runc whose number is the place in the list."""
        self.name = STREAMS
        try:
            found = json_shapes.loads(self.read(STREAMS))
        except FileNotFoundError:
            return
        except ValueError:
            found = None
        if not isinstance(found, list) or len(found) > 3:
            self.refuse("must be a list of at most three descriptors")

    def read(self, name: str) -> bytes:
        self.name = name
        with (self._folder / name).open("rb", buffering=0) as f:
            size = os.fstat(f.fileno()).st_size
            if size > LARGEST:
                self.refuse(f"has {size} bytes, more than any real one")
            self._bytes += size
            if self._bytes > ALL:
                self.refuse(f"and the images before it have more than {ALL} bytes")
            return f.readall()

    def entries(self, name: str, kind: str) -> Iterator[Message]:
        for entry in criu.entries(kind, self.read(name)):
            self._count += 1
            if self._count > MOST_ENTRIES:
                self.refuse(f"and the images before it have more than {MOST_ENTRIES} entries")
            yield entry

    def listed(self, name: str, kind: str) -> list[Message]:
        found = list(itertools.islice(self.entries(name, kind), MOST_LISTED + 1))
        if len(found) > MOST_LISTED:
            self.refuse(f"has more than {MOST_LISTED} entries")
        return found

    def only(self, name: str, kind: str) -> Message:
        return criu.only(kind, self.read(name))

# SPDX-License-Identifier: Apache-2.0
"""Mounts within a container that CRIU (4.2) cannot dump: those that were on the host below a
folder that config.json binds.

runc tells CRIU of the root and of each bind, and the target has them already.  Any other mount
must be one that CRIU can make of these.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pyploop.runtimes.runc import contents
from pyploop.runtimes.runc.preflight_files import Problem
from pyploop.system import mount_table


def of(init: int, config: Mapping[str, Any], bundle: str, proc: str = "/proc") -> Iterator[Problem]:
    """init: the first process."""
    path = Path(f"{proc}/{init}/mountinfo")
    try:
        table = mount_table.read(path)
        peers = _peers(path)
    except OSError:
        return
    known = contents.as_seen(config, bundle, f"{proc}/{init}/root")
    points = {
        os.path.normpath(str(m.get("destination")))
        for m in known.get("mounts") or ()
        if contents.is_bind(m)
    }
    told = [e for e in table if e.point in {"/", *points}]
    shared = {shared for shared, _ in peers.values() if shared}
    for e in table:
        if e in told:
            continue
        master = peers.get(e.number, (0, 0))[1]
        text = f"{e.source} ({e.fstype}, {e.root}) is mounted on {e.point} in the container"
        if master and master not in shared:
            yield Problem("submount", f"{text}, and follows a mount of this host", e.point)
        elif e.fstype not in contents.PSEUDO and not any(
            t.dev == e.dev and mount_table.within(e.root, t.root) for t in told
        ):
            yield Problem("submount", f"{text}, and is no part of what is bound there", e.point)


_PEER = re.compile(r" (shared|master):(\d+)")


def _peers(path: Path) -> dict[int, tuple[int, int]]:
    """Number of a mount -> its peer group, and the one from which it receives mounts."""
    found = {}
    for line in path.read_text(errors="surrogateescape").splitlines():
        left = line.partition(" - ")[0]
        groups = {kind: int(number) for kind, number in _PEER.findall(left)}
        found[int(line.split(" ", 1)[0])] = groups.get("shared", 0), groups.get("master", 0)
    return found

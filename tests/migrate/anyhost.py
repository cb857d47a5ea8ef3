#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A container of nobody's runtime, for `runtime = "command"`: guest.py's process,
with two disks.

    anyhost.py HOST STEP        HOST/one and HOST/two are the mount points
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from guest import Guest

DISKS = ("one", "two")


def main(host: str, step: str) -> int:
    folder = Path(host)
    g, disks = Guest(folder, "any"), [folder / d for d in DISKS]
    if (folder / f"{step}-fails").exists():
        print(f"{step} was made to fail", file=sys.stderr)
        return 3
    images = os.environ.get("PYPLOOP_IMAGES", "")
    if step == "status":
        there = g.pids() or (folder / "one.img").exists()
        state = "suspended" if g.pids() and g.frozen() else "running" if g.pids() else "stopped"
        print(state if there else "absent")
    elif step == "suspend":
        g.freeze(True)
    elif step in ("resume", "resume_restored"):
        g.freeze(False)
    elif step == "dump":
        Path(images, "memory").write_text(os.environ["PYPLOOP_CONTAINER"])
    elif step == "undump":
        assert Path(images, "memory").read_text() == os.environ["PYPLOOP_CONTAINER"]
        g.launch(disks, frozen=True)
    elif step in ("kill", "abandon", "stop"):
        g.end()
    elif step == "start":
        g.launch(disks, frozen=False)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

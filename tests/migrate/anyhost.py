#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A container of nobody's runtime, for `runtime = "command"`: guest.py's process,
with two disks.

    anyhost.py HOST STEP        HOST/one and HOST/two are the mount points
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

from guest import Guest

DISKS = ("one", "two")


def dump(images: Path, contents: str) -> None:
    """What the guest's memory is said to be, or, with a parent, that it is there."""
    if parent := os.environ.get("PYPLOOP_PARENT"):
        assert memory(Path(parent)) == contents
        (images / "parent").symlink_to(os.path.relpath(parent, images))
    else:
        (images / "memory").write_text(contents)


def memory(images: Path) -> str:
    """What a chain of images holds."""
    file = images / "memory"
    return file.read_text() if file.exists() else memory(images / "parent")


def reach(host: Path, step: str, which: str = "") -> None:
    """Stand still there when a test wants to be told of it."""
    gate = host / f"{step}{which}-waits"
    if gate.exists():
        (host / f"{step}-reached").touch()
    while gate.exists():
        time.sleep(0.01)


def pre_dump(host: Path, images: Path) -> None:
    """The first is large and takes its time, so that a second one pays."""
    reach(host, "pre_dump", f"-{images.name}")
    dump(images, os.environ["PYPLOOP_CONTAINER"])
    with (images / "pages-1.img").open("wb") as f:
        f.write(b"\1" * ((16 << 20) // int(images.name) ** 4))
    time.sleep(0.1)


def main(host: str, step: str) -> int:
    folder = Path(host)
    g, disks = Guest(folder, "any"), [folder / d for d in DISKS]
    images = os.environ.get("PYPLOOP_IMAGES", "")
    fails = folder / f"{step}-fails"
    if fails.exists() and fails.read_text() in ("", Path(images).name):
        print(f"{step} was made to fail", file=sys.stderr)
        if step == "pre_dump":  # as a CRIU that aborts
            g.freeze(True)
        return 3
    reach(folder, step)
    if step == "status":
        there = g.pids() or (folder / "one.img").exists()
        state = "suspended" if g.pids() and g.frozen() else "running" if g.pids() else "stopped"
        print(state if there else "absent")
    elif step == "suspend":
        g.freeze(True)
    elif step in ("resume", "resume_restored"):
        g.freeze(False)
    elif step == "pre_dump":
        pre_dump(folder, Path(images))
    elif step == "dump":
        dump(Path(images), os.environ["PYPLOOP_CONTAINER"])
        if (pages := folder / "pages").exists():  # what it is to hold besides
            shutil.copyfile(pages, Path(images) / "pages-1.img")
    elif step == "undump":
        assert memory(Path(images)) == os.environ["PYPLOOP_CONTAINER"]
        g.launch(disks, frozen=True)
    elif step in ("kill", "abandon", "stop"):
        g.end()
    elif step == "start":
        g.launch(disks, frozen=False)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

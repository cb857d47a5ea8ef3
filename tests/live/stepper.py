# SPDX-License-Identifier: Apache-2.0
"""pyploop that stands still at a named step until it is told to go on.

    stepper.py STEP FOLDER ARGUMENTS…

FOLDER/at appears at the step, FOLDER/go ends the standstill.  When the source
is frozen, FOLDER/frozen gets the hash of its image ($STEPPER_IMAGE, if set).  The steps
are methods of the product, wrapped here: it has no switch for this.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyploop.cli.main import main
from pyploop.diskcopy.approach import Approach
from pyploop.diskcopy.d1_target import StreamOutput
from pyploop.diskcopy.precopy import PreCopy
from pyploop.diskcopy.sender import Sender
from pyploop.diskcopy.source_pump import SourcePump
from pyploop.freeze.cgroup import CgroupStopper
from pyploop.freeze.filesystems import FileSystems
from pyploop.freeze.session import FreezeSession
from pyploop.trackers.bpf import BpfTracker

AFTER = 1
STEPS: dict[str, tuple[type, str, int, str]] = {
    # name: (class, method, before or AFTER it, since which other step)
    "greeting": (SourcePump, "greet", 0, ""),
    "first pass begins": (PreCopy, "first_pass", 0, ""),
    "first pass sent": (PreCopy, "first_pass", AFTER, ""),
    "round": (PreCopy, "round", 0, ""),
    "source synced": (FileSystems, "sync", AFTER, ""),
    "watchdog ready": (FreezeSession, "prepare", AFTER, ""),
    "target synced": (Approach, "sync_target", AFTER, "watchdog ready"),
    "warm-up": (FileSystems, "_freeze_all", AFTER, "watchdog ready"),
    "stop begins": (FreezeSession, "stop", 0, ""),
    "cgroup frozen": (CgroupStopper, "stop", AFTER, ""),
    "stopped source synced": (FileSystems, "sync", AFTER, "cgroup frozen"),
    "freeze begins": (FileSystems, "freeze", 0, "cgroup frozen"),
    "frozen": (FileSystems, "freeze", AFTER, "cgroup frozen"),
    "proving": (BpfTracker, "check", 0, "frozen"),
    "last blocks sent": (Sender, "last_blocks", AFTER, ""),
    "END may go": (FreezeSession, "commit", AFTER, ""),
    "END begins": (StreamOutput, "finish", 0, "END may go"),
    "END sent": (StreamOutput, "_answer", 0, "END may go"),
    "acknowledged": (Sender, "finish", AFTER, ""),
    "thawed": (FileSystems, "thaw", AFTER, "acknowledged"),
    "released": (FreezeSession, "release", AFTER, ""),
}
SINCE = {"": 0}
"""Steps that have been reached."""


def wrap(owner: type, method: str, moment: int, then: Callable[[Any], None]) -> None:
    """Call `then` with the object, before or after the method."""
    inner = getattr(owner, method)

    @functools.wraps(inner)
    def outer(*args: Any, **options: Any) -> Any:
        if not moment:
            then(args[0])
        result = inner(*args, **options)
        if moment:
            then(args[0])
        return result

    setattr(owner, method, outer)


def reach(name: str, stand: Callable[[], None] | None, _: object) -> None:
    _, _, _, since = STEPS[name]
    if name in SINCE or since not in SINCE:
        return
    SINCE[name] = 1
    if stand is not None:
        stand()


def stand_still(folder: Path) -> None:
    (folder / "at").touch()
    deadline = time.monotonic() + 60
    while not (folder / "go").exists() and time.monotonic() < deadline:
        time.sleep(0.002)


def throttle(precopy: PreCopy) -> None:
    """The policy's last means from the beginning, so that every step has it."""
    if (throttle := precopy._context.options.throttle) is not None:
        throttle.apply()


def remember(folder: Path) -> None:
    if "STEPPER_IMAGE" not in os.environ:
        return
    with open(os.environ["STEPPER_IMAGE"], "rb") as f:
        (folder / "frozen").write_text(hashlib.file_digest(f, "sha1").hexdigest())


def run() -> int:
    step, folder = sys.argv[1], Path(sys.argv[2])
    wrap(FileSystems, "freeze", AFTER, lambda _: remember(folder))
    wrap(PreCopy, "converge", 0, throttle)
    for name, (owner, method, moment, _) in STEPS.items():
        stand = functools.partial(stand_still, folder) if name == step else None
        wrap(owner, method, moment, functools.partial(reach, name, stand))
    return main(sys.argv[3:])


if __name__ == "__main__":
    sys.exit(run())

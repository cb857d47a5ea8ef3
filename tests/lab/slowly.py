# SPDX-License-Identifier: Apache-2.0
"""`pyploop` with deadlines that are PYPLOOP_SLOWNESS times as long, for a machine
that is emulated.

    slowly.py pyploop.cli.main ARGUMENTS…       (as `python3 -m` would run it)
"""

from __future__ import annotations

import importlib
import os
import sys

from pyploop.cli.main import program

DEADLINES = (
    *(("migration.deadlines", name) for name in ("CONNECT", "HELLO", "ENDING", "RSYNC_READY")),
    *(("migration.deadlines", name) for name in ("REQUEST", "CHECKING")),
    ("runtimes.runc.criu", "PROBE_TIMEOUT"),
    ("runtimes.runc.memory_tracking", "TIMEOUT"),
)

if __name__ == "__main__":
    for module, name in DEADLINES:
        found = importlib.import_module(f"pyploop.{module}")
        setattr(found, name, getattr(found, name) * float(os.environ["PYPLOOP_SLOWNESS"]))
    del sys.argv[1]
    program()

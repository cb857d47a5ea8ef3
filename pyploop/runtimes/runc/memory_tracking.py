# SPDX-License-Identifier: Apache-2.0
"""CRIU's memory tracking, which a pre-dump needs: whether it works on this kernel, and for
how long a pre-dump stopped the container."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

from pyploop.errors import MigrateError, VzExitCode
from pyploop.system import private_folder
from pyploop.system.commands import Command, last_words, run
from pyploop.wire.protobuf import Malformed, Message

FEATURE = "mem_dirty_track"
TIMEOUT = 30.0
_STATS = struct.Struct("<III")
"""Two magic numbers, and the length of the message that follows."""
_DUMP, _FREEZING, _FROZEN = 1, 1, 2
"""Fields of CRIU's statistics: the part about a dump, and in it two times in
microseconds.  One for freezing the processes, one from there until they ran again."""


def problem(criu: str) -> str:
    """Why CRIU cannot pre-dump on this host; empty when it can.

    `criu check` comes first: a pre-dump without tracking aborts half-way, and leaves
    CRIU's code in the process.  Then follow two pre-dumps of an idle process.  The
    second must have fewer bytes.
    """
    try:
        status, output = Command([criu, "check", "--feature", FEATURE]).wait(TIMEOUT)
    except OSError as e:  # TimeoutError is one
        return f"{criu} check --feature {FEATURE}: {e.strerror or e}"
    if status:
        return last_words(output).split(": ", 1)[-1]
    with private_folder.scratch() as folder:
        sleeper = subprocess.Popen(
            [shutil.which("sleep") or "sleep", "60"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            sizes = []
            for number, more in ((1, []), (2, ["--prev-images-dir", "../1"])):
                images = folder / str(number)
                images.mkdir()
                command = [criu, "pre-dump", "-t", str(sleeper.pid), "-D", str(images)]
                run([*command, "--track-mem", *more], VzExitCode.NO_KERNEL, TIMEOUT)
                sizes.append(sum(p.stat().st_size for p in images.glob("pages-*.img")))
        except MigrateError as e:
            return str(e)
        finally:
            sleeper.kill()
            sleeper.wait()
    if sizes[1] >= sizes[0]:
        return f"the second pre-dump of an idle process has {sizes[1]} bytes, the first {sizes[0]}"
    return ""


def frozen_seconds(work: Path) -> float | None:
    """Seconds for which a dump or pre-dump stopped the processes, from the statistics in
    CRIU's working folder (work).  None: there are none."""
    try:
        data = (work / "stats-dump").read_bytes()
        size = _STATS.unpack_from(data)[2]
        dump = Message(data[_STATS.size : _STATS.size + size]).message(_DUMP)
        if dump is None or (frozen := dump.number(_FROZEN)) is None:
            return None
        return ((dump.number(_FREEZING) or 0) + frozen) / 1e6
    except (OSError, Malformed, struct.error):
        return None

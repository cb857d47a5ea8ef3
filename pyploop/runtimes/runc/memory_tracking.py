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
        dump = _fields(data[_STATS.size : _STATS.size + size])[_DUMP]
        if not isinstance(dump, bytes):
            return None
        times = _fields(dump)
        parts = [times.get(_FREEZING, 0), times[_FROZEN]]
        return sum(p for p in parts if isinstance(p, int)) / 1e6
    except (OSError, LookupError, struct.error):
        return None


def _fields(data: bytes) -> dict[int, int | bytes]:
    """A protobuf message of numbers and byte strings."""
    found: dict[int, int | bytes] = {}
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        value, at = _varint(data, at)
        if key & 7 == 2:
            found[key >> 3] = data[at : at + value]
            at += value
        elif key & 7 == 0:
            found[key >> 3] = value
        else:
            raise LookupError(f"field {key >> 3} of type {key & 7}")
    return found


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """(value, where it ends); IndexError when it does not."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        shift, at = shift + 7, at + 1
        if byte < 0x80:
            return value, at

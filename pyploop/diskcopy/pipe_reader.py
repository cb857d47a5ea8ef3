# SPDX-License-Identifier: Apache-2.0
"""Find the process that reads a pipe on this machine, and where it writes: for a
receiver that cannot say so (`pyploop copy -s DEVICE | pyploop copy -d FILE`, or ploop)."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from pyploop.disks import backing
from pyploop.disks.backing import Thing


def below_target(pipe: int) -> set[Thing] | None:
    """What lies below the target of the receivers that read this pipe; None: it is not a
    pipe, or has none."""
    st = os.fstat(pipe)
    if not stat.S_ISFIFO(st.st_mode):
        return None
    found: set[Thing] = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            target = _target((process / "cmdline").read_bytes())
            if target and int(process.name) != os.getpid() and _has(process, st):
                folder = os.path.join(os.fsencode(process / "cwd"), os.path.dirname(target))
                found |= _below_folder(folder)
    return found or None


def _target(cmdline: bytes) -> bytes:
    """FILE of the command line `ploop copy -d FILE`; empty: it is another command."""
    words = cmdline.split(b"\0")
    if b"copy" not in words:
        return b""
    for word, following in zip(words, [*words[1:], b""], strict=True):
        if word.startswith(b"-d"):
            return word[2:] or following
    return b""


def _has(process: Path, pipe: os.stat_result) -> bool:
    """Whether it has the pipe open."""
    for fd in os.listdir(process / "fd"):
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(process / "fd" / fd), pipe):
                return True
    return False


def _below_folder(folder: bytes) -> set[Thing]:
    fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return backing.of_file(fd).things
    finally:
        os.close(fd)

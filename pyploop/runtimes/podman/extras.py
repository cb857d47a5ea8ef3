# SPDX-License-Identifier: Apache-2.0
"""What a container of Podman has beside its memory images: the contents of /dev/shm, which is
a tmpfs of the host, and the end of its output.  They are added to the images while CRIU dumps.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import struct
import termios
import time
from pathlib import Path

from pyploop.errors import MigrateError, VzExitCode
from pyploop.system.commands import run

SHM = "podman-shm.tar"
LOG = "podman-log-"
"""The name ends with the position of its first byte in the whole output."""
DRAINED = 0.2
"""Seconds for the monitor to read what the suspended container has written."""
TIMEOUT = 120.0


def pack_shm(bundle: str, images: Path) -> None:
    """Nothing when it is empty.  MigrateError(8)."""
    folder = Path(bundle, "shm")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    tar = ["tar", "--create", "--sparse", "--numeric-owner", "--directory", str(folder)]
    run([*tar, "--file", str(images / SHM), "."], VzExitCode.DUMP_FAILED, TIMEOUT)


def unpack_shm(bundle: str, images: Path) -> None:
    """MigrateError(7)."""
    if (images / SHM).exists():
        tar = ["tar", "--extract", "--numeric-owner", "--same-permissions", "--file"]
        words = [*tar, str(images / SHM), "--directory", f"{bundle}/shm"]
        run(words, VzExitCode.RESTORE_FAILED, TIMEOUT)


def pack_log(log: str, sent: int, init: int, images: Path) -> None:
    """The output from the position `sent` on.  All of it, if the file was cut since.
    MigrateError(8)."""
    _await_monitor(init)
    try:
        with open(log, "rb") as f:
            start = sent if os.fstat(f.fileno()).st_size >= sent else 0
            f.seek(start)
            with open(images / f"{LOG}{start}", "xb") as out:
                shutil.copyfileobj(f, out)
    except FileNotFoundError:
        return
    except OSError as e:
        raise MigrateError(
            VzExitCode.DUMP_FAILED, f"cannot copy the container's output {log}: {e.strerror}"
        ) from e


def _await_monitor(init: int) -> None:
    """Wait until the pipes of the first process's output are empty."""
    deadline = time.monotonic() + DRAINED
    for number in (1, 2):
        try:
            fd = os.open(f"/proc/{init}/fd/{number}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            while time.monotonic() < deadline:
                left = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))[0]
                if not left:
                    break
                time.sleep(0.002)
        except OSError:
            pass  # not a pipe
        finally:
            os.close(fd)


def unpack_log(log: str, before: Path, images: Path | None) -> None:
    """Put the output together.  before: what came ahead, which is removed.  The monitor appends
    to the same file.  OSError."""
    found = list(images.glob(f"{LOG}*")) if images is not None else []
    ends = {int(m[1]): p for p in found if (m := re.fullmatch(rf"{LOG}(\d+)", p.name))}
    start = min(ends, default=None)
    with open(log, "ab") as out:
        if before.exists() and (start is None or start > 0):
            with before.open("rb") as f:
                shutil.copyfileobj(f, out)
        if start is not None:
            with ends[start].open("rb") as f:
                shutil.copyfileobj(f, out)
    before.unlink(missing_ok=True)

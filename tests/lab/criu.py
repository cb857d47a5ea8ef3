# SPDX-License-Identifier: Apache-2.0
"""The CRIU that the tests use, and whether it works here."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

_INSTALL = Path(__file__).with_name("install-criu")
_DEFAULT = Path("/opt/pyploop-criu/usr/sbin/criu")
_DUMPED = """
import socket, time
s = socket.create_server(("127.0.0.1", 0))
c = socket.create_connection(s.getsockname())
d = s.accept()
print("ready", flush=True)
time.sleep(600)
"""


def program() -> str | None:
    """CRIU's path: $PYPLOOP_CRIU, what install-criu made, or the system's."""
    named = os.environ.get("PYPLOOP_CRIU")
    if named:
        return named
    if prefix := os.environ.get("PYPLOOP_CRIU_PREFIX"):
        return f"{prefix}/usr/sbin/criu"
    return str(_DEFAULT) if _DEFAULT.exists() else shutil.which("criu")


@functools.cache
def problem() -> str | None:
    """Why CRIU cannot be used here, None if it can: `criu check`, and a real dump
    of a process with an open TCP connection (4.1 passes the first, not the second)."""
    criu = program()
    if criu is None:
        return f"no criu: run {_INSTALL}"
    checked = _criu(criu, "check")
    if checked is not None:
        return f"{criu} check: {checked}"
    with tempfile.TemporaryDirectory(prefix="pyploop-criu-") as folder:
        process = subprocess.Popen(
            [sys.executable, "-c", _DUMPED],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            assert process.stdout is not None
            process.stdout.readline()
            process.stdout.close()
            return _dump(criu, process.pid, Path(folder))
        finally:
            process.kill()
            process.wait()


def _dump(criu: str, pid: int, folder: Path) -> str | None:
    words = ["dump", "--tree", str(pid), "--images-dir", str(folder), "--tcp-established"]
    words += ["--network-lock", "skip"]
    # The pipe's other end is ours.
    inode = os.stat(f"/proc/{pid}/fd/1").st_ino
    failed = _criu(criu, *words, "--external", f"pipe:[{inode}]")
    return None if failed is None else f"{criu} cannot dump an inet socket: {failed}"


def _criu(criu: str, *words: str) -> str | None:
    """What CRIU said when it failed."""
    try:
        done = subprocess.run(
            [criu, *words], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        return str(e)
    if done.returncode == 0:
        return None
    lines = [
        x for x in (done.stderr + done.stdout).splitlines() if "Error" in x and "rlimit" not in x
    ]
    return "; ".join(lines) if lines else f"exit code {done.returncode}"

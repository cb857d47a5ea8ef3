# SPDX-License-Identifier: Apache-2.0
"""What the lab needs of the machine."""

from __future__ import annotations

from pathlib import Path

from support import missing, needs

from lab import criu

_PROGRAMS = ("runc", "gcc", "ip", "ss", "ssh", "ssh-keygen", "rsync", "mkfs.ext4", "losetup")
_FILES = {
    "/usr/sbin/sshd": "openssh-server",
    "/usr/include/sqlite3.h": "libsqlite3-dev",
}


def check() -> None:
    """Skip the test where there can be no lab; with CI=true that is a failure."""
    needs("root", "loop", "nsenter", "unshare", "setpriv", "ps", *_PROGRAMS)
    for file, package in _FILES.items():
        if not Path(file).exists():
            missing(f"needs {file} (Debian package {package})")
    if problem := criu.problem():
        missing(problem)

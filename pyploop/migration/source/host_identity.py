# SPDX-License-Identifier: Apache-2.0
"""Who this host is, as the source of a migration."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
from pathlib import Path


def identity(state_dir: str) -> dict[str, str]:
    """Identity of this host as a source.  A target uses resumable files only for the same
    container from the same host."""
    machine = ""
    with contextlib.suppress(OSError):
        machine = Path("/etc/machine-id").read_text().strip()
    text = "\0".join((machine, platform.node(), os.path.abspath(state_dir)))
    own = hashlib.blake2b(os.fsencode(text), digest_size=16).hexdigest()
    return {"id": own, "name": platform.node()[:64]}

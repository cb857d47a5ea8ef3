# SPDX-License-Identifier: Apache-2.0
"""lo of a network namespace that runc makes: CRIU makes it anew on the target, where its lo is
down.  Then no connection over lo could be restored, and the container's 127.0.0.1 would be gone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_SCRIPT = """#!/bin/sh
[ "$CRTOOLS_SCRIPT_ACTION" = post-setup-namespaces ] || exit 0
exec nsenter --net="/proc/$CRTOOLS_INIT_PID/ns/net" ip link set lo up
"""


def options(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """Lines of CRIU's options for a restore; none when the namespace is there already.  folder: for
    the script, which CRIU starts as root.  config: config.json.  OSError."""
    namespaces = (config.get("linux") or {}).get("namespaces") or ()
    if not any(n.get("type") == "network" and not n.get("path") for n in namespaces):
        return []
    script = folder / "lo"
    script.write_text(_SCRIPT)
    script.chmod(0o700)
    return [f"action-script {script}"]


def environment(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The same for a CRIU that reads no file of ours, with what the user's own says."""
    lines = options(folder, config)
    if not lines:
        return {}
    own, file = os.environ.get("CRIU_CONFIG_FILE"), folder / "lo.conf"
    file.write_text("\n".join([Path(own).read_text() if own else "", *lines, ""]))
    return {"CRIU_CONFIG_FILE": str(file)}

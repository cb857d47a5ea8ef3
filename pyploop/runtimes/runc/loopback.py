# SPDX-License-Identifier: Apache-2.0
"""lo of a network namespace that runc makes: CRIU makes it anew on the target, where its lo is
down.  Then no connection over lo could be restored, and the container's 127.0.0.1 would be gone.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyploop.runtimes.runc import local_packets

HOLD = "hold-packets"
"""A file beside the images with rules for nft: no packet comes in while sockets are restored."""
_SCRIPT = """#!/bin/sh
in_network() { exec nsenter --net="/proc/$CRTOOLS_INIT_PID/ns/net" "$@"; }
case "$CRTOOLS_SCRIPT_ACTION" in
post-setup-namespaces)
    (in_network ip link set lo up) || exit 1
    [ ! -e {hold} ] || in_network nft -f {hold} ;;
network-unlock)
    [ ! -e {hold} ] || in_network nft delete table inet {table} ;;
esac
exit 0
"""


def options(folder: Path, config: Mapping[str, Any], hold: Path) -> list[str]:
    """Lines of CRIU's options for a restore; none when the namespace is there already.  folder: for
    the script, which CRIU starts as root.  config: config.json.  hold: the rules are there if
    packets must be held.  OSError."""
    namespaces = (config.get("linux") or {}).get("namespaces") or ()
    if not any(n.get("type") == "network" and not n.get("path") for n in namespaces):
        return []
    script = folder / "lo"
    words = {"hold": shlex.quote(str(hold)), "table": local_packets.TABLE}
    text = _SCRIPT
    for name, word in words.items():
        text = text.replace(f"{{{name}}}", word)
    script.write_text(text)
    script.chmod(0o700)
    return [f"action-script {script}"]


def environment(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The same for a CRIU that reads no file of ours, with what the user's own says."""
    lines = options(folder, config, folder / HOLD)
    if not lines:
        return {}
    own, file = os.environ.get("CRIU_CONFIG_FILE"), folder / "lo.conf"
    file.write_text("\n".join([Path(own).read_text() if own else "", *lines, ""]))
    return {"CRIU_CONFIG_FILE": str(file)}

# SPDX-License-Identifier: Apache-2.0
"""Connections between the containers of a pod.

They go through the loopback of the network that the containers share, and no link can be cut
there.  The kernel would go on sending what a frozen process has written.  A byte that arrives
after the socket there was dumped, and is acknowledged before the socket here is, is in neither
dump.  So no packet comes in while the dumps are made.
"""

from __future__ import annotations

import subprocess

from pyploop.errors import MigrateError, VzExitCode
from pyploop.system import network

_TABLE = "pyploop_pod"
_RULES = f"""table inet {_TABLE}
delete table inet {_TABLE}
table inet {_TABLE} {{
 chain in {{
  type filter hook input priority -400; policy drop;
 }}
}}
"""


def close(pid: int) -> None:
    """In the network of that process.  MigrateError(8)."""
    done = _nft(pid, "-f", "-", text=_RULES)
    if done.returncode:
        raise MigrateError(
            VzExitCode.DUMP_FAILED,
            "cannot hold the packets between the pod's containers: nft: "
            f"{done.stderr.decode(errors='replace').strip()[:200]} (package nftables)",
        )


def open_again(pid: int) -> None:
    """No error when it is open.  MigrateError(8) when nft cannot be run."""
    _nft(pid, "delete", "table", "inet", _TABLE)


def _nft(pid: int, *words: str, text: str = "") -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(
            ["nsenter", f"--net=/proc/{pid}/ns/net", "nft", *words],
            input=text.encode(),
            capture_output=True,
            timeout=network.ANSWER * 10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        raise MigrateError(
            VzExitCode.DUMP_FAILED, f"cannot run nft in the network of the pod: {e}"
        ) from e

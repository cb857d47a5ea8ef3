# SPDX-License-Identifier: Apache-2.0
"""Connections whose both ends are in one network namespace: of a container with itself, or of the
containers of a pod.

They go through the loopback, and no link can be cut there.  The kernel would go on sending what
a frozen process has written.  A byte that arrives after the socket there was dumped, and is
acknowledged before the socket here is, is in neither dump.  In a restore, the kernel sends what is
in the queue of a socket whose peer is not restored yet, and its answer to that ends the
connection.  So no packet comes in while sockets are dumped or restored.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from pyploop.errors import MigrateError, VzExitCode
from pyploop.runtimes.oci.image_files import Images
from pyploop.system import network
from pyploop.wire.criu import File, InetSocket
from pyploop.wire.protobuf import Malformed

TABLE = "pyploop_lo"
RULES = f"""table inet {TABLE}
delete table inet {TABLE}
table inet {TABLE} {{
 chain in {{
  type filter hook input priority -400; policy drop;
 }}
}}
"""
MISSING = (
    "The container is connected with itself by TCP, and this host has no nft (package nftables) to "
    "hold its packets: those connections may fail, or lose data"
)
_MAPPED = bytes(10) + b"\xff\xff"  # RFC 4291, 2.5.5.2: IPv4-mapped

End = tuple[bytes, int]
"""Address, port."""


def close(namespace: str) -> None:
    """In that network (/proc/PID/ns/net).  MigrateError(8)."""
    done = _nft(namespace, "-f", "-", text=RULES)
    if done.returncode:
        raise MigrateError(
            VzExitCode.DUMP_FAILED,
            "cannot hold the packets of connections within the container: nft: "
            f"{done.stderr.decode(errors='replace').strip()[:200]} (package nftables)",
        )


def open_again(namespace: str) -> None:
    """No error when it is open.  MigrateError(8) when nft cannot be run."""
    if available():  # else nobody has closed it
        _nft(namespace, "delete", "table", "inet", TABLE)


def available() -> bool:
    return shutil.which("nft") is not None


def _nft(namespace: str, *words: str, text: str = "") -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(
            ["nsenter", f"--net={namespace}", "nft", *words],
            input=text.encode(),
            capture_output=True,
            timeout=network.ANSWER * 10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        raise MigrateError(
            VzExitCode.DUMP_FAILED, f"cannot run nft in the container's network: {e}"
        ) from e


def end_of(address: bytes, port: int) -> End:
    """A server of both families has the IPv4 address of its peer in the form of IPv6."""
    return address.removeprefix(_MAPPED), port


def within(ends: Iterable[tuple[End, End]]) -> set[tuple[End, End]]:
    """Those of the sockets (own end, peer's end) whose peers are among them."""
    every = set(ends)
    return {(own, peer) for own, peer in every if (peer, own) in every}


def in_images(folders: Sequence[Path]) -> bool:
    """Whether packets must be held while these images are restored.  They were checked before:
    False when one cannot be read."""
    ends = []
    try:
        for folder in folders:
            if not any(folder.glob("tcp-stream-*.img")):
                continue
            # CRIU restores the rule, too, if it has dumped the namespace.
            if any(TABLE.encode() in f.read_bytes() for f in folder.glob("nftables-*.img")):
                return True
            for entry in Images(folder).entries("files.img", "files"):
                if (inet := entry.message(File.INET)) is not None:
                    own, peer = (
                        b"".join(w.to_bytes(4, "little") for w in inet.numbers32(field))
                        for field in (InetSocket.SOURCE, InetSocket.PEER)
                    )
                    ports = inet.number32(InetSocket.PORT), inet.number32(InetSocket.PEER_PORT)
                    ends.append((end_of(own, ports[0] or 0), end_of(peer, ports[1] or 0)))
    except (OSError, Malformed):
        return False
    return bool(within(e for e in ends if e[1][1]))

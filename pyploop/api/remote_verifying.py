# SPDX-License-Identifier: Apache-2.0
"""`verify` with one side on another host: that host reads its own, and only hashes go over."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from pyploop._core import PROOF_FANOUT, Proof
from pyploop.api.copy_client import CopyClient
from pyploop.api.copying import CopyOptions
from pyploop.api.remote_host import RemoteHost
from pyploop.diskcopy import proof as proofs
from pyploop.diskcopy.receipt import Receipt
from pyploop.errors import ConnectError, ProtocolError, PyploopError
from pyploop.report.events import Reporter
from pyploop.units import BLOCK
from pyploop.wire import copy_messages

PARTS = 4096
"""When so many nodes of a level differ, no lower level is asked for."""
WAIT = 1.0
"""Seconds that one request to wait for the reading takes at most."""


class _Client(CopyClient):
    what = "the comparison"
    nothing = "nothing was compared"

    def lost(self, error: PyploopError, op: str, why: str) -> PyploopError:
        return ConnectError(f"the connection to {self.host} was lost: {why}; {self.nothing}")


class _Host(RemoteHost):
    client_kind = _Client
    has_lanes = False


class There:
    """An image on another host (verifying.Image)."""

    def __init__(self, ask: Callable[..., dict[str, Any]], host: str, answer: Any) -> None:
        self._ask, self._host = ask, host
        self.size: int = answer["size"]
        self.is_device: bool = answer["device"]
        self._wanted = 0
        self._root = b""

    def start(self, size: int) -> None:
        self._wanted = size
        self._ask("digest", size=size)

    def root(self) -> bytes:
        while not self._root:
            answer = self._ask("join", timeout=WAIT)
            if answer["done"]:
                self._root = self._checked(answer.get("result", {}).get("root"))
        return self._root

    def _checked(self, root: Any) -> bytes:
        with contextlib.suppress(TypeError, ValueError):
            if len(found := bytes.fromhex(root)) == proofs.HASH:
                return found
        raise ProtocolError(f"{self._host} answered with a wrong root")

    def differences(self, own: Proof) -> list[tuple[int, int]]:
        level, nodes = own.levels, [0]
        while level and len(nodes) <= PARTS:
            level -= 1
            nodes = self._below(own, level, nodes)
        unit = BLOCK * PROOF_FANOUT**level
        found: list[tuple[int, int]] = []
        for node in nodes:
            start, end = node * unit, min((node + 1) * unit, own.size)
            if found and found[-1][1] == start:
                start = found.pop()[0]
            found.append((start, end))
        if not found:
            raise ProtocolError(f"{self._host} answered with hashes that are not those of its root")
        return found

    def _below(self, own: Proof, level: int, nodes: Sequence[int]) -> list[int]:
        """Which children of these nodes of a level differ."""
        size = proofs.HASH if level else proofs.LEAF
        found = []
        for i in range(0, len(nodes), copy_messages.MOST_NODES):
            some = nodes[i : i + copy_messages.MOST_NODES]
            ours = [proofs.children(own, level, node) for node in some]
            theirs = self._hashes(level, some, sum(map(len, ours)))
            at = 0
            for node, hashes in zip(some, ours, strict=True):
                for child in range(0, len(hashes), size):
                    if hashes[child : child + size] != theirs[at + child : at + child + size]:
                        found.append(node * PROOF_FANOUT + child // size)
                at += len(hashes)
        return found

    def nodes(self, level: int) -> bytes:
        """Not of the highest level, which has one node."""
        above = -(-self._wanted // (BLOCK * PROOF_FANOUT ** (level + 2)))
        count = -(-self._wanted // (BLOCK * PROOF_FANOUT ** (level + 1)))
        return self._hashes(level + 1, range(above), count * proofs.HASH)

    def _hashes(self, level: int, nodes: Sequence[int], size: int) -> bytes:
        found: bytes = self._ask("hashes", level=level, nodes=list(nodes))["hashes"]
        if len(found) != size:
            raise ProtocolError(f"{self._host} answered with {len(found)} bytes of hashes")
        return found


def open_there(
    owned: contextlib.ExitStack, host: str, path: str, ssh_options: Sequence[str], program: str
) -> Receipt | There:
    """What that path is there.  owned: closes the connection."""
    options = CopyOptions(ssh_options=ssh_options, remote_pyploop=program)
    there = owned.enter_context(_Host(host, options, Reporter()))
    try:
        answer = there.ask("look", path=path)
    except ProtocolError as e:
        raise ConnectError(
            f"pyploop {there.peer.version} on {host} cannot compare: {e}; nothing was compared",
            hint="install the version of this host there",
        ) from e
    if answer["receipt"] is not None:
        return Receipt.parse(answer["receipt"], f"{host}:{path}")
    return There(there.ask, host, answer)

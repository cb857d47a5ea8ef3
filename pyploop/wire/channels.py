# SPDX-License-Identifier: Apache-2.0
"""Numbers of the agent protocol's channels: how many there are, and how many a
migration needs.  No I/O.

A number is used once in a connection: a frame that comes late for a channel that has
ended (CREDIT, RESET) can then belong to no other.  The frame's field (u16) has more
of them than a migration uses.
"""

from __future__ import annotations

LAST = 0xFFFF
"""The largest number that a frame has room for."""
LAST_OLD = 63
"""The largest number that each agent of protocol 1 takes.  One that takes all of
them says so: `channels` is among its capabilities (`takes` in the answer to `check`)."""
AT_ONCE = 256
"""Channels that are open at once in a connection.  mux.WINDOW bytes of each may wait in
memory, and at both ends each has two descriptors, of which a process has 1,024."""

OTHERS = 4
"""For other things than disks, trees and rounds of memory: the dump, items, and
digests of these."""
ROUNDS = 20
"""Rounds of memory at most."""
TREE = 5
"""Of each tree at least: the first pass, and the last one, which may be made twice."""
TREE_LAST = 4
"""Of each tree for the last pass alone."""


def needed(disks: int, trees: int, rounds: int = ROUNDS) -> int:
    """Numbers that a migration uses, without digests of disks and more passes."""
    return disks + TREE * trees + rounds + OTHERS


LANES = 1023
"""Lanes in one migration at most; each has a number of its own.  A lane that was lost is
replaced by one with another number."""
LANES_AT_ONCE = 64
"""Lanes that an agent keeps open at once, those included that have ended."""
BULK_AT_ONCE = 8
"""Channels that are open at once in a connection over several lanes: the window of each may
wait in memory, and is 16 MiB there."""
BULK_TREES = 6
"""Of these for directories: the rest is for memory images, of which one stream comes at a time,
while the one before may still be ending."""
BULK_AT_AGENT = 2 * BULK_AT_ONCE
"""The same for the agent, at which a channel that the source has done with ends later."""

PROBE = 32 << 20
"""Bytes of a probe of the connection at most."""
PROBES = 8
"""Probes in a connection at most."""

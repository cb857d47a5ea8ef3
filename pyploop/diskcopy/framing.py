# SPDX-License-Identifier: Apache-2.0
"""How blocks are cut into frames: our way, or that of the C tool.  No I/O.

A C receiver understands any D1 stream.  But an unknown program gets what `ploop copy`
is known to send, zeroes included (docs/internals/protocol.md has the reasons).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pyploop import _core
from pyploop.disks.source import Source
from pyploop.trackers import Batch
from pyploop.units import MIB

Compat = Literal["auto", "ploop", "native"]
COMPATS: tuple[Compat, ...] = ("auto", "ploop", "native")

PIECE = 256 * 1024
"""Bytes of one read and one frame from a page cache."""
MAX_CLUSTER = 64 * MIB

Extent = tuple[int, int]


@dataclass(frozen=True)
class Framing:
    """How the blocks of a copy are cut into frames, and which are sent."""

    name: str
    """For the log and the summary."""
    as_ploop: bool
    """Frames are clusters, and dirty extents are sent as they are, zero or not."""
    holes_left_out: bool
    """Not sent: holes of the source, and what has become zero where the target is known
    to have zeroes."""
    exact: bool = False
    """Only frames that the C tool would send: no HELLO, one SYNC."""

    def cluster(self, source: Source, unit: int) -> int:
        """Bytes of the largest frame; a multiple of `unit`."""
        if self.as_ploop:
            return max(min(source.cluster, MAX_CLUSTER) // unit, 1) * unit
        if source.is_image:
            return min(max(source.cluster, MIB), MAX_CLUSTER)
        # Pieces that stay in the core's cache.  The peer then writes such pieces, too,
        # which needs no large folios.
        return PIECE if source.align == 1 else MIB

    def parts(self, source: Source) -> tuple[list[Extent], list[Extent]]:
        """(data, holes) of the source, as the first pass treats them."""
        if self.as_ploop and not self.holes_left_out:
            return ([(0, source.size)] if source.size else []), []
        return source.holes()

    def needs_hashes(self, tracker_needs: bool) -> bool:
        """Whether the pump must know what data the target has.  Then it widens extents to
        whole blocks, which the C tool does not."""
        return tracker_needs or not self.exact

    def flags(self, batch: Batch) -> int:
        """The flags of the pass over this batch."""
        bits = _core.PASS_CHANGED if batch.changed else 0
        bits |= _core.PASS_HOLES if batch.holes else 0
        if self.holes_left_out or batch.holes:
            bits |= _core.PASS_SKIP_ZERO
        return bits


NATIVE = Framing("native", as_ploop=False, holes_left_out=True)
PYPLOOP = Framing("pyploop peer", as_ploop=False, holes_left_out=True)
PLOOP = Framing("ploop peer", as_ploop=True, holes_left_out=False)
PERHAPS_PLOOP = Framing("perhaps a ploop peer", as_ploop=True, holes_left_out=True)
EXACT = Framing("as ploop sends it", as_ploop=True, holes_left_out=False, exact=True)

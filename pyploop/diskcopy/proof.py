# SPDX-License-Identifier: Apache-2.0
"""The proof of a copy: both ends keep a tree of hashes of what the target must hold, and
compare the roots before END is answered (docs/internals/proof.md).

The sender's tree is of what it sent, the receiver's of what it wrote.  When the roots
differ, the sender asks for the receiver's nodes, from the top down, and sends those blocks
again, once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from pyploop import _core
from pyploop._core import Proof
from pyploop.errors import ProtocolError
from pyploop.units import BLOCK, format_size
from pyploop.wire import d1

Wish = Literal["auto", "always", "never"]
WISHES: tuple[Wish, ...] = ("auto", "always", "never")

LEAF = 8
"""Bytes of the hash of a block."""
HASH = 16
"""Bytes of a node."""
FANOUT = _core.PROOF_FANOUT
TRIES = 2
"""Ends of the stream, until a target that differs makes the copy fail."""

Ask = Callable[[int, list[int], int], bytes]
"""(level, nodes, bytes of the answer) -> the children of these nodes."""


class TargetDiffers(ProtocolError):
    """The target is not what was sent.  ask: for nodes of the receiver's tree; None: it is
    too late for that."""

    def __init__(self, *args: object, ask: Ask | None = None) -> None:
        super().__init__(*args)
        self.ask = ask


def frame(proof: Proof) -> bytes:
    """The PROOF frame of what was sent."""
    return d1.proof(proof.size, BLOCK, _core.PROOF_ALGORITHM, proof.root())


class Witness:
    """The receiver's side: keeps the proof of what is written, and compares."""

    def __init__(
        self, size: int, say: Callable[[bytes], None], record: Callable[[d1.Times], bytes]
    ) -> None:
        """size: of the image.  say: sends bytes to the sender; WriteError.  record: what
        follows an answer.  OSError: there is no address space for so large an image."""
        self.proof = Proof(size)
        self._say, self._record = say, record
        self.why = ""
        """Why the target was last refused."""
        self.refused = 0
        """So often."""

    def agrees(self, claim: bytes | None, fd: int) -> bool:
        """After END: whether the target in `fd` is what the sender's PROOF says.
        ProtocolError: there is no such proof, or it is of something else."""
        if claim is None:
            raise ProtocolError("the sender ended the copy without the PROOF that it agreed to")
        size, block, algorithm, root = d1.CLAIM.unpack(claim)
        if (size, block, algorithm) != (self.proof.size, BLOCK, _core.PROOF_ALGORITHM):
            raise ProtocolError(
                f"the sender's PROOF is of {size} bytes in blocks of {block} by algorithm "
                f"{algorithm}, and not of {self.proof.size} bytes in blocks of {BLOCK} by "
                f"{_core.PROOF_ALGORITHM}"
            )
        own = self.proof.root(fd)
        self.why = "" if own == root else f"its root is {own.hex()}, and the sender's {root.hex()}"
        return not self.why

    def refuse(self, times: d1.Times) -> None:
        """Answer END: the target is not what was sent.  WriteError."""
        self.refused += 1
        self._say(d1.DIFFERS + self._record(times))

    def answer(self, level: int, asked: bytes) -> None:
        """Answer a question about nodes.  ProtocolError: they are not there, or END was not
        refused; WriteError."""
        if not self.refused:
            raise ProtocolError("the sender asked for nodes of a proof that was not refused")
        nodes = [node for (node,) in d1.NODE.iter_unpack(asked)]
        self._say(b"".join(children(self.proof, level, node) for node in nodes))

    def failure(self, path: str, what: str) -> TargetDiffers:
        """The error of a copy that ends because of a difference."""
        return TargetDiffers(
            f"what was written to {path} is not what the sender sent ({self.why}), and {what}; "
            f"{path} was not created"
        )


def children(proof: Proof, level: int, node: int) -> bytes:
    """The hashes of a node's children.  ProtocolError: the peer asked for one that is not
    there."""
    if not 0 <= level < proof.levels or node >= _count(proof, level):
        raise ProtocolError(
            f"the sender asked for node {node} of level {level}, which is not there"
        )
    first, last = child_range(proof, level, node)
    if level:
        return proof.nodes(level - 1, first, last)
    return proof.leaves(first, last)


def _count(proof: Proof, level: int) -> int:
    """Nodes of a level; of level -1 the blocks."""
    unit: int = BLOCK * FANOUT ** (level + 1)
    return max(-(-proof.size // unit), 1 if level >= 0 else 0)


def child_range(proof: Proof, level: int, node: int) -> tuple[int, int]:
    """The children of a node: numbers of nodes of the level below, or of blocks."""
    first = node * FANOUT
    return first, min(first + FANOUT, _count(proof, level - 1))


def descend(proof: Proof, ask: Ask) -> list[tuple[int, int]]:
    """The parts of the image, as (start, end) in bytes, in which the receiver's tree is
    not ours.  TargetDiffers: there are too many."""
    nodes = [0]
    for level in reversed(range(proof.levels)):
        if len(nodes) > d1.MANY_NODES:
            unit = BLOCK * FANOUT ** (level + 1)
            raise TargetDiffers(
                f"the target differs from what was sent in {len(nodes)} parts of "
                f"{format_size(unit)}, too many to send again; no target was made"
            )
        if not nodes:
            break
        size = LEAF if level == 0 else HASH
        ranges = [child_range(proof, level, node) for node in nodes]
        theirs = ask(level, nodes, size * sum(last - first for first, last in ranges))
        found: list[int] = []
        at = 0
        for node, (first, last) in zip(nodes, ranges, strict=True):
            ours = children(proof, level, node)
            for child in range(last - first):
                part = slice(child * size, (child + 1) * size)
                if ours[part] != theirs[at + part.start : at + part.stop]:
                    found.append(first + child)
            at += len(ours)
        nodes = found
    return [(b * BLOCK, min((b + 1) * BLOCK, proof.size)) for b in nodes]

# SPDX-License-Identifier: Apache-2.0
"""Whether an image is what it should be: `verify`."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass

from pyploop._core import Proof
from pyploop.api.tracking import Extent
from pyploop.diskcopy import receipt
from pyploop.diskcopy.receipt import Receipt
from pyploop.disks import opening


@dataclass(frozen=True, kw_only=True)
class VerifyResult:
    """What a comparison has found."""

    same: bool
    root: str
    """Of what was read, in hexadecimal."""
    size: int
    """Bytes that were compared."""
    differing: tuple[Extent, ...]
    """Where the two differ: of a pair in blocks of 4 KiB; of a file and a receipt in the parts
    that it knows, 1 MiB or more.  Empty, too, when the sizes differ."""
    why: str
    """What differs, in words; empty: nothing."""
    past_end: int
    """Bytes of a device behind the image, which were not looked at."""
    proven: bool | None
    """Whether the receiver had compared the receipt's root with its own; null: there is no
    receipt, or no receiver (a local copy)."""


def verify(path: str | os.PathLike[str], other: str | os.PathLike[str]) -> VerifyResult:
    """Read a file or device, and compare it with the receipt of a copy, or with another file
    or device, all of which are at rest.

    A plain file is read from its disk, and not from what the page cache has of it.  A device
    may be larger than a receipt's image.  DeviceError, OpenError: there is no such file or
    device; ReadError; FormatError: the receipt is damaged.
    """
    path, other = os.fspath(path), os.fspath(other)
    with contextlib.ExitStack() as owned:
        one = owned.enter_context(contextlib.closing(opening.open_source(path, to_freeze=False)))
        if (paper := Receipt.read(other)) is not None:
            size, wanted = one.size, paper.size
            proven = None if paper.acknowledged == "local" else paper.proven
            if size < wanted or (size > wanted and not one.is_device):
                return _sizes(path, size, other, wanted, proven)
            proof = receipt.digest(one, wanted)
            same = _root(proof) == paper.root
            found = [] if same else receipt.wrong_parts(paper, proof)
            why = "" if same else f"{path} is not what {other} says"
            return _result(proof, found, why, size - wanted, proven)
        two = owned.enter_context(contextlib.closing(opening.open_source(other, to_freeze=False)))
        if two.size < one.size or (two.size > one.size and not two.is_device):
            return _sizes(path, one.size, other, two.size, None)
        proof, target = receipt.digest(one, one.size), receipt.digest(two, one.size)
        found = list(proof.differences(target))
        why = f"{path} and {other} differ" if found else ""
        return _result(proof, found, why, two.size - one.size, None)


def _root(proof: Proof) -> str:
    return proof.root().hex()


def _sizes(path: str, size: int, other: str, wanted: int, proven: bool | None) -> VerifyResult:
    why = f"{path} has {size} bytes, and {other} has {wanted}"
    return VerifyResult(
        same=False, root="", size=0, differing=(), why=why, past_end=0, proven=proven
    )


def _result(
    proof: Proof, found: list[tuple[int, int]], why: str, past_end: int, proven: bool | None
) -> VerifyResult:
    return VerifyResult(
        same=not why,
        root=_root(proof),
        size=proof.size,
        differing=tuple(Extent(*part) for part in found),
        why=why,
        past_end=past_end,
        proven=proven,
    )

# SPDX-License-Identifier: Apache-2.0
"""Whether an image is what it should be: `verify`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pyploop._core import Proof
from pyploop.api.tracking import Extent
from pyploop.diskcopy import receipt
from pyploop.diskcopy.receipt import Receipt
from pyploop.disks import opening
from pyploop.disks.source import Source
from pyploop.errors import ParameterError


@dataclass(frozen=True, kw_only=True)
class VerifyResult:
    """What a comparison has found."""

    same: bool
    root: str
    """Of what was read, in hexadecimal."""
    size: int
    """Bytes that were compared."""
    differing: tuple[Extent, ...]
    """Where the two differ: of a pair in blocks of 4 KiB (between two hosts in larger parts, if
    there are many); of a file and a receipt in the parts that it knows, 1 MiB or more.  Empty,
    too, when the sizes differ."""
    why: str
    """What differs, in words; empty: nothing."""
    past_end: int
    """Bytes of a device behind the image, which were not looked at."""
    proven: bool | None
    """Whether the receiver had compared the receipt's root with its own; null: there is no
    receipt, or no receiver (a local copy)."""


def verify(
    path: str | os.PathLike[str],
    other: str | os.PathLike[str],
    *,
    ssh_options: Sequence[str] = (),
    remote_pyploop: str = "pyploop",
) -> VerifyResult:
    """Read a file or device, and compare it with the receipt of a copy, or with another file
    or device, all of which are at rest.

    One of the two may be on another host: `[user@]host:path`, as for `copy`, with the same
    ssh_options and remote_pyploop.  Each host reads its own; only hashes go over.

    A plain file is read from its disk, and not from what the page cache has of it.  A device
    may be larger than a receipt's image.  DeviceError, OpenError: there is no such file or
    device; ReadError; FormatError: the receipt is damaged; ConnectError: no pyploop on the
    other host, or the connection was lost.
    """
    with contextlib.ExitStack() as owned:

        def opened(host: str, name: str, *, receipts: bool) -> Receipt | Image:
            if host:
                from pyploop.api.remote_verifying import open_there

                return open_there(owned, host, name, ssh_options, remote_pyploop)
            if receipts and (paper := Receipt.read(name)) is not None:
                return paper
            source = opening.open_source(name, to_freeze=False)
            owned.callback(source.close)
            return _Here(source)

        (host, name), (other_host, other_name) = _place(path), _place(other)
        path, other = os.fspath(path), os.fspath(other)
        if host and other_host:
            raise ParameterError(
                f"{path} and {other} are both not on this host, and one of them must be",
                hint=f"run `pyploop verify` on {host}",
            )
        one = opened(host, name, receipts=False)
        two = opened(other_host, other_name, receipts=True)
        if isinstance(one, Receipt):
            raise ParameterError(f"{path} is a receipt: name it after the file that it is about")
        if isinstance(two, Receipt):
            return _with_receipt(path, one, other, two)
        return _pair(path, one, other, two)


class Image(Protocol):
    """A file or device, here or on another host."""

    size: int
    is_device: bool

    def start(self, size: int) -> None:
        """Begin to read the first `size` bytes, if that goes on beside what is done here."""

    def root(self) -> bytes:
        """Of these bytes, when they were read."""

    def differences(self, own: Proof) -> list[tuple[int, int]]:
        """Where they are not those of a proof here, which has another root."""

    def nodes(self, level: int) -> bytes:
        """A level of their tree, of PARTS nodes at most."""


class _Here:
    """An image on this host."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.size, self.is_device = source.size, source.is_device
        self.proof: Proof | None = None

    def start(self, size: int) -> None:
        self._wanted = size

    def read(self) -> Proof:
        if self.proof is None:
            self.proof = receipt.digest(self._source, self._wanted)
        return self.proof

    def root(self) -> bytes:
        return self.read().root()

    def differences(self, own: Proof) -> list[tuple[int, int]]:
        return list(self.read().differences(own))

    def nodes(self, level: int) -> bytes:
        return self.read().nodes(level)


def _place(path: str | os.PathLike[str]) -> tuple[str, str]:
    """(host, path on it); no host: this one."""
    text = os.fspath(path)
    if not isinstance(path, str) or ":" not in path:
        return "", text
    from pyploop.transport.place import place

    try:
        return place(path)
    except ValueError as e:
        raise ParameterError(str(e)) from e


def _with_receipt(path: str, one: Image, other: str, paper: Receipt) -> VerifyResult:
    size, wanted = one.size, paper.size
    proven = None if paper.acknowledged == "local" else paper.proven
    if size < wanted or (size > wanted and not one.is_device):
        return _sizes(path, size, other, wanted, proven)
    one.start(wanted)
    root = one.root()
    same = root.hex() == paper.root
    found = [] if same else receipt.wrong_parts(paper, one.nodes)
    why = "" if same else f"{path} is not what {other} says"
    return _result(root, wanted, found, why, size - wanted, proven)


def _pair(path: str, one: Image, other: str, two: Image) -> VerifyResult:
    size = one.size
    if two.size < size or (two.size > size and not two.is_device):
        return _sizes(path, size, other, two.size, None)
    one.start(size)
    two.start(size)
    here, there = (one, two) if isinstance(one, _Here) else (two, one)
    assert isinstance(here, _Here)
    own, root = here.read(), one.root()
    found = [] if root == two.root() else there.differences(own)
    why = f"{path} and {other} differ" if found else ""
    return _result(root, size, found, why, two.size - size, None)


def _sizes(path: str, size: int, other: str, wanted: int, proven: bool | None) -> VerifyResult:
    why = f"{path} has {size} bytes, and {other} has {wanted}"
    return VerifyResult(
        same=False, root="", size=0, differing=(), why=why, past_end=0, proven=proven
    )


def _result(  # noqa: PLR0917
    root: bytes,
    size: int,
    found: list[tuple[int, int]],
    why: str,
    past_end: int,
    proven: bool | None,
) -> VerifyResult:
    return VerifyResult(
        same=not why,
        root=root.hex(),
        size=size,
        differing=tuple(Extent(*part) for part in found),
        why=why,
        past_end=past_end,
        proven=proven,
    )

# SPDX-License-Identifier: Apache-2.0
"""How the tmpfs of a container were packed: the images of a dump say so themselves."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pyploop.report.events import Reporter
from pyploop.units import format_size

PATTERN = "tmpfs-*.img"
"""CRIU's images that have the files of a tmpfs."""
_MAGIC = slice(257, 265)
_STORED = b"\x1f\x8b\x08\0\0\0\0\0\x04\x03"
"""How csrc/tmpfs_tar begins a gzip file: no name, no time."""


@dataclass(frozen=True)
class Packed:
    """A tmpfs in the dump."""

    image: str
    size: int
    packing: str
    """plain, wrapped: by pyploop's tar.  compressed: by the host's tar and gzip."""


def packed(images: Path) -> list[Packed]:
    """Each tmpfs in the folder of a dump."""
    found = []
    for path in sorted(images.glob(PATTERN)):
        with path.open("rb") as f:
            head = f.read(512)
        packing = "plain" if head[_MAGIC] == b"ustar  \0" else "compressed"
        packing = "wrapped" if head.startswith(_STORED) else packing
        found.append(Packed(path.name, path.stat().st_size, packing))
    return found


_WORDS = {
    "plain": "not compressed",
    "wrapped": "not compressed, in gzip's format, because the target's pyploop is older",
    "compressed": "by the host's tar and gzip, because CRIU did not find pyploop's",
}


def report(folders: Iterable[Path], report: Reporter) -> None:
    """Say how each tmpfs was packed."""
    every = [one for folder in folders for one in packed(folder)]
    for packing, words in _WORDS.items():
        sizes = [one.size for one in every if one.packing == packing]
        if sizes:
            report.event("tmpfs", packing=packing, count=len(sizes), size=sum(sizes))
            report.info(
                f"{len(sizes)} tmpfs of the container ({format_size(sum(sizes))}) moved {words}"
            )

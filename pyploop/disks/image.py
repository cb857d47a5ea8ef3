# SPDX-License-Identifier: Apache-2.0
"""Image files: raw, and ploop1 (Parallels expandable) of versions 1 and 2.

Offsets and rules are tabulated in docs/internals/images.md; they follow the published
description of the format (docs/interop/parallels of the QEMU project), and
tests/unit/test_image.py compares with what qemu-img makes and reads.

Invariant: a number from a file is compared with the size of that file before it decides
how much is read or kept.  All sizes are bytes unless they are called sectors.  Nothing
here writes.
"""

from __future__ import annotations

import mmap
import os
import stat
import struct
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from pyploop.errors import DeviceError, FormatError, OpenError
from pyploop.system.file_extents import data_extents
from pyploop.units import SECTOR

Format = Literal["raw", "ploop1"]

SIGNATURES = {b"WithoutFreeSpace": 1, b"WithouFreSpacExt": 2}
"""The first 16 bytes -> the version."""
HEADER = struct.Struct("<16sIIIIIQIIIQ")
"""sig, type, heads, cylinders, sectors per cluster, clusters, size in sectors,
in use, first block (sectors), flags, extension (sectors); packed."""
HEADER_FRAME = 512
"""What `ploop copy` sends of the header at the end."""
EXPANDING = 2
"""`m_Type`: the only one that has a BAT."""
IN_USE = 0x746F6E59
CLOSED = (0, 0x312E3276)
"""`m_DiskInUse` of an image that is not open for writing."""
CLOSED_EXTENDED = 0x312E3276
"""Written by software that keeps the format extension up to date."""
ENTRY = 4
PIECE = 256 << 10
"""Bytes of the BAT that are read at a time."""
MAX_ENTRIES = 1 << 28
"""Entries of a BAT that is read (256 TiB in clusters of 1 MiB)."""
MAX_CLUSTERS = 1 << 30
"""Clusters of a file.  Each takes one bit of memory, so 128 MiB at most."""

_IN_USE_AT = 44
_ZEROES = bytes(PIECE)
_WORD = "I" if array("I").itemsize == ENTRY else "L"


@dataclass(frozen=True)
class Header:
    """A ploop1 header whose fields are consistent."""

    version: int
    cluster: int
    entries: int
    """Entries of the BAT: one for each cluster of the disk."""
    size: int
    """The size of the disk."""
    in_use_value: int
    data_start: int
    """Where the first cluster may lie in the file."""
    flags: int
    extension: int
    """Where the format extension lies in the file; 0: there is none."""

    @property
    def in_use(self) -> bool:
        """Open for writing, or not closed well."""
        return self.in_use_value == IN_USE

    @property
    def entry_unit(self) -> int:
        """Bytes that one unit of a BAT entry stands for."""
        return SECTOR if self.version == 1 else self.cluster

    @property
    def bat_end(self) -> int:
        return HEADER.size + self.entries * ENTRY


@dataclass(frozen=True)
class Image:
    """An image file.  `size` is the disk's, `file_size` the file's.

    allocated: raw: what the file system has allocated; ploop1: the clusters
    that the BAT names.  data: what is not a hole in the file (SEEK_DATA)."""

    path: str
    format: Format
    size: int
    file_size: int
    allocated: int
    data: int
    header: Header | None = None
    signed: bool = False
    """It begins with a ploop1 signature, whatever the format is."""
    notes: list[str] = field(default_factory=list)
    """What could not be found out, as texts."""

    @property
    def in_use(self) -> bool | None:
        """None: the format does not say."""
        return self.header.in_use if self.header else None


def is_ploop1(start: bytes) -> bool:
    """These first bytes of a file carry a ploop1 signature."""
    return start[:16] in SIGNATURES


def clear_in_use(header: bytes) -> bytes:
    """The first bytes of a ploop1 image (48 at least, 512 in the frame that
    ends a copy) with `m_DiskInUse` set to zero, as in an image that is not in use.
    The rest is not checked: the ploop driver has said that it is a ploop1 image."""
    if len(header) < _IN_USE_AT + 4:
        raise FormatError(f"{len(header)} bytes are too few for a ploop1 header")
    return header[:_IN_USE_AT] + bytes(4) + header[_IN_USE_AT + 4 :]


def _bad(name: str, offset: int, what: str) -> FormatError:
    return FormatError(f"{name}: offset {offset}: {what}")


def parse_header(start: bytes, name: str) -> Header:
    """The header in the first 64 bytes of a file; FormatError, with the file's
    `name` and the offset, when it is damaged."""
    if not is_ploop1(start):
        raise _bad(name, 0, f"no ploop1 signature ({start[:16]!r})")
    if len(start) < HEADER.size:
        raise _bad(name, len(start), f"the file ends in the header of {HEADER.size} bytes")
    fields = HEADER.unpack_from(start)
    sig, kind, _heads, _cylinders, sectors, entries, size, in_use, first, flags, ext = fields
    version = SIGNATURES[sig]
    if kind != EXPANDING:
        raise _bad(name, 16, f"the image type is {kind} ({EXPANDING} expected)")
    if sectors == 0 or sectors % 2:
        raise _bad(name, 28, f"the cluster has {sectors} sectors (an even number expected)")
    if version == 1:
        size &= 0xFFFFFFFF  # the upper half is unused
    if size * SECTOR >= 1 << 63:
        raise _bad(name, 36, f"the disk has {size} sectors, which is more than a file can hold")
    if -(-size // sectors) != entries:
        raise _bad(
            name, 32, f"{entries} clusters of {sectors} sectors do not make {size} sectors (at 36)"
        )
    header = Header(
        version, sectors * SECTOR, entries, size * SECTOR, in_use, first * SECTOR, flags,
        ext * SECTOR,
    )  # fmt: skip
    if first == 0 and version == 1:
        # Old images leave it out: then the data follow the BAT.
        after = -(-header.bat_end // SECTOR) * SECTOR
        return replace(header, data_start=after)
    if version == 2 and (first == 0 or first % sectors):
        raise _bad(name, 48, f"the first block is at sector {first}, not a multiple of {sectors}")
    if header.data_start < header.bat_end:
        raise _bad(
            name, 48, f"the first block is at sector {first}, inside the BAT of {entries} entries"
        )
    return header


def count_allocated(fd: int, header: Header, name: str) -> int:
    """Read the BAT of the open file and check every entry; returns the number
    of allocated clusters.

    FormatError: an entry lies in the header area, past the end of the file or
    off the grid of clusters, or is used twice; or the file is too short."""
    file_size = os.fstat(fd).st_size
    if header.bat_end > file_size:
        raise _bad(
            name, 32, f"a BAT of {header.entries} entries ends at {header.bat_end}, "
            f"past the end of the file ({file_size} bytes)",
        )  # fmt: skip
    if header.entries > MAX_ENTRIES:
        raise _bad(name, 32, f"a BAT of {header.entries} entries (at most {MAX_ENTRIES} are read)")
    if header.data_start > file_size:
        raise _bad(
            name, 48, f"the first block would be at {header.data_start}, "
            f"past the end of the file ({file_size} bytes)",
        )  # fmt: skip
    used = _Used(fd, header, name)
    if header.extension and header.in_use_value == CLOSED_EXTENDED:
        if header.extension % header.entry_unit:
            raise _bad(name, 56, f"the extension at {header.extension} is not on a cluster")
        used.add(56, [header.extension // header.entry_unit])
    # What is not there is not read: a small file may have a BAT of a gigabyte.
    parts = data_extents(fd, HEADER.size, header.bat_end)
    return sum(_count_part(fd, start, end, used, name) for start, end in parts)


def _count_part(fd: int, start: int, end: int, used: _Used, name: str) -> int:
    count, at = 0, start
    while at < end:
        want = min(PIECE, end - at)
        piece = os.pread(fd, want, at)
        if len(piece) != want:
            raise _bad(name, at + len(piece), "the file ends in the BAT (it has become shorter)")
        if piece != _ZEROES[:want]:
            words = array(_WORD)
            words.frombytes(piece)
            if sys.byteorder == "big":
                words.byteswap()
            count += used.add(at, words)
        at += want
    return count


class _Used:
    """The clusters of the file that are in use, one bit each."""

    def __init__(self, fd: int, header: Header, name: str) -> None:
        self._fd, self._header, self._name = fd, header, name
        unit = header.entry_unit
        self._step = header.cluster // unit
        self._low = -(-header.data_start // unit)
        # Offsets from here are multiples of a cluster.  A version 1 header
        # without a first block leaves it to the first entry.
        self._grid: int | None = header.data_start // unit
        if header.version == 1 and header.data_start % header.cluster:
            self._grid = None
        # A bit for each cluster.  Only the pages that are touched take memory.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._bits = mmap.mmap(-1, MAX_CLUSTERS >> 3, flags=flags)
        self._measure()

    def _measure(self) -> None:
        size = os.fstat(self._fd).st_size
        self._high = (size - self._header.cluster) // self._header.entry_unit + 1
        """The first entry whose cluster does not fit into the file."""

    def add(self, at: int, words: Sequence[int]) -> int:
        """Mark the clusters of these BAT entries, which are at offset `at`; returns their
        number."""
        count = 0
        low, step, bits = self._low, self._step, self._bits
        for i, word in enumerate(words):
            if not word:
                continue
            if word < low:
                raise self._bad(at, i, word, f"before the first block ({self._header.data_start})")
            if word >= self._high:
                self._measure()  # an image in use may have grown just now
                if word >= self._high:
                    size = os.fstat(self._fd).st_size
                    raise self._bad(at, i, word, f"past the end of the file ({size} bytes)")
            if self._grid is None:
                self._grid = low + (word - low) % step
            slot, off = divmod(word - self._grid, step)
            if off:
                raise self._bad(at, i, word, "not a whole number of clusters after the first")
            if slot >= MAX_CLUSTERS:
                raise self._bad(at, i, word, f"more than {MAX_CLUSTERS} clusters into the file")
            byte, bit = slot >> 3, 1 << (slot & 7)
            if bits[byte] & bit:
                raise self._bad(at, i, word, "a cluster that is used twice")
            bits[byte] |= bit
            count += 1
        return count

    def _bad(self, at: int, i: int, word: int, what: str) -> FormatError:
        where = word * self._header.entry_unit
        return _bad(self._name, at + i * ENTRY, f"entry {word} (offset {where}) is {what}")


def open_regular(path: str, error: type[DeviceError | OpenError], what: str) -> int:
    """Open a regular file for reading, without waiting (as for a FIFO).  `error`, with
    `what` in its text, for anything else."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except (OSError, ValueError) as e:
        if isinstance(e, ValueError):  # a NUL in the name
            raise error(f"cannot open {what} {path!r}: {e}") from e
        raise error.of(f"cannot open {what} {path}", e) from e
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return fd
    os.close(fd)
    kind = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
    raise error(f"cannot read {what} {path}: it is {kind}")


def inspect(
    path: str,
    claimed: Format | None = None,
    error: type[DeviceError | OpenError] = DeviceError,
) -> Image:
    """Read an image file.  Its format is the `claimed` one of the descriptor that names it,
    else found by its signature.  (The guest can write a signature into a raw image, so the
    claim decides.)

    Raises `error` when it cannot be opened, FormatError when it is empty, or
    claimed to be ploop1 and is not, or is damaged."""
    fd = open_regular(path, error, "the image")
    try:
        return _inspect(fd, path, claimed)
    except OSError as e:
        raise error.of(f"cannot read the image {path}", e) from e
    finally:
        os.close(fd)


def _inspect(fd: int, path: str, claimed: Format | None) -> Image:
    notes: list[str] = []

    def note(why: str) -> None:
        notes.append(f"{path}: {why}")

    st = os.fstat(fd)
    size = st.st_size
    if size == 0:
        raise FormatError(f"{path}: offset 0: the file is empty, there is no image in it")
    start = os.pread(fd, HEADER.size, 0)
    signed = is_ploop1(start)
    if claimed == "raw" or (claimed is None and not signed):
        data = sum(end - begin for begin, end in data_extents(fd, 0, size, note))
        return Image(path, "raw", size, size, st.st_blocks * 512, data, None, signed, notes)
    header = parse_header(start, path)
    allocated = count_allocated(fd, header, path) * header.cluster
    data = sum(end - begin for begin, end in data_extents(fd, 0, size, note))
    return Image(path, "ploop1", header.size, size, allocated, data, header, signed, notes)

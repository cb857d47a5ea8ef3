# SPDX-License-Identifier: Apache-2.0
"""Reading the source as a copy does, and what a copy does with the data."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator

from pyploop import _core
from pyploop._core import Extents, Fault, Known, Pump
from pyploop.bench.stages import Stage, rates
from pyploop.diskcopy.framing import NATIVE
from pyploop.disks import small_reads
from pyploop.disks.source import Source
from pyploop.errors import ReadError
from pyploop.system.worker import run_cancellable
from pyploop.units import BLOCK, MIB
from pyploop.wire.d1 import Feature

PART = 64 * MIB
"""Bytes of one sample of reading."""
SAMPLE = 4 * MIB
"""Bytes of the source on which the other stages work."""
TIMES = 4
"""How often a stage works on it for one sample."""
READ, ZERO, DIGEST, COMPRESS = "read", "zero test", "digest", "compress"


def parts(source: Source, size: int = PART) -> Iterator[list[tuple[int, int]]]:
    """Its data, without holes, in parts of `size` bytes, the last one of fewer."""
    part, left = list[tuple[int, int]](), size
    for start, end in source.holes()[0]:
        at = start
        while at < end:
            upto = min(at + left, end)
            part.append((at, upto))
            left -= upto - at
            at = upto
            if not left:
                yield part
                part, left = [], size
    if part:
        yield part


def read(source: Source, seconds: float) -> Stage:
    """From its beginning, by the pump of a copy, which also looks for zeroes."""
    left = parts(source)
    null = os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)
    try:
        pump = into(source, null)

        values = rates(seconds, lambda: send(pump, next(left, None)))
    finally:
        os.close(null)
    return Stage(READ, "bytes/s", values, source.io_mode if values else "there is no data")


def compress(source: Source, seconds: float) -> tuple[Stage, float]:
    """Reading, and zstd:1, by the threads of a copy.  Returns also the part of the bytes
    that is left; 1 if there is no data."""
    left = parts(source)
    null = os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)
    try:
        pump = into(source, null, compressed=True)
        values = rates(seconds, lambda: send(pump, next(left, None)))
        stats = pump.stats
    finally:
        os.close(null)
    ratio = stats.wire / stats.data if stats.data else 1.0
    return Stage(COMPRESS, "bytes/s", values, f"zstd:1, to {ratio:.0%}, with reading"), ratio


def send(pump: Pump, part: list[tuple[int, int]] | None) -> int:
    """Returns its bytes; 0 for None.  ReadError."""
    if part is None:
        return 0
    extents = Extents.of(part)
    try:
        run_cancellable(lambda: pump.run(extents, _core.PASS_SKIP_ZERO), pump.cancel)
    except Fault as fault:
        raise ReadError.of(f"cannot read the source at byte {fault.pos}", fault) from fault
    return extents.bytes


def into(source: Source, fd: int, *, compressed: bool = False) -> Pump:
    """A pump that sends D1 frames of the source, as to a pyploop peer."""
    buffered = source.align == 1
    return Pump(
        src_fd=source.fd,
        src_base=source.base,
        size=source.size,
        align=source.align,
        out_fd=fd,
        sink=_core.SINK_FRAMES,
        cluster=NATIVE.cluster(source, BLOCK),
        slots=8 if buffered else 16,
        readers=1 if buffered else 4,
        known=Known(source.size),
        features=int(Feature.COMPRESSED) if compressed else 0,
        compress=_core.COMPRESS_ALWAYS if compressed else _core.COMPRESS_NEVER,
        tail=0 if source.tail is None else source.tail.size,
        tail_fd=-1 if source.tail is None else source.tail.fd,
        tail_pos=0 if source.tail is None else source.tail.pos,
    )


def sample(source: Source) -> bytes:
    """The first SAMPLE bytes of its data; fewer if it has fewer.  ReadError."""
    first = next(parts(source, SAMPLE), [])
    with mmap.mmap(-1, small_reads.room(source, SAMPLE)) as page, memoryview(page) as memory:
        return b"".join(bytes(small_reads.read(source, memory, a, b - a)) for a, b in first)


def processed(data: bytes, seconds: float) -> list[Stage]:
    """What one core does with data that are in memory.  data: of the source."""
    if not data:
        return []
    # The test for zeroes ends at the first other byte, so it is given zeroes.
    empty = bytes(len(data))
    return [
        Stage(ZERO, "bytes/s", _often(seconds, empty, _core.is_zero), "of zeroes, one core"),
        Stage(
            DIGEST,
            "bytes/s",
            _often(seconds, data, _core.hash_block),
            f"XXH3-64, {_core.hash_kernel()}, one core",
        ),
    ]


def _often(seconds: float, data: bytes, work: Callable[[bytes], object]) -> tuple[float, ...]:
    def one() -> int:
        for _ in range(TIMES):
            work(data)
        return TIMES * len(data)

    return rates(seconds, one)

# SPDX-License-Identifier: Apache-2.0
"""What a target had before the copy, so that only what differs is sent
(docs/internals/update.md).

The end that has the target reads it cell by cell, in ascending order, and gives digests of
its blocks.  The end that has the source reads beside it, part by part, and sends the blocks
whose digests differ.  So both read once, at the same time.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol

from pyploop import _core
from pyploop._core import Known, Prior, PriorCell, Proof, fdatasync
from pyploop.diskcopy.write_mode import DEFAULT_ALIGNMENT
from pyploop.errors import CancelledError, ProtocolError, ReadError, WriteError
from pyploop.system import descriptors, file_extents, kernel
from pyploop.system.jobs import Job
from pyploop.units import BLOCK, format_size
from pyploop.wire import d1

CELL = _core.PRIOR_CELL
FIRST_PART, LARGEST_PART = 16 << 20, 256 << 20
"""Bytes of data at the target whose digests are waited for before the source is read there.
Little at first, so that both ends begin at once; then more, since between two parts the
pipeline of the source runs empty."""
TICK = 0.1
"""Seconds until it is seen that nobody needs the digests any more."""

Extent = tuple[int, int]


def new_key() -> bytes:
    """Drawn when both contents exist: who wrote them must not know it."""
    return os.urandom(_core.PRIOR_KEY)


class Cell(NamedTuple):
    """CELL bytes of the image, or what is left of it."""

    pos: int
    blocks: int
    digests: int
    """Blocks that are not zero."""
    data: bytes
    """A bit for each block, then a digest for each bit."""


class Holder(Protocol):
    """A target with older contents."""

    fd: int
    """The file or device that becomes the copy."""
    path: str
    copied_from: int
    """The file whose data become part of `fd` where that has holes; -1: none."""
    unsynced: bool
    """Somebody may have failed while writing to `fd`: the page cache may hide that its disk
    has something else."""


# ---- the end that has the target


class Teller:
    """Reads what the target has: past the page cache, where that can be, since nobody else
    reads it, and two cells at a time."""

    def __init__(self, target: Holder, size: int, key: bytes, proof: Proof | None) -> None:
        """size: of the image that the target becomes.  proof: it becomes that of what the
        target has."""
        self._target, self._size = target, size
        self._free = [PriorCell(key, size, proof) for _ in range(2)]
        self._gone = False
        self.bytes = 0
        """Bytes of data so far."""

    def cancel(self) -> None:
        """From any thread: `cells` and `tell` fail soon."""
        self._gone = True

    def cells(self) -> Iterator[Cell]:
        """In ascending order; those without data are left out.  WriteError: what is copied
        from another file cannot be written."""
        fd, older = self._target.fd, self._target.copied_from
        if self._target.unsynced:
            with contextlib.suppress(OSError):  # then the digests show what the disk has
                fdatasync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        own = _by_cell(_extents(fd, self._size), self._size)
        others: Iterator[tuple[int, list[Extent]]] = iter(())
        before: Job[Cell] | None = None
        with contextlib.ExitStack() as stack:
            read, read_older = stack.enter_context(_reader(fd, self._target.path)), -1
            if older >= 0:
                read_older = stack.enter_context(_reader(older, self._target.path))
                others = _by_cell(_extents(older, self._size), self._size)
            try:
                for pos, parts, copied in _merged(own, others):
                    job = Job(partial(self._read, pos, read, parts, read_older, copied)).start()
                    if before is not None:
                        last, before = before, job
                        yield from self._done(last)
                    before = job
                if before is not None:
                    yield from self._done(before)
            finally:
                if before is not None:
                    before.end()

    def _done(self, job: Job[Cell]) -> Iterator[Cell]:
        cell = job.join()
        if self._gone:
            raise CancelledError(f"{self._target.path}: its digests are not needed any more")
        self.bytes += cell.digests * BLOCK
        if cell.digests:
            yield cell

    def _read(
        self, pos: int, fd: int, parts: list[Extent], older: int, copied: list[Extent]
    ) -> Cell:
        cell = self._free.pop()
        cell.begin(pos)
        for start, end in parts:
            cell.read(fd, start, end)
        for start, end in _without(copied, parts):
            try:
                cell.read(older, start, end, self._target.fd)
            except OSError as e:
                raise WriteError.of(
                    f"cannot copy what {self._target.path} has into its new contents, near byte "
                    f"{start}",
                    e,
                ) from e
        blocks, digests, data = cell.tell()
        self._free.append(cell)
        return Cell(pos, blocks, digests, data)

    def tell(self, channel: int) -> None:
        """Send all cells, and the end.  WriteError, CancelledError."""
        for cell in self.cells():
            head = d1.CELL_HEAD.pack(cell.pos, cell.blocks, cell.digests)
            self._write(channel, head + cell.data)
        self._write(channel, d1.CELL_HEAD.pack(self._size, 0, 0))

    def _write(self, channel: int, data: bytes) -> None:
        """In pieces that a pipe takes at once, so that a cancel is seen."""
        poll = select.poll()
        poll.register(channel, select.POLLOUT)
        for at in range(0, len(data), select.PIPE_BUF):
            while not poll.poll(TICK * 1000):
                if self._gone:
                    raise CancelledError("the digests of the target are not needed any more")
            piece = data[at : at + select.PIPE_BUF]
            descriptors.write_all(channel, piece, "cannot send the digests of the target")


class Telling:
    """A Teller at work in a thread of its own, beside the receipt of data."""

    def __init__(self, teller: Teller, channel: int, failed: Callable[[], None]) -> None:
        """failed: called in that thread when it cannot go on."""
        self._teller, self._channel, self._failed = teller, channel, failed
        self._job = Job(self._run).start()

    def _run(self) -> None:
        try:
            self._teller.tell(self._channel)
        except BaseException:
            self._failed()
            raise

    @property
    def failure(self) -> BaseException | None:
        return self._job.failure

    @property
    def over(self) -> bool:
        """All digests are sent, as far as this end knows."""
        return self._job.over.is_set() and self._job.failure is None

    def wait(self, timeout: float) -> int:
        """Until all are sent; returns the bytes of data that the target had.  ReadError: the
        sender does not read it; or the failure."""
        try:
            self._job.join(timeout)
        except TimeoutError:
            raise ReadError("the sender does not read the digests of the target") from None
        return self._teller.bytes

    def end(self) -> None:
        self._teller.cancel()
        self._job.end()


@contextlib.contextmanager
def _reader(fd: int, path: str) -> Iterator[int]:
    """A descriptor that reads the same past the page cache; else the same one."""
    direct = -1
    with contextlib.suppress(OSError):
        block, memory = kernel.direct_alignment(fd, path) or DEFAULT_ALIGNMENT
        if 0 < block <= BLOCK and 0 < memory <= BLOCK and not kernel.is_tmpfs(fd, path):
            direct = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    try:
        yield fd if direct < 0 else direct
    finally:
        if direct >= 0:
            os.close(direct)


def _extents(fd: int, size: int) -> Iterator[Extent]:
    """Where it may have something else than zeroes."""
    st = os.fstat(fd)
    if stat.S_ISBLK(st.st_mode):
        return iter([(0, size)])
    with contextlib.suppress(OSError):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    return file_extents.data_extents(fd, 0, min(size, st.st_size))


def _by_cell(extents: Iterator[Extent], size: int) -> Iterator[tuple[int, list[Extent]]]:
    """(position of a cell, its extents, widened to whole blocks)."""
    cell, parts, last = -1, list[Extent](), 0
    for first, past in extents:
        start = max(first // BLOCK * BLOCK, last)
        last = min(-(-past // BLOCK) * BLOCK, size)
        while start < last:
            pos = start // CELL * CELL
            if pos != cell:
                if parts:
                    yield cell, parts
                cell, parts = pos, []
            cut = min(last, pos + CELL)
            parts.append((start, cut))
            start = cut
    if parts:
        yield cell, parts


def _merged(
    own: Iterator[tuple[int, list[Extent]]], others: Iterator[tuple[int, list[Extent]]]
) -> Iterator[tuple[int, list[Extent], list[Extent]]]:
    """Both by their cells.  The next one of `own` is looked up when it is due, since what is
    copied becomes its data, too."""
    none = (1 << 64, list[Extent]())
    mine, theirs = next(own, none), next(others, none)
    while (pos := min(mine[0], theirs[0])) != none[0]:
        parts, copied = (both[1] if both[0] == pos else [] for both in (mine, theirs))
        yield pos, parts, copied
        mine = next(own, none) if mine[0] == pos else mine
        theirs = next(others, none) if theirs[0] == pos else theirs


def _without(parts: list[Extent], others: list[Extent]) -> Iterator[Extent]:
    for first, end in parts:
        start = first
        for a, b in others:
            if b > start and a < end:
                if a > start:
                    yield start, a
                start = b
        if start < end:
            yield start, end


# ---- the end that has the source


@dataclass
class Contents:
    """What the target had, as the sender learns it."""

    key: bytes
    cells: Callable[[Callable[[], bool]], Iterator[Cell]]
    """Called with what says whether the cells are not needed any more."""
    table: Prior = field(init=False)
    bytes: int = field(init=False, default=0)
    """Bytes of data that it had, so far."""
    _gone: bool = field(init=False, default=False)

    def begin(self, size: int) -> Prior:
        """The table that a pump compares with."""
        self.table = Prior(self.key, size)
        return self.table

    def parts(self, known: Known) -> Iterator[Extent]:
        """Parts of the image, one after the other, of which the table and `known` have what
        the target had.  While one is used, the next one is read.  PyploopError."""
        size = self.table.size
        cells = self.cells(lambda: self._gone)
        start, want = 0, FIRST_PART
        job = Job(lambda: self._load(cells, known, FIRST_PART)).start()
        try:
            while True:
                end = min(job.join(), size)
                if end < size:
                    want = min(2 * want, LARGEST_PART)
                    job = Job(lambda much=want: self._load(cells, known, much)).start()  # type: ignore[misc]
                yield start, end
                self.table.forget(start, end)
                if end >= size:
                    return
                start = end
        finally:
            self._gone = True
            job.end()

    def _load(self, cells: Iterator[Cell], known: Known, want: int) -> int:
        """Read cells with `want` bytes of data, or all.  Returns the position up to which
        all is known."""
        got = 0
        for cell in cells:
            try:
                self.table.load(known, cell.pos, cell.blocks, cell.digests, cell.data)
            except OSError as e:
                raise ProtocolError(
                    f"the receiver sent digests of its target at byte {cell.pos} that are not "
                    "well-formed"
                ) from e
            got += cell.digests * BLOCK
            self.bytes += cell.digests * BLOCK
            if got >= want:
                return cell.pos + CELL
        return self.table.size


def of_peer(
    fd: int, stream: int, key: bytes, timeout: float, deadline: Callable[[], float]
) -> Contents:
    """The same, as a receiver tells it on `fd`.  stream: what it reads.  timeout: seconds to
    wait for the next bytes.  deadline: time.monotonic() when waiting ends in any case."""

    def cells(gone: Callable[[], bool]) -> Iterator[Cell]:
        # The stream may go on over another connection, and the descriptor be another one's.
        own = os.dup(fd)

        def read(size: int) -> bytes:
            limit = time.monotonic() + timeout
            return descriptors.read_exactly(
                own,
                size,
                lambda: -math.inf if gone() else min(limit, deadline()),
                "reading the digests of the target",
                stream,
            )

        try:
            yield from _received(read)
        finally:
            os.close(own)

    return Contents(key, cells)


def _received(read: Callable[[int], bytes]) -> Iterator[Cell]:
    """The cells as they come, until the end.  read: returns the next bytes.  ProtocolError."""
    floor = 0
    while True:
        pos, blocks, digests = d1.CELL_HEAD.unpack(read(d1.CELL_HEAD.size))
        if not blocks:
            return
        if pos < floor or digests > blocks or blocks > CELL // BLOCK:
            raise ProtocolError(
                f"the receiver sent {digests} digests of its target at byte {pos}, which is out of "
                "order or too many"
            )
        floor = pos + CELL
        data = read(-(-blocks // 8) + digests * _core.PRIOR_DIGEST)
        yield Cell(pos, blocks, digests, data)


def in_words(had: int, same: int) -> str:
    return f"the target had {format_size(had)} of data, of which {format_size(same)} are the same"


def of_file(target: Holder, size: int) -> Contents:
    """The same for a target on this host."""
    key = new_key()

    def cells(gone: Callable[[], bool]) -> Iterator[Cell]:
        teller = Teller(target, size, key, None)
        for cell in teller.cells():
            if gone():
                teller.cancel()
            yield cell

    return Contents(key, cells)

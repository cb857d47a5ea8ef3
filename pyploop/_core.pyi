# SPDX-License-Identifier: Apache-2.0
"""Types of the native core; _core.pyx has the docstrings, csrc/pl.h the rules."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Self, final

from typing_extensions import Buffer

PASS_SKIP_ZERO: int
PASS_CHANGED: int
PASS_HOLES: int
PASS_LAST: int
PASS_HOOK: int
PASS_LIVE: int
RECV_SYNC: int
RECV_END: int
COMPRESS_NEVER: int
COMPRESS_AUTO: int
COMPRESS_ALWAYS: int
RECV_QUESTION: int
RECV_LOST: int
MOST_LANES: int
SINK_FRAMES: int
SINK_FILE: int
SINK_PACKETS: int
SINK_NONE: int
PROOF_FANOUT: int
PROOF_ALGORITHM: int
DIALECT_NONE: int
DIALECT_D1: int
DIALECT_D2: int
BPF_RQ: int
BPF_BIO: int
BPF_QUEUE: int

class Fault(OSError):
    errno: int
    stage: str
    pos: int
    stream: int
    frame: int
    mark: int
    size: int
    type: int
    command: int
    reply: int
    lane: int

def fdatasync(fd: int) -> None: ...
def hash_block(data: Buffer) -> int: ...
def hash_block_ref(data: Buffer) -> int: ...
def hash128(data: Buffer) -> bytes: ...
def hash128_ref(data: Buffer) -> bytes: ...
def is_zero(data: Buffer) -> bool: ...
def hash_kernel() -> str: ...

@final
class Extents:
    @staticmethod
    def of(pairs: Iterable[tuple[int, int]]) -> Extents: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[tuple[int, int]]: ...
    @property
    def bytes(self) -> int: ...

@final
class Bitmap:
    def __new__(cls, size: int, shift: int = 12) -> Self: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    @property
    def size(self) -> int: ...
    @property
    def shift(self) -> int: ...
    def zero(self) -> None: ...
    def set(self, start: int, end: int) -> None: ...
    def clear(self, start: int, end: int) -> None: ...
    def update(self, other: Bitmap) -> None: ...
    def intersect(self, other: Bitmap) -> None: ...
    def subtract(self, other: Bitmap) -> None: ...
    def add(self, extents: Extents) -> None: ...
    @property
    def count(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    def extents(self) -> Extents: ...

@final
class Known:
    def __new__(cls, size: int, shift: int = 12) -> Self: ...
    @property
    def chunk(self) -> int: ...
    def assume_data(self, start: int, end: int) -> None: ...
    def note(self, start: int, data: Buffer) -> None: ...

@final
class Proof:
    def __new__(cls, size: int) -> Self: ...
    @property
    def size(self) -> int: ...
    def note(self, start: int, data: Buffer) -> None: ...
    def root(self, fd: int = -1) -> bytes: ...
    @property
    def levels(self) -> int: ...
    def nodes(self, level: int) -> bytes: ...
    def leaves(self, first: int, last: int) -> bytes: ...
    def differences(self, other: Proof) -> Extents: ...

@final
class Hook: ...

class PumpStats(NamedTuple):
    read: int
    data: int
    wire: int
    zero: int
    same: int
    frames: int
    done: int
    huge: int
    compressed: int
    compressed_frames: int
    direct: int
    filled: int
    again: int

class PumpLane(NamedTuple):
    number: int
    error: int
    sent: int

class LaneEnd(NamedTuple):
    lane: int
    received: int

@final
class Pump:
    def __new__(
        cls,
        *,
        src_fd: int,
        src_base: int,
        size: int,
        align: int,
        out_fd: int,
        sink: int,
        cluster: int,
        slots: int,
        readers: int,
        stall_ms: int = 0,
        rate: int = 0,
        known: Known | None = None,
        proof: Proof | None = None,
        hook: Hook | None = None,
        async_packets: bool = False,
        window: int = 0,
        digests: bool = False,
        tail: int = 0,
        tail_fd: int = -1,
        tail_pos: int = 0,
        features: int = 0,
        compress: int = 0,
        level: int = 1,
        direct: tuple[int, int] | None = None,
        zero_holes: bool = False,
        lane_stall_ms: int = 0,
    ) -> Self: ...
    def run(self, extents: Extents, flags: int = 0) -> None: ...
    def write(self, data: bytes) -> None: ...
    def ask(self, data: bytes, timeout_ms: int = 0) -> None: ...
    def add_lane(self, fd: int, number: int) -> None: ...
    @property
    def lanes(self) -> list[PumpLane]: ...
    def settle(self, ends: Sequence[tuple[int, int]]) -> bool: ...
    def resend(self) -> None: ...
    def limit(self, rate: int) -> None: ...
    def frozen(self, frozen: bool) -> None: ...
    def cancel(self) -> None: ...
    @property
    def stats(self) -> PumpStats: ...

class RecvStats(NamedTuple):
    stream: int
    data: int
    frames: int
    written: int
    holes: int
    image_size: int
    huge: int
    compressed: int
    compressed_frames: int
    direct: int
    filled: int

class Arrival(NamedTuple):
    first: int
    arrived: int
    written: int
    dirty: int

@final
class Receiver:
    def __new__(
        cls,
        *,
        in_fd: int,
        out_fd: int,
        slots: int,
        slot_size: int,
        max_frame: int,
        stall_ms: int = 0,
        window: int = 0,
        sparse: bool = True,
        old_end: int = 0,
        largest: int = 0,
        reply_fd: int = -1,
        fill: bool = False,
        direct: tuple[int, int] | None = None,
        writers: int = 1,
        ahead: bool = False,
        lane_stall_ms: int = 0,
    ) -> Self: ...
    arrival: Arrival
    def add_lane(self, fd: int, number: int) -> None: ...
    def end_lanes(self) -> None: ...
    def lost(self) -> list[LaneEnd]: ...
    def synced(self) -> None: ...
    def run(self) -> tuple[int, int, bytes]: ...
    @property
    def dialect(self) -> int: ...
    def expect_digests(self) -> None: ...
    def expect(self, features: int) -> None: ...
    def expect_proof(self, proof: Proof) -> None: ...
    @property
    def proof_data(self) -> bytes | None: ...
    def reopen(self) -> None: ...
    def cancel(self) -> None: ...
    @property
    def stats(self) -> RecvStats: ...

@final
class PloopTracking:
    def __new__(cls, fd: int) -> Self: ...
    def start(self, size: int) -> None: ...
    def set_position(self, end: int) -> None: ...
    def hook(self) -> Hook: ...
    def take(self, into: Bitmap) -> int: ...
    def next(self) -> tuple[int, int] | None: ...
    def sync(self) -> None: ...
    def stop(self) -> None: ...
    def abort(self) -> None: ...

class Counters(NamedTuple):
    done_write: int
    done_discard: int
    queued_write: int
    queued_discard: int
    everything: int

class Snapshot(NamedTuple):
    before: Counters
    after: Counters
    stat_write: int
    stat_discard: int
    inflight: int
    stable: bool

@final
class BpfTracking:
    def __new__(
        cls,
        *,
        major: int,
        minor: int,
        start: int,
        end: int,
        done_shift: int,
        queued_shift: int,
        source: int,
    ) -> Self: ...
    def close(self) -> None: ...
    def take_done(self, into: Bitmap) -> None: ...
    def take_extents(self) -> Extents: ...
    def take_queued(self, into: Bitmap) -> None: ...
    def peek_done(self) -> int: ...
    def hook(self) -> Hook: ...
    def snapshot(self, stat_fd: int, tries: int = 100) -> Snapshot: ...

@final
class Gate:
    def __new__(cls, fd: int) -> Self: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *exc: object) -> None: ...
    def shut(self) -> None: ...

@final
class FilesOut:
    def __new__(
        cls,
        gate: Gate,
        channel: int,
        *,
        window: int,
        rate: int = 0,
        stall_ms: int = 0,
        silence_ms: int = 0,
    ) -> Self: ...
    def grow(self, name: bytes, mode: int, fd: int, pos: int) -> int: ...
    def complete(self, name: bytes, mode: int, size: int) -> None: ...
    def credit(self, count: int) -> None: ...
    def stop(self, err: int) -> None: ...
    @property
    def sent(self) -> int: ...
    @property
    def zeroes(self) -> int: ...

class Piece(NamedTuple):
    name: bytes
    mode: int
    length: int
    pos: int

@final
class FilesIn:
    def __new__(
        cls, gate: Gate, channel: int, *, window: int, stall_ms: int = 0, silence_ms: int = 0
    ) -> Self: ...
    def next(self) -> Piece: ...
    def take(
        self, fd: int, most: int, largest: int, budget: int, count: Callable[[int], object]
    ) -> Piece: ...
    def finish(self) -> None: ...
    def stop(self, err: int) -> None: ...

@final
class Intake:
    def __new__(cls, fd: int, stop_fd: int, early: bytes, *, silence_ms: int = 0) -> Self: ...
    def head(self) -> bytes: ...
    def read(self, size: int) -> bytearray: ...
    def add(self, receiver: FilesIn) -> None: ...
    def remove(self, receiver: FilesIn) -> None: ...

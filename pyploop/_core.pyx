# cython: language_level=3, freethreading_compatible=False
# SPDX-License-Identifier: Apache-2.0
"""The only door to csrc: the GIL is released around everything that waits,
and -errno becomes OSError in `_check` / `Fault`, nowhere else."""
import os
from typing import NamedTuple

from libc.errno cimport ENOMEM
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy, memset
from cpython.buffer cimport PyBUF_READ
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.memoryview cimport PyMemoryView_FromMemory


PASS_SKIP_ZERO = 1
PASS_CHANGED = 2
PASS_HOLES = 4
PASS_LAST = 8
PASS_HOOK = 16
PASS_LIVE = 32

RECV_SYNC = 1
RECV_END = 2

SINK_FRAMES = <int>PL_SINK_FRAMES
SINK_FILE = <int>PL_SINK_FILE
SINK_PACKETS = <int>PL_SINK_PACKETS

BPF_RQ = <int>PL_BPF_RQ
BPF_BIO = <int>PL_BPF_BIO
BPF_QUEUE = <int>PL_BPF_QUEUE

DIALECT_NONE = <int>PL_DIALECT_NONE
DIALECT_D1 = <int>PL_DIALECT_D1
DIALECT_D2 = <int>PL_DIALECT_D2

_STAGES = ("none", "read", "write", "hook", "protocol", "reply")


class Fault(OSError):
    """A failure inside a pump, with the place: `stage` ('read', 'write',
    'hook', 'protocol', 'reply', 'none'), `pos` (byte of the image), `stream`
    (bytes of the stream before it), `frame` (frames before it), `mark`, `size`,
    `type` and `command` (of the offending header), `reply` (the peer's)."""

    stage = "none"
    pos = stream = frame = mark = size = type = command = reply = 0


cdef _fault(int err, pl_fault *f):
    exc = Fault(-err, os.strerror(-err))
    exc.stage = _STAGES[f.stage]
    exc.pos, exc.stream, exc.frame = f.pos, f.stream, f.frame
    exc.mark, exc.size = f.mark, f.size
    exc.type, exc.command, exc.reply = f.type, f.command, f.reply
    return exc


cdef int _check(int ret, what=None) except? -1:
    if ret < 0:
        if what is None:
            raise OSError(-ret, os.strerror(-ret))
        raise OSError(-ret, os.strerror(-ret), what)
    return ret


def fdatasync(int fd):
    """fdatasync(2) without the GIL; not retried after a failure."""
    cdef int ret
    with nogil:
        ret = pl_fdatasync(fd)
    _check(ret)


def hash_block(const uint8_t[::1] data not None):
    """XXH3-64 of the bytes; 0 if and only if all are zero."""
    return pl_hash_block(&data[0], data.shape[0])


def hash_block_ref(const uint8_t[::1] data not None):
    """hash_block by the portable code."""
    return pl_hash_block_ref(&data[0], data.shape[0])


def is_zero(const uint8_t[::1] data not None):
    return pl_is_zero(&data[0], data.shape[0])


def hash_kernel():
    """'avx2' or 'portable': the code that hash_block runs on this machine."""
    return pl_hash_kernel().decode()


cdef class Extents:
    """An array of half-open byte ranges, ascending, in C memory."""
    cdef pl_extent *ext
    cdef size_t n, room

    def __dealloc__(self):
        free(self.ext)

    cdef int push(self, uint64_t start, uint64_t end) except -1:
        cdef size_t room
        cdef pl_extent *p
        if self.n == self.room:
            room = self.room * 2 if self.room else 64
            p = <pl_extent *>realloc(self.ext, room * sizeof(pl_extent))
            if p == NULL:
                raise MemoryError
            self.ext, self.room = p, room
        self.ext[self.n].start, self.ext[self.n].end = start, end
        self.n += 1
        return 0

    @staticmethod
    def of(pairs):
        cdef Extents e = Extents()
        for start, end in pairs:
            e.push(start, end)
        return e

    def __len__(self):
        return self.n

    def __iter__(self):
        for i in range(self.n):
            yield self.ext[i].start, self.ext[i].end

    @property
    def bytes(self):
        cdef uint64_t total = 0
        for i in range(self.n):
            total += self.ext[i].end - self.ext[i].start
        return total


cdef int _push(void *ctx, uint64_t start, uint64_t end) noexcept with gil:
    try:
        (<Extents>ctx).push(start, end)
    except MemoryError:
        return -ENOMEM
    return 0


cdef class Bitmap:
    """Dirty bitmap: one bit per granule of (1 << shift) bytes of `size` bytes.

    Supports the buffer protocol (uint64 words, little-endian bit order), so
    numpy sees it without a copy."""
    cdef pl_bitmap b
    cdef Py_ssize_t shape[1]
    cdef Py_ssize_t strides[1]

    def __cinit__(self, uint64_t size, uint32_t shift=12):
        _check(pl_bitmap_init(&self.b, size, shift))

    def __dealloc__(self):
        pl_bitmap_fini(&self.b)

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        self.shape[0] = self.b.nwords
        self.strides[0] = 8
        buffer.buf = self.b.word
        buffer.obj = self
        buffer.len = self.b.nwords * 8
        buffer.itemsize = 8
        buffer.format = b"Q"
        buffer.ndim = 1
        buffer.shape = self.shape
        buffer.strides = self.strides
        buffer.suboffsets = NULL
        buffer.internal = NULL
        buffer.readonly = 0

    @property
    def size(self):
        return self.b.size

    @property
    def shift(self):
        return self.b.shift

    def zero(self):
        pl_bitmap_zero(&self.b)

    def set(self, uint64_t start, uint64_t end):
        """Mark every granule that [start, end) touches."""
        pl_bitmap_set(&self.b, start, end)

    def clear(self, uint64_t start, uint64_t end):
        """Clear every granule that lies wholly in [start, end)."""
        pl_bitmap_clear(&self.b, start, end)

    def update(self, Bitmap other not None):
        """self |= other; the granules may differ, the size may not."""
        _check(pl_bitmap_or_scaled(&self.b, &other.b))

    def intersect(self, Bitmap other not None):
        """self &= other; size and granule must agree."""
        _check(pl_bitmap_and(&self.b, &other.b, False))

    def subtract(self, Bitmap other not None):
        """self &= ~other; size and granule must agree."""
        _check(pl_bitmap_and(&self.b, &other.b, True))

    def add(self, Extents extents not None):
        """Mark every granule that one of the extents touches."""
        for i in range(extents.n):
            pl_bitmap_set(&self.b, extents.ext[i].start, extents.ext[i].end)

    @property
    def count(self):
        """Set bits."""
        return pl_bitmap_count(&self.b)

    @property
    def bytes(self):
        """Bytes that the set bits cover."""
        return pl_bitmap_bytes(&self.b)

    def extents(self):
        """Runs of set bits as Extents."""
        cdef Extents e = Extents()
        cdef pl_extent run
        run.end = 0
        while pl_bitmap_next(&self.b, run.end, &run):
            e.push(run.start, run.end)
        return e


cdef class Known:
    """What the target is known to hold (zeroes at first): one bit per 4 KiB,
    one hash per chunk of (1 << shift) bytes."""
    cdef pl_known k

    def __cinit__(self, uint64_t size, uint32_t shift=12):
        _check(pl_known_init(&self.k, size, shift))

    def __dealloc__(self):
        pl_known_fini(&self.k)

    @property
    def chunk(self):
        """Bytes that one hash covers."""
        return 1 << self.k.shift

    def assume_data(self, uint64_t start, uint64_t end):
        """The target may hold anything in [start, end): zeroes are sent there."""
        pl_known_assume_data(&self.k, start, end)

    def note(self, uint64_t start, const uint8_t[::1] data not None):
        """The target holds exactly `data` at `start`: whole chunks, or up to the
        end of the source."""
        _check(pl_known_note(&self.k, start, &data[0] if data.shape[0] else NULL,
                             data.shape[0]))


cdef class Hook:
    """A C function that the pump calls just before it reads a range."""
    cdef pl_hook fn
    cdef void *ctx
    cdef object owner   # keeps ctx alive


cdef class _Md5:
    """D3's digest for the pumps.  hashlib's: it needs the GIL only to begin."""
    cdef object new, md5

    def __cinit__(self):
        import hashlib  # OpenSSL behind it takes time and memory, and D1 needs none

        self.new = hashlib.md5
        self.md5 = self.new(usedforsecurity=False)


cdef int _md5(void *ctx, const void *data, size_t size, uint8_t *out) noexcept with gil:
    cdef _Md5 self = <_Md5>ctx
    cdef const char *digest
    try:
        if size:
            self.md5.update(PyMemoryView_FromMemory(<char *>data, size, PyBUF_READ))
        if out != NULL:
            value = self.md5.digest()
            digest = value
            memcpy(out, digest, PL_DIGEST)
            self.md5 = self.new(usedforsecurity=False)
    except BaseException:
        return -ENOMEM
    return 0


class PumpStats(NamedTuple):
    """Monotonic counters of a sending pump, in bytes (`frames` in frames)."""
    read: int
    data: int
    wire: int
    zero: int
    same: int
    frames: int
    done: int
    huge: int


cdef class Pump:
    """The sending pump (csrc/pump.c).  Borrowed descriptors stay open."""
    cdef pl_pump *p
    cdef Known known
    cdef Hook hook
    cdef _Md5 md5

    def __cinit__(self, *, int src_fd, uint64_t src_base, uint64_t size,
                  uint32_t align, int out_fd, int sink, uint32_t cluster,
                  uint32_t slots, uint32_t readers, uint32_t stall_ms=0,
                  uint64_t rate=0, Known known=None, Hook hook=None,
                  bint async_packets=False, uint32_t window=0, bint digests=False):
        cdef pl_pump_cfg cfg
        memset(&cfg, 0, sizeof(cfg))
        cfg.src_fd, cfg.src_base, cfg.size = src_fd, src_base, size
        cfg.align, cfg.out_fd, cfg.sink = align, out_fd, <pl_sink>sink
        cfg.cluster, cfg.slots, cfg.readers = cluster, slots, readers
        cfg.stall_ms, cfg.rate = stall_ms, rate
        self.known, self.hook = known, hook
        if known is not None:
            cfg.known = &known.k
        if hook is not None:
            cfg.hook, cfg.hook_ctx = hook.fn, hook.ctx
        cfg.async_, cfg.window = async_packets, window
        if digests:
            self.md5 = _Md5()
            cfg.digest, cfg.digest_ctx = _md5, <void *>self.md5
        _check(pl_pump_new(&self.p, &cfg))

    def __dealloc__(self):
        cdef pl_pump *p = self.p
        self.p = NULL
        if p != NULL:
            with nogil:
                pl_pump_free(p)

    def run(self, Extents extents not None, unsigned flags=0):
        """Send the extents.  Raises Fault."""
        cdef pl_fault fault
        cdef int ret
        with nogil:
            ret = pl_pump_pass(self.p, extents.ext, extents.n, flags, &fault)
        if ret < 0:
            raise _fault(ret, &fault)

    def write(self, bytes data not None):
        """Write raw bytes (a control frame) into the stream.  Raises Fault."""
        cdef pl_fault fault
        cdef const char *buf = data
        cdef size_t n = len(data)
        cdef int ret
        with nogil:
            ret = pl_pump_write(self.p, buf, n, &fault)
        if ret < 0:
            raise _fault(ret, &fault)

    def ask(self, bytes data not None, uint32_t timeout_ms=0):
        """Write a control packet of D2 and wait for the answers to it and to
        all before it, so long at most (0: for ever).  Raises Fault."""
        cdef pl_fault fault
        cdef const char *buf = data
        cdef size_t n = len(data)
        cdef int ret
        with nogil:
            ret = pl_pump_ask(self.p, buf, n, timeout_ms, &fault)
        if ret < 0:
            raise _fault(ret, &fault)

    def unlimit(self):
        """Between two passes: no rate applies from now on."""
        pl_pump_unlimit(self.p)

    def cancel(self):
        """From any thread: a run ends at once with ECANCELED."""
        pl_pump_cancel(self.p)

    @property
    def stats(self):
        cdef pl_pump_stats s
        pl_pump_get_stats(self.p, &s)
        return PumpStats(s.read_bytes, s.data_bytes, s.wire_bytes, s.zero_bytes,
                         s.same_bytes, s.frames, s.done_bytes, s.huge_bytes)


class RecvStats(NamedTuple):
    """Monotonic counters of a receiving pump, in bytes (`frames` in frames)."""
    stream: int
    data: int
    frames: int
    written: int
    holes: int
    image_size: int
    huge: int


class Arrival(NamedTuple):
    """When an event came, CLOCK_MONOTONIC in ns: the first data since the last
    one (0: none), itself, and when all before it was written; and the bytes
    that were written since `synced` and may not be on the disk."""
    first: int
    arrived: int
    written: int
    dirty: int


cdef class Receiver:
    """The receiving pump (csrc/recv.c).  Borrowed descriptors stay open."""
    cdef pl_recv *r
    cdef readonly object arrival
    cdef _Md5 md5

    def __cinit__(self, *, int in_fd, int out_fd, uint32_t slots,
                  uint32_t slot_size, uint32_t max_frame, uint32_t stall_ms=0,
                  uint64_t window=0, bint sparse=True, uint64_t held=0,
                  int reply_fd=-1):
        cdef pl_recv_cfg cfg
        self.md5 = _Md5()
        self.arrival = Arrival(0, 0, 0, 0)
        memset(&cfg, 0, sizeof(cfg))
        cfg.in_fd, cfg.out_fd = in_fd, out_fd
        cfg.slots, cfg.slot_size, cfg.max_frame = slots, slot_size, max_frame
        cfg.stall_ms, cfg.window, cfg.sparse = stall_ms, window, sparse
        cfg.held = held
        cfg.reply_fd, cfg.digest, cfg.digest_ctx = reply_fd, _md5, <void *>self.md5
        _check(pl_recv_new(&self.r, &cfg))

    def __dealloc__(self):
        cdef pl_recv *r = self.r
        self.r = NULL
        if r != NULL:
            with nogil:
                pl_recv_free(r)

    def run(self):
        """Receive until SYNC or END: (RECV_SYNC or RECV_END, pos, SYNC's four
        bytes).  All before it is written, not durable.  Raises Fault."""
        cdef pl_fault fault
        cdef pl_recv_msg msg
        cdef int ret
        memset(&msg, 0, sizeof(msg))
        with nogil:
            ret = pl_recv_run(self.r, &msg, &fault)
        if ret < 0:
            raise _fault(ret, &fault)
        self.arrival = Arrival(msg.first_ns, msg.arrived_ns, msg.written_ns,
                               msg.dirty_bytes)
        return ret, msg.pos, PyBytes_FromStringAndSize(<char *>msg.data, 4)

    def synced(self):
        """Between two runs: the file was synced."""
        pl_recv_synced(self.r)

    @property
    def dialect(self):
        """DIALECT_D1 or DIALECT_D2 once a marker was seen, else DIALECT_NONE."""
        return <int>pl_recv_dialect(self.r)

    def expect_digests(self):
        """Between two runs: D3's MD5 was agreed, every packet has one now."""
        _check(pl_recv_expect_digests(self.r))

    def cancel(self):
        """From any thread: a run ends at once with ECANCELED."""
        pl_recv_cancel(self.r)

    @property
    def stats(self):
        cdef pl_recv_stats s
        pl_recv_get_stats(self.r, &s)
        return RecvStats(s.stream_bytes, s.data_bytes, s.frames,
                         s.written_bytes, s.hole_bytes, s.image_size,
                         s.huge_bytes)


cdef class PloopTracking:
    """The ploop driver's tracking ioctls on an open /dev/ploopN."""
    cdef pl_ploop t

    def __cinit__(self, int fd):
        self.t.fd = fd

    def start(self, uint64_t size):
        _check(pl_ploop_start(&self.t, size), "TRACK_INIT")

    def set_position(self, uint64_t end):
        """All before `end` counts as read: writes there are marked."""
        _check(pl_ploop_setpos(&self.t, 0, end), "TRACK_SETPOS")

    def hook(self):
        """SETPOS before each read."""
        cdef Hook h = Hook()
        h.fn, h.ctx, h.owner = pl_ploop_setpos, &self.t, self
        return h

    def take(self, Bitmap into not None):
        """Move all dirty extents into the bitmap; returns how many."""
        cdef pl_extent e
        cdef int ret
        cdef int n = 0
        while True:
            with nogil:
                ret = pl_ploop_next(&self.t, &e)
            if _check(ret, "TRACK_READ") == 0:
                return n
            pl_bitmap_set(&into.b, e.start, e.end)
            n += 1

    def next(self):
        """The next dirty extent (start, end), cleared by this, or None."""
        cdef pl_extent e
        cdef int ret
        with nogil:
            ret = pl_ploop_next(&self.t, &e)
        return (e.start, e.end) if _check(ret, "TRACK_READ") else None

    def sync(self):
        cdef int ret
        with nogil:
            ret = pl_ploop_sync(&self.t)
        _check(ret, "PLOOP_IOC_SYNC")

    def stop(self):
        _check(pl_ploop_stop(&self.t), "TRACK_STOP")

    def abort(self):
        _check(pl_ploop_abort(&self.t), "TRACK_ABORT")


class Counters(NamedTuple):
    """512-byte sectors of the whole disk since the start; `everything` in times."""
    done_write: int
    done_discard: int
    queued_write: int
    queued_discard: int
    everything: int


class Snapshot(NamedTuple):
    """Counters before and after one reading of /sys/block/X/stat."""
    before: Counters
    after: Counters
    stat_write: int
    stat_discard: int
    inflight: int
    stable: bool


cdef _counters(pl_bpf_counters *c):
    return Counters(c.done_write, c.done_discard, c.queued_write,
                    c.queued_discard, c.everything)


cdef class BpfTracking:
    """Dirty tracking by BPF programs at the block layer (csrc/bpf_*.c)."""
    cdef pl_bpf *t

    def __cinit__(self, *, uint32_t major, uint32_t minor, uint64_t start,
                  uint64_t end, uint32_t done_shift, uint32_t queued_shift,
                  int source):
        cdef pl_bpf_cfg cfg
        cdef char why[512]
        cdef int ret
        memset(&cfg, 0, sizeof(cfg))
        memset(why, 0, sizeof(why))
        cfg.major, cfg.minor, cfg.start, cfg.end = major, minor, start, end
        cfg.done_shift, cfg.queued_shift = done_shift, queued_shift
        cfg.source = <pl_bpf_source>source
        with nogil:
            ret = pl_bpf_open(&self.t, &cfg, why, sizeof(why))
        if ret < 0:
            raise OSError(-ret, (<bytes>why).decode(errors="replace")
                          or os.strerror(-ret))

    def close(self):
        """Detach; closing twice is harmless."""
        cdef pl_bpf *t = self.t
        self.t = NULL
        if t != NULL:
            with nogil:
                pl_bpf_close(t)

    def __dealloc__(self):
        self.close()

    def take_done(self, Bitmap into not None):
        self._open()
        _check(pl_bpf_take_done(self.t, &into.b))

    def take_extents(self):
        """What take_done would set, as Extents."""
        cdef Extents e = Extents()
        self._open()
        _check(pl_bpf_take_runs(self.t, _push, <void *>e))
        return e

    def take_queued(self, Bitmap into not None):
        self._open()
        _check(pl_bpf_take_queued(self.t, &into.b))

    def peek_done(self):
        """Set bits of the done bitmap."""
        self._open()
        return pl_bpf_peek_done(self.t)

    def hook(self):
        """Drop the marks of a range just before it is read."""
        cdef Hook h = Hook()
        self._open()
        h.fn, h.ctx, h.owner = pl_bpf_forget, self.t, self
        return h

    def snapshot(self, int stat_fd, unsigned tries=100):
        cdef pl_bpf_snapshot s
        cdef int ret
        self._open()
        memset(&s, 0, sizeof(s))
        with nogil:
            ret = pl_bpf_take_snapshot(self.t, stat_fd, tries, &s)
        _check(ret)
        return Snapshot(_counters(&s.before), _counters(&s.after),
                        s.stat_write, s.stat_discard, s.inflight, bool(s.stable))

    cdef int _open(self) except -1:
        if self.t == NULL:
            raise ValueError("the tracker is closed")
        return 0

# SPDX-License-Identifier: Apache-2.0
# Part of _core.pyx: the sending and the receiving pump.


class PumpStats(NamedTuple):
    """Monotonic counters of a sending pump, in bytes (`frames` in frames).  compressed:
    of `data`, before it was."""
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
    """A lane of a sending pump.  error: why it was left out (an errno), or 0.  sent: bytes
    that its stream has taken."""
    number: int
    error: int
    sent: int


class LaneEnd(NamedTuple):
    """A lane that has ended.  received: bytes of its stream, up to the end of a frame,
    whose data are written."""
    lane: int
    received: int


cdef unsigned _lane_ends(ends, pl_lane_end *end) except? 1000:
    cdef unsigned n = 0
    if len(ends) > PL_BARRIER_NAMES:
        raise ValueError("too many lanes")
    for lane, received in ends:
        end[n].lane, end[n].received = lane, received
        n += 1
    return n


cdef class Pump:
    """The sending pump (csrc/pump.c).  Borrowed descriptors stay open."""
    cdef pl_pump *p
    cdef Known known
    cdef Proof proof
    cdef Prior prior
    cdef Hook hook
    cdef _Md5 md5

    def __cinit__(self, *, int src_fd, uint64_t src_base, uint64_t size,
                  uint32_t align, int out_fd, int sink, uint32_t cluster,
                  uint32_t slots, uint32_t readers, uint32_t stall_ms=0,
                  uint64_t rate=0, Known known=None, Proof proof=None, Hook hook=None,
                  bint async_packets=False, uint32_t window=0, bint digests=False,
                  uint32_t tail=0, int tail_fd=-1, uint64_t tail_pos=0,
                  uint64_t features=0, int compress=0, int level=1, direct=None,
                  bint ahead=False, bint zero_holes=False, uint32_t lane_stall_ms=0,
                  Prior prior=None):
        cdef pl_pump_cfg cfg
        memset(&cfg, 0, sizeof(cfg))
        cfg.src_fd, cfg.src_base, cfg.size = src_fd, src_base, size
        cfg.align, cfg.out_fd, cfg.sink = align, out_fd, <pl_sink>sink
        cfg.tail, cfg.tail_fd, cfg.tail_pos = tail, tail_fd, tail_pos
        cfg.cluster, cfg.slots, cfg.readers = cluster, slots, readers
        cfg.stall_ms, cfg.rate = stall_ms, rate
        self.known, self.proof, self.hook = known, proof, hook
        if known is not None:
            cfg.known = &known.k
        if proof is not None:
            cfg.proof = &proof.p
        self.prior = prior
        if prior is not None:
            cfg.prior = &prior.p
        if hook is not None:
            cfg.hook, cfg.hook_ctx = hook.fn, hook.ctx
        cfg.compress, cfg.level = <pl_compress>compress, level
        cfg.features, cfg.lane_stall_ms = features, lane_stall_ms
        cfg.async_, cfg.window = async_packets, window
        cfg.ahead, cfg.zero_holes = ahead, zero_holes
        if direct is not None:
            cfg.direct.block, cfg.direct.memory = direct
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

    def add_lane(self, int fd, uint32_t number):
        """From any thread: send data over this stream, too (non-blocking, or a socket).
        number: 1 to 65535, new, and the one by which the peer knows it.  OSError."""
        _check(pl_pump_add_lane(self.p, fd, number))

    @property
    def lanes(self):
        """The lanes; those that have failed until `settle`."""
        cdef pl_pump_lane lane[PL_LANES]
        cdef unsigned n = pl_pump_get_lanes(self.p, lane)
        return [PumpLane(lane[i].number, -lane[i].err, lane[i].bytes) for i in range(n)]

    def settle(self, ends):
        """The last control frame is answered, with these LaneEnds.  True: something must
        go again (`resend`).  OSError (EPROTO): a lane was not sent so many bytes."""
        cdef pl_lane_end end[PL_BARRIER_NAMES]
        cdef unsigned n = _lane_ends(ends, end)
        cdef int ret
        with nogil:
            ret = pl_pump_settle(self.p, end, n)
        return bool(_check(ret))

    def relink(self, int fd, ends):
        """After a Fault of the stream, or of its answers: go on over this one.  ends:
        LaneEnds of all streams that were, the main one as lane 0.  As `settle`.  All lanes
        are given up.  The pass that has failed must be run again from `floor` on."""
        cdef pl_lane_end end[PL_BARRIER_NAMES]
        cdef unsigned n = _lane_ends(ends, end)
        cdef int ret
        with nogil:
            ret = pl_pump_relink(self.p, fd, end, n)
        return bool(_check(ret))

    @property
    def floor(self):
        """Of the last run: nothing of its extents below has to be run again."""
        return pl_pump_floor(self.p)

    def disconnect(self):
        """From any thread: the stream fails (ECONNABORTED), until `relink`."""
        pl_pump_disconnect(self.p)

    def resend(self):
        """Send what lanes have lost, as the source has it now.  Raises Fault."""
        cdef pl_fault fault
        cdef int ret
        with nogil:
            ret = pl_pump_resend(self.p, &fault)
        if ret < 0:
            raise _fault(ret, &fault)

    def limit(self, uint64_t rate):
        """Between two passes: this rate applies from now on; 0: none."""
        pl_pump_limit(self.p, rate)

    def frozen(self, bint frozen):
        """Between two passes: the source is frozen now, or runs again."""
        pl_pump_frozen(self.p, frozen)

    def cancel(self):
        """From any thread: a run ends at once with ECANCELED."""
        pl_pump_cancel(self.p)

    @property
    def stats(self):
        cdef pl_pump_stats s
        pl_pump_get_stats(self.p, &s)
        return PumpStats(s.read_bytes, s.data_bytes, s.wire_bytes, s.zero_bytes,
                         s.same_bytes, s.frames, s.done_bytes, s.huge_bytes,
                         s.packed_bytes, s.packed_frames, s.direct_bytes,
                         s.filled_bytes, s.again_bytes)


class RecvStats(NamedTuple):
    """Monotonic counters of a receiving pump, in bytes (`frames` in frames).
    compressed: of `data`, after it was decompressed."""
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
    cdef Proof proof

    def __cinit__(self, *, int in_fd, int out_fd, uint32_t slots,
                  uint32_t slot_size, uint32_t max_frame, uint32_t stall_ms=0,
                  uint64_t window=0, bint sparse=True, uint64_t old_end=0, uint64_t largest=0,
                  int reply_fd=-1, bint fill=False, direct=None, uint32_t writers=1,
                  bint ahead=False, uint32_t lane_stall_ms=0):
        cdef pl_recv_cfg cfg
        self.md5 = _Md5()
        self.arrival = Arrival(0, 0, 0, 0)
        memset(&cfg, 0, sizeof(cfg))
        cfg.in_fd, cfg.out_fd = in_fd, out_fd
        cfg.slots, cfg.slot_size, cfg.max_frame = slots, slot_size, max_frame
        cfg.stall_ms, cfg.window, cfg.sparse = stall_ms, window, sparse
        cfg.old_end = old_end
        cfg.largest, cfg.lane_stall_ms = largest, lane_stall_ms
        cfg.fill, cfg.writers, cfg.ahead = fill, writers, ahead
        if direct is not None:
            cfg.direct.block, cfg.direct.memory = direct
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
        bytes).  All before it is written, not durable.  RECV_LOST: the same, but `lost`
        has to be answered, and the sender goes on.  RECV_BROKEN: the stream broke off
        (d1.Feature.RESUME); `lost` says what came, and `relink` goes on.  Or until a question about nodes of
        `proof`: (RECV_QUESTION, level + 1, _).  Raises Fault."""
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

    def add_lane(self, int fd, uint32_t number):
        """From any thread, once lanes are expected: receive data over this stream, too.
        OSError (ECANCELED: nothing is received any more)."""
        cdef int ret
        with nogil:
            ret = pl_recv_add_lane(self.r, fd, number)
        _check(ret)

    def end_lanes(self):
        """Between two runs: lanes neither read nor write any more."""
        with nogil:
            pl_recv_end_lanes(self.r)

    def relink(self, int fd):
        """After RECV_BROKEN and `lost`: go on with this stream."""
        pl_recv_relink(self.r, fd)

    def disconnect(self):
        """From any thread: the stream breaks off, until `relink`."""
        pl_recv_disconnect(self.r)

    def lost(self):
        """After RECV_LOST and RECV_BROKEN: the LaneEnds since the last call."""
        cdef pl_lane_end end[PL_BARRIER_NAMES]
        cdef unsigned n = pl_recv_lost(self.r, end)
        return [LaneEnd(end[i].lane, end[i].received) for i in range(n)]

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

    def expect(self, uint64_t features):
        """Between two runs: frames of these features (wire/d1.py) are taken from now on.
        OSError (EINVAL) unless this is D1, and it knows them."""
        _check(pl_recv_expect(self.r, features))

    def expect_proof(self, Proof proof not None):
        """Between two runs, before any data: it becomes that of what is written."""
        _check(pl_recv_expect_proof(self.r, &proof.p))
        self.proof = proof

    @property
    def proof_data(self):
        """The payload of the PROOF frame right before END, or of a RECV_QUESTION; or
        None."""
        cdef uint32_t size
        cdef const uint8_t *data = pl_recv_proof_data(self.r, &size)
        if data == NULL:
            return None
        return PyBytes_FromStringAndSize(<const char *>data, size)

    def reopen(self):
        """After END: the stream goes on, with questions and blocks that are sent again."""
        pl_recv_reopen(self.r)

    def cancel(self):
        """From any thread: a run ends at once with ECANCELED."""
        pl_recv_cancel(self.r)

    @property
    def stats(self):
        cdef pl_recv_stats s
        pl_recv_get_stats(self.r, &s)
        return RecvStats(s.stream_bytes, s.data_bytes, s.frames,
                         s.written_bytes, s.hole_bytes, s.image_size,
                         s.huge_bytes, s.packed_bytes, s.packed_frames,
                         s.direct_bytes, s.filled_bytes)

# SPDX-License-Identifier: Apache-2.0
# Part of _core.pyx: one connection's two ends, and file streams in its channels.


cdef _at_stage(int err, pl_stage stage):
    exc = Fault(-err, os.strerror(-err))
    exc.stage = _STAGES[<int>stage]
    return exc


cdef class Gate:
    """The writing end of a connection that several threads share (csrc/gate.h), a
    context manager: whoever has entered writes whole frames.  Signals are handled while
    it waits."""
    cdef pl_gate *g

    def __cinit__(self, int fd):
        _check(pl_gate_new(&self.g, fd))

    def __dealloc__(self):
        pl_gate_free(self.g)

    def __enter__(self):
        cdef int ret = -EAGAIN
        while ret == -EAGAIN:
            with nogil:
                ret = pl_gate_enter(self.g, True, 100)
            if ret:
                PyErr_CheckSignals()
        _check(ret)
        return self

    def __exit__(self, *exc):
        pl_gate_leave(self.g)

    def shut(self):
        """From any thread: the connection is dead, and streams write nothing more."""
        pl_gate_shut(self.g)


cdef class FilesOut:
    """The sender of a file stream in one channel (csrc/files_out.h).  Raises Fault: its
    stage is 'read' for the file, 'write' for the connection, and 'reply' when the channel
    was stopped, or got no credit in time."""
    cdef pl_files_out *o
    cdef Gate gate

    def __cinit__(self, Gate gate not None, uint16_t channel, *, uint64_t window,
                  uint64_t rate=0, uint32_t stall_ms=0, uint32_t silence_ms=0):
        cdef pl_files_out_cfg cfg
        memset(&cfg, 0, sizeof(cfg))
        self.gate = gate
        cfg.gate, cfg.channel, cfg.window = gate.g, channel, window
        cfg.rate, cfg.stall_ms, cfg.silence_ms = rate, stall_ms, silence_ms
        _check(pl_files_out_new(&self.o, &cfg))

    def __dealloc__(self):
        pl_files_out_free(self.o)

    def grow(self, bytes name not None, uint16_t mode, int fd, uint64_t pos):
        """Send what the file has from `pos` on, without pages of zeroes; returns where it
        ends now."""
        cdef const char *text = name
        cdef uint16_t n = len(name)
        cdef pl_stage stage
        cdef int ret
        with nogil:
            ret = pl_files_out_grow(self.o, text, n, mode, fd, &pos, &stage)
        if ret < 0:
            raise _at_stage(ret, stage)
        return pos

    def complete(self, bytes name not None, uint16_t mode, uint64_t size):
        """A file is complete, and `size` bytes long; of no name: the stream ends."""
        cdef const char *text = name
        cdef uint16_t n = len(name)
        cdef pl_stage stage
        cdef int ret
        with nogil:
            ret = pl_files_out_complete(self.o, text, n, mode, size, &stage)
        if ret < 0:
            raise _at_stage(ret, stage)

    def credit(self, uint32_t count):
        """From any thread: the peer has taken so many bytes.  OSError: more than it had."""
        _check(pl_files_out_credit(self.o, count))

    def stop(self, int err):
        """From any thread: all fails with this errno from now on; the first one counts."""
        pl_files_out_stop(self.o, -err)

    @property
    def sent(self):
        """Bytes of data so far."""
        cdef pl_files_out_stats s
        pl_files_out_get_stats(self.o, &s)
        return s.data_bytes

    @property
    def zeroes(self):
        """Bytes of pages that were zero, and were not sent."""
        cdef pl_files_out_stats s
        pl_files_out_get_stats(self.o, &s)
        return s.zero_bytes


class Piece(NamedTuple):
    """The head of a piece: its file's name, `length` bytes of data at `pos`."""
    name: bytes
    mode: int
    length: int
    pos: int


cdef class FilesIn:
    """The receiver of a file stream in one channel (csrc/files_in.h).  Raises Fault: its
    stage is 'read' for the stream, 'write' for the file, 'reply' for the connection."""
    cdef pl_files_in *f
    cdef Gate gate
    cdef pl_piece piece

    def __cinit__(self, Gate gate not None, uint16_t channel, *, uint64_t window,
                  uint32_t stall_ms=0, uint32_t silence_ms=0):
        cdef pl_files_in_cfg cfg
        memset(&cfg, 0, sizeof(cfg))
        self.gate = gate
        cfg.gate, cfg.channel, cfg.window = gate.g, channel, window
        cfg.stall_ms, cfg.silence_ms = stall_ms, silence_ms
        _check(pl_files_in_new(&self.f, &cfg))

    def __dealloc__(self):
        pl_files_in_free(self.f)

    cdef object _head(self):
        return Piece(PyBytes_FromStringAndSize(self.piece.name, self.piece.name_len),
                     self.piece.mode, self.piece.length, self.piece.pos)

    def next(self):
        """The next piece's head.  The data of the one before must be taken."""
        cdef pl_stage stage
        cdef int ret
        with nogil:
            ret = pl_files_in_next(self.f, &self.piece, &stage)
        if ret < 0:
            raise _at_stage(ret, stage)
        return self._head()

    def take(self, int fd, uint32_t most, uint64_t largest, uint64_t budget, count):
        """Write the data of the last piece, which is checked, to the file, and those of the
        pieces that go on with it: with data, `most` bytes each, ending at `largest`,
        `budget` bytes all together, at most.  Returns the head of the piece after them.
        count: is called with the bytes that were taken, whatever happens."""
        cdef uint64_t left = budget
        cdef pl_stage stage
        cdef int ret
        with nogil:
            ret = pl_files_in_take(self.f, fd, most, largest, &left, &self.piece, &stage)
        count(budget - left)
        if ret < 0:
            raise _at_stage(ret, stage)
        return self._head()

    def finish(self):
        """From any thread: no more will come."""
        pl_files_in_finish(self.f)

    def stop(self, int err):
        """From any thread: all fails with this errno from now on."""
        pl_files_in_stop(self.f, -err)


cdef class Intake:
    """The reading end of a connection (csrc/intake.h); one thread reads it.  DATA of the
    channels that were added goes to their receivers."""
    cdef pl_intake *i

    def __cinit__(self, int fd, int stop_fd, bytes early not None, *, uint32_t silence_ms=0):
        cdef pl_intake_cfg cfg
        cdef const char *bytes_ = early
        memset(&cfg, 0, sizeof(cfg))
        cfg.fd, cfg.stop_fd, cfg.silence_ms = fd, stop_fd, silence_ms
        cfg.early, cfg.early_len = <const uint8_t *>bytes_, len(early)
        _check(pl_intake_new(&self.i, &cfg))

    def __dealloc__(self):
        pl_intake_free(self.i)

    def head(self):
        """The eight bytes of the next frame's head that is for none of the receivers."""
        cdef uint8_t head[8]
        cdef int ret
        with nogil:
            ret = pl_intake_head(self.i, head)
        _check(ret)
        return PyBytes_FromStringAndSize(<char *>head, 8)

    def read(self, size_t size):
        """Exactly so many bytes."""
        data = bytearray(size)
        cdef char *to = data
        cdef int ret
        with nogil:
            ret = pl_intake_read(self.i, to, size)
        _check(ret)
        return data

    def add(self, FilesIn receiver not None):
        _check(pl_intake_add(self.i, receiver.f))

    def remove(self, FilesIn receiver not None):
        pl_intake_remove(self.i, receiver.f)


cdef class Bundle:
    """One stream of bytes in each direction over several lanes, between a socket here and
    one at the peer (csrc/bundle.h).  `run` is one thread's, all else any thread's."""
    cdef pl_bundle *b

    def __cinit__(self, int fd, *, uint32_t stall_ms=0):
        _check(pl_bundle_new(&self.b, fd, stall_ms))

    def __dealloc__(self):
        pl_bundle_free(self.b)

    def run(self):
        """Until the socket's other end is closed, or `stop`.  OSError: the peer broke the
        protocol."""
        cdef int ret
        with nogil:
            ret = pl_bundle_run(self.b)
        if ret != -errno.ECANCELED:
            _check(ret)

    def add(self, int rfd, int wfd, uint32_t number):
        """OSError: EBUSY: there are too many; ECANCELED: it has ended."""
        _check(pl_bundle_add(self.b, rfd, wfd, number))

    def stop(self):
        pl_bundle_stop(self.b)

    @property
    def moved(self):
        return pl_bundle_moved(self.b)

    @property
    def ended(self):
        """Numbers of lanes that have ended."""
        cdef pl_bundle_lane lane[32]
        cdef unsigned i, n = pl_bundle_lanes(self.b, lane, 32)
        return [lane[i].number for i in range(n) if lane[i].ended]

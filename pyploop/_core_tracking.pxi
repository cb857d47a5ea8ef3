# SPDX-License-Identifier: Apache-2.0
# Part of _core.pyx: what the ploop driver and the BPF programs have marked.


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

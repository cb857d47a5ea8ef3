# cython: language_level=3, freethreading_compatible=False
# SPDX-License-Identifier: Apache-2.0
"""The only door to csrc: the GIL is released around everything that waits,
and -errno becomes OSError in `_check` / `Fault`, nowhere else."""
import errno
import os
from typing import NamedTuple

from libc.errno cimport EAGAIN, EINVAL, ENOMEM
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy, memset
from cpython.buffer cimport PyBUF_READ
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals
from cpython.memoryview cimport PyMemoryView_FromMemory


PASS_SKIP_ZERO = <int>PL_PASS_SKIP_ZERO
PASS_CHANGED = <int>PL_PASS_CHANGED
PASS_HOLES = <int>PL_PASS_HOLES
PASS_LAST = <int>PL_PASS_LAST
PASS_HOOK = <int>PL_PASS_HOOK
PASS_LIVE = <int>PL_PASS_LIVE
PASS_PRIOR = <int>PL_PASS_PRIOR

RECV_SYNC = <int>PL_RECV_SYNC
RECV_END = <int>PL_RECV_END
RECV_QUESTION = <int>PL_RECV_QUESTION
RECV_LOST = <int>PL_RECV_LOST
RECV_BROKEN = <int>PL_RECV_BROKEN

MOST_LANES = <int>PL_LANES
"""Lanes beside the main stream, at a time."""

COMPRESS_NEVER = <int>PL_COMPRESS_NEVER
COMPRESS_AUTO = <int>PL_COMPRESS_AUTO
COMPRESS_ALWAYS = <int>PL_COMPRESS_ALWAYS

SINK_FRAMES = <int>PL_SINK_FRAMES
SINK_FILE = <int>PL_SINK_FILE
SINK_PACKETS = <int>PL_SINK_PACKETS
SINK_NONE = <int>PL_SINK_NONE

PROOF_FANOUT = <int>PL_PROOF_FANOUT
PROOF_ALGORITHM = <int>PL_PROOF_ALGORITHM

PRIOR_KEY = <int>PL_PRIOR_KEY
"""Random bytes that a key is made from."""
PRIOR_DIGEST = <int>PL_PRIOR_DIGEST
PRIOR_CELL = <int>PL_PRIOR_CELL
"""Bytes of the image that are told at a time, from a multiple of this on."""

BPF_RQ = <int>PL_BPF_RQ
BPF_BIO = <int>PL_BPF_BIO
BPF_QUEUE = <int>PL_BPF_QUEUE

DIALECT_NONE = <int>PL_DIALECT_NONE
DIALECT_D1 = <int>PL_DIALECT_D1
DIALECT_D2 = <int>PL_DIALECT_D2

_STAGES = {
    <int>PL_STAGE_NONE: "none",
    <int>PL_STAGE_READ: "read",
    <int>PL_STAGE_WRITE: "write",
    <int>PL_STAGE_HOOK: "hook",
    <int>PL_STAGE_PROTOCOL: "protocol",
    <int>PL_STAGE_REPLY: "reply",
}


class Fault(OSError):
    """A failure inside a pump, with the place: `stage` ('read', 'write',
    'hook', 'protocol', 'reply', 'none'), `pos` (byte of the image), `stream`
    (bytes of the stream before it), `frame` (frames before it), `mark`, `size`,
    `type` and `command` (of the offending header), `reply` (the peer's), `lane`
    (0: the main stream)."""

    stage = "none"
    pos = stream = frame = mark = size = type = command = reply = lane = 0


cdef _fault(int err, pl_fault *f):
    exc = Fault(-err, os.strerror(-err))
    exc.stage = _STAGES[<int>f.stage]
    exc.pos, exc.stream, exc.frame = f.pos, f.stream, f.frame
    exc.mark, exc.size = f.mark, f.size
    exc.type, exc.command, exc.reply = f.type, f.command, f.reply
    exc.lane = f.lane
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


def hash128(const uint8_t[::1] data not None):
    """XXH3-128 of the bytes in its canonical form: 16 bytes, big-endian."""
    cdef uint8_t out[PL_HASH128]
    pl_hash128(&data[0], data.shape[0], out)
    return PyBytes_FromStringAndSize(<char *>out, PL_HASH128)


def hash128_ref(const uint8_t[::1] data not None):
    """hash128 by the portable code."""
    cdef uint8_t out[PL_HASH128]
    pl_hash128_ref(&data[0], data.shape[0], out)
    return PyBytes_FromStringAndSize(<char *>out, PL_HASH128)


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


cdef class Proof:
    """What an image of `size` bytes holds (zeroes at first), as a tree of hashes
    (csrc/proof.h).  Equal roots mean equal images."""
    cdef pl_proof p

    def __cinit__(self, uint64_t size):
        _check(pl_proof_init(&self.p, size))

    def __dealloc__(self):
        pl_proof_fini(&self.p)

    @property
    def size(self):
        return self.p.size

    def note(self, uint64_t start, const uint8_t[::1] data not None):
        """The image holds `data` at `start`.  A block that this covers in part is unknown
        from then on."""
        if start > self.p.size or <uint64_t>data.shape[0] > self.p.size - start:
            raise ValueError("past the end of the image")
        if data.shape[0]:
            pl_proof_note(&self.p, &data[0], data.shape[0], start)

    def root(self, int fd=-1):
        """The root, 16 bytes.  Unknown blocks are read from `fd`, a file with the image;
        OSError, also when there are some and no `fd`."""
        cdef uint8_t out[PL_HASH128]
        cdef int ret
        with nogil:
            ret = pl_proof_root(&self.p, fd, out)
        _check(ret)
        return PyBytes_FromStringAndSize(<char *>out, PL_HASH128)

    @property
    def levels(self):
        """Levels of nodes.  The highest has one node."""
        return self.p.levels

    def nodes(self, unsigned level, uint64_t first=0, last=None):
        """The nodes [first, last) of a level, 16 bytes each, as they were at the last `root`;
        without `last` to its end.  One of level 0 stands for PROOF_FANOUT blocks."""
        if level >= self.p.levels:
            raise IndexError(level)
        cdef uint64_t end = self.p.level[level].nodes if last is None else last
        if first > end or end > self.p.level[level].nodes:
            raise IndexError(end)
        return PyBytes_FromStringAndSize(<char *>self.p.level[level].node + first * PL_HASH128,
                                         (end - first) * PL_HASH128)

    def leaves(self, uint64_t first, uint64_t last):
        """The hashes of the blocks [first, last), 8 bytes each."""
        if first > last or last > self.p.blocks:
            raise IndexError(last)
        return PyBytes_FromStringAndSize(<char *>(self.p.leaf + first),
                                         (last - first) * sizeof(uint64_t))

    def differences(self, Proof other not None):
        """Where the two images differ, in whole blocks.  The sizes must agree."""
        cdef Extents e = Extents()
        cdef pl_extent run
        run.end = 0
        while _check(pl_proof_differ(&self.p, &other.p, run.end, &run)):
            e.push(run.start, run.end)
        return e


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


include "_core_prior.pxi"
include "_core_pumps.pxi"
include "_core_tracking.pxi"
include "_core_files.pxi"

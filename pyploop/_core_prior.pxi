# SPDX-License-Identifier: Apache-2.0
# Part of _core.pyx: digests of what a target had before the copy.


cdef class PriorCell:
    """Digests of what the target has (csrc/prior.h), a cell of PRIOR_CELL bytes at a time.
    random: PRIOR_KEY bytes.  size: what the image will have."""
    cdef pl_prior_cell c
    cdef Proof proof

    def __cinit__(self, const uint8_t[::1] random not None, uint64_t size, Proof proof=None):
        if random.shape[0] != PL_PRIOR_KEY:
            raise ValueError("not the size of a key")
        self.proof = proof
        _check(pl_prior_cell_init(&self.c, &random[0], size))

    def __dealloc__(self):
        pl_prior_cell_fini(&self.c)

    def begin(self, uint64_t pos):
        """The cell at `pos`, a multiple of PRIOR_CELL below the size.  Nothing is in it."""
        if pos % PL_PRIOR_CELL or pos >= self.c.size:
            raise ValueError("no cell begins there")
        pl_prior_cell_begin(&self.c, pos)

    def read(self, int fd, uint64_t start, uint64_t end, int copy_fd=-1):
        """Take what `fd` has at [start, end): whole blocks of the cell, or up to the image's
        end.  copy_fd: is written, too.  OSError of a write; what cannot be read differs."""
        cdef pl_proof *proof = NULL
        cdef int ret
        if self.proof is not None:
            proof = &self.proof.p
        with nogil:
            ret = pl_prior_cell_read(&self.c, fd, copy_fd, start, end, proof)
        _check(ret)

    def tell(self):
        """(blocks of the cell, digests, the bytes that tell them)."""
        cdef uint32_t blocks, digests, size
        cdef uint8_t out[PL_PRIOR_MAX]
        size = pl_prior_cell_tell(&self.c, out, &blocks, &digests)
        return blocks, digests, PyBytes_FromStringAndSize(<char *>out, size)


cdef class Prior:
    """What the target had before, as the end with the source knows it, of an image of
    `size` bytes.  random: PRIOR_KEY bytes."""
    cdef pl_prior p

    def __cinit__(self, const uint8_t[::1] random not None, uint64_t size):
        if random.shape[0] != PL_PRIOR_KEY:
            raise ValueError("not the size of a key")
        _check(pl_prior_init(&self.p, &random[0], size))

    def __dealloc__(self):
        pl_prior_fini(&self.p)

    @property
    def size(self):
        return self.p.size

    def load(self, Known known not None, uint64_t pos, uint32_t blocks, uint32_t digests,
             const uint8_t[::1] data not None):
        """A cell as it was told, which `known` learns, too.  OSError (EINVAL): it is not
        well-formed."""
        if not data.shape[0]:
            raise OSError(EINVAL, os.strerror(EINVAL))
        _check(pl_prior_load(&self.p, &known.k, pos, blocks, digests, &data[0], data.shape[0]))

    def forget(self, uint64_t start, uint64_t end):
        """The cells between these positions are not needed any more."""
        pl_prior_forget(&self.p, start, end)

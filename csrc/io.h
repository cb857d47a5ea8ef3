/* SPDX-License-Identifier: Apache-2.0 */
/*
 * io.h - whole transfers: EINTR, short counts and alignment are handled here.
 */
#ifndef PL_IO_H
#define PL_IO_H

#include <sys/uio.h>

#include "base.h"

int pl_pwrite_full(int fd, const void *buf, size_t len, uint64_t pos)
	PL_CHECKED PL_NONNULL PL_READS(2, 3);
int pl_fdatasync(int fd) PL_CHECKED;
/* Buffers for O_DIRECT: PL_BLOCK aligned, or of huge pages from 2 MiB on; the size is
   rounded up. */
void *pl_buf_new(size_t len) PL_CHECKED;
void pl_buf_free(void *buf, size_t len);

/* The first `done` bytes of the vector are transferred: it begins behind them. */
static inline void pl_iov_skip(struct iovec **iov, unsigned *n, size_t done)
{
	while (*n && done >= (*iov)->iov_len) {
		done -= (*iov)->iov_len;
		++*iov;
		--*n;
	}
	if (*n) {
		(*iov)->iov_base = (char *)(*iov)->iov_base + done;
		(*iov)->iov_len -= done;
	}
}

#endif

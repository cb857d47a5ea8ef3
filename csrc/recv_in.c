/* SPDX-License-Identifier: Apache-2.0 */
/* The receiver's front: bytes from the stream, or a reason why not. */
#define _GNU_SOURCE
#include <assert.h>
#include <errno.h>
#include <poll.h>
#include <unistd.h>

#include "io.h"
#include "recv_internal.h"

static int wait_readable(struct pl_recv *r)
{
	struct pollfd pfd[2] = {
		{ .fd = r->cancel_fd, .events = POLLIN },
		{ .fd = r->cfg.in_fd, .events = POLLIN },
	};
	int n = pl_patient_poll(&r->peer_gives, pfd, 2, r->cfg.stall_ms);

	if (n < 0)
		return n;
	if (pfd[0].revents)
		return __atomic_load_n(&r->broken, __ATOMIC_RELAXED) &&
		       !pl_recv_failed(r) ? -ECONNABORTED : -ECANCELED;
	return 0;
}

ssize_t pl_recv_read(struct pl_recv *r, struct iovec *iov, unsigned n,
		     size_t must)
{
	size_t got = 0;

	while (got < must) {
		ssize_t k;
		int err = wait_readable(r);

		if (err)
			return err;
		assert(n);	/* the vector has room for `must` bytes */
		k = readv(r->cfg.in_fd, iov, (int)n);
		if (k < 0) {
			if (errno == EINTR || errno == EAGAIN)
				continue;
			return -errno;
		}
		if (k == 0)
			return -ENODATA;
		got += (size_t)k;
		pl_patience_moved(&r->peer_gives, (size_t)k);
		RECV_ADD(r, stream_bytes, (uint64_t)k);
		pl_iov_skip(&iov, &n, (size_t)k);
	}
	return (ssize_t)got;
}

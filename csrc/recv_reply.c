/* SPDX-License-Identifier: Apache-2.0 */
/* D2's answers to data: one int32 zero for each packet that is in the file. */
#define _GNU_SOURCE
#include <assert.h>
#include <errno.h>
#include <poll.h>
#include <sys/socket.h>

#include "recv_internal.h"

/* Until the socket takes more: 0, -ECANCELED, -ETIMEDOUT. */
static int wait_writable(struct pl_recv *r)
{
	struct pollfd pfd[2] = {
		{ .fd = r->cancel_fd, .events = POLLIN },
		{ .fd = r->cfg.reply_fd, .events = POLLOUT },
	};
	int n = pl_patient_poll(&r->peer_takes, pfd, 2, r->cfg.stall_ms);

	if (n < 0)
		return n;
	return pfd[0].revents ? -ECANCELED : 0;
}

int pl_recv_reply(struct pl_recv *r, unsigned count)
{
	static const int32_t done[RECV_PARTS];	/* a slot has no more packets */
	const char *p = (const char *)done;
	size_t left = count * sizeof(*done);

	assert(count <= RECV_PARTS);
	while (left) {
		ssize_t n = send(r->cfg.reply_fd, p, left, MSG_DONTWAIT | MSG_NOSIGNAL);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
			int err = wait_writable(r);

			if (err)
				return err;
			continue;
		}
		if (n < 0)
			return -errno;
		pl_patience_moved(&r->peer_takes, (size_t)n);
		p += n;
		left -= (size_t)n;
	}
	return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Bytes of the sending pump into a stream.
 *
 * The stream must not block the emitter in write(2), or a signal could not
 * stop the copy while the peer is stuck; so it is non-blocking (or a socket,
 * MSG_DONTWAIT) and the emitter waits in poll(2) together with the cancel
 * descriptor.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "clock.h"
#include "io.h"
#include "pump_internal.h"

/* Until the stream takes more: 0, -ECANCELED, -ETIMEDOUT; D2's answers are
   taken meanwhile, with their errors. */
int pl_stream_wait(struct pl_pump *p)
{
	bool answers = p->sink->take_answers;
	struct pollfd pfd[3] = {
		{ .fd = p->cancel_fd, .events = POLLIN },
		{ .fd = p->cfg.out_fd, .events = answers ? POLLOUT | POLLIN : POLLOUT },
		{ .fd = p->lanes.wake_fd, .events = POLLIN },	/* -1: is not looked at */
	};
	uint64_t since = pl_now_ns(), woken;
	int n = pl_patient_poll(&p->peer_takes, pfd, 3, p->cfg.stall_ms);

	p->waited_ns += pl_now_ns() - since;
	if (n < 0)
		return n;
	if (pfd[0].revents)
		return -ECANCELED;
	if (pfd[2].revents && read(p->lanes.wake_fd, &woken, sizeof(woken)) < 0 &&
	    errno != EAGAIN)
		return -errno;
	if (answers && (pfd[1].revents & POLLIN))
		return p->sink->take_answers(p);
	/* POLLERR (reader gone) is left to write(2), which names it. */
	return 0;
}

/* A peer that has hung up may have said why. */
static int why_closed(struct pl_pump *p, int err)
{
	if (p->sink->take_answers && p->sink->take_answers(p) == -EREMOTEIO)
		return -EREMOTEIO;
	return err;
}

void pl_stream_moved(struct pl_pump *p, size_t n)
{
	STAT_ADD(p, wire_bytes, n);
	pl_patience_moved(&p->peer_takes, n);
}

int pl_stream_fault(struct pl_pump *p, int err, struct pl_fault *fault)
{
	if (err == -EREMOTEIO || err == -EPROTO) {
		pl_reply_explain(p, err, fault);
		return err;
	}
	fault->stage = PL_STAGE_WRITE;
	fault->stream = __atomic_load_n(&p->stats.wire_bytes, __ATOMIC_RELAXED);
	fault->frame = __atomic_load_n(&p->stats.frames, __ATOMIC_RELAXED);
	return err;
}

int pl_stream_due(struct pl_pump *p, size_t bytes)
{
	uint64_t since = pl_now_ns();
	int err = pl_rate_obey(p, bytes);

	p->waited_ns += pl_now_ns() - since;
	return err;
}

int pl_stream_write(struct pl_pump *p, struct iovec *iov, unsigned n,
		    struct pl_fault *fault)
{
	int fd = p->cfg.out_fd, err = 0;
	size_t total = 0;

	for (unsigned i = 0; i < n; i++)
		total += iov[i].iov_len;
	err = pl_stream_due(p, total);
	while (!err && n) {
		struct msghdr msg = { .msg_iov = iov, .msg_iovlen = n };
		ssize_t done;

		if (__atomic_load_n(&p->cancelled, __ATOMIC_RELAXED)) {
			err = -ECANCELED;
			break;
		}
		if (__atomic_load_n(&p->lanes.broken, __ATOMIC_RELAXED)) {
			err = -ECONNABORTED;
			break;
		}
		done = sendmsg(fd, &msg, MSG_DONTWAIT | MSG_NOSIGNAL);
		if (done < 0 && errno == ENOTSOCK)
			done = writev(fd, iov, (int)n);
		if (done < 0) {
			if (errno == EAGAIN || errno == EWOULDBLOCK)
				err = pl_stream_wait(p);
			else if (errno != EINTR)
				err = why_closed(p, -errno);
			continue;
		}
		pl_stream_moved(p, (size_t)done);
		pl_iov_skip(&iov, &n, (size_t)done);
	}
	return err ? pl_stream_fault(p, err, fault) : 0;
}

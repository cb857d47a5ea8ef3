/* SPDX-License-Identifier: Apache-2.0 */
/*
 * D2's answers.  They come in the order of the packets, so counting them is
 * enough: packets go out while answers are outstanding, up to a window, and a
 * round trip costs no throughput.  A thread that waits for the stream takes the
 * answers meanwhile, or the peer, stuck in answering, would never read on.
 */
#define _GNU_SOURCE
#include <assert.h>
#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>

#include "pump_internal.h"

static int one_answer(struct pl_pump *p, const uint8_t *bytes)
{
	p->reply.value = (int32_t)pl_get32(bytes);
	if (p->reply.value)
		return -EREMOTEIO;	/* asked for or not: the copy has failed */
	if (p->reply.answered == p->reply.asked)
		return -EPROTO;
	p->reply.answered++;
	pl_patience_moved(&p->reply.peer_answers, PL_BLOCK);
	return 0;
}

int pl_reply_take(struct pl_pump *p)
{
	struct pump_reply *r = &p->reply;

	for (;;) {
		ssize_t n = recv(p->cfg.out_fd, r->buf + r->got,
				 sizeof(r->buf) - r->got, MSG_DONTWAIT);
		unsigned at = 0;

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return errno == EAGAIN || errno == EWOULDBLOCK ? 0 : -errno;
		if (n == 0)
			return -EPIPE;
		r->got += (unsigned)n;
		for (; r->got - at >= sizeof(int32_t); at += sizeof(int32_t)) {
			int err = one_answer(p, r->buf + at);

			if (err)
				return err;
		}
		r->got -= at;
		memmove(r->buf, r->buf + at, r->got);
	}
}

static int wait_until(struct pl_pump *p, uint64_t outstanding,
		      struct pl_patience *patience, uint32_t limit_ms)
{
	while (p->reply.asked - p->reply.answered > outstanding) {
		struct pollfd pfd[2] = {
			{ .fd = p->cancel_fd, .events = POLLIN },
			{ .fd = p->cfg.out_fd, .events = POLLIN },
		};
		int err = pl_patient_poll(patience, pfd, 2, limit_ms);

		if (err < 0)
			return err;
		if (pfd[0].revents)
			return -ECANCELED;
		err = pl_reply_take(p);
		/* A peer may hang up after its last answer: that comes first. */
		if ((err == -EPIPE || err == -ECONNRESET) &&
		    p->reply.asked - p->reply.answered <= outstanding)
			return 0;
		if (err)
			return err;
	}
	return 0;
}

int pl_reply_room(struct pl_pump *p, unsigned packets)
{
	int err;

	assert(packets <= p->cfg.window && p->reply.answered <= p->reply.asked);
	/* An answer counts as a block: packets are that large, or few. */
	err = wait_until(p, p->cfg.window - packets, &p->reply.peer_answers,
			 p->cfg.stall_ms);
	if (!err)
		p->reply.asked += packets;
	return err;
}

void pl_reply_explain(const struct pl_pump *p, int err, struct pl_fault *fault)
{
	fault->stage = PL_STAGE_REPLY;
	fault->reply = err == -EREMOTEIO ? p->reply.value : 0;
	fault->stream = __atomic_load_n(&p->stats.wire_bytes, __ATOMIC_RELAXED);
	fault->frame = p->reply.answered;
}

int pl_pump_ask(struct pl_pump *p, const void *buf, size_t len,
		uint32_t timeout_ms, struct pl_fault *fault)
{
	struct pl_patience patience = { 0 };
	struct iovec iov = { (void *)buf, len };
	int err;

	*fault = (struct pl_fault){ 0 };
	if (!p->sink->take_answers || timeout_ms > INT32_MAX)
		return -EINVAL;
	err = pl_reply_take(p);		/* one too many is not this one's */
	if (err) {
		pl_reply_explain(p, err, fault);
		return err;
	}
	p->reply.asked++;
	err = pl_stream_write(p, &iov, 1, fault);
	if (err)
		return err;
	/* The last answer: all before it have come.  What they are about is in the
	   peer's hands by now, so one time is for them all. */
	err = wait_until(p, 0, &patience, timeout_ms);
	if (err)
		pl_reply_explain(p, err, fault);
	return err;
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * libFuzzer harness for what a D2 receiver answers: pump_reply.c, with the
 * socket replaced (seams.h) by the input, which also says in what pieces the
 * bytes come.  The outcome must be that of a plain look at the answers.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pump_internal.h"

#define CHECK(x) do { if (!(x)) { \
	fprintf(stderr, "FINDING line %d: %s\n", __LINE__, #x); abort(); } } while (0)

static struct {
	const uint8_t *data;
	size_t len, at;
	uint32_t order;
	bool paused;
} in;

static uint32_t choice(uint32_t below)
{
	in.order = in.order * 1103515245 + 12345;
	return (in.order >> 16) % below;
}

/* Some of what is left; nothing now and then; at last the end. */
ssize_t fuzz_recv(int fd, void *buf, size_t len, int flags)
{
	size_t left = in.len - in.at, n;

	(void)fd;
	(void)flags;
	CHECK(len);
	in.paused = !in.paused && left && !choice(3);
	if (in.paused) {
		errno = choice(2) ? EAGAIN : EINTR;
		return -1;
	}
	n = choice(8) ? 1 + choice(9) : len;
	n = n < len ? n : len;
	n = n < left ? n : left;
	memcpy(buf, in.data + in.at, n);
	in.at += n;
	return (ssize_t)n;
}

int fuzz_poll(struct pollfd *pfd, nfds_t n, int timeout)
{
	CHECK(n == 2 && timeout > 0 && timeout <= 1000);
	pfd[0].revents = 0;
	pfd[1].revents = POLLIN;
	return 1;
}

int pl_stream_write(struct pl_pump *p, struct iovec *iov, unsigned n, struct pl_fault *fault)
{
	(void)p;
	(void)iov;
	(void)n;
	(void)fault;
	return 0;
}

static const struct pl_sink_ops answered_sink = { .take_answers = pl_reply_take };

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
	static struct pl_pump p;
	struct pl_fault fault;
	uint64_t wanted, answered = 0;
	int got, word = 0, extra = 0;

	if (len < 3)
		return -1;
	memset(&p.reply, 0, sizeof(p.reply));
	p.sink = &answered_sink;
	p.cfg.out_fd = p.cancel_fd = 0;
	p.reply.asked = (data[0] | data[1] << 8) % 300;
	in.order = data[2];
	in.data = data + 3;
	in.len = len - 3;
	in.at = in.paused = 0;
	/* pl_pump_ask asks for one more, and waits for all. */
	wanted = p.reply.asked + 1;
	for (size_t at = 0; at + 4 <= in.len && !word; at += 4) {
		memcpy(&word, in.data + at, 4);
		if (answered == wanted) {
			/* One too many is an error, if it is seen at all. */
			extra = word ? -EREMOTEIO : -EPROTO;
			break;
		}
		answered += !word;
	}
	got = pl_pump_ask(&p, data, 1, 1000, &fault);
	if (got == -EPROTO && p.reply.asked < wanted) {
		/* The last one came before it was asked for. */
		CHECK(answered == wanted);
		answered--;
		extra = got;
		wanted--;
	}
	if (answered < wanted)
		CHECK(got == (word ? -EREMOTEIO : -EPIPE));
	else
		CHECK(got == 0 || got == extra);
	CHECK(p.reply.answered == answered);
	if (got)
		CHECK(fault.stage == PL_STAGE_REPLY && fault.frame == answered);
	if (got == -EREMOTEIO)
		CHECK(fault.reply == word);
	CHECK(p.reply.got <= sizeof(p.reply.buf));
	return 0;
}

#ifdef REPLAY
#include "replay.h"
#endif

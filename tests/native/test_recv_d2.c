/* SPDX-License-Identifier: Apache-2.0 */
/* The receiving pump in D2 and D3: answers, digests, refusals, bad peers. */
#define _GNU_SOURCE
#include <signal.h>

#include "packets.h"
#include "stream.h"

static void packet(struct stream *s, uint32_t type, uint64_t pos, const void *data,
		   uint32_t len, bool digest)
{
	struct packet h = { PL_D2_MARK, type, len, 0xdddddddd, pos };

	add(s, &h, sizeof(h));
	if (digest) {
		struct toy t = { 0 };
		uint8_t sum[PL_DIGEST];

		toy_digest(&t, data, len, sum);
		add(s, sum, sizeof(sum));
	}
	add(s, data, len);
}

static void command(struct stream *s, uint32_t cmd, uint64_t pos, bool digest)
{
	packet(s, CMD, pos, &cmd, 4, digest);
}

static struct pl_recv *new_recv(int in, int out, uint32_t max, struct toy *toy,
				uint32_t stall_ms)
{
	struct pl_recv_cfg cfg = {
		.in_fd = in, .out_fd = out, .slots = 3, .slot_size = 8192,
		.max_frame = max, .sparse = 1, .stall_ms = stall_ms,
		.reply_fd = in, .digest = toy_digest, .digest_ctx = toy,
	};
	struct pl_recv *r;

	EQ(pl_recv_new(&r, &cfg), 0);
	return r;
}

/* A peer: sends packets, and takes the answers as it sees fit. */
struct peer {
	pthread_t thread;
	const struct stream *s;
	int fd;
	bool lockstep;		/* one packet, one answer */
	bool digests;		/* from the second packet on */
	unsigned header_split;	/* a pause within each header */
	unsigned answers, wrong;
};

static bool take_answer(struct peer *p)
{
	int32_t value = 1;
	ssize_t n = recv(p->fd, &value, sizeof(value), MSG_WAITALL);

	if (n != sizeof(value))
		return false;
	p->answers++;
	p->wrong += value != 0;
	return true;
}

static void *drain_answers(void *arg)
{
	while (take_answer(arg))
		;
	return NULL;
}

static void *peer_main(void *arg)
{
	struct peer *p = arg;
	pthread_t drainer;
	size_t at = 0;

	if (!p->lockstep)
		OK(pthread_create(&drainer, NULL, drain_answers, p) == 0);
	for (unsigned k = 0; at < p->s->len; k++) {
		struct packet h;
		size_t len;

		memcpy(&h, p->s->data + at, sizeof(h));
		len = sizeof(h) + h.size + (p->digests && k ? PL_DIGEST : 0);
		if (p->header_split) {
			put(p->fd, p->s->data + at, p->header_split);
			usleep(200);
			put(p->fd, p->s->data + at + p->header_split,
			    len - p->header_split);
		} else {
			put(p->fd, p->s->data + at, len);
		}
		at += len;
		if (p->lockstep && h.type != ASYNC)
			OK(take_answer(p));
	}
	if (!p->lockstep)
		pthread_join(drainer, NULL);
	return NULL;
}

/* A whole conversation; the caller of the pump answers SYNC and END. */
static void converse(struct peer *p, const struct stream *s, const uint8_t *image,
		     size_t size, unsigned answers, bool digests)
{
	uint8_t *got = must_alloc(size);
	struct toy toy = { 0 };
	struct pl_recv_msg msg;
	struct pl_fault fault;
	struct pl_recv *r;
	int32_t fine = 0;
	int fd[2], out = temp_file(NULL, 0), ret;

	OK(socketpair(AF_UNIX, SOCK_STREAM, 0, fd) == 0);
	p->fd = fd[1];
	p->s = s;
	p->digests = digests;
	p->answers = p->wrong = 0;
	OK(pthread_create(&p->thread, NULL, peer_main, p) == 0);
	r = new_recv(fd[0], out, 1u << 20, &toy, 10000);
	EQ(pl_recv_dialect(r), PL_DIALECT_NONE);
	do {
		ret = pl_recv_run(r, &msg, &fault);
		OK(ret == PL_RECV_SYNC || ret == PL_RECV_END);
		EQ(pl_recv_dialect(r), PL_DIALECT_D2);
		if (ret == PL_RECV_SYNC && msg.pos == 1)
			EQ(pl_recv_expect_digests(r), 0);
		OK(write(fd[0], &fine, sizeof(fine)) == sizeof(fine));
	} while (ret != PL_RECV_END);
	EQ(pl_recv_run(r, &msg, &fault), PL_RECV_END);
	pl_recv_free(r);
	OK(pread(out, got, size, 0) == (ssize_t)size);
	OK(!memcmp(got, image, size));
	shutdown(fd[0], SHUT_WR);
	pthread_join(p->thread, NULL);
	EQ(p->answers, answers);
	EQ(p->wrong, 0);
	close(fd[0]);
	close(fd[1]);
	close(out);
	free(got);
}

static void conversations(bool digests, uint32_t type)
{
	size_t size = MiB + 4;
	uint8_t *image = must_alloc(size);
	struct stream s = { 0 };
	unsigned answers = 0;

	if (digests) {
		command(&s, 0, 1, false);
		answers++;
	}
	for (int i = 0; i < 300; i++) {
		uint32_t len = (uint32_t)rnd(rnd(10) ? 5000 : 60000) + 1;
		uint64_t pos = rnd(size - len);
		uint8_t *data = must_alloc(len);

		fill_random(data, len);
		memcpy(image + pos, data, len);
		packet(&s, type, pos, data, len, digests);
		answers += type == DATA;
		free(data);
		if (i % 50 == 49) {
			command(&s, 0, 0, digests);
			answers++;
		}
	}
	/* Four bytes are data here. */
	memcpy(image + size - 4, "tail", 4);
	packet(&s, type, size - 4, "tail", 4, digests);
	packet(&s, CMD, 0, NULL, 0, digests);
	answers += 1 + (type == DATA);
	for (unsigned split = 0; split < 24; split += 7) {
		struct peer p = { .lockstep = true, .header_split = split };

		converse(&p, &s, image, size, answers, digests);
		p = (struct peer){ .header_split = split };
		converse(&p, &s, image, size, answers, digests);
	}
	free(s.data);
	free(image);
}

/* A stream, all of it sent at once: how it ends. */
static void bad(const struct stream *s, size_t len, int err, enum pl_stage stage,
		uint64_t frames, uint64_t at, bool digests)
{
	struct stream part = { s->data, len, len };
	struct pl_fault fault = { 0 };
	struct toy toy = { 0 };
	struct pl_recv_msg msg;
	struct pl_recv *r;
	struct feeder f;
	int out = temp_file(NULL, 0), in = open_feed(&f, &part, len + 1, 0, true), ret;

	/* The peer hangs up first, so that no answer decides what is seen. */
	pthread_join(f.thread, NULL);
	r = new_recv(in, out, 8192, &toy, 10000);
	do {
		ret = pl_recv_run(r, &msg, &fault);
		if (ret == PL_RECV_SYNC && digests)
			EQ(pl_recv_expect_digests(r), 0);
	} while (ret == PL_RECV_SYNC);
	EQ(ret, err);
	EQ(fault.stage, stage);
	EQ(fault.frame, frames);
	EQ(fault.stream, at);
	EQ(pl_recv_run(r, &msg, &fault), err);	/* and stays so */
	pl_recv_free(r);
	close(in);
	close(out);
}

static void faults(void)
{
	static const struct { struct packet h; int err; } heads[] = {
		{ { PL_D1_MARK, 10, 0, 0, 0 }, -EBADMSG },	/* D1 in D2 */
		{ { 0, 0, 0, 0, 0 }, -EBADMSG },
		{ { PL_D2_MARK, DATA, 8193, 0, 0 }, -EMSGSIZE },
		{ { PL_D2_MARK, ASYNC, UINT32_MAX, 0, 0 }, -EMSGSIZE },
		{ { PL_D2_MARK, DATA, 10, 0, INT64_MAX - 9 }, -ERANGE },
		{ { PL_D2_MARK, ASYNC, 10, 0, UINT64_MAX - 9 }, -ERANGE },
		{ { PL_D2_MARK, DATA, 1, 0, INT64_MAX }, -ERANGE },
		{ { PL_D2_MARK, CMD, 3, 0, 0 }, -EPROTO },
		{ { PL_D2_MARK, 3, 10, 0, 0 }, -EOPNOTSUPP },
		{ { PL_D2_MARK, 4, 10, 0, 0 }, -EOPNOTSUPP },
		{ { PL_D2_MARK, UINT32_MAX, 10, 0, 0 }, -EOPNOTSUPP },
	};
	struct stream s = { 0 };
	uint8_t data[8000];
	uint32_t word[2] = { 0 };

	/* The stream ends at every byte of a handshake, a packet with a digest
	   in two slots' parts, and a bare header. */
	fill_random(data, sizeof(data));
	command(&s, 0, 1, false);
	packet(&s, ASYNC, 0, data, 6000, true);
	packet(&s, ASYNC, 6000, data, 2100, true);
	for (size_t len = 0; len < s.len; len += len < 80 || len > s.len - 50 ? 1 : 13)
		bad(&s, len, -ENODATA, PL_STAGE_READ, len < 6068 ? 0 : 1, len, true);
	s.len = 0;
	packet(&s, ASYNC, 0, data, 10, false);
	for (size_t i = 0; i < sizeof(heads) / sizeof(*heads); i++) {
		bool early = heads[i].err == -EBADMSG;	/* known by 16 bytes */

		s.len = 34;
		add(&s, &heads[i].h, early ? 16 : sizeof(heads[i].h));
		bad(&s, s.len, heads[i].err, PL_STAGE_PROTOCOL, 1, s.len, false);
	}
	for (uint32_t cmd = 1; cmd < 7; cmd++) {
		s.len = 34;
		word[0] = cmd;
		packet(&s, CMD, 0, word, cmd % 2 ? 4 : 8, false);
		bad(&s, 34 + 28, -EOPNOTSUPP, PL_STAGE_PROTOCOL, 1, 34 + 28, false);
	}
	s.len = 34;
	word[0] = 0;
	packet(&s, CMD, 0, word, 8, false);
	bad(&s, 34 + 28, -EPROTO, PL_STAGE_PROTOCOL, 1, 34 + 28, false);
	/* D2 in D1. */
	s.len = 0;
	frame(&s, 0, data, 10);
	packet(&s, DATA, 0, data, 10, false);
	bad(&s, 26 + 16, -EBADMSG, PL_STAGE_PROTOCOL, 1, 26 + 16, false);
	free(s.data);
}

/* One changed bit of the data, or of the digest, of each kind of packet. */
static void wrong_digests(void)
{
	static const struct { uint32_t type, len; } kinds[] = {
		{ ASYNC, 1 }, { ASYNC, 5000 }, { DATA, 4 }, { CMD, 4 }, { CMD, 0 },
	};
	uint8_t data[5000] = { 0 };

	for (size_t i = 0; i < sizeof(kinds) / sizeof(*kinds); i++) {
		uint32_t len = kinds[i].len;

		for (unsigned where = 0; where < 2; where++) {
			struct stream s = { 0 };

			if (where && !len)
				continue;
			command(&s, 0, 1, false);
			packet(&s, kinds[i].type, 0, data, len, true);
			/* Not the command itself: that would be another one. */
			s.data[28 + 24 + (where && kinds[i].type != CMD ?
					  16 + len / 2 : 3)] ^= 4;
			bad(&s, s.len, -EBADE, PL_STAGE_PROTOCOL, 0, s.len, true);
			free(s.data);
		}
	}
}

/* The peer waits for an answer, we for its next packet: a failed write must
   end that, and not the deadline. */
static void a_failed_write_ends_the_wait(void)
{
	int full = open("/dev/full", O_WRONLY | O_CLOEXEC), fd[2];
	struct pl_fault fault;
	struct stream s = { 0 };
	struct toy toy = { 0 };
	struct pl_recv_msg msg;
	struct pl_recv *r;

	OK(socketpair(AF_UNIX, SOCK_STREAM, 0, fd) == 0);
	packet(&s, DATA, 0, "some data", 9, false);
	put(fd[1], s.data, s.len);
	r = new_recv(fd[0], full, 8192, &toy, 0);
	EQ(pl_recv_run(r, &msg, &fault), -ENOSPC);
	EQ(fault.stage, PL_STAGE_WRITE);
	pl_recv_free(r);
	close(fd[0]);
	close(fd[1]);
	close(full);
	free(s.data);
}

static void *cancel_later(void *arg)
{
	usleep(50000);
	pl_recv_cancel(arg);
	return NULL;
}

/* A peer that never takes its answers: given up, or cancelled. */
static void deaf_peer(bool cancel)
{
	int fd[2], out = temp_file(NULL, 0), small = 1;
	struct pl_fault fault;
	struct stream s = { 0 };
	struct toy toy = { 0 };
	struct pl_recv_msg msg;
	struct feeder f;
	struct pl_recv *r;
	pthread_t thread;

	OK(socketpair(AF_UNIX, SOCK_STREAM, 0, fd) == 0);
	OK(setsockopt(fd[0], SOL_SOCKET, SO_SNDBUF, &small, sizeof(small)) == 0);
	for (int i = 0; i < 5000; i++)
		packet(&s, DATA, 0, "some data", 9, false);
	f = (struct feeder){ .data = s.data, .len = s.len, .piece = s.len, .fd = dup(fd[1]) };
	OK(pthread_create(&f.thread, NULL, feeder_main, &f) == 0);
	r = new_recv(fd[0], out, 8192, &toy, cancel ? 0 : 50);
	if (cancel)
		OK(pthread_create(&thread, NULL, cancel_later, r) == 0);
	EQ(pl_recv_run(r, &msg, &fault), cancel ? -ECANCELED : -ETIMEDOUT);
	EQ(fault.stage, cancel ? PL_STAGE_NONE : PL_STAGE_REPLY);
	if (cancel)
		pthread_join(thread, NULL);
	pl_recv_free(r);
	close(fd[0]);
	pthread_join(f.thread, NULL);
	close(fd[1]);
	close(out);
	free(s.data);
}

/* Without a socket to answer on there is no D2; nor digests in D1. */
static void refused(void)
{
	struct pl_recv_cfg cfg = { .slots = 2, .slot_size = 4096, .max_frame = 4096,
				   .reply_fd = -1, .digest = toy_digest };
	struct stream s = { 0 };
	struct pl_recv_msg msg;
	struct pl_fault fault;
	struct pl_recv *r;
	struct feeder f;

	packet(&s, DATA, 0, "some data", 9, false);
	cfg.in_fd = open_feed(&f, &s, s.len, 0, false);
	cfg.out_fd = temp_file(NULL, 0);
	EQ(pl_recv_new(&r, &cfg), 0);
	EQ(pl_recv_expect_digests(r), -EINVAL);
	EQ(pl_recv_run(r, &msg, &fault), -ENOTSOCK);
	EQ(fault.stage, PL_STAGE_PROTOCOL);
	pl_recv_free(r);
	close(cfg.in_fd);
	pthread_join(f.thread, NULL);
	close(cfg.out_fd);
	free(s.data);
}

int main(void)
{
	signal(SIGPIPE, SIG_IGN);
	conversations(false, DATA);
	conversations(false, ASYNC);
	conversations(true, DATA);
	conversations(true, ASYNC);
	faults();
	wrong_digests();
	a_failed_write_ends_the_wait();
	deaf_peer(false);
	deaf_peer(true);
	refused();
	return 0;
}

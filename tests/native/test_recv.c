/* SPDX-License-Identifier: Apache-2.0 */
/* The receiving pump: streams in pieces of every size, and every fault. */
#define _GNU_SOURCE
#include <signal.h>
#include <sys/resource.h>
#include <sys/socket.h>

#include "stream.h"

static struct pl_recv *new_recv(int in, int out, uint32_t slot, uint32_t max,
				uint32_t sparse)
{
	struct pl_recv_cfg cfg = {
		.in_fd = in, .out_fd = out, .slots = 3, .slot_size = slot,
		.max_frame = max, .window = 64 * KiB, .sparse = sparse,
		.reply_fd = -1,
	};
	struct pl_recv *r;

	EQ(pl_recv_new(&r, &cfg), 0);
	return r;
}

/* A stream that ends well gives the image, however it arrives. */
static void good(const struct stream *s, const uint8_t *image, size_t size,
		 size_t piece, size_t split, uint32_t slot, bool sock, uint32_t sparse,
		 unsigned syncs)
{
	uint8_t *got = must_alloc(size);
	struct pl_recv_stats stats;
	struct pl_recv_msg msg;
	struct pl_fault fault;
	struct pl_recv *r;
	struct feeder f;
	int out = temp_file(NULL, 0);
	int in = open_feed(&f, s, piece, split, sock);

	r = new_recv(in, out, slot, 64u << 20, sparse);
	while (syncs--) {
		EQ(pl_recv_run(r, &msg, &fault), PL_RECV_SYNC);
		OK(!memcmp(msg.data, "sync", 4));
		EQ(msg.pos, 77);
	}
	EQ(pl_recv_run(r, &msg, &fault), PL_RECV_END);
	pl_recv_stats(r, &stats);
	EQ(stats.image_size, size);
	pl_recv_free(r);
	OK(ftruncate(out, (off_t)size) == 0);
	OK(pread(out, got, size, 0) == (ssize_t)size);
	OK(!memcmp(got, image, size));
	close(in);
	pthread_join(f.thread, NULL);
	close(out);
	free(got);
}

static void small_stream(void)
{
	uint8_t image[9000] = { 0 };
	struct stream s = { 0 };

	fill_random(image + 100, 5000);
	frame(&s, 0, "junkjunkjunk", 12);	/* later wins */
	frame(&s, 0, image, 3);
	frame(&s, 3, image + 3, 4097);
	frame(&s, 77, "sync", 4);
	frame(&s, 4100, image + 4100, 2);
	frame(&s, 4102, image + 4102, 4898);
	frame(&s, 77, "sync", 4);
	frame(&s, 123, NULL, 0);
	for (size_t split = 1; split < s.len; split += split % 4096 < 160 ? 1 : 61)
		good(&s, image, sizeof(image), 0, split, 4096, split % 2, split % 3 != 0, 2);
	for (size_t piece = 1; piece < 100; piece += 7)
		good(&s, image, sizeof(image), piece, 0, 8192, false, 1, 2);
	free(s.data);
}

/* Frames of every size in random order, over a model. */
static void random_stream(uint32_t slot, uint32_t sparse, uint32_t largest)
{
	size_t size = 3 * MiB + 5;
	uint8_t *image = must_alloc(size), *buf = must_alloc(size);
	struct stream s = { 0 };

	fill_random(buf, size);
	memset(buf + MiB, 0, MiB);
	for (int i = 0; i < 600; i++) {
		uint32_t len = (uint32_t)(rnd(20) ? rnd(6000) : rnd(largest)) + 1;
		uint64_t pos = rnd(size), from = rnd(size);

		if (rnd(3) == 0) {	/* whole blocks of zeroes, over data too */
			from = MiB;
			pos -= pos % 4096;
			len = (uint32_t)rnd(40) * 4096 + 4096;
		}
		if (pos + len > size)
			len = (uint32_t)(size - pos);
		if (from + len > size)
			from = size - len;
		if (len == 4 || len == 0)
			continue;
		memcpy(image + pos, buf + from, len);
		frame(&s, pos, buf + from, len);
	}
	memcpy(image + size - 7, "the end", 7);
	frame(&s, size - 7, "the end", 7);
	frame(&s, 0, NULL, 0);
	good(&s, image, size, 65536, 0, slot, false, sparse, 0);
	good(&s, image, size, 3001, 0, slot, true, sparse, 0);
	free(s.data);
	free(image);
	free(buf);
}

/* Many tiny frames share slots. */
static void many_small(void)
{
	size_t size = 60000;
	uint8_t *image = must_alloc(size);
	struct stream s = { 0 };

	fill_random(image, size);
	for (size_t i = 0; i < size; i += 3)
		frame(&s, i, image + i, 3);
	frame(&s, 0, NULL, 0);
	good(&s, image, size, 65536, 0, 4096, false, 1, 0);
	good(&s, image, size, 65536, 0, (uint32_t)MiB, false, 1, 0);
	free(s.data);
	free(image);
}

/* What follows END belongs to somebody else. */
static void nothing_past_end(void)
{
	struct stream s = { 0 };
	struct pl_recv_msg msg;
	struct pl_fault fault;
	struct pl_recv *r;
	char rest[64] = "";
	struct feeder f;
	int out = temp_file(NULL, 0), in;

	frame(&s, 0, "some data here", 14);
	frame(&s, 0, NULL, 0);
	add(&s, "not yours, and longer than a header", 36);
	in = open_feed(&f, &s, s.len, 0, false);
	pthread_join(f.thread, NULL);
	r = new_recv(in, out, 4096, 4096, 1);
	EQ(pl_recv_run(r, &msg, &fault), PL_RECV_END);
	/* Asked again, it says so again, and reads nothing. */
	EQ(pl_recv_run(r, &msg, &fault), PL_RECV_END);
	pl_recv_free(r);
	EQ(read(in, rest, sizeof(rest)), 36);
	OK(!strcmp(rest, "not yours, and longer than a header"));
	close(in);
	close(out);
	free(s.data);
}

static void bad(const struct stream *s, size_t len, int err, enum pl_stage stage,
		uint64_t frames, uint64_t at)
{
	struct stream part = { s->data, len, len };
	struct pl_recv_msg msg;
	struct pl_fault fault = { 0 };
	struct pl_recv *r;
	struct feeder f;
	int out = temp_file(NULL, 0), in = open_feed(&f, &part, len + 1, 0, len % 2), ret;

	r = new_recv(in, out, 4096, 8192, 1);
	do
		ret = pl_recv_run(r, &msg, &fault);
	while (ret == PL_RECV_SYNC);
	EQ(ret, err);
	EQ(fault.stage, stage);
	EQ(fault.frame, frames);
	EQ(fault.stream, at);
	EQ(pl_recv_run(r, &msg, &fault), err);	/* and stays so */
	pl_recv_free(r);
	close(in);
	pthread_join(f.thread, NULL);
	close(out);
}

static void faults(void)
{
	static const struct { uint32_t mark, size; uint64_t pos; int err; } heads[] = {
		{ 0x4cc0ac3e, 10, 0, -EBADMSG },
		{ 0, 0, 0, -EBADMSG },
		{ PL_D1_MARK, 8193, 0, -EMSGSIZE },
		{ PL_D1_MARK, UINT32_MAX, 0, -EMSGSIZE },
		{ PL_D1_MARK, 0x80000000u, 0, -EMSGSIZE },
		{ PL_D1_MARK, 10, INT64_MAX - 9, -ERANGE },
		{ PL_D1_MARK, 10, UINT64_MAX - 3, -ERANGE },
		{ PL_D1_MARK, 10, UINT64_MAX, -ERANGE },
		{ PL_D1_MARK, 1, INT64_MAX, -ERANGE },
	};
	struct stream s = { 0 };
	uint8_t data[6000];

	/* The stream ends at every byte of: frame, SYNC, frame over two slots. */
	fill_random(data, sizeof(data));
	frame(&s, 0, data, 10);
	frame(&s, 0, "sync", 4);
	frame(&s, 10, data, 6000);
	for (size_t len = 0; len <= s.len; len += len < 50 || len > s.len - 50 ? 1 : 13)
		bad(&s, len, -ENODATA, PL_STAGE_READ,
		    len < 26 ? 0 : len < s.len ? 1 : 2, len);
	for (size_t i = 0; i < sizeof(heads) / sizeof(*heads); i++) {
		s.len = 26;
		add(&s, &(struct header){ heads[i].mark, heads[i].size, heads[i].pos }, 16);
		add(&s, data, 100);
		bad(&s, s.len, heads[i].err, PL_STAGE_PROTOCOL, 1, 26 + 16);
	}
	free(s.data);
}

static void *cancel_later(void *arg)
{
	usleep(50000);
	pl_recv_cancel(arg);
	return NULL;
}

static void waiting(void)
{
	struct pl_recv_cfg cfg = { .slots = 2, .slot_size = 4096, .max_frame = 4096,
				   .stall_ms = 30, .reply_fd = -1 };
	struct header h = { PL_D1_MARK, 1000, 0 };
	struct pl_recv_msg msg;
	struct pl_fault fault;
	struct pl_recv *r;
	pthread_t thread;
	int fd[2], out = temp_file(NULL, 0);

	OK(pipe(fd) == 0);
	cfg.in_fd = fd[0];
	cfg.out_fd = out;
	EQ(pl_recv_new(&r, &cfg), 0);
	OK(write(fd[1], &h, 16) == 16);
	EQ(pl_recv_run(r, &msg, &fault), -ETIMEDOUT);
	EQ(fault.stream, 16);
	pl_recv_free(r);

	cfg.stall_ms = 0;
	EQ(pl_recv_new(&r, &cfg), 0);
	OK(pthread_create(&thread, NULL, cancel_later, r) == 0);
	EQ(pl_recv_run(r, &msg, &fault), -ECANCELED);
	pthread_join(thread, NULL);
	EQ(pl_recv_run(r, &msg, &fault), -ECANCELED);
	pl_recv_free(r);
	close(fd[0]);
	close(fd[1]);

	/* A writer that fails stops a reader that is far ahead. */
	for (int i = 0; i < 20; i++) {
		struct stream s = { 0 };
		struct feeder f;
		int full = open("/dev/full", O_WRONLY | O_CLOEXEC);
		uint8_t data[4000];

		fill_random(data, sizeof(data));
		for (int k = 0; k < 100; k++)
			frame(&s, (uint64_t)k * 4000, data, 4000);
		frame(&s, 0, NULL, 0);
		cfg.in_fd = open_feed(&f, &s, s.len, 0, false);
		cfg.out_fd = full;
		EQ(pl_recv_new(&r, &cfg), 0);
		EQ(pl_recv_run(r, &msg, &fault), -ENOSPC);
		EQ(fault.stage, PL_STAGE_WRITE);
		EQ(fault.pos, 0);
		pl_recv_free(r);
		close(cfg.in_fd);
		pthread_join(f.thread, NULL);
		close(full);
		free(s.data);
	}
	close(out);
}

struct drip {
	pthread_t thread;
	int fd;
};

static void *drip_main(void *arg)
{
	struct drip *d = arg;
	struct header h = { PL_D1_MARK, 1000000, 0 };

	/* For ever: only the receiver ends it. */
	for (size_t i = 0; write(d->fd, (char *)&h + i % sizeof(h), 1) == 1; i++)
		usleep(2000);
	return NULL;
}

/* A byte now and then is no progress: it does not start the timer anew. */
static void dripping(void)
{
	struct pl_recv_cfg cfg = { .slots = 2, .slot_size = 4096, .max_frame = 1000000,
				   .stall_ms = 100, .reply_fd = -1 };
	struct pl_recv_msg msg;
	struct pl_fault fault;
	struct pl_recv *r;
	struct drip d;
	int fd[2], out = temp_file(NULL, 0);

	OK(pipe(fd) == 0);
	cfg.in_fd = fd[0];
	cfg.out_fd = out;
	d.fd = fd[1];
	EQ(pl_recv_new(&r, &cfg), 0);
	OK(pthread_create(&d.thread, NULL, drip_main, &d) == 0);
	EQ(pl_recv_run(r, &msg, &fault), -ETIMEDOUT);
	EQ(fault.stage, PL_STAGE_READ);
	OK(fault.stream < PL_BLOCK);
	close(fd[0]);
	pthread_join(d.thread, NULL);
	close(fd[1]);
	close(out);
	pl_recv_free(r);
}

/* Zero blocks become holes in the file, and overwrite what was there. */
static void holes(void)
{
	size_t size = 8 * MiB;
	uint8_t *zero = must_alloc(size), one[4096];
	struct pl_recv_msg msg;
	struct pl_fault fault;
	struct stream s = { 0 };
	struct pl_recv *r;
	struct feeder f;
	struct stat st;
	int out = temp_file(NULL, 0), in;

	fill_random(one, sizeof(one));
	frame(&s, 0, zero, 4u << 20);
	frame(&s, 2 * MiB, one, 4096);
	frame(&s, 4 * MiB, zero, 4u << 20);
	frame(&s, MiB, zero, 2u << 20);
	frame(&s, 0, NULL, 0);
	in = open_feed(&f, &s, 65536, 0, false);
	r = new_recv(in, out, (uint32_t)MiB, 8u << 20, 1);
	EQ(pl_recv_run(r, &msg, &fault), PL_RECV_END);
	pl_recv_free(r);
	OK(fstat(out, &st) == 0);
	OK((uint64_t)st.st_blocks * 512 <= 64 * KiB);
	OK(ftruncate(out, (off_t)size) == 0);
	OK(pread(out, s.data, size, 0) == (ssize_t)size);
	OK(!memcmp(s.data, zero, size));
	close(in);
	pthread_join(f.thread, NULL);
	close(out);
	free(s.data);
	free(zero);
}

/* Features are agreed in D1, once it is known to be that. */
static void features(void)
{
	struct pl_recv_msg msg;
	struct pl_fault fault;
	struct stream s = { 0 };
	struct pl_recv *r;
	struct feeder f;
	int out = temp_file(NULL, 0), in;

	frame(&s, 0, "sync", 4);
	frame(&s, 0, NULL, 0);
	in = open_feed(&f, &s, 65536, 0, false);
	r = new_recv(in, out, 4096, 4096, 1);
	EQ(pl_recv_expect(r, 0), -EINVAL);
	EQ(pl_recv_run(r, &msg, &fault), PL_RECV_SYNC);
	EQ(pl_recv_expect(r, 1ull << 63), -EINVAL);
	EQ(pl_recv_expect(r, 0), 0);
	EQ(pl_recv_run(r, &msg, &fault), PL_RECV_END);
	pl_recv_free(r);
	close(in);
	pthread_join(f.thread, NULL);
	close(out);
	free(s.data);
}

/* Data, and zeroes over them in the same slot: the hole is made after the data, or not
   at all.  The stream is all there, so the reader fills slots while the writer is busy. */
static void zeroes_over_data_in_one_slot(void)
{
	size_t size = 8 * MiB;
	uint8_t *zero = must_alloc(size), *got = must_alloc(size);
	struct stream s = { 0 };
	struct pl_recv_msg msg;
	struct pl_fault fault;
	struct pl_recv *r;
	int out = temp_file(NULL, 0), in;

	fill_random(got, 64 * KiB);
	for (size_t at = 0; at < size; at += 64 * KiB) {
		frame(&s, at, got, 64 * KiB);
		frame(&s, at, zero, 64 * KiB);
	}
	frame(&s, 0, NULL, 0);
	in = temp_file(s.data, s.len);
	r = new_recv(in, out, (uint32_t)MiB, (uint32_t)MiB, 1);
	EQ(pl_recv_run(r, &msg, &fault), PL_RECV_END);
	pl_recv_free(r);
	OK(ftruncate(out, (off_t)size) == 0);
	OK(pread(out, got, size, 0) == (ssize_t)size);
	OK(!memcmp(got, zero, size));
	close(in);
	close(out);
	free(s.data);
	free(got);
	free(zero);
}

static void bad_configs(void)
{
	struct pl_recv_cfg good_cfg = { .in_fd = 0, .out_fd = 1, .slots = 2,
					.slot_size = 4096, .max_frame = 1 }, c;
	struct pl_recv *r;

#define REFUSED(change) do { c = good_cfg; change; EQ(pl_recv_new(&r, &c), -EINVAL); } while (0)
	REFUSED(c.in_fd = -1);
	REFUSED(c.out_fd = -1);
	REFUSED(c.reply_fd = -2);
	REFUSED(c.slots = 1);
	REFUSED(c.slots = 1025);
	REFUSED(c.slot_size = 0);
	REFUSED(c.slot_size = 4097);
	REFUSED(c.max_frame = 0);
	REFUSED(c.stall_ms = UINT32_MAX);
	pl_recv_free(NULL);
}

int main(void)
{
	signal(SIGPIPE, SIG_IGN);
	bad_configs();
	small_stream();
	many_small();
	random_stream(4096, 1, 60000);
	random_stream((uint32_t)MiB, 1, 2500000);
	random_stream(65536, 0, 200000);
	nothing_past_end();
	faults();
	waiting();
	dripping();
	holes();
	features();
	zeroes_over_data_in_one_slot();
	return 0;
}

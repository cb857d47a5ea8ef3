/* SPDX-License-Identifier: Apache-2.0 */
/* The sending pump into a pipe, a socket and a file. */
#define _GNU_SOURCE
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>

#include "testing.h"

struct header {
	uint32_t mark, size;
	uint64_t pos;
};

/* The other end: takes the stream apart into an image. */
struct taker {
	pthread_t thread;
	int fd;
	uint8_t *image, *touched;
	uint64_t size, frames, bytes, largest, syncs, ends, last;
	bool ordered;
};

static bool take_all(int fd, void *buf, size_t len)
{
	for (char *p = buf; len;) {
		ssize_t n = read(fd, p, len);

		if (n < 0 && errno == EINTR)
			continue;
		OK(n >= 0);
		if (n == 0)
			return false;
		p += n;
		len -= (size_t)n;
	}
	return true;
}

static void *taker_main(void *arg)
{
	struct taker *t = arg;
	struct header h;
	uint8_t four[4];

	while (take_all(t->fd, &h, sizeof(h))) {
		EQ(h.mark, PL_D1_MARK);
		if (h.size == 0 || h.size == 4) {
			if (h.size)
				OK(take_all(t->fd, four, 4));
			t->syncs += h.size == 4;
			t->ends += h.size == 0;
			t->last = 0;
			continue;
		}
		OK(h.pos + h.size <= t->size);
		OK(take_all(t->fd, t->image + h.pos, h.size));
		memset(t->touched + h.pos, 1, h.size);
		if (h.pos < t->last)
			t->ordered = false;
		t->last = h.pos;
		t->frames++;
		t->bytes += h.size;
		if (h.size > t->largest)
			t->largest = h.size;
	}
	return NULL;
}

static int taker_start(struct taker *t, uint64_t size, bool sock)
{
	int fd[2];

	*t = (struct taker){ .size = size, .ordered = true };
	t->image = must_alloc(size);
	t->touched = must_alloc(size);
	if (sock)
		OK(socketpair(AF_UNIX, SOCK_STREAM, 0, fd) == 0);
	else
		OK(pipe2(fd, 0) == 0 && fcntl(fd[1], F_SETFL, O_NONBLOCK) == 0);
	t->fd = fd[0];
	OK(pthread_create(&t->thread, NULL, taker_main, t) == 0);
	return fd[1];
}

static void taker_end(struct taker *t, int fd)
{
	close(fd);
	pthread_join(t->thread, NULL);
	close(t->fd);
}

static void taker_free(struct taker *t)
{
	free(t->image);
	free(t->touched);
}

static struct pl_pump_cfg config(int src, uint64_t size, int out, enum pl_sink sink)
{
	return (struct pl_pump_cfg){
		.src_fd = src, .size = size, .align = 1, .out_fd = out,
		.sink = sink, .cluster = 64 * KiB, .slots = 4, .readers = 2,
	};
}

static struct pl_pump *new_pump(const struct pl_pump_cfg *cfg)
{
	struct pl_pump *p;

	EQ(pl_pump_new(&p, cfg), 0);
	return p;
}

/* Random extents of a random source arrive as they are, in order. */
static void extents_arrive(uint64_t size, bool sock, uint32_t readers, uint64_t base)
{
	uint8_t *data = must_alloc(size + base);
	struct pl_extent ext[200];
	struct pl_pump_stats stats;
	struct pl_pump_cfg cfg;
	struct pl_fault fault;
	struct pl_pump *p;
	struct taker t;
	uint64_t at = 0, total = 0;
	size_t n = 0;
	int src, out;

	fill_random(data, size + base);
	src = temp_file(data, size + base);
	while (n < 200 && at < size) {
		uint64_t gap = rnd(4) ? rnd(5000) : 0;
		uint64_t len = rnd(10) ? rnd(9000) + 1 : rnd(300000) + 1;

		if (at + gap >= size)
			break;
		ext[n].start = at + gap;
		ext[n].end = at + gap + len > size ? size : at + gap + len;
		at = ext[n].end;
		total += ext[n].end - ext[n].start;
		n++;
	}
	out = taker_start(&t, size, sock);
	cfg = config(src, size, out, PL_SINK_FRAMES);
	cfg.readers = readers;
	cfg.src_base = base;
	p = new_pump(&cfg);
	EQ(pl_pump_pass(p, ext, n, 0, &fault), 0);
	pl_pump_stats(p, &stats);
	pl_pump_free(p);
	taker_end(&t, out);
	EQ(stats.data_bytes, total);
	EQ(stats.read_bytes, total);
	EQ(stats.done_bytes, total);
	EQ(t.bytes, total);
	EQ(stats.frames, t.frames);
	EQ(stats.wire_bytes, total + 16 * t.frames);
	OK(t.ordered && t.largest <= 64 * KiB && t.syncs == 0);
	for (size_t i = 0; i < n; i++) {
		uint64_t len = ext[i].end - ext[i].start;

		OK(!memcmp(t.image + ext[i].start, data + base + ext[i].start, len));
		memset(t.touched + ext[i].start, 0, len);
	}
	for (uint64_t i = 0; i < size; i++)
		OK(!t.touched[i]);	/* and nothing else was sent */
	taker_free(&t);
	close(src);
	free(data);
}

/* No data frame has 4 bytes, whatever the tail. */
static void tails(void)
{
	for (uint64_t tail = 1; tail <= 9; tail++) {
		for (int with_known = 0; with_known < 2; with_known++) {
			uint64_t size = 128 * KiB + tail;
			struct pl_extent all = { 0, size };
			uint8_t *data = must_alloc(size);
			struct pl_known known;
			struct pl_pump_cfg cfg;
			struct pl_fault fault;
			struct pl_pump *p;
			struct taker t;
			int src, out;

			fill_random(data, size);
			src = temp_file(data, size);
			out = taker_start(&t, size, false);
			cfg = config(src, size, out, PL_SINK_FRAMES);
			EQ(pl_known_init(&known, size, 12), 0);
			cfg.known = with_known ? &known : NULL;
			p = new_pump(&cfg);
			EQ(pl_pump_pass(p, &all, 1, 0, &fault), 0);
			pl_pump_free(p);
			taker_end(&t, out);
			EQ(t.syncs, 0);
			EQ(t.frames, 3 + (tail == 4));
			OK(!memcmp(t.image, data, size));
			taker_free(&t);
			pl_known_fini(&known);
			close(src);
			free(data);
		}
	}
}

struct hook_log {
	uint64_t last, calls, fail_at;
	int err;
	bool ascending;
};

static int log_hook(void *ctx, uint64_t start, uint64_t end)
{
	struct hook_log *l = ctx;

	if (start < l->last || end <= start)
		l->ascending = false;
	l->last = end;
	l->calls++;
	return end > l->fail_at ? l->err : 0;
}

static void hooks(void)
{
	struct hook_log log = { .ascending = true, .fail_at = UINT64_MAX };
	struct pl_extent all = { 0, MiB };
	struct pl_fault fault;
	struct pl_pump_cfg cfg;
	struct pl_pump *p;
	struct taker t;
	int src = temp_file(NULL, MiB), out;

	out = taker_start(&t, MiB, false);
	cfg = config(src, MiB, out, PL_SINK_FRAMES);
	cfg.hook = log_hook;
	cfg.hook_ctx = &log;
	p = new_pump(&cfg);
	EQ(pl_pump_pass(p, &all, 1, 0, &fault), 0);
	EQ(log.calls, 0);		/* not asked for */
	EQ(pl_pump_pass(p, &all, 1, PL_PASS_HOOK, &fault), 0);
	OK(log.ascending);
	EQ(log.calls, 16);
	EQ(log.last, MiB);
	/* A failure wherever it comes ends the pass and names the place. */
	for (uint64_t at = 0; at < MiB; at += 64 * KiB) {
		log = (struct hook_log){ .ascending = true, .fail_at = at,
					 .err = -EXDEV };
		EQ(pl_pump_pass(p, &all, 1, PL_PASS_HOOK, &fault), -EXDEV);
		EQ(fault.stage, PL_STAGE_HOOK);
		EQ(fault.pos, at);
	}
	/* The pump is usable after that. */
	EQ(pl_pump_pass(p, &all, 1, 0, &fault), 0);
	pl_pump_free(p);
	taker_end(&t, out);
	taker_free(&t);
	close(src);
}

static int write_then(void *ctx, uint64_t start, uint64_t end)
{
	static const uint8_t late[64 * KiB] = { [0 ... 64 * KiB - 1] = 0xa5 };

	OK(end - start <= sizeof(late));
	OK(pwrite(*(const int *)ctx, late, end - start, (off_t)start) ==
	   (ssize_t)(end - start));
	return 0;
}

/* Clear, then read: what is written while the hook clears a mark is sent. */
static void hook_before_read(unsigned flags)
{
	struct pl_extent all = { 0, MiB };
	struct pl_pump_cfg cfg;
	struct pl_fault fault;
	struct pl_pump *p;
	struct taker t;
	int src = temp_file(NULL, MiB), out;

	out = taker_start(&t, MiB, false);
	cfg = config(src, MiB, out, PL_SINK_FRAMES);
	cfg.hook = write_then;
	cfg.hook_ctx = &src;
	p = new_pump(&cfg);
	EQ(pl_pump_pass(p, &all, 1, PL_PASS_HOOK | flags, &fault), 0);
	pl_pump_free(p);
	taker_end(&t, out);
	for (uint64_t i = 0; i < MiB; i++)
		EQ(t.image[i], 0xa5);
	taker_free(&t);
	close(src);
}

/* known: zeroes, unchanged chunks, holes, the last byte. */
static void passes(uint32_t shift)
{
	uint64_t size = 512 * KiB + 100;
	struct pl_extent all = { 0, size }, one;
	uint8_t *data = must_alloc(size);
	struct pl_pump_stats s0, s1;
	struct pl_known known;
	struct pl_pump_cfg cfg;
	struct pl_fault fault;
	struct pl_pump *p;
	struct taker t;
	int src, out;

	fill_random(data + 64 * KiB, 64 * KiB);
	src = temp_file(data, size);
	out = taker_start(&t, size, false);
	cfg = config(src, size, out, PL_SINK_FRAMES);
	EQ(pl_known_init(&known, size, shift), 0);
	cfg.known = &known;
	p = new_pump(&cfg);

	EQ(pl_pump_pass(p, &all, 1, PL_PASS_SKIP_ZERO | PL_PASS_LAST, &fault), 0);
	pl_pump_stats(p, &s0);
	EQ(s0.data_bytes, 64 * KiB + 100);
	EQ(s0.zero_bytes, size - s0.data_bytes);
	/* Unchanged: nothing goes, but the last block on demand. */
	EQ(pl_pump_pass(p, &all, 1, PL_PASS_SKIP_ZERO | PL_PASS_CHANGED, &fault), 0);
	pl_pump_stats(p, &s1);
	EQ(s1.data_bytes, s0.data_bytes);
	EQ(pl_pump_pass(p, &all, 1, PL_PASS_SKIP_ZERO | PL_PASS_CHANGED | PL_PASS_LAST,
			&fault), 0);
	pl_pump_stats(p, &s0);
	EQ(s0.data_bytes - s1.data_bytes, 100);
	/* One byte: its chunk goes, widened from a tiny extent. */
	data[64 * KiB + 5000] ^= 0xff;
	OK(pwrite(src, data + 64 * KiB + 5000, 1, 64 * KiB + 5000) == 1);
	one = (struct pl_extent){ 64 * KiB + 5000, 64 * KiB + 5001 };
	EQ(pl_pump_pass(p, &one, 1, PL_PASS_SKIP_ZERO | PL_PASS_CHANGED, &fault), 0);
	pl_pump_stats(p, &s1);
	EQ(s1.data_bytes - s0.data_bytes, 1ull << shift);
	/* Zeroed: zeroes go where the target has data, once. */
	memset(data + 64 * KiB, 0, 32 * KiB);
	OK(pwrite(src, data + 64 * KiB, 32 * KiB, 64 * KiB) == (ssize_t)(32 * KiB));
	EQ(pl_pump_pass(p, &all, 1, PL_PASS_SKIP_ZERO | PL_PASS_CHANGED, &fault), 0);
	pl_pump_stats(p, &s0);
	EQ(s0.data_bytes - s1.data_bytes, shift == 12 ? 32 * KiB : 64 * KiB);
	EQ(pl_pump_pass(p, &all, 1, PL_PASS_SKIP_ZERO, &fault), 0);
	pl_pump_stats(p, &s1);
	EQ(s1.data_bytes - s0.data_bytes, 32 * KiB);
	/* A hole over data: not read, zeroes go, and only where there was data. */
	one = (struct pl_extent){ 96 * KiB, 192 * KiB };
	memset(data + 96 * KiB, 0, 96 * KiB);
	OK(pwrite(src, data + 96 * KiB, 96 * KiB, 96 * KiB) == (ssize_t)(96 * KiB));
	EQ(pl_pump_pass(p, &one, 1, PL_PASS_SKIP_ZERO | PL_PASS_CHANGED | PL_PASS_HOLES,
			&fault), 0);
	pl_pump_stats(p, &s0);
	/* Only whole chunks of it: the rest belongs to the data beside it. */
	EQ(s0.data_bytes - s1.data_bytes, shift == 12 ? 32 * KiB : 0);
	EQ(s0.read_bytes, s1.read_bytes);
	EQ(pl_pump_pass(p, &one, 1, PL_PASS_SKIP_ZERO | PL_PASS_HOLES, &fault), 0);
	pl_pump_stats(p, &s1);
	EQ(s1.data_bytes, s0.data_bytes);
	/* What may hold anything gets its zeroes. */
	pl_known_assume_data(&known, 300 * KiB, 300 * KiB + 1);
	EQ(pl_pump_pass(p, &all, 1, PL_PASS_SKIP_ZERO | PL_PASS_CHANGED, &fault), 0);
	pl_pump_stats(p, &s0);
	OK(s0.data_bytes - s1.data_bytes >= 4096);
	pl_pump_free(p);
	taker_end(&t, out);
	OK(!memcmp(t.image, data, size));
	taker_free(&t);
	pl_known_fini(&known);
	close(src);
	free(data);
}

/* A target that follows a changing source through random CHANGED, dirty and
   hole passes is equal to it after each. */
static void random_rounds(uint32_t shift)
{
	uint64_t size = 700 * KiB + 4;
	struct pl_extent all = { 0, size };
	uint8_t *data = must_alloc(size), *got = must_alloc(size);
	struct pl_known known;
	struct pl_pump_cfg cfg;
	struct pl_fault fault;
	struct pl_pump *p;
	int src = temp_file(NULL, size), out = temp_file(NULL, size);

	EQ(pl_known_init(&known, size, shift), 0);
	cfg = config(src, size, out, PL_SINK_FILE);
	cfg.known = &known;
	p = new_pump(&cfg);
	for (int round = 0; round < (int)so_many(60); round++) {
		struct pl_bitmap dirty, holes;
		struct pl_extent ext[400], run = { 0, 0 };
		size_t n = 0;

		EQ(pl_bitmap_init(&dirty, size, 12), 0);
		EQ(pl_bitmap_init(&holes, size, 12), 0);
		for (int i = 0; i < 20; i++) {
			uint64_t at = rnd(size), len = rnd(30000) + 1;
			bool hole = rnd(4) == 0, zero = hole || rnd(3) == 0;

			if (hole) {
				at -= at % 4096;
				len += 4095 - (len - 1) % 4096;
			}
			if (at + len > size)
				len = size - at;
			if (zero)
				memset(data + at, 0, len);
			else
				fill_random(data + at, len);
			OK(pwrite(src, data + at, len, (off_t)at) == (ssize_t)len);
			pl_bitmap_set(&dirty, at, at + len);
			if (hole)
				pl_bitmap_set(&holes, at, at + len);
			else
				for (uint64_t g = at / 4096; g <= (at + len - 1) / 4096; g++)
					pl_bitmap_clear(&holes, g * 4096, (g + 1) * 4096);
		}
		switch (rnd(3)) {
		case 0:
			EQ(pl_pump_pass(p, &all, 1, PL_PASS_CHANGED | PL_PASS_SKIP_ZERO,
					&fault), 0);
			break;
		case 1:
			while (pl_bitmap_next(&dirty, run.end, &run))
				ext[n++] = run;
			EQ(pl_pump_pass(p, ext, n, rnd(2) ? PL_PASS_SKIP_ZERO :
					PL_PASS_SKIP_ZERO | PL_PASS_CHANGED, &fault), 0);
			break;
		default:
			while (pl_bitmap_next(&holes, run.end, &run))
				ext[n++] = run;
			EQ(pl_pump_pass(p, ext, n, PL_PASS_HOLES | PL_PASS_SKIP_ZERO |
					PL_PASS_CHANGED, &fault), 0);
			EQ(pl_pump_pass(p, &all, 1, PL_PASS_CHANGED | PL_PASS_SKIP_ZERO,
					&fault), 0);
		}
		OK(pread(out, got, size, 0) == (ssize_t)size);
		for (uint64_t i = 0; i < size; i++)
			if (got[i] != data[i])
				DIE("round %d shift %u differs at %llu", round, shift,
				    (unsigned long long)i);
		pl_bitmap_fini(&dirty);
		pl_bitmap_fini(&holes);
	}
	pl_pump_free(p);
	pl_known_fini(&known);
	close(src);
	close(out);
	free(data);
	free(got);
}

/* Alignment of O_DIRECT: reads are widened, the end is clipped. */
static void aligned(void)
{
	uint64_t size = 300 * KiB + 123, base = 512;
	struct pl_extent ext[] = { { 1, 3 }, { 4095, 4097 }, { 8192, 150000 },
				   { 200001, size } };
	uint8_t *data = must_alloc(base + size);
	struct pl_pump_cfg cfg;
	struct pl_fault fault;
	struct pl_pump *p;
	struct taker t;
	int src, out;

	fill_random(data, base + size);
	src = temp_file(data, base + size);
	for (uint32_t align = 1; align <= 65536; align *= align < 4096 ? 8 : 16) {
		out = taker_start(&t, size, false);
		cfg = config(src, size, out, PL_SINK_FRAMES);
		cfg.align = align;
		cfg.src_base = base;
		p = new_pump(&cfg);
		EQ(pl_pump_pass(p, ext, 4, 0, &fault), 0);
		pl_pump_free(p);
		taker_end(&t, out);
		for (size_t i = 0; i < 4; i++)
			OK(!memcmp(t.image + ext[i].start, data + base + ext[i].start,
				   ext[i].end - ext[i].start));
		taker_free(&t);
	}
	close(src);
	free(data);
}

/* The last bytes, no whole sector, come from elsewhere; also the only ones. */
static void tail(uint64_t size)
{
	uint64_t base = 4096, whole = size - size % 4096;
	struct pl_extent ext = { 0, size };
	uint8_t *data = must_alloc(base + size);
	struct pl_pump_cfg cfg;
	struct pl_fault fault;
	struct pl_pump *p;
	struct taker t;
	int src, end, out;

	fill_random(data, base + size);
	src = temp_file(data, base + whole);
	end = temp_file(data + base + whole - 7, 7 + size - whole);
	out = taker_start(&t, size, false);
	cfg = config(src, size, out, PL_SINK_FRAMES);
	cfg.align = 4096;
	cfg.src_base = base;
	cfg.tail = (uint32_t)(size - whole);
	cfg.tail_fd = end;
	cfg.tail_pos = 7;
	p = new_pump(&cfg);
	EQ(pl_pump_pass(p, &ext, 1, 0, &fault), 0);
	pl_pump_free(p);
	taker_end(&t, out);
	OK(!memcmp(t.image, data + base, size));
	taker_free(&t);
	close(src);
	close(end);
	free(data);
}

static void *cancel_later(void *arg)
{
	usleep(50000);
	pl_pump_cancel(arg);
	return NULL;
}

static bool dripped_enough;	/* atomic */

static void *drip_main(void *arg)
{
	char page[4096];

	/* Whole pages: a pipe has no room before one is free. */
	while (!__atomic_load_n(&dripped_enough, __ATOMIC_RELAXED)) {
		if (read(*(int *)arg, page, sizeof(page)) <= 0)
			break;
		usleep(20000);
	}
	return NULL;
}

static void dripping(int src, int *fd)
{
	struct pl_pump_cfg cfg = config(src, MiB, fd[1], PL_SINK_FRAMES);
	const struct pl_extent all = { 0, MiB };
	struct pl_fault fault;
	struct pl_pump *p;
	pthread_t thread;

	cfg.stall_ms = 100;
	p = new_pump(&cfg);
	OK(pthread_create(&thread, NULL, drip_main, fd) == 0);
	EQ(pl_pump_pass(p, &all, 1, 0, &fault), -ETIMEDOUT);
	EQ(fault.stage, PL_STAGE_WRITE);
	OK(fault.stream < 256 * KiB);
	__atomic_store_n(&dripped_enough, true, __ATOMIC_RELAXED);
	pthread_join(thread, NULL);
	pl_pump_free(p);
}

static void faults(void)
{
	struct pl_extent all = { 0, MiB }, bad[] = { { 4096, 8192 }, { 0, 4096 } };
	struct pl_extent empty = { 5, 5 }, past = { 0, MiB + 1 };
	int src = temp_file(NULL, MiB), fd[2], out;
	struct pl_pump_cfg cfg;
	struct pl_fault fault;
	struct pl_pump *p;
	pthread_t thread;
	struct taker t;

	/* Arguments are checked before anything happens. */
	out = taker_start(&t, MiB, false);
	cfg = config(src, MiB, out, PL_SINK_FRAMES);
	p = new_pump(&cfg);
	EQ(pl_pump_pass(p, bad, 2, 0, &fault), -EINVAL);
	EQ(pl_pump_pass(p, &empty, 1, 0, &fault), -EINVAL);
	EQ(pl_pump_pass(p, &past, 1, 0, &fault), -EINVAL);
	EQ(pl_pump_pass(p, &all, 1, PL_PASS_CHANGED, &fault), -EINVAL);
	EQ(pl_pump_pass(p, NULL, 0, 0, &fault), 0);
	EQ(pl_pump_write(p, "sixteen bytes at", 0, &fault), 0);
	/* The source gets shorter: the place is named. */
	OK(ftruncate(src, (off_t)(256 * KiB)) == 0);
	EQ(pl_pump_pass(p, &all, 1, 0, &fault), -ENODATA);
	EQ(fault.stage, PL_STAGE_READ);
	OK(fault.pos >= 256 * KiB && fault.pos < MiB && fault.pos % (64 * KiB) == 0);
	OK(ftruncate(src, (off_t)MiB) == 0);
	pl_pump_free(p);
	taker_end(&t, out);
	taker_free(&t);

	/* Nobody reads: a stall is given up, with the place in the stream. */
	OK(pipe2(fd, O_NONBLOCK) == 0);
	cfg = config(src, MiB, fd[1], PL_SINK_FRAMES);
	cfg.stall_ms = 50;
	p = new_pump(&cfg);
	EQ(pl_pump_pass(p, &all, 1, 0, &fault), -ETIMEDOUT);
	EQ(fault.stage, PL_STAGE_WRITE);
	EQ(fault.stream, 65536);
	EQ(pl_pump_write(p, "x", 1, &fault), -ETIMEDOUT);
	pl_pump_free(p);

	/* A reader that drips is given up too, though it never stops. */
	dripping(src, fd);

	/* Cancelled while the pipe is full, and for good. */
	cfg.stall_ms = 0;
	p = new_pump(&cfg);
	OK(pthread_create(&thread, NULL, cancel_later, p) == 0);
	EQ(pl_pump_pass(p, &all, 1, 0, &fault), -ECANCELED);
	pthread_join(thread, NULL);
	EQ(pl_pump_pass(p, &all, 1, 0, &fault), -ECANCELED);
	EQ(pl_pump_write(p, "x", 1, &fault), -ECANCELED);
	pl_pump_free(p);

	/* Cancelled while it obeys a rate. */
	close(fd[0]);
	close(fd[1]);
	out = taker_start(&t, MiB, true);
	cfg = config(src, MiB, out, PL_SINK_FRAMES);
	cfg.rate = 1;
	p = new_pump(&cfg);
	OK(pthread_create(&thread, NULL, cancel_later, p) == 0);
	EQ(pl_pump_pass(p, &all, 1, 0, &fault), -ECANCELED);
	pthread_join(thread, NULL);
	pl_pump_free(p);
	taker_end(&t, out);
	taker_free(&t);

	/* The reader is gone: EPIPE, no signal. */
	for (int sock = 0; sock < 2; sock++) {
		if (sock)
			OK(socketpair(AF_UNIX, SOCK_STREAM, 0, fd) == 0);
		else
			OK(pipe2(fd, O_NONBLOCK) == 0);
		cfg = config(src, MiB, fd[1], PL_SINK_FRAMES);
		p = new_pump(&cfg);
		close(fd[0]);
		EQ(pl_pump_pass(p, &all, 1, 0, &fault), -EPIPE);
		EQ(fault.stage, PL_STAGE_WRITE);
		EQ(fault.stream, 0);
		EQ(pl_pump_write(p, "x", 1, &fault), -EPIPE);
		pl_pump_free(p);
		close(fd[1]);
	}

	/* A file that is full. */
	out = open("/dev/full", O_WRONLY | O_CLOEXEC);
	cfg = config(src, MiB, out, PL_SINK_FILE);
	p = new_pump(&cfg);
	EQ(pl_pump_pass(p, &all, 1, 0, &fault), -ENOSPC);
	EQ(fault.stage, PL_STAGE_WRITE);
	EQ(pl_pump_write(p, "x", 1, &fault), -EINVAL);	/* not a stream */
	pl_pump_free(p);
	close(out);
	close(src);
}

struct cut {
	int src, reader, writer;
	bool over;	/* atomic */
};

/* When the pipe is full: the source is cut, and the pipe emptied. */
static void *cut_main(void *arg)
{
	struct cut *c = arg;
	struct pollfd ready = { .fd = c->writer, .events = POLLOUT };
	char page[4096];

	while (poll(&ready, 1, 0) == 1)
		;
	OK(ftruncate(c->src, 0) == 0);
	while (!__atomic_load_n(&c->over, __ATOMIC_RELAXED))
		while (read(c->reader, page, sizeof(page)) > 0)
			;
	return NULL;
}

/* A source that gets shorter after it was read and before its pages are in the pipe is
   named, not the stream. */
static void spliced_source_gets_shorter(void)
{
	uint8_t *data = must_alloc(MiB);
	const struct pl_extent all = { 0, MiB };
	struct pl_pump_cfg cfg;
	struct pl_fault fault;
	struct pl_known known;
	struct pl_pump *p;
	pthread_t thread;
	struct cut c;
	int fd[2];

	fill_random(data, MiB);
	OK(pipe2(fd, O_NONBLOCK) == 0);
	c = (struct cut){ temp_file(data, MiB), fd[0], fd[1], false };
	EQ(pl_known_init(&known, MiB, 12), 0);
	cfg = config(c.src, MiB, c.writer, PL_SINK_FRAMES);
	cfg.known = &known;
	cfg.cluster = MiB;	/* one run, many times what a pipe holds */
	p = new_pump(&cfg);
	OK(pthread_create(&thread, NULL, cut_main, &c) == 0);
	EQ(pl_pump_pass(p, &all, 1, PL_PASS_LIVE, &fault), -ENODATA);
	EQ(fault.stage, PL_STAGE_READ);
	EQ(fault.pos, 0);
	__atomic_store_n(&c.over, true, __ATOMIC_RELAXED);
	pthread_join(thread, NULL);
	pl_pump_free(p);
	pl_known_fini(&known);
	close(c.src);
	close(fd[0]);
	close(fd[1]);
	free(data);
}

static void *cancel_amid(void *arg)
{
	struct pl_pump_stats stats;

	do
		pl_pump_stats(arg, &stats);
	while (!stats.done_bytes);
	pl_pump_cancel(arg);
	return NULL;
}

/* Wherever in a pass a cancel comes, 0 means that all was sent.  Many small
   pieces of a hole, so that it comes at any point of claiming them. */
static void cancelled_pass_is_no_success(void)
{
	struct pl_extent all = { 0, 4 * GiB };
	int src = temp_file(NULL, all.end), out = temp_file(NULL, 0), ret;
	struct pl_pump_stats stats;
	struct pl_known known;
	struct pl_pump_cfg cfg;
	struct pl_fault fault;
	struct pl_pump *p;
	pthread_t thread;

	EQ(pl_known_init(&known, all.end, 12), 0);
	cfg = config(src, all.end, out, PL_SINK_FILE);
	cfg.known = &known;
	cfg.cluster = 4096;
	cfg.readers = 0;
	for (int i = 0; i < 200; i++) {
		p = new_pump(&cfg);
		OK(pthread_create(&thread, NULL, cancel_amid, p) == 0);
		ret = pl_pump_pass(p, &all, 1, PL_PASS_SKIP_ZERO | PL_PASS_HOLES,
				   &fault);
		pthread_join(thread, NULL);
		pl_pump_stats(p, &stats);
		if (ret)
			EQ(ret, -ECANCELED);
		else
			EQ(stats.done_bytes, all.end);
		pl_pump_free(p);
	}
	pl_known_fini(&known);
	close(src);
	close(out);
}

static void bad_configs(void)
{
	struct pl_known known;
	struct pl_pump *p;
	struct pl_pump_cfg good = config(0, MiB, 1, PL_SINK_FILE), c;

	EQ(pl_known_init(&known, MiB, 11), -EINVAL);
	EQ(pl_known_init(&known, MiB, 12), 0);
#define REFUSED(change) do { c = good; change; EQ(pl_pump_new(&p, &c), -EINVAL); } while (0)
	REFUSED(c.src_fd = -1);
	REFUSED(c.out_fd = -1);
	REFUSED(c.sink = 0);
	REFUSED(c.sink = 3);
	REFUSED(c.slots = 1);
	REFUSED(c.slots = 1025);
	REFUSED(c.readers = 65);
	REFUSED(c.align = 0);
	REFUSED(c.align = 3);
	REFUSED(c.align = 131072);
	REFUSED(c.tail = 1);
	REFUSED((c.align = 4096, c.tail = 4096));
	REFUSED(c.cluster = 0);
	REFUSED(c.cluster = 4097);
	REFUSED(c.cluster = (64u << 20) + 4096);
	REFUSED(c.size = 1ull << 63);
	REFUSED(c.src_base = INT64_MAX);
	REFUSED((c.known = &known, c.size = MiB + 1));
	pl_pump_free(NULL);
	pl_known_fini(&known);
	pl_known_fini(NULL);
}

/* 4 GiB in one extent, with little data: lengths are 64 bits wide. */
static void four_gib(void)
{
	struct pl_extent ext = { 4096, 4 * GiB + 4096 };
	int src = temp_file(NULL, 5 * GiB), out = temp_file(NULL, 0);
	struct pl_pump_stats stats;
	struct pl_known known;
	struct pl_pump_cfg cfg;
	struct pl_fault fault;
	struct pl_pump *p;
	char c = 0;

	OK(pwrite(src, "a", 1, 4096) == 1);
	OK(pwrite(src, "z", 1, 4 * GiB + 4095) == 1);
	EQ(pl_known_init(&known, 5 * GiB, 12), 0);
	cfg = config(src, 5 * GiB, out, PL_SINK_FILE);
	cfg.known = &known;
	cfg.cluster = 1 << 20;
	p = new_pump(&cfg);
	EQ(pl_pump_pass(p, &ext, 1, PL_PASS_SKIP_ZERO | PL_PASS_HOLES, &fault), 0);
	pl_pump_stats(p, &stats);
	EQ(stats.done_bytes, 4 * GiB);
	EQ(stats.zero_bytes, 4 * GiB);
	ext.start = 4 * GiB;
	EQ(pl_pump_pass(p, &ext, 1, PL_PASS_SKIP_ZERO, &fault), 0);
	OK(pread(out, &c, 1, 4 * GiB + 4095) == 1 && c == 'z');
	pl_pump_free(p);
	pl_known_fini(&known);
	close(src);
	close(out);
}

int main(void)
{
	signal(SIGPIPE, SIG_IGN);
	bad_configs();
	for (uint32_t readers = 0; readers <= 4; readers += 2) {
		extents_arrive(MiB, false, readers, 0);
		extents_arrive(300001, true, readers, 512);
	}
	tails();
	aligned();
	tail(300 * KiB + 1536);
	tail(512);
	hooks();
	hook_before_read(0);
	hook_before_read(PL_PASS_LIVE);
	passes(12);
	passes(16);
	random_rounds(12);
	random_rounds(14);
	faults();
	spliced_source_gets_shorter();
	cancelled_pass_is_no_success();
	four_gib();
	return 0;
}

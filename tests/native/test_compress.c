/* SPDX-License-Identifier: Apache-2.0 */
/* Compressed frames: from the sending pump to the receiving one, hostile ones, and when
   it pays. */
#define _GNU_SOURCE
#include <signal.h>
#include <zstd.h>

#include "pays.h"
#include "stream.h"

static struct pl_recv *new_recv(int in, int out, uint32_t slot, uint32_t max)
{
	struct pl_recv_cfg cfg = {
		.in_fd = in, .out_fd = out, .slots = 3, .slot_size = slot,
		.max_frame = max, .window = 64 * KiB, .sparse = 1, .reply_fd = -1,
	};
	struct pl_recv *r;

	EQ(pl_recv_new(&r, &cfg), 0);
	return r;
}

/* ---- from end to end */

struct end {
	pthread_t thread;
	int in, out;
	struct pl_recv_stats stats;
};

static void *end_main(void *arg)
{
	struct end *e = arg;
	struct pl_recv *r = new_recv(e->in, e->out, 16 * KiB, 64u << 20);
	struct pl_recv_msg msg;
	struct pl_fault fault;

	EQ(pl_recv_run(r, &msg, &fault), PL_RECV_SYNC);
	EQ(pl_recv_expect(r, PL_FEATURE_COMPRESSED), 0);
	EQ(pl_recv_run(r, &msg, &fault), PL_RECV_END);
	pl_recv_stats(r, &e->stats);
	pl_recv_free(r);
	return NULL;
}

static void control(struct pl_pump *p, uint32_t size)
{
	struct header h = { PL_D1_MARK, size, 0 };
	uint8_t frame[20] = { 0 };
	struct pl_fault fault;

	memcpy(frame, &h, sizeof(h));
	EQ(pl_pump_write(p, frame, sizeof(h) + size, &fault), 0);
}

/* fill_random's bytes are odd, which zstd makes use of. */
static void fill_noise(uint8_t *data, size_t len)
{
	for (size_t i = 0; i < len; i++)
		data[i] = (uint8_t)rnd(256);
}

/* Every kind of block, at random places, behind more than a MiB of noise. */
static void fill_mixed(uint8_t *data, size_t len)
{
	size_t noise = MiB + 1000;

	fill_noise(data, noise);
	for (size_t at = noise, n; at < len; at += n) {
		uint64_t kind = rnd(4);

		n = rnd(60000) + 1;
		n = n < len - at ? n : len - at;
		if (kind == 0)
			fill_noise(data + at, n);
		else if (kind == 1)
			memset(data + at, 'a' + (int)rnd(26), n);
		else if (kind == 2)
			for (size_t i = 0; i < n; i++)
				data[at + i] = (uint8_t)("0123456789abcdef"[rnd(16)]);
	}
}

struct copy {
	enum pl_compress compress;
	int level;
	uint32_t readers, cluster;
	unsigned flags;
	bool known, frozen, random;
	int halves;	/* of each block this half is noise, 1 or 2; 0: not so */
};

static struct pl_pump_stats copied(const struct copy *c)
{
	uint64_t size = 3 * MiB + 1234;
	uint8_t *data = must_alloc(size), *got = must_alloc(size);
	struct pl_extent all = { 0, size };
	struct pl_pump_stats stats;
	struct pl_known known;
	struct pl_fault fault;
	struct pl_pump *p;
	struct end e = { .out = temp_file(NULL, 0) };
	int fd[2], src;

	if (c->random)
		fill_noise(data, size);
	else if (c->halves)
		for (size_t at = (size_t)(c->halves - 1) * 2048; at < size; at += 4096)
			fill_noise(data + at, size - at < 2048 ? size - at : 2048);
	else
		fill_mixed(data, size);
	src = temp_file(data, size);
	OK(pipe2(fd, 0) == 0 && fcntl(fd[1], F_SETFL, O_NONBLOCK) == 0);
	e.in = fd[0];
	OK(pthread_create(&e.thread, NULL, end_main, &e) == 0);
	EQ(pl_known_init(&known, size, 12), 0);
	EQ(pl_pump_new(&p, &(struct pl_pump_cfg){
		.src_fd = src, .size = size, .align = 1, .out_fd = fd[1],
		.sink = PL_SINK_FRAMES, .cluster = c->cluster, .slots = 4,
		.readers = c->readers, .known = c->known ? &known : NULL,
		.features = PL_FEATURE_COMPRESSED, .compress = c->compress,
		.level = c->level }), 0);
	control(p, 4);
	pl_pump_frozen(p, c->frozen);
	EQ(pl_pump_pass(p, &all, 1, c->flags, &fault), 0);
	pl_pump_stats(p, &stats);
	/* What changes later goes in small frames, over what is there. */
	for (int i = 0; c->known && i < 50; i++) {
		uint64_t pos = rnd(size - 5000);
		struct pl_extent one = { pos, pos + rnd(5000) + 1 };

		if (i % 2)
			fill_noise(data + pos, one.end - pos);
		else
			memset(data + pos, i, one.end - pos);
		OK(pwrite(src, data + pos, one.end - pos, (off_t)pos) ==
		   (ssize_t)(one.end - pos));
		EQ(pl_pump_pass(p, &one, 1, PL_PASS_SKIP_ZERO | PL_PASS_CHANGED,
				&fault), 0);
	}
	control(p, 0);
	pthread_join(e.thread, NULL);
	if (!c->known) {
		EQ(e.stats.packed_bytes, stats.packed_bytes);
		EQ(e.stats.packed_frames, stats.packed_frames);
		EQ(e.stats.data_bytes, stats.data_bytes);
		EQ(stats.data_bytes, size);
		EQ(e.stats.stream_bytes, stats.wire_bytes + 16);
	}
	pl_pump_free(p);
	OK(ftruncate(e.out, (off_t)size) == 0);
	OK(pread(e.out, got, size, 0) == (ssize_t)size);
	OK(!memcmp(got, data, size));
	pl_known_fini(&known);
	close(fd[0]);
	close(fd[1]);
	close(src);
	close(e.out);
	free(data);
	free(got);
	return stats;
}

static void arrives(void)
{
	struct pl_pump_stats s;
	struct copy c = { .compress = PL_COMPRESS_ALWAYS };

	/* 6: one whose level needs a look by a fast one first. */
	for (c.level = 1; c.level <= 6; c.level += 5)
		for (c.readers = 0; c.readers <= 2; c.readers += 2)
			for (c.cluster = 64 * KiB; c.cluster <= MiB; c.cluster *= 16) {
				c.known = false;
				c.flags = 0;
				s = copied(&c);
				OK(s.packed_frames && s.wire_bytes < s.data_bytes);
				OK(s.packed_bytes <= s.data_bytes - MiB);
				c.known = true;
				c.flags = PL_PASS_SKIP_ZERO | PL_PASS_LAST;
				copied(&c);
				c.flags |= PL_PASS_LIVE;
				OK(copied(&c).packed_frames);
			}
}

/* What does not become smaller goes as it always went. */
static void no_expansion(void)
{
	struct copy c = { .compress = PL_COMPRESS_ALWAYS, .level = 1, .readers = 1,
			  .cluster = 64 * KiB, .random = true };

	for (; c.level <= 9; c.level += 8) {
		struct pl_pump_stats s = copied(&c);

		EQ(s.packed_frames, 0);
		EQ(s.packed_bytes, 0);
		EQ(s.wire_bytes, 20 + s.data_bytes + 16 * s.frames);
	}
}

/* The look at a sample sees all parts of the blocks. */
static void half_of_each_block(void)
{
	struct copy c = { .compress = PL_COMPRESS_ALWAYS, .level = 6, .readers = 1,
			  .cluster = 64 * KiB };

	for (c.halves = 1; c.halves <= 2; c.halves++)
		OK(copied(&c).packed_bytes >= 3 * MiB);
}

/* Frames larger than a receiver's window are not compressed. */
static void too_large_to_compress(void)
{
	struct copy c = { .compress = PL_COMPRESS_ALWAYS, .level = 1, .readers = 1,
			  .cluster = 2 * MiB };
	struct pl_pump_stats s = copied(&c);

	EQ(s.frames, 2);
	EQ(s.packed_frames, 0);
}

static void not_in_the_freeze(void)
{
	struct copy c = { .compress = PL_COMPRESS_ALWAYS, .level = 1, .readers = 1,
			  .cluster = 64 * KiB, .frozen = true };

	EQ(copied(&c).packed_frames, 0);	/* nothing is known of the stream */
	c.compress = PL_COMPRESS_AUTO;
	EQ(copied(&c).packed_frames, 0);
}

static void bad_configs(void)
{
	struct pl_pump_cfg good = {
		.align = 1, .out_fd = 1, .sink = PL_SINK_FRAMES, .cluster = 4096,
		.slots = 2, .features = PL_FEATURE_COMPRESSED,
		.compress = PL_COMPRESS_AUTO, .level = 1 }, c;
	struct pl_pump *p;

	EQ(pl_pump_new(&p, &good), 0);
	pl_pump_free(p);
#define REFUSED(change) do { c = good; change; EQ(pl_pump_new(&p, &c), -EINVAL); } while (0)
	REFUSED(c.features = 0);
	REFUSED(c.features = PL_FEATURE_PROOF);
	REFUSED(c.level = 0);
	REFUSED(c.level = 20);
	REFUSED(c.sink = PL_SINK_FILE);
}

/* ---- hostile frames */

static void packed_head(struct stream *s, uint64_t pos, uint32_t size, uint32_t raw,
			uint32_t codec)
{
	add(s, &(struct header){ PL_D1_COMPRESSED_MARK, size, pos }, 16);
	add(s, &(uint32_t[]){ raw, codec }, 8);
}

static void packed(struct stream *s, uint64_t pos, uint32_t raw, const void *zstd,
		   size_t len)
{
	packed_head(s, pos, (uint32_t)len + 8, raw, PL_CODEC_ZSTD);
	add(s, zstd, len);
}

#define MAX 300000u

/* The stream so far, behind an agreed SYNC: an error, with so many frames before. */
static void refused(const struct stream *s, int err, enum pl_stage stage, uint64_t frames,
		    uint64_t features)
{
	struct stream all = { 0 };
	struct pl_recv_msg msg;
	struct pl_fault fault = { 0 };
	struct pl_recv *r;
	struct feeder f;
	int out = temp_file(NULL, 0), in;

	frame(&all, 0, "sync", 4);
	add(&all, s->data, s->len);
	in = open_feed(&f, &all, all.len, 0, false);
	r = new_recv(in, out, 4096, MAX);
	EQ(pl_recv_run(r, &msg, &fault), PL_RECV_SYNC);
	EQ(pl_recv_expect(r, features), 0);
	EQ(pl_recv_run(r, &msg, &fault), err);
	EQ(fault.stage, stage);
	EQ(fault.frame, frames);
	EQ(pl_recv_run(r, &msg, &fault), err);
	pl_recv_free(r);
	close(in);
	pthread_join(f.thread, NULL);
	close(out);
	free(all.data);
}

/* In place of a frame that is right: it passes, this does not. */
#define ONLY(build) do { s.len = 0; packed(&s, 0, len, z, zlen); build; \
	refused(&s, -EILSEQ, PL_STAGE_PROTOCOL, 1, PL_FEATURE_COMPRESSED); } while (0)

static void hostile(void)
{
	static uint8_t data[MAX], z[2 * MAX], other[2 * MAX];
	static const uint8_t skippable[] = { 0x50, 0x2a, 0x4d, 0x18, 4, 0, 0, 0, 1, 2, 3, 4 };
	uint32_t len = 100000;
	struct stream s = { 0 };
	ZSTD_CCtx *c = ZSTD_createCCtx();
	size_t zlen, n;

	for (uint32_t i = 0; i < len; i++)
		data[i] = (uint8_t)(i % 251 % (7 + i / 9000));
	zlen = ZSTD_compress(z, sizeof(z), data, len, 3);
	OK(!ZSTD_isError(zlen) && zlen > 100);

	/* Not agreed. */
	packed(&s, 0, len, z, zlen);
	refused(&s, -EBADMSG, PL_STAGE_PROTOCOL, 0, 0);
	/* It breaks off anywhere. */
	for (size_t cut = 1; cut < s.len; cut += cut < 50 ? 1 : 97) {
		struct stream part = { s.data, s.len - cut, s.len };

		refused(&part, -ENODATA, PL_STAGE_READ, 0, PL_FEATURE_COMPRESSED);
	}
	/* Bounds of plain data. */
	s.len = 0;
	packed_head(&s, 0, 100, MAX + 1, 1);
	refused(&s, -EMSGSIZE, PL_STAGE_PROTOCOL, 0, PL_FEATURE_COMPRESSED);
	s.len = 0;
	packed_head(&s, INT64_MAX - 99, 20, 100, 1);
	refused(&s, -ERANGE, PL_STAGE_PROTOCOL, 0, PL_FEATURE_COMPRESSED);
	/* The headers. */
	for (uint32_t size = 0; size <= 8; size++)
		ONLY(packed_head(&s, 0, size, 10, 1));
	ONLY(packed_head(&s, 0, 20, 0, 1));		/* no data */
	ONLY(packed_head(&s, 0, 20, 11, 1));		/* larger than the data */
	ONLY(packed_head(&s, 0, UINT32_MAX, 100, 1));
	ONLY(packed_head(&s, 0, 20, 100, 0));		/* other codecs */
	ONLY(packed_head(&s, 0, 20, 100, 2));
	ONLY(packed_head(&s, 0, 20, 100, 0x101));	/* what is reserved */
	ONLY(packed_head(&s, 0, 20, 100, 0x1000001));
	/* More or less than was said: a bomb is the former. */
	ONLY(packed(&s, 0, len - 1, z, zlen));
	ONLY(packed(&s, 0, len + 1, z, zlen));
	ONLY(packed(&s, 0, (uint32_t)zlen, z, zlen));
	n = ZSTD_compress(other, sizeof(other), memset(data, 0, MAX), MAX, 3);
	ONLY(packed(&s, 0, 8192, other, n));
	/* The frame ends before the bytes that were said, or they before it. */
	memcpy(other, z, zlen);
	ONLY(packed(&s, 0, len, other, zlen + 1));
	ONLY(packed(&s, 0, len, z, zlen - 1); frame(&s, 0, "12345678", 8));
	/* Two frames, a skippable one, and one that follows it. */
	memcpy(other + zlen, z, zlen);
	ONLY(packed(&s, 0, 2 * len, other, 2 * zlen));
	ONLY(packed(&s, 0, 4000, skippable, sizeof(skippable)));
	memcpy(other, skippable, sizeof(skippable));
	memcpy(other + sizeof(skippable), z, zlen);
	ONLY(packed(&s, 0, len, other, zlen + sizeof(skippable)));
	/* Rubbish, less than a magic number, an old format (0.7). */
	ONLY(packed(&s, 0, len, data + 1000, 500));
	ONLY(packed(&s, 0, len, z, 3); frame(&s, 0, "12345678", 8));
	ONLY(packed(&s, 0, len, "\x27\xb5\x2f\xfd\x60\0\0\0\0\0\0", 11));
	/* A window of 8 MiB, a dictionary that nobody has. */
	OK(!ZSTD_isError(ZSTD_CCtx_setParameter(c, ZSTD_c_contentSizeFlag, 0)));
	OK(!ZSTD_isError(ZSTD_CCtx_setParameter(c, ZSTD_c_windowLog, 23)));
	for (uint32_t i = 0; i < len; i++)
		data[i] = (uint8_t)(i % 251 % (7 + i / 9000));
	{
		ZSTD_inBuffer in = { data, len, 0 };
		ZSTD_outBuffer out = { other, sizeof(other), 0 };

		/* In two steps: or it would make the window as small as the data. */
		OK(!ZSTD_isError(ZSTD_compressStream2(c, &out, &in, ZSTD_e_flush)));
		EQ(ZSTD_compressStream2(c, &out, &in, ZSTD_e_end), 0);
		ONLY(packed(&s, 0, len, other, out.pos));
	}
	memcpy(other, z, zlen);
	other[4] |= 1;			/* its number, of one byte, follows */
	memmove(other + 7, other + 6, zlen - 6);
	ONLY(packed(&s, 0, len, other, zlen + 1));
	/* Any byte of it damaged: never more than was said, never past the end. */
	for (size_t i = 0; i < zlen; i += 1 + i / 40) {
		struct pl_recv_msg msg;
		struct pl_fault fault;
		struct pl_recv *r;
		struct feeder f;
		struct stat st;
		int out = temp_file(NULL, 0), in, ret;

		s.len = 0;
		frame(&s, 0, "sync", 4);
		packed(&s, 0, len, z, zlen);
		s.data[20 + 24 + i] ^= (uint8_t)(1 + i % 255);
		frame(&s, 0, NULL, 0);
		in = open_feed(&f, &s, s.len, 0, false);
		r = new_recv(in, out, 4096, MAX);
		EQ(pl_recv_run(r, &msg, &fault), PL_RECV_SYNC);
		EQ(pl_recv_expect(r, PL_FEATURE_COMPRESSED), 0);
		ret = pl_recv_run(r, &msg, &fault);
		OK(ret == -EILSEQ || ret == PL_RECV_END);
		pl_recv_free(r);
		OK(fstat(out, &st) == 0 && st.st_size <= len);
		close(in);
		pthread_join(f.thread, NULL);
		close(out);
	}
	ZSTD_freeCCtx(c);
	free(s.data);
}

/* ---- when it pays */

struct line {		/* all in MB per second */
	double reads, packs, wire, peer;
	double ratio;		/* before over after; 1: it cannot be compressed */
};

/* So long on this line: the share of the data that went while it was on. */
static double share_on(struct pl_pays *p, const struct line *l, double seconds)
{
	double on = 0, all = 0;

	for (double t = 0; t < seconds; t += 0.01) {
		bool packs = p->on;
		double ours = packs && l->packs < l->reads ? l->packs : l->reads;
		double wire = packs ? l->wire * l->ratio : l->wire, rate = ours;
		struct pl_while w = { .ns = 10000000 };

		rate = wire < rate ? wire : rate;
		rate = l->peer < rate ? l->peer : rate;
		w.waited_ns = (uint64_t)((1 - rate / ours) * (double)w.ns);
		w.bytes = (uint64_t)(rate * 10000);
		w.packed_bytes = packs && l->ratio > 1 ? w.bytes : 0;
		pl_pays_add(p, &w);
		all += rate;
		on += packs ? rate : 0;
	}
	return on / all;
}

static void pays(void)
{
	static const struct line slow = { 2000, 400, 12.5, 2000, 2 };
	static const struct line very_slow = { 2000, 400, 0.3, 2000, 3 };
	static const struct line lan = { 1000, 400, 2000, 2000, 2 };
	static const struct line slow_peer = { 2000, 400, 1000, 100, 2 };
	static const struct line slow_here = { 2000, 50, 100, 2000, 2 };
	static const struct line between = { 2000, 150, 100, 2000, 2 };
	static const struct line fixed = { 2000, 400, 12.5, 2000, 1 };
	static const struct line fast = { 1000, 400, 1000, 2000, 2 };
	struct pl_pays p;

#define ANEW (p = (struct pl_pays){ 0 }, &p)
	OK(share_on(ANEW, &slow, 1) > 0.7);
	OK(p.proven && p.waits);
	EQ(share_on(&p, &slow, 60) * 1000, 1000);
	/* The line becomes faster: it is off again, and stays so. */
	share_on(&p, &fast, 5);
	EQ(share_on(&p, &fast, 60) * 1000, 0);
	/* And slower again. */
	share_on(&p, &slow, 1);
	EQ(share_on(&p, &slow, 60) * 1000, 1000);
	/* Slower than the rate that it was compared with: anew. */
	share_on(&p, &very_slow, 20);
	OK(p.proven);
	OK(share_on(&p, &very_slow, 60) > 0.9);
	EQ(share_on(ANEW, &lan, 60) * 1000, 0);
	/* The stream waits, but not for the wire. */
	OK(share_on(ANEW, &slow_peer, 60) < 0.08);
	OK(share_on(&p, &slow_peer, 60) < 0.04);
	OK(share_on(ANEW, &slow_here, 60) < 0.08);
	/* Our CPU is the bottleneck then, and it is still faster. */
	OK(share_on(ANEW, &between, 60) > 0.9);
	OK(p.waits == false);
	/* What cannot be compressed says nothing against it. */
	share_on(ANEW, &fixed, 10);
	OK(p.on && !p.proven);
}

int main(void)
{
	signal(SIGPIPE, SIG_IGN);
	bad_configs();
	pays();
	hostile();
	no_expansion();
	half_of_each_block();
	too_large_to_compress();
	not_in_the_freeze();
	arrives();
	return 0;
}

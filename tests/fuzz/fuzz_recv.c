/* SPDX-License-Identifier: Apache-2.0 */
/*
 * libFuzzer harness for the receiving pump: hostile streams against a replay.
 *
 * It stands in for recv_in.c, recv_reply.c, io.c and, through seams.h, for the
 * threads and the system: bytes come from memory and go to memory, the slots have the
 * sanitizer's red zones around them all, and the helper runs when the input says so.
 * Parser, ring, and the cutting into runs and holes are the product's code.  What
 * the target holds, the event or error, the counters and the number of answers
 * must be what a plain replay of the stream onto an array says (`model`); so a
 * wrong byte is a finding, not only a crash.
 *
 * In D1, what both ends may agree on is agreed at each SYNC.
 *
 * Input: byte 0 and 1 choose the configuration; the rest is a stream as it is
 * (RAW), or a list of packets that are built well (see build).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <zstd.h>

#include "recv_internal.h"

#define SPACE (1u << 20)	/* of the target: what the model compares */
#define OLD 0xa5		/* what is on a device */
#define STREAM (1u << 20)	/* the longest stream that is built */
#define ODD_HUGE 1	/* of byte 1: the file is on tmpfs */
#define ODD_PLAIN 2	/* of byte 1: compressed frames are not agreed */
#define PROVEN 300001	/* bytes of an image with a proof */
#define ODD_FILL 4	/* of byte 1: it is a device that had something before */

enum { RAW = 1, SPARSE = 2, SHORT_READS = 4, NO_REPLIES = 8, DIGESTS = 16,
       BIG_SLOTS = 32, MORE_SLOTS = 64, D2 = 128 };
enum { DATA, CMD, ASYNC };

#define CHECK(x) do { if (!(x)) { \
	fprintf(stderr, "FINDING line %d: %s\n", __LINE__, #x); abort(); } } while (0)

static struct {
	const uint8_t *data;
	size_t len, at;
	bool greedy;
	unsigned replies;
	uint32_t order;		/* of reader and helper: the next choices */
} in;

static struct {
	uint8_t space[SPACE];
	uint32_t end;		/* zero from here on */
	bool tmpfs, device;
	uint8_t *page;		/* a huge page of it, mapped */
	uint64_t page_pos;
} target;

/* No slot may write where the reader fills a page. */
static bool meets_page(uint64_t start, uint64_t end)
{
	return target.page && start < target.page_pos + PL_HUGE &&
	       end > target.page_pos;
}

/* ---- in place of recv_in.c, recv_reply.c, io.c and system calls */

ssize_t pl_recv_read(struct pl_recv *r, struct iovec *iov, unsigned n, size_t must)
{
	size_t want = must, got = 0;

	/* An idle helper is given each slot at once, a busy one full slots. */
	in.order = in.order * 1103515245 + 12345;
	r->writer_idle = in.order >> 16 & 1;
	for (unsigned i = 0; in.greedy && i < n; i++)
		want = i ? want + iov[i].iov_len : iov[0].iov_len;
	if (want > in.len - in.at)
		want = in.len - in.at;
	for (unsigned i = 0; i < n && got < want; i++) {
		size_t k = iov[i].iov_len < want - got ? iov[i].iov_len : want - got;

		memcpy(iov[i].iov_base, in.data + in.at, k);
		in.at += k;
		got += k;
	}
	__atomic_fetch_add(&r->stats.stream_bytes, got, __ATOMIC_RELAXED);
	return got < must ? -ENODATA : (ssize_t)got;
}

int pl_recv_reply(struct pl_recv *r, unsigned count)
{
	(void)r;
	in.replies += count;
	return 0;
}

int pl_pwrite_full(int fd, const void *buf, size_t len, uint64_t pos)
{
	(void)fd;
	CHECK(len && pos <= (uint64_t)INT64_MAX - len && !meets_page(pos, pos + len));
	if (pos + len > SPACE)
		return -EFBIG;
	memcpy(target.space + pos, buf, len);
	if (pos + len > target.end)
		target.end = (uint32_t)(pos + len);
	return 0;
}

ssize_t fuzz_pread(int fd, void *buf, size_t len, off_t pos)
{
	(void)fd;
	CHECK(pos >= 0 && (uint64_t)pos + len <= SPACE);
	memcpy(buf, target.space + pos, len);
	return (ssize_t)len;
}

int fuzz_fallocate(int fd, int mode, off_t pos, off_t len)
{
	(void)fd;
	CHECK(pos >= 0 && len > 0);
	if (target.device && pos + len > SPACE) {
		errno = EFBIG;
		return -1;
	}
	CHECK(mode == (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE));
	CHECK(pos + len <= SPACE);
	CHECK(!meets_page((uint64_t)pos, (uint64_t)(pos + len)));
	memset(target.space + pos, 0, (size_t)len);
	return 0;
}

int fuzz_sync_file_range(int fd, off_t pos, off_t len, unsigned flags)
{
	(void)fd;
	(void)flags;
	CHECK(pos >= 0 && len > 0 && pos + len <= SPACE);
	return 0;
}

int fuzz_eventfd(unsigned count, int flags)
{
	(void)count;
	(void)flags;
	return 0;
}

int fuzz_close(int fd)
{
	return fd;
}

ssize_t fuzz_write(int fd, const void *buf, size_t len)
{
	(void)fd;
	(void)buf;
	return (ssize_t)len;
}

int fuzz_sigmask(int how, const sigset_t *set, sigset_t *old)
{
	(void)how;
	(void)set;
	(void)old;
	return 0;
}

/* huge.c: a page of its own, so that the sanitizer guards its ends. */
void pl_huge_init(struct pl_huge *h, int fd, unsigned places)
{
	*h = (struct pl_huge){ .fd = fd, .places = places };
	if (target.tmpfs)
		h->reserved = target.space;
}

void pl_huge_fini(struct pl_huge *h)
{
	h->reserved = NULL;
}

bool pl_huge_usable(const struct pl_huge *h)
{
	return h->reserved;
}

uint8_t *pl_huge_make(struct pl_huge *h, uint64_t pos, unsigned place)
{
	static const uint8_t hole[PL_HUGE];

	CHECK(h->reserved && place < h->places && !target.page && pos % PL_HUGE == 0);
	if (pos + PL_HUGE > SPACE || h->skip-- % 4)
		return NULL;
	CHECK(!memcmp(target.space + pos, hole, PL_HUGE));
	target.page = calloc(1, PL_HUGE);
	target.page_pos = pos;
	return target.page;
}

void pl_huge_unmap(struct pl_huge *h, unsigned place)
{
	CHECK(place < h->places);
	memcpy(target.space + target.page_pos, target.page, PL_HUGE);
	if (target.page_pos + PL_HUGE > target.end)
		target.end = (uint32_t)target.page_pos + PL_HUGE;
	free(target.page);
	target.page = NULL;
}

void pl_huge_regret(struct pl_huge *h)
{
	h->skip++;
}

void pl_huge_punch(const struct pl_huge *h, uint64_t start, uint64_t end)
{
	(void)h;
	if (start >= end)
		return;
	CHECK(end <= SPACE && !meets_page(start, end));
	memset(target.space + start, 0, end - start);
}

/* Slots are kept for the next execution: allocating them is most of one. */
static struct {
	void *buf;
	size_t len;
} spare[16];

void *pl_buf_new(size_t len)
{
	for (unsigned i = 0; i < 16; i++)
		if (spare[i].buf && spare[i].len == len) {
			void *buf = spare[i].buf;

			spare[i].buf = NULL;
			return buf;
		}
	return malloc(len);
}

void pl_buf_free(void *buf, size_t len)
{
	for (unsigned i = 0; buf && i < 16; i++)
		if (!spare[i].buf) {
			spare[i].buf = buf;
			spare[i].len = len;
			return;
		}
	free(buf);
}

/* ---- the helper thread, as a coroutine: it leaves where it would wait */

static struct {
	void *(*main)(void *);
	struct pl_recv *r;
	jmp_buf left;
} helper;

int fuzz_thread_create(pthread_t *t, const pthread_attr_t *attr, void *(*start)(void *),
		       void *arg)
{
	(void)t;
	(void)attr;
	helper.main = start;
	helper.r = arg;
	return 0;
}

int fuzz_thread_join(pthread_t t, void **result)
{
	(void)t;
	(void)result;
	helper.main(helper.r);
	return 0;
}

/* Lock held, before and after. */
static void run_helper(void)
{
	pthread_mutex_unlock(&helper.r->lock);
	if (!setjmp(helper.left)) {
		helper.main(helper.r);
		CHECK(!"the helper ended");
	}
}

int fuzz_cond_wait(pthread_cond_t *cond, pthread_mutex_t *lock)
{
	CHECK(lock == &helper.r->lock);
	if (cond == &helper.r->work)
		longjmp(helper.left, 1);
	run_helper();
	return 0;
}

int fuzz_cond_signal(pthread_cond_t *cond)
{
	if (cond == &helper.r->work)
		run_helper();
	return 0;
}

/* A digest that costs little; the order of the bytes matters, but not how they are
   cut. */
#ifdef __clang__
__attribute__((no_sanitize("coverage")))	/* not what is fuzzed */
#endif
static int digest(void *ctx, const void *data, size_t len, uint8_t *out)
{
	const uint8_t *p = data;
	uint64_t *sum = ctx;

	for (; len; len--)
		*sum = *sum * 31 + *p++ + 1;
	if (out) {
		memset(out, 0xdd, PL_DIGEST);
		memcpy(out, sum, sizeof(*sum));
		*sum = 0;
	}
	return 0;
}

/* ---- the model: one pass over the bytes, one step for each run of the pump */

struct model {
	uint8_t space[SPACE];
	size_t at;
	uint64_t frames, image_size;
	uint32_t end;		/* of what was put into the space */
	unsigned answered;
	int dialect;		/* 1, 2 */
	bool digests, ended;
	bool packed;		/* compressed frames are agreed */
	bool proof;		/* PROOF frames are taken */
	const uint8_t *claim;	/* the one right before END */
	bool wild;		/* a write may have failed: past the space */
	uint32_t max_frame;
	bool replies;
};

static uint32_t u32(const uint8_t *p)
{
	return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 |
	       (uint32_t)p[3] << 24;
}

static uint64_t u64(const uint8_t *p)
{
	return u32(p) | (uint64_t)u32(p + 4) << 32;
}

static bool digest_is_right(const struct model *m, const uint8_t *want,
			    const uint8_t *data, size_t len)
{
	uint64_t sum = 0;
	uint8_t got[PL_DIGEST];

	if (!m->digests)
		return true;
	digest(&sum, data, len, got);
	return !memcmp(got, want, PL_DIGEST);
}

static void put(struct model *m, uint64_t pos, const uint8_t *data, uint32_t size)
{
	if (pos + size > SPACE) {
		m->wild = true;
		if (pos >= SPACE)
			return;
		size = SPACE - (uint32_t)pos;
	}
	memcpy(m->space + pos, data, size);
	if (pos + size > m->end)
		m->end = (uint32_t)pos + size;
}

/* One zstd frame of just so many bytes, by the library's other interface: into memory
   that is there, where a window is no matter. */
static bool is_frame_of(uint32_t size, const uint8_t *z, uint32_t len)
{
	static uint8_t data[SPACE];
	size_t whole;

	if (len < 9 || u32(z) != 0xfd2fb528 || z[4] & 3 || (!(z[4] & 32) && z[5] > 80))
		return false;
	whole = ZSTD_findFrameCompressedSize(z, len);
	return !ZSTD_isError(whole) && whole == len && size <= sizeof(data) &&
	       ZSTD_decompress(data, size, z, len) == size;
}

/* A compressed frame: its size on the wire, *data and *size of what it holds, or -errno. */
static int64_t unpack(const struct model *m, const uint8_t *h, size_t left,
		      uint32_t *size, const uint8_t **data, uint64_t pos, bool *wild)
{
	static uint8_t raw[SPACE];
	uint32_t wire = u32(h + 4);

	*size = 0;
	if (wire <= 8)
		return -EILSEQ;
	if (left < 24)
		return -ENODATA;
	*size = u32(h + 16);
	if (!*size || wire - 8 > *size || u32(h + 20) != 1)
		return -EILSEQ;
	if (*size > m->max_frame)
		return -EMSGSIZE;
	if (pos > (uint64_t)INT64_MAX - *size)
		return -ERANGE;
	if (m->proof && pos + *size > PROVEN)
		return -EFBIG;
	/* Some of it may have been written when it turns out to be wrong. */
	*wild |= pos + *size > SPACE;
	if (left < 16 + wire)
		return -ENODATA;
	if (!is_frame_of(*size, h + 24, wire - 8))
		return -EILSEQ;
	CHECK(ZSTD_decompress(raw, sizeof(raw), h + 24, wire - 8) == *size);
	*data = raw;
	return 16 + wire;
}

/* A PROOF frame, if this is one: its event, 0 for none, or -errno. */
static int step_proof(struct model *m, const uint8_t *h, size_t left, uint64_t *pos)
{
	uint32_t size = u32(h + 4);

	*pos = u64(h + 8);
	if (*pos ? !size || size % 8 || size > 2048 : size != 48)
		return -EPROTO;
	if (left < 16 + size)
		return -ENODATA;
	m->at += 16 + size;
	m->claim = *pos ? NULL : h + 16;
	return *pos ? PL_RECV_QUESTION : 0;
}

/* PL_RECV_SYNC or QUESTION (with its position), PL_RECV_END, or -errno. */
static int step(struct model *m, const uint8_t *s, size_t len, uint64_t *sync_pos)
{
	while (!m->ended) {
		size_t left = len - m->at, head = 16;
		const uint8_t *h = s + m->at;
		uint32_t type = DATA, size;
		uint64_t pos;

		if (left < 16)
			return -ENODATA;
		if (m->proof && u32(h) == PL_PROOF_MARK) {
			int event = step_proof(m, h, left, sync_pos);

			if (event)
				return event;
			continue;
		}
		if (!m->dialect)
			m->dialect = u32(h) == PL_D1_MARK ? 1 : u32(h) == PL_D2_MARK ? 2 : 0;
		if (m->dialect == 1 && m->packed && u32(h) == PL_D1_COMPRESSED_MARK) {
			const uint8_t *data;
			int64_t n;

			pos = u64(h + 8);
			n = unpack(m, h, left, &size, &data, pos, &m->wild);
			if (n < 0)
				return (int)n;
			put(m, pos, data, size);
			m->claim = NULL;
			m->frames++;
			if (pos + size > m->image_size)
				m->image_size = pos + size;
			m->at += (size_t)n;
			continue;
		}
		if (!m->dialect || u32(h) != (m->dialect == 1 ? PL_D1_MARK : PL_D2_MARK))
			return -EBADMSG;
		size = u32(h + 4);
		pos = u64(h + 8);
		if (m->dialect == 1 && size == 4)
			type = CMD;
		if (m->dialect == 2) {
			head = m->digests ? 40 : 24;
			if (!m->replies)
				return -ENOTSOCK;
			if (left < head)
				return -ENODATA;
			type = size;
			size = u32(h + 8);
			pos = u64(h + 16);
		}
		left -= head;
		if (!size) {
			if (!digest_is_right(m, h + 24, NULL, 0))
				return -EBADE;
			m->at += head;
			m->ended = true;
			break;
		}
		m->claim = NULL;
		if (type > ASYNC)
			return -EOPNOTSUPP;
		if (type == CMD) {
			if (size < 4)
				return -EPROTO;
			if (left < 4)
				return -ENODATA;
			if (m->dialect == 2 && u32(h + head))
				return -EOPNOTSUPP;
			if (size != 4)
				return -EPROTO;
			if (!digest_is_right(m, h + 24, h + head, 4))
				return -EBADE;
			m->at += head + 4;
			*sync_pos = pos;
			return PL_RECV_SYNC;
		}
		if (size > m->max_frame)
			return -EMSGSIZE;
		if (pos > (uint64_t)INT64_MAX - size)
			return -ERANGE;
		if (m->proof && pos + size > PROVEN)
			return -EFBIG;
		if (left < size) {
			m->wild |= pos + size > SPACE;
			return -ENODATA;
		}
		if (!digest_is_right(m, h + 24, h + head, size)) {
			m->wild |= pos + size > SPACE;
			return -EBADE;
		}
		put(m, pos, h + head, size);
		m->frames++;
		m->answered += m->dialect == 2 && type == DATA;
		if (pos + size > m->image_size)
			m->image_size = pos + size;
		m->at += head + size;
	}
	return PL_RECV_END;
}

/* ---- streams that are well built, so that the fuzzer reaches what lies deep */

struct builder {
	uint8_t data[STREAM];
	size_t len;
	bool digests;
};

static void add(struct builder *b, const void *data, size_t len)
{
	if (b->len + len <= STREAM) {
		memcpy(b->data + b->len, data, len);
		b->len += len;
	}
}

static void packet(struct builder *b, int dialect, uint32_t type, uint64_t pos,
		   const uint8_t *data, uint32_t size, bool wrong)
{
	struct { uint32_t mark, size; uint64_t pos; } d1 = { PL_D1_MARK, size, pos };
	struct { uint32_t mark, type, size, pad; uint64_t pos; } d2 = {
		PL_D2_MARK, type, size, wrong, pos };
	uint64_t sum = 0;
	uint8_t out[PL_DIGEST];

	if (b->len + 40 + size > STREAM)
		return;
	add(b, dialect == 1 ? (void *)&d1 : (void *)&d2, dialect == 1 ? 16 : 24);
	if (dialect == 2 && b->digests) {
		digest(&sum, data, size, out);
		out[size % PL_DIGEST] ^= wrong;
		add(b, out, sizeof(out));
	}
	add(b, data, size);
}

/* A compressed frame; `odd` breaks it in one of some ways. */
static void packed(struct builder *b, uint64_t pos, const uint8_t *data, uint32_t size,
		   unsigned odd)
{
	static uint8_t z[SPACE];
	static ZSTD_CCtx *c;
	struct { uint32_t mark, size; uint64_t pos; uint32_t raw, codec; } h = {
		PL_D1_COMPRESSED_MARK, 0, pos, size, 1 };
	size_t n;

	if (!c)
		c = ZSTD_createCCtx();
	ZSTD_CCtx_setParameter(c, ZSTD_c_checksumFlag, odd & 1);
	ZSTD_CCtx_setParameter(c, ZSTD_c_contentSizeFlag, !(odd & 2));
	n = ZSTD_compress2(c, z, sizeof(z), data, size);
	if (odd >> 2 & 1)
		h.raw += odd % 5 - 2;
	if (odd >> 3 & 1 && n)
		z[odd * 37u % n] ^= (uint8_t)odd;
	if (odd >> 4 & 1 && n)
		n -= odd & 1;
	h.size = (uint32_t)n + 8;
	if (b->len + sizeof(h) + n > STREAM)
		return;
	add(b, &h, 24);
	add(b, z, n);
}

/*
 * Seven bytes a packet: what, size u16, position u16, fill, scale.  The scales
 * make blocks and odd bytes alike; a packet of raw bytes breaks the rules.
 */
static void build(struct builder *b, int dialect, bool digests, const uint8_t *p, size_t n)
{
	static const uint64_t edge[] = {
		INT64_MAX, INT64_MAX - 1ull, 1ull << 62, UINT64_MAX - 2, UINT32_MAX,
		SPACE, 1ull << 63, INT64_MAX - 4096ull };
	static uint8_t payload[SPACE];
	uint64_t end = 0;

	for (; n >= 7; p += 7, n -= 7) {
		uint32_t size = (uint32_t)(p[1] | p[2] << 8) % 5000 << (p[6] & 3);
		uint64_t pos = (uint64_t)(p[3] | p[4] << 8) << (p[6] >> 2 & 3);

		if (p[6] & 16)
			size = size % 20 * 4096;
		if (p[6] & 32)
			pos = pos % 64 * 4096;
		if (p[6] & 64)
			size = size % 9;
		if (p[6] & 128)	/* without a gap */
			pos = end;
		end = pos + size;
		memset(payload, p[5], size);
		if (p[5] & 1 && size)	/* one byte among zeroes */
			memset(payload, 0, size), payload[p[4] * 257u % size] = p[5];
		if (dialect == 1 && p[0] & 8) {
			packed(b, pos, payload, size, p[0] >> 4 | (p[0] & 1) << 4);
			continue;
		}
		switch (p[0] % 8) {
		case 0: case 1: case 2:
			packet(b, dialect, DATA, pos, payload, size, false);
			break;
		case 3:
			packet(b, dialect, ASYNC, pos, payload, size, false);
			break;
		case 4:
			memset(payload, 0, 4);
			packet(b, dialect, CMD, pos, payload, 4, false);
			b->digests |= digests && dialect == 2 && (pos & 1);
			break;
		case 5:
			if (dialect == 1 && p[5] % 4 == 3) {
				uint32_t size_of[] = { 48, 8, 2048, size };
				uint32_t raw[] = { PL_PROOF_MARK, size_of[p[1] % 4],
						   p[1] % 4, 0 };

				if (b->len + 16 + raw[1] <= STREAM) {
					add(b, raw, 16);
					add(b, payload, raw[1]);
				}
				break;
			}
			packet(b, dialect, p[5] % 3, pos, payload, 0, false);
			break;
		case 6:		/* any type, a far position, a wrong digest */
			packet(b, dialect, p[5] % 8, edge[p[3] % 8] + p[4] % 4 - size % 5000,
			       payload, size, p[2] & 1);
			break;
		case 7:
			add(b, p, 7);
			break;
		}
	}
	add(b, p, n);
}

/* ---- one execution */

static void compare(const struct model *m, const struct pl_recv *r)
{
	struct pl_recv_stats stats;

	CHECK(!target.page);
	/* What a device had past the copy stays there. */
	CHECK(!memcmp(target.space, m->space,
		      m->end > target.end || target.device ? m->end : target.end));
	for (uint32_t i = m->end; target.device && i < SPACE; i++)
		CHECK(target.space[i] == OLD);
	pl_recv_stats(r, &stats);
	CHECK(stats.frames == m->frames);
	CHECK(stats.image_size == m->image_size);
	CHECK(stats.stream_bytes == in.at);
	CHECK(stats.written_bytes + stats.hole_bytes == stats.data_bytes);
}

/* The proof is that of the contents, and what the sender claims is what it sent. */
static void compare_proof(const struct model *m, const struct pl_recv *r,
			  struct pl_proof *proof)
{
	struct pl_proof plain;
	uint8_t got[16], want[16];
	const uint8_t *claim;
	uint32_t len;

	CHECK(!pl_proof_init(&plain, PROVEN));
	pl_proof_note(&plain, m->space, PROVEN, 0);
	CHECK(!pl_proof_root(&plain, -1, want));
	CHECK(!pl_proof_root(proof, 0, got));
	CHECK(!memcmp(got, want, 16));
	pl_proof_fini(&plain);
	claim = pl_recv_proof_data(r, &len);
	CHECK(!claim == !m->claim && len == (claim ? 48 : 0));
	CHECK(!claim || !memcmp(claim, m->claim, 48));
}

/* After a SYNC of D1: the features from now on. */
static void agree(struct pl_recv *r, struct model *m, bool digests, bool plain,
		  struct pl_proof *proof)
{
	uint64_t features = plain ? 0 : PL_FEATURE_COMPRESSED;

	m->packed = !plain;
	if (digests && !m->proof && !m->frames) {
		CHECK(!pl_proof_init(proof, PROVEN));
		CHECK(!pl_recv_expect_proof(r, proof));
		m->proof = true;
	}
	if (m->proof)
		features |= PL_FEATURE_PROOF;
	CHECK(!pl_recv_expect(r, features));
}

static void run(struct pl_recv *r, struct model *m, bool digests, bool plain,
		struct pl_proof *proof)
{
	struct pl_recv_msg msg;
	struct pl_fault fault;
	int got, want;

	do {
		uint64_t pos = 0;

		got = pl_recv_run(r, &msg, &fault);
		want = step(m, in.data, in.len, &pos);
		/* A write far away may have failed, and is then told instead. */
		if (m->wild && got < 0 && fault.stage == PL_STAGE_WRITE)
			return;
		CHECK(got == want);
		if (got < 0) {
			CHECK(fault.stage == (got == -ENODATA ? PL_STAGE_READ :
							       PL_STAGE_PROTOCOL));
			CHECK(fault.frame == m->frames);
			CHECK(fault.stream == in.at);
			CHECK(in.replies <= m->answered);
			CHECK(pl_recv_run(r, &msg, &fault) == got);
			return;
		}
		CHECK(in.at == m->at);	/* nothing past it was taken */
		CHECK(in.replies == m->answered);
		if (got == PL_RECV_QUESTION) {
			CHECK(msg.pos == pos);
			continue;
		}
		compare(m, r);
		if (got == PL_RECV_SYNC) {
			CHECK(msg.pos == pos);
			if (m->dialect == 1)
				agree(r, m, digests, plain, proof);
			if (digests && (pos & 1) && m->dialect == 2) {
				CHECK(!pl_recv_expect_digests(r));
				m->digests = true;
			}
		}
	} while (got != PL_RECV_END);
	if (m->proof)
		compare_proof(m, r, proof);
	CHECK(pl_recv_run(r, &msg, &fault) == PL_RECV_END);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
	static struct builder built;
	static struct model model;
	struct pl_proof proof = { 0 };
	struct pl_recv *r;
	uint64_t sum = 0;
	unsigned flags;

	if (len < 2)
		return -1;
	flags = data[0];
	memset(target.space, 0, target.end);
	target.end = 0;
	target.tmpfs = data[1] & ODD_HUGE;
	if (target.device)	/* the last one */
		memset(target.space, 0, SPACE);
	target.device = data[1] & ODD_FILL;
	if (target.device)
		memset(target.space, OLD, SPACE);
	memset(model.space, 0, model.end);
	memset(&model.at, 0, sizeof(model) - offsetof(struct model, at));
	built.len = 0;
	built.digests = false;
	if (flags & RAW)
		add(&built, data + 2, len - 2);
	else
		build(&built, flags & D2 ? 2 : 1, flags & DIGESTS, data + 2, len - 2);
	in.data = built.data;
	in.len = built.len;
	in.at = in.replies = 0;
	in.greedy = !(flags & SHORT_READS);
	in.order = data[1];
	model.max_frame = flags & BIG_SLOTS ? 200000 : 12288 + data[1];
	model.replies = !(flags & NO_REPLIES);
	CHECK(!pl_recv_new(&r, &(struct pl_recv_cfg){
		.in_fd = 0, .out_fd = 0, .reply_fd = model.replies ? 0 : -1,
		.slots = flags & MORE_SLOTS ? 5 : 2,
		.slot_size = flags & BIG_SLOTS ? 131072 : 4096,
		.max_frame = model.max_frame, .window = 32768,
		.sparse = !!(flags & SPARSE), .fill = target.device,
		.old_end = target.device ? SPACE : 0, .digest = digest, .digest_ctx = &sum,
	}));
	run(r, &model, flags & DIGESTS, data[1] & ODD_PLAIN, &proof);
	pl_recv_free(r);
	pl_proof_fini(&proof);
	free(target.page);	/* of a stream that broke off in it */
	target.page = NULL;
	return 0;
}

#ifdef REPLAY
#include "replay.h"
#endif

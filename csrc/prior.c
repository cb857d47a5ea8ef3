/* SPDX-License-Identifier: Apache-2.0 */
/* Digests of what a target had before: see prior.h. */
#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "io.h"
#include "prior.h"

#define P61 ((1ull << 61) - 1)
#define PIECE (1u << 20)	/* read at a time: a disk takes it faster, and the digests
				   find it in the cache */

typedef unsigned __int128 u128;

static uint64_t word(const uint8_t *from)
{
	uint64_t value;

	memcpy(&value, from, sizeof(value));
	return le64toh(value);
}

void pl_prior_key(struct pl_prior_key *k, const uint8_t *random)
{
	for (unsigned i = 0; i < PL_PRIOR_NH; i++)
		k->nh[i] = word(random + i * 8u);
	random += PL_PRIOR_NH * 8u;
	for (unsigned i = 0; i < 18; i++)
		k->mix[i / 9][i % 9] = word(random + i * 8u) & P61;
}

static void nh(const uint64_t *k, const uint8_t *m, u128 sum[2])
{
	u128 a = 0, b = 0;

	for (unsigned i = 0; i < PL_BLOCK / 8; i += 2) {
		uint64_t x = word(m + i * 8u), y = word(m + i * 8u + 8u);

		a += (u128)(k[i] + x) * (k[i + 1] + y);
		b += (u128)(k[i + 2] + x) * (k[i + 3] + y);
	}
	sum[0] = a;
	sum[1] = b;
}

static uint64_t mix(const uint64_t *a, const u128 sum[2])
{
	/* Each product is below 2^93. */
	u128 h = a[8];

	for (unsigned i = 0; i < 8; i++)
		h += (u128)a[i] * (uint32_t)(sum[i / 4] >> (i % 4 * 32));
	h = (h & P61) + (h >> 61);
	h = (h & P61) + (h >> 61);
	return (uint64_t)(h >= P61 ? h - P61 : h);
}

void pl_prior_digest(const struct pl_prior_key *k, const void *data, uint32_t len,
		     uint8_t out[PL_PRIOR_DIGEST])
{
	uint8_t whole[PL_BLOCK];
	uint64_t half[2];
	u128 sum[2];

	if (len < PL_BLOCK) {
		memcpy(whole, data, len);
		memset(whole + len, 0, PL_BLOCK - len);
		data = whole;
	}
	nh(k->nh, data, sum);
	/* The highest bits are free: so it is not zero, and not all ones. */
	half[0] = htole64(mix(k->mix[0], sum));
	half[1] = htole64(mix(k->mix[1], sum) | 1ull << 63);
	memcpy(out, half, sizeof(half));
}

/* ---- the end that has the target */

int pl_prior_cell_init(struct pl_prior_cell *c, const uint8_t *random, uint64_t size)
{
	memset(c, 0, sizeof(*c));
	pl_prior_key(&c->key, random);
	c->size = size;
	c->buf = pl_buf_new(PIECE);
	return c->buf ? 0 : -ENOMEM;
}

void pl_prior_cell_fini(struct pl_prior_cell *c)
{
	if (c && c->buf) {
		pl_buf_free(c->buf, PIECE);
		c->buf = NULL;
	}
}

void pl_prior_cell_begin(struct pl_prior_cell *c, uint64_t pos)
{
	c->pos = pos;
	memset(c->digest, 0, sizeof(c->digest));
}

static ssize_t read_full(int fd, uint8_t *to, size_t len, uint64_t pos)
{
	size_t got = 0;

	while (got < len) {
		ssize_t n = pread(fd, to + got, len - got, (off_t)(pos + got));

		if (n < 0 && errno == EINTR)
			continue;
		/* Behind a file's end that is no whole block, O_DIRECT reads nothing. */
		if (n == 0 || (n < 0 && errno == EINVAL && got % PL_BLOCK))
			break;
		if (n < 0)
			return -errno;
		got += (size_t)n;
	}
	return (ssize_t)got;
}

/* Blocks that are in the buffer: their digests, and the copy, run by run. */
static int take(struct pl_prior_cell *c, int copy_fd, uint64_t pos, uint32_t len,
		struct pl_proof *proof)
{
	uint32_t run = 0, at = 0, step;
	int err = 0;

	for (; at < len; at += step) {
		step = len - at < PL_BLOCK ? len - at : PL_BLOCK;
		if (!pl_is_zero(c->buf + at, step)) {
			pl_prior_digest(&c->key, c->buf + at, step,
					c->digest[(pos + at - c->pos) / PL_BLOCK]);
			continue;
		}
		if (copy_fd >= 0 && at > run && !err)
			err = pl_pwrite_full(copy_fd, c->buf + run, at - run, pos + run);
		run = at + step;
	}
	if (copy_fd >= 0 && at > run && !err)
		err = pl_pwrite_full(copy_fd, c->buf + run, at - run, pos + run);
	if (proof)
		pl_proof_note(proof, c->buf, len, pos);
	return err;
}

int pl_prior_cell_read(struct pl_prior_cell *c, int fd, int copy_fd, uint64_t start,
		       uint64_t end, struct pl_proof *proof)
{
	uint32_t len;

	if (start < c->pos || start % PL_BLOCK || start > end || end > c->size ||
	    end - c->pos > PL_PRIOR_CELL || (proof && proof->size != c->size))
		return -EINVAL;
	for (uint64_t pos = start; pos < end; pos += len) {
		ssize_t got;
		int err;

		len = end - pos < PIECE ? (uint32_t)(end - pos) : PIECE;
		/* Whole blocks, as O_DIRECT wants it. */
		got = read_full(fd, c->buf, (len + PL_BLOCK - 1) / PL_BLOCK * PL_BLOCK,
				pos);
		if (got < 0) {
			uint32_t n = (len + PL_BLOCK - 1) / PL_BLOCK;

			memset(c->digest[(pos - c->pos) / PL_BLOCK], 0xff,
			       n * PL_PRIOR_DIGEST);
			continue;
		}
		if (got < len)
			memset(c->buf + got, 0, len - (size_t)got);
		err = take(c, copy_fd, pos, len, proof);
		if (err)
			return err;
	}
	return 0;
}

uint32_t pl_prior_cell_tell(const struct pl_prior_cell *c, uint8_t out[PL_PRIOR_MAX],
			    uint32_t *blocks, uint32_t *digests)
{
	static const uint8_t none[PL_PRIOR_DIGEST];
	uint64_t left = c->size - c->pos;
	uint32_t n = left < PL_PRIOR_CELL ?
		     (uint32_t)((left + PL_BLOCK - 1) / PL_BLOCK) : PL_PRIOR_BLOCKS;
	uint8_t *to = out + (n + 7) / 8;

	*blocks = n;
	*digests = 0;
	memset(out, 0, (n + 7) / 8);
	for (uint32_t i = 0; i < n; i++) {
		if (!memcmp(c->digest[i], none, PL_PRIOR_DIGEST))
			continue;
		out[i / 8] |= (uint8_t)(1u << i % 8);
		memcpy(to, c->digest[i], PL_PRIOR_DIGEST);
		to += PL_PRIOR_DIGEST;
		++*digests;
	}
	return (uint32_t)(to - out);
}

/* ---- the end that has the source */

int pl_prior_init(struct pl_prior *p, const uint8_t *random, uint64_t size)
{
	uint64_t blocks = (size + PL_BLOCK - 1) / PL_BLOCK;
	void *m;

	if (size > INT64_MAX)
		return -EINVAL;
	m = mmap(NULL, (blocks ? blocks : 1) * PL_PRIOR_DIGEST, PROT_READ | PROT_WRITE,
		 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (m == MAP_FAILED)
		return -errno;
	madvise(m, (blocks ? blocks : 1) * PL_PRIOR_DIGEST, MADV_NOHUGEPAGE);
	*p = (struct pl_prior){ .digest = m, .blocks = blocks, .size = size };
	pl_prior_key(&p->key, random);
	return 0;
}

void pl_prior_fini(struct pl_prior *p)
{
	if (p && p->digest)
		munmap(p->digest, (p->blocks ? p->blocks : 1) * PL_PRIOR_DIGEST);
	if (p)
		p->digest = NULL;
}

static bool has(const uint8_t *bits, uint32_t block)
{
	return bits[block / 8] >> block % 8 & 1;
}

int pl_prior_load(struct pl_prior *p, struct pl_known *known, uint64_t pos,
		  uint32_t blocks, uint32_t digests, const uint8_t *data, uint32_t len)
{
	uint64_t first = pos / PL_BLOCK;
	uint32_t bytes = (blocks + 7) / 8, found = 0;
	const uint8_t *from = data + bytes;

	if (known->size != p->size || pos % PL_PRIOR_CELL || blocks > PL_PRIOR_BLOCKS || first > p->blocks ||
	    blocks > p->blocks - first || digests > blocks ||
	    len != bytes + digests * PL_PRIOR_DIGEST)
		return -EINVAL;
	for (uint32_t i = 0; i < bytes; i++)
		found += (uint32_t)__builtin_popcount(data[i]);
	if (found != digests || (blocks % 8 && data[bytes - 1] >> blocks % 8))
		return -EINVAL;
	for (uint32_t i = 0, end; i < blocks; i = end) {
		end = i + 1;
		if (!has(data, i))
			continue;
		while (end < blocks && has(data, end))
			end++;
		memcpy(p->digest[first + i], from, (end - i) * PL_PRIOR_DIGEST);
		from += (end - i) * PL_PRIOR_DIGEST;
		pl_known_assume_data(known, (first + i) * PL_BLOCK,
				     (first + end) * PL_BLOCK);
	}
	return 0;
}

void pl_prior_forget(struct pl_prior *p, uint64_t start, uint64_t end)
{
	/* A cell has whole pages of digests. */
	uint64_t first = (start + PL_PRIOR_CELL - 1) / PL_PRIOR_CELL * PL_PRIOR_CELL;
	uint64_t last = end >= p->size ? p->blocks : end / PL_PRIOR_CELL * PL_PRIOR_BLOCKS;

	first /= PL_BLOCK;
	if (first < last)
		madvise(p->digest[first], (last - first) * PL_PRIOR_DIGEST, MADV_DONTNEED);
}

bool pl_prior_same(const struct pl_prior *p, uint64_t block, const void *data,
		   uint32_t len)
{
	static const uint8_t none[PL_PRIOR_DIGEST];
	uint8_t digest[PL_PRIOR_DIGEST];

	if (!memcmp(p->digest[block], none, PL_PRIOR_DIGEST))
		return false;
	pl_prior_digest(&p->key, data, len, digest);
	return !memcmp(digest, p->digest[block], PL_PRIOR_DIGEST);
}

/* SPDX-License-Identifier: Apache-2.0 */
/* Dirty bitmaps.  Half-open byte ranges in, runs of set granules out. */
#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include "bitmap.h"

int pl_bitmap_init(struct pl_bitmap *b, uint64_t size, uint32_t shift)
{
	uint64_t nbits, nwords;
	void *p;

	if (shift < 9 || shift > 40 || size > INT64_MAX)
		return -EINVAL;
	nbits = (size + (1ull << shift) - 1) >> shift;
	nwords = (nbits + 63) / 64;
	p = mmap(NULL, nwords ? nwords * 8 : 8, PROT_READ | PROT_WRITE,
		 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (p == MAP_FAILED)
		return -errno;
	/* A huge page would cost 2 MiB for the first bit set in it. */
	madvise(p, nwords * 8, MADV_NOHUGEPAGE);
	*b = (struct pl_bitmap){ .word = p, .nwords = nwords, .nbits = nbits,
				 .size = size, .shift = shift };
	return 0;
}

void pl_bitmap_fini(struct pl_bitmap *b)
{
	if (b && b->word)
		munmap(b->word, b->nwords ? b->nwords * 8 : 8);
	if (b)
		b->word = NULL;
}

void pl_bitmap_zero(struct pl_bitmap *b)
{
	/* Gives untouched pages back as well, which memset would not. */
	if (madvise(b->word, b->nwords ? b->nwords * 8 : 8, MADV_DONTNEED) < 0)
		memset(b->word, 0, b->nwords * 8);
}

/* Bits [first, last) to ones or zeroes. */
static void fill(uint64_t *word, uint64_t first, uint64_t last, bool ones)
{
	uint64_t w = first / 64, end = last / 64;
	uint64_t head = ~0ull << (first % 64);
	uint64_t tail = last % 64 ? ~0ull >> (64 - last % 64) : 0;

	if (first >= last)
		return;
	if (w == end) {
		head &= tail;
		word[w] = ones ? word[w] | head : word[w] & ~head;
		return;
	}
	word[w] = ones ? word[w] | head : word[w] & ~head;
	for (w++; w < end; w++)
		word[w] = ones ? ~0ull : 0;
	if (tail)
		word[w] = ones ? word[w] | tail : word[w] & ~tail;
}

void pl_bitmap_set(struct pl_bitmap *b, uint64_t start, uint64_t end)
{
	if (end > b->size)
		end = b->size;
	if (start >= end)
		return;
	fill(b->word, start >> b->shift, ((end - 1) >> b->shift) + 1, true);
}

void pl_bitmap_clear(struct pl_bitmap *b, uint64_t start, uint64_t end)
{
	uint64_t granule = 1ull << b->shift;
	uint64_t first, last;

	if (start >= end || start >= b->size)
		return;
	first = (start + granule - 1) >> b->shift;
	/* The last granule counts as whole when the range reaches the size. */
	last = end >= b->size ? b->nbits : end >> b->shift;
	fill(b->word, first, last, false);
}

int pl_bitmap_or(struct pl_bitmap *dst, const struct pl_bitmap *src)
{
	if (dst->size != src->size || dst->shift != src->shift)
		return -EINVAL;
	for (uint64_t w = 0; w < src->nwords; w++)
		if (src->word[w])
			dst->word[w] |= src->word[w];
	return 0;
}

int pl_bitmap_and(struct pl_bitmap *dst, const struct pl_bitmap *src, bool invert)
{
	if (dst->size != src->size || dst->shift != src->shift)
		return -EINVAL;
	for (uint64_t w = 0; w < dst->nwords; w++)
		if (dst->word[w])
			dst->word[w] &= invert ? ~src->word[w] : src->word[w];
	return 0;
}

int pl_bitmap_or_scaled(struct pl_bitmap *dst, const struct pl_bitmap *src)
{
	struct pl_extent run = { 0, 0 };

	if (dst->size != src->size)
		return -EINVAL;
	if (dst->shift == src->shift)
		return pl_bitmap_or(dst, src);
	while (pl_bitmap_next(src, run.end, &run))
		pl_bitmap_set(dst, run.start, run.end);
	return 0;
}

uint64_t pl_bitmap_count(const struct pl_bitmap *b)
{
	uint64_t n = 0;

	for (uint64_t w = 0; w < b->nwords; w++)
		n += (uint64_t)__builtin_popcountll(b->word[w]);
	return n;
}

uint64_t pl_bitmap_bytes(const struct pl_bitmap *b)
{
	uint64_t n = pl_bitmap_count(b) << b->shift;
	uint64_t tail = b->size & ((1ull << b->shift) - 1);
	uint64_t last = b->nbits - 1;

	if (tail && (b->word[last / 64] >> (last % 64) & 1))
		n -= (1ull << b->shift) - tail;
	return n;
}

/* The pump's threads set other bits of the word meanwhile. */
static uint64_t load(const uint64_t *word)
{
	return __atomic_load_n(word, __ATOMIC_RELAXED);
}

/* The first bit equal to `want` in [bit, nbits), or nbits. */
static uint64_t find(const struct pl_bitmap *b, uint64_t bit, bool want)
{
	uint64_t w = bit / 64, x;

	if (bit >= b->nbits)
		return b->nbits;
	x = (want ? load(&b->word[w]) : ~load(&b->word[w])) & (~0ull << (bit % 64));
	while (!x) {
		if (++w >= b->nwords)
			return b->nbits;
		x = want ? load(&b->word[w]) : ~load(&b->word[w]);
	}
	bit = w * 64 + (uint64_t)__builtin_ctzll(x);
	return bit < b->nbits ? bit : b->nbits;
}

int pl_bitmap_next(const struct pl_bitmap *b, uint64_t from,
		   struct pl_extent *run)
{
	uint64_t first, last;

	if (from >= b->size)
		return 0;
	first = find(b, from >> b->shift, true);
	if (first >= b->nbits)
		return 0;
	last = find(b, first, false);
	run->start = first << b->shift;
	run->end = last << b->shift;
	if (run->start < from)
		run->start = from;
	if (run->end > b->size)
		run->end = b->size;
	return 1;
}

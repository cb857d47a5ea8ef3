/* SPDX-License-Identifier: Apache-2.0 */
/*
 * bitmap.h - dirty bitmaps.
 *
 * One bit per granule of (1 << shift) bytes of a source of `size` bytes.
 * Words are 64 bits, little-endian bit order (bit i is word[i/64] >> i%64).
 */
#ifndef PL_BITMAP_H
#define PL_BITMAP_H

#include "base.h"

struct pl_bitmap {
	uint64_t *word;		/* owned; mmapped, so untouched pages cost nothing */
	uint64_t nwords;
	uint64_t nbits;
	uint64_t size;		/* bytes covered; the last granule may be partial */
	uint32_t shift;
};

int pl_bitmap_init(struct pl_bitmap *b, uint64_t size, uint32_t shift)
	PL_CHECKED PL_NONNULL;
void pl_bitmap_fini(struct pl_bitmap *b);
void pl_bitmap_zero(struct pl_bitmap *b) PL_NONNULL;
/* Mark every granule that [start, end) touches; clipped to the size. */
void pl_bitmap_set(struct pl_bitmap *b, uint64_t start, uint64_t end) PL_NONNULL;
/* Clear every granule that lies wholly in [start, end). */
void pl_bitmap_clear(struct pl_bitmap *b, uint64_t start, uint64_t end) PL_NONNULL;
/* dst |= src; the same size and shift, else -EINVAL. */
int pl_bitmap_or(struct pl_bitmap *dst, const struct pl_bitmap *src)
	PL_CHECKED PL_NONNULL;
/* dst &= src, or dst &= ~src; the same size and shift, else -EINVAL. */
int pl_bitmap_and(struct pl_bitmap *dst, const struct pl_bitmap *src, bool invert)
	PL_CHECKED PL_NONNULL;
/* dst |= src where src may be coarser or finer; the same size, else -EINVAL. */
int pl_bitmap_or_scaled(struct pl_bitmap *dst, const struct pl_bitmap *src)
	PL_CHECKED PL_NONNULL;
uint64_t pl_bitmap_count(const struct pl_bitmap *b) PL_NONNULL;	/* set bits */
uint64_t pl_bitmap_bytes(const struct pl_bitmap *b) PL_NONNULL;	/* they cover */
/*
 * The first run of set bits at or after byte `from`.  Returns 1 and the
 * run, clipped to the size, or 0 when there is none.
 */
int pl_bitmap_next(const struct pl_bitmap *b, uint64_t from,
		   struct pl_extent *run) PL_CHECKED PL_NONNULL;

#endif

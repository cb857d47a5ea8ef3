/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A target that is full of what it had before (a device): what the stream passes
 * over becomes zeroes.  A sender leaves out what a new file has as holes.
 *
 * All below `covered_end` was written or made zero.  A first pass ascends, so each
 * gap in it is made zero once.  In any other order, too, the target is right in the
 * end: what was made zero too early is written after that.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>

#include "recv_internal.h"

#define FILL_STEP ((uint64_t)64 << 20)	/* at once: so soon a cancel is seen */

static bool failed(struct pl_recv *r)
{
	bool err;

	pthread_mutex_lock(&r->lock);
	err = r->err;
	pthread_mutex_unlock(&r->lock);
	return err;
}

/* Whole blocks.  The first way lets a device forget them, and promises zeroes. */
static int zero_blocks(struct pl_recv *r, uint64_t start, uint64_t end)
{
	static const int ways[] = { FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE };

	for (unsigned i = 0; i < 2; i++)
		if (fallocate(r->cfg.out_fd, ways[i] | FALLOC_FL_KEEP_SIZE,
			      (off_t)start, (off_t)(end - start)) == 0)
			return 0;
	return -errno;
}

static int zero_bytes(struct pl_recv *r, uint64_t start, uint64_t end)
{
	static const uint8_t zeroes[PL_BLOCK];

	/* Buffered, alone: it is less than a block. */
	if (start == end)
		return 0;
	return pl_direct_write(&r->direct, zeroes, (uint32_t)(end - start), start,
			       pl_recv_write_buffered, r);
}

static int zero(struct pl_recv *r, uint64_t start, uint64_t end)
{
	uint64_t first = (start + PL_BLOCK - 1) / PL_BLOCK * PL_BLOCK;
	uint64_t last = end / PL_BLOCK * PL_BLOCK;
	int err;

	if (first > last)
		return zero_bytes(r, start, end);
	err = zero_bytes(r, start, first);
	for (uint64_t next; !err && first < last; first = next) {
		next = last - first > FILL_STEP ? first + FILL_STEP : last;
		err = failed(r) ? -ECANCELED : zero_blocks(r, first, next);
	}
	return err ? err : zero_bytes(r, last, end);
}

int pl_recv_fill(struct pl_recv *r, uint64_t pos, uint32_t len)
{
	int err = 0;

	if (!r->cfg.fill || pos + len <= r->covered_end)
		return 0;
	if (pos > r->covered_end) {
		err = zero(r, r->covered_end, pos);
		RECV_ADD(r, filled_bytes, pos - r->covered_end);
	}
	r->covered_end = pos + len;
	return err;
}

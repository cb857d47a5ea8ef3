/* SPDX-License-Identifier: Apache-2.0 */
/* What the target is known to hold: see known.h. */
#include <errno.h>
#include <sys/mman.h>

#include "known.h"

#define BLOCK_SHIFT 12u
_Static_assert(PL_BLOCK == 1u << BLOCK_SHIFT, "`nonzero` has a bit per block");

int pl_known_init(struct pl_known *k, uint64_t size, uint32_t shift)
{
	uint64_t n;
	void *p;
	int err;

	if (shift < BLOCK_SHIFT || shift > 26 || size > INT64_MAX)
		return -EINVAL;
	n = (size + (1ull << shift) - 1) >> shift;
	p = mmap(NULL, n ? n * 8 : 8, PROT_READ | PROT_WRITE,
		 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (p == MAP_FAILED)
		return -errno;
	madvise(p, n * 8, MADV_NOHUGEPAGE);
	*k = (struct pl_known){ .hash = p, .nchunks = n, .size = size,
				.shift = shift };
	err = pl_bitmap_init(&k->nonzero, size, BLOCK_SHIFT);
	if (err)
		pl_known_fini(k);
	return err;
}

void pl_known_fini(struct pl_known *k)
{
	if (!k)
		return;
	pl_bitmap_fini(&k->nonzero);
	if (k->hash)
		munmap(k->hash, k->nchunks ? k->nchunks * 8 : 8);
	k->hash = NULL;
}

int pl_known_note(struct pl_known *k, uint64_t start, const uint8_t *data,
		  uint64_t len)
{
	uint64_t chunk = 1ull << k->shift, size;

	/* Whole chunks: of a part of one nothing could be kept. */
	if (start % chunk || start > k->size || len > k->size - start ||
	    (len % chunk && start + len != k->size))
		return -EINVAL;
	for (uint64_t at = 0; at < len; at += size) {
		size = len - at < chunk ? len - at : chunk;
		k->hash[(start + at) >> k->shift] = pl_hash_block(data + at, size);
	}
	for (uint64_t at = 0; at < len; at += size) {
		uint64_t pos = start + at;

		size = len - at < PL_BLOCK ? len - at : PL_BLOCK;
		if (pl_is_zero(data + at, size))
			pl_bitmap_clear(&k->nonzero, pos, pos + size);
		else
			pl_bitmap_set(&k->nonzero, pos, pos + size);
	}
	return 0;
}

void pl_known_assume_data(struct pl_known *k, uint64_t start, uint64_t end)
{
	if (end > k->size)
		end = k->size;
	if (start >= end)
		return;
	pl_bitmap_set(&k->nonzero, start, end);
	for (uint64_t c = start >> k->shift; c <= (end - 1) >> k->shift; c++)
		k->hash[c] = PL_HASH_UNKNOWN;
}

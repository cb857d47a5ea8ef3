/* SPDX-License-Identifier: Apache-2.0 */
/*
 * known.h - the sender's knowledge of the target, which starts as zeroes:
 *   nonzero - one bit per PL_BLOCK: something else than zeroes was sent last;
 *   hash    - one per chunk of (1 << shift) bytes: the hash of what was sent
 *             last, PL_HASH_UNKNOWN when only a part of it was sent.
 * Both are mmapped: what stays zero costs no memory.
 */
#ifndef PL_KNOWN_H
#define PL_KNOWN_H

#include "bitmap.h"
#include "hash.h"

struct pl_known {
	struct pl_bitmap nonzero;
	uint64_t *hash;		/* owned */
	uint64_t nchunks;
	uint64_t size;
	uint32_t shift;
};

int pl_known_init(struct pl_known *k, uint64_t size, uint32_t shift)
	PL_CHECKED PL_NONNULL;
void pl_known_fini(struct pl_known *k);
/* The target may hold anything in [start, end): zeroes must be sent there. */
void pl_known_assume_data(struct pl_known *k, uint64_t start, uint64_t end) PL_NONNULL;
/* The target holds exactly `data` at [start, start + len), which is whole chunks,
   the last one of the source among them perhaps; else -EINVAL. */
int pl_known_note(struct pl_known *k, uint64_t start, const uint8_t *data,
		  uint64_t len) PL_CHECKED PL_NONNULL_AT(1) PL_READS(3, 4);

#endif

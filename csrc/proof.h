/* SPDX-License-Identifier: Apache-2.0 */
/*
 * proof.h - what an image holds, as a tree of hashes.  Both ends of a copy keep one:
 * equal roots mean equal images.
 *
 *   leaf   XXH3-64 of a block of PL_BLOCK bytes; 0 if and only if it is all zero.  The
 *          image's last block may be shorter.
 *   node   XXH3-128 of up to PL_PROOF_FANOUT children; 16 zero bytes if all of them are
 *          zero.
 *   root   XXH3-128 of the top node, the size (u64), PL_BLOCK (u32) and
 *          PL_PROOF_ALGORITHM (u32).
 *
 * Numbers are little-endian, and XXH3-128 is in its canonical form (big-endian), as
 * xxhsum prints it.  The leaves have the granule of the trackers' marks, so that a block
 * that is sent again needs nothing of its neighbours.  All is mmapped: only what is not
 * zero takes memory, 8 bytes for 4 KiB of data.
 *
 * XXH3 finds accidents.  It does not find a forgery.
 */
#ifndef PL_PROOF_H
#define PL_PROOF_H

#include "bitmap.h"
#include "hash.h"

#define PL_PROOF_FANOUT 256u
#define PL_PROOF_ALGORITHM 1u
#define PL_PROOF_LEVELS 6u	/* 256^6 blocks are more than 2^63 bytes */
/* The leaf of a block that was written in part: nobody knows what it holds now. */
#define PL_PROOF_UNKNOWN PL_HASH_UNKNOWN

struct pl_proof_level {
	uint8_t (*node)[PL_HASH128];
	uint64_t nodes;
	struct pl_bitmap stale;	/* a bit for each node: a child has changed */
};

struct pl_proof {
	uint64_t *leaf;		/* owned, as all the nodes are */
	uint64_t blocks;
	uint64_t size;		/* of the image, bytes */
	unsigned levels;	/* of nodes; the highest has one node */
	struct pl_proof_level level[PL_PROOF_LEVELS];
};

/* An image of zeroes. */
int pl_proof_init(struct pl_proof *p, uint64_t size) PL_CHECKED PL_NONNULL;
void pl_proof_fini(struct pl_proof *p);
/*
 * The image holds `data` at [pos, pos + len), which is within its size.  A block of
 * which this is only a part becomes unknown.  Any thread, if no two of them have parts
 * of one block.
 */
void pl_proof_note(struct pl_proof *p, const void *data, size_t len, uint64_t pos)
	PL_NONNULL PL_READS(2, 3);
/* The same for one whole block, by its number and its pl_hash_block. */
void pl_proof_set(struct pl_proof *p, uint64_t block, uint64_t hash) PL_NONNULL;
/*
 * The root.  Only nodes above blocks that have changed since the last time are hashed.
 * Unknown blocks are read from `fd`, where the image begins at its first byte; behind
 * its end it is zero.  -1: they are -ENODATA.
 */
int pl_proof_root(struct pl_proof *p, int fd, uint8_t root[PL_HASH128])
	PL_CHECKED PL_NONNULL;
/* The first run of blocks at or after byte `from` that differ: 1 and the run, or 0.
   -EINVAL: the sizes differ. */
int pl_proof_differ(const struct pl_proof *a, const struct pl_proof *b, uint64_t from,
		    struct pl_extent *run) PL_CHECKED PL_NONNULL;

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * prior.h - what a target had before the copy, as digests of its blocks, so that only
 * what differs is sent (docs/internals/update.md).
 *
 * A digest stands for its data, and somebody may have written both contents with care.
 * So it is a universal hash whose key is drawn at random once both contents exist:
 *
 *   NH (RFC 4418's, with words of 64 bits), twice, with a Toeplitz key:
 *       sum over i < 256 of (k[2i] + m[2i]) * (k[2i+1] + m[2i+1]) mod 2^128,
 *       the second time with the key from its third word on;
 *   those 32 bytes, as 8 words x of 32 bits, twice, with coefficients of their own:
 *       a[8] + sum over i < 8 of a[i] * x[i] mod 2^61 - 1.
 *
 * Two different blocks have the same digest with a probability of at most
 * 2^-128 + 2^-121, whoever chose them, if he does not know the key.
 */
#ifndef PL_PRIOR_H
#define PL_PRIOR_H

#include "known.h"
#include "proof.h"

#define PL_PRIOR_NH (PL_BLOCK / 8u + 2u)	/* words of the key for NH */
#define PL_PRIOR_KEY ((PL_PRIOR_NH + 2u * 9u) * 8u)	/* bytes */
#define PL_PRIOR_DIGEST 16u
/* Bytes of the image whose digests are sent at a time, from a multiple of this on. */
#define PL_PRIOR_CELL (4u << 20)
#define PL_PRIOR_BLOCKS (PL_PRIOR_CELL / PL_BLOCK)
/* Bytes of a cell as it is sent: a bit for each block, then a digest for each bit. */
#define PL_PRIOR_MAX (PL_PRIOR_BLOCKS / 8u + PL_PRIOR_BLOCKS * PL_PRIOR_DIGEST)

struct pl_prior_key {
	uint64_t nh[PL_PRIOR_NH];
	uint64_t mix[2][9];
};

/* From PL_PRIOR_KEY random bytes. */
void pl_prior_key(struct pl_prior_key *k, const uint8_t *random) PL_NONNULL;
/* Of one block; a shorter one counts as if zeroes followed.  Neither all zero, nor all
   ones. */
void pl_prior_digest(const struct pl_prior_key *k, const void *data, uint32_t len,
		     uint8_t out[PL_PRIOR_DIGEST]) PL_NONNULL PL_READS(2, 3);

/* ---- the end that has the target */

struct pl_prior_cell {
	struct pl_prior_key key;
	uint64_t pos, size;	/* where the cell begins, and what the image will have */
	uint8_t *buf;		/* owned */
	uint8_t digest[PL_PRIOR_BLOCKS][PL_PRIOR_DIGEST];
};

int pl_prior_cell_init(struct pl_prior_cell *c, const uint8_t *random, uint64_t size)
	PL_CHECKED PL_NONNULL;
void pl_prior_cell_fini(struct pl_prior_cell *c);
/* Begin the cell at `pos`, with nothing in it. */
void pl_prior_cell_begin(struct pl_prior_cell *c, uint64_t pos) PL_NONNULL;
/*
 * What `fd` has at [start, end), which are whole blocks within the cell, or up to the
 * image's end.  copy_fd >= 0: it is written there, too, but for zeroes.  proof: it becomes
 * that of these blocks; or NULL.  A block that cannot be read is one that differs.
 * 0, or -errno of a write.
 */
int pl_prior_cell_read(struct pl_prior_cell *c, int fd, int copy_fd, uint64_t start,
		       uint64_t end, struct pl_proof *proof) PL_CHECKED PL_NONNULL_AT(1);
/* The cell as it is sent: bytes written to `out`, and the number of its blocks and of
   the digests among them. */
uint32_t pl_prior_cell_tell(const struct pl_prior_cell *c, uint8_t out[PL_PRIOR_MAX],
			    uint32_t *blocks, uint32_t *digests) PL_NONNULL;

/* ---- the end that has the source */

struct pl_prior {
	struct pl_prior_key key;
	uint8_t (*digest)[PL_PRIOR_DIGEST];	/* of each block, zero: the target has
						   zeroes.  Owned; mmapped */
	uint64_t blocks, size;
};

int pl_prior_init(struct pl_prior *p, const uint8_t *random, uint64_t size)
	PL_CHECKED PL_NONNULL;
void pl_prior_fini(struct pl_prior *p);
/*
 * A cell that begins at `pos`, as it was received.  known: assumes data where there are some.
 * Not beside a pass over this cell.  -EINVAL: it is not well-formed.
 */
int pl_prior_load(struct pl_prior *p, struct pl_known *known, uint64_t pos,
		  uint32_t blocks, uint32_t digests, const uint8_t *data, uint32_t len)
	PL_CHECKED PL_NONNULL;
/* Give the memory of [start, end) back. */
void pl_prior_forget(struct pl_prior *p, uint64_t start, uint64_t end) PL_NONNULL;
/* Whether the target has this block.  Any thread. */
bool pl_prior_same(const struct pl_prior *p, uint64_t block, const void *data,
		   uint32_t len) PL_NONNULL PL_READS(3, 4);

#endif

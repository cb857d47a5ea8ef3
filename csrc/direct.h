/* SPDX-License-Identifier: Apache-2.0 */
/*
 * direct.h - writes that pass by the page cache (O_DIRECT), where that can be.
 *
 * Whole blocks go direct, by several threads at once; what is no whole block goes
 * buffered, alone.  For the two must not meet: a direct write drops its part of the
 * page cache, and what a buffered one has there at that moment would be lost (the
 * kernel then fails the next fdatasync).  One after the other they are right in either
 * order.
 *
 * The descriptor changes between the two ways (F_SETFL): a second one would be in the
 * way of a lease on the file, by which a migration sees whether others write to it.
 */
#ifndef PL_DIRECT_H
#define PL_DIRECT_H

#include <pthread.h>

#include "base.h"

struct pl_direct_cfg {
	uint32_t block;		/* what positions and lengths must be multiples of, */
	uint32_t memory;	/* and addresses; powers of two, at most 65536.  0: all
				   is buffered */
};

struct pl_direct {
	int fd;			/* borrowed */
	struct pl_direct_cfg cfg;
	bool begun;
	bool refused;		/* atomic: the file system does not take them */
	uint64_t bytes;		/* atomic: written so */
	pthread_rwlock_t lock;	/* held to read by direct writes, to write by others */
};

/* Writes buffered; 0 or -errno. */
typedef int (*pl_buffered)(void *ctx, const uint8_t *data, uint32_t len, uint64_t pos);

/* -EINVAL: not such a configuration. */
int pl_direct_init(struct pl_direct *d, int fd, const struct pl_direct_cfg *cfg)
	PL_CHECKED PL_NONNULL;
void pl_direct_fini(struct pl_direct *d) PL_NONNULL;
/* Around writes, with no write under way: outside, the descriptor is buffered.  To begin
   again changes nothing. */
void pl_direct_begin(struct pl_direct *d) PL_NONNULL;
void pl_direct_end(struct pl_direct *d) PL_NONNULL;
/* Any thread: all is buffered from now on, since others write to the file, too.  No direct
   write is under way when this returns. */
void pl_direct_refuse(struct pl_direct *d) PL_NONNULL;
/*
 * Write all, by `buffered` what cannot go direct.  Any thread; of two that write to
 * the same block of PL_BLOCK bytes the order is the caller's.  0 or -errno.
 */
int pl_direct_write(struct pl_direct *d, const uint8_t *data, uint32_t len,
		    uint64_t pos, pl_buffered buffered, void *ctx)
	PL_CHECKED PL_NONNULL_AT(1, 2, 5) PL_READS(2, 3);

#endif

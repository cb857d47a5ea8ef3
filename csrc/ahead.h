/* SPDX-License-Identifier: Apache-2.0 */
/*
 * ahead.h - room for direct writes, allocated before them.
 *
 * A direct write to a hole, or past the end of the file, has the file for itself on
 * ext4; one to allocated blocks lets others write beside it.  And blocks that are
 * allocated together lie together.  So while data come without a gap, as much again
 * is allocated as has come; what was not used becomes a hole again at the next gap.
 * All calls are in the order of the stream.
 */
#ifndef PL_AHEAD_H
#define PL_AHEAD_H

#include "base.h"

struct pl_ahead {
	int fd;			/* borrowed; -1: nothing is allocated */
	uint64_t run_start, run_end;	/* data that came without a gap */
	uint64_t end;		/* allocated from run_end to here, if that is more */
	uint64_t limit;		/* nothing is allocated past it; 0: no limit */
};

/* Data for [pos, pos + len) are about to be written; the file has nothing at or past
   `data_end`, but what they are. */
void pl_ahead_data(struct pl_ahead *a, uint64_t pos, uint32_t len, uint64_t data_end)
	PL_NONNULL;
/* No more data follow there: what is not used becomes a hole again. */
void pl_ahead_close(struct pl_ahead *a) PL_NONNULL;

#endif

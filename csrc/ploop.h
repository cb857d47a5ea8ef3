/* SPDX-License-Identifier: Apache-2.0 */
/*
 * ploop.h - the ploop driver's own tracking (`ploop` type 'P' ioctls; numbers
 * from the driver's documented interface).  Positions are bytes of the image.
 */
#ifndef PL_PLOOP_H
#define PL_PLOOP_H

#include "base.h"

struct pl_ploop {
	int fd;			/* borrowed: the open /dev/ploopN */
};

/* A tracker left by a killed sender (EBUSY) is aborted, once. */
int pl_ploop_start(struct pl_ploop *t, uint64_t size) PL_CHECKED PL_NONNULL;
/* Pump hook: extents at or past `end` will still be reached by the pass. */
int pl_ploop_setpos(void *tracker, uint64_t start, uint64_t end) PL_CHECKED PL_NONNULL;
/* 1 and the next dirty extent, which is cleared; 0: none is left. */
int pl_ploop_next(struct pl_ploop *t, struct pl_extent *dirty) PL_CHECKED PL_NONNULL;
/* Flush the top delta. */
int pl_ploop_sync(struct pl_ploop *t) PL_CHECKED PL_NONNULL;
/* Fails while bits are unread. */
int pl_ploop_stop(struct pl_ploop *t) PL_CHECKED PL_NONNULL;
int pl_ploop_abort(struct pl_ploop *t) PL_CHECKED PL_NONNULL;

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/* Room for direct writes: see ahead.h. */
#define _GNU_SOURCE
#include <fcntl.h>

#include "ahead.h"

#ifndef AHEAD_LEAST	/* tests take smaller ones */
#define AHEAD_LEAST ((uint64_t)4 << 20)	/* between holes nothing is allocated */
#endif
#define AHEAD_MOST (16 * AHEAD_LEAST)

void pl_ahead_close(struct pl_ahead *a)
{
	uint64_t start = (a->run_end + PL_BLOCK - 1) / PL_BLOCK * PL_BLOCK;

	/* If it cannot be a hole, it reads as zeroes all the same. */
	if (a->fd >= 0 && start < a->end &&
	    fallocate(a->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)start,
		      (off_t)(a->end - start)) < 0)
		a->fd = -1;
	a->end = 0;
}

void pl_ahead_data(struct pl_ahead *a, uint64_t pos, uint32_t len, uint64_t data_end)
{
	uint64_t room;

	if (a->fd < 0)
		return;
	if (pos != a->run_end) {
		pl_ahead_close(a);
		a->run_start = pos;
	}
	a->run_end = pos + len;
	room = a->run_end - a->run_start;
	if (a->run_end <= a->end || a->run_end < data_end || room < AHEAD_LEAST)
		return;
	if (room > AHEAD_MOST)
		room = AHEAD_MOST;
	/* With these bytes, and with the size: past the end no other could write. */
	pos = a->end > a->run_start ? a->end : pos;
	a->end = a->run_end + room;
	if (a->limit && a->end > a->limit)
		a->end = a->limit;
	if (a->end > INT64_MAX ||
	    fallocate(a->fd, 0, (off_t)pos, (off_t)(a->end - pos)) < 0) {
		/* No room, or no such thing here: it was only to help. */
		pl_ahead_close(a);
		a->fd = -1;
	}
}

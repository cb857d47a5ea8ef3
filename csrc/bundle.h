/* SPDX-License-Identifier: Apache-2.0 */
/*
 * bundle.h - one stream of bytes in each direction, over several lanes (connections
 * between the same two ends), any of which may come, stall and die.  What a dead lane had
 * not delivered goes again, over another.
 *
 * On a lane, in both directions, frames of a head (PL_BUNDLE_HEAD bytes, little-endian:
 * kind u32, length u32, value u64) and, for DATA only, `length` bytes:
 *
 *   1 DATA  length: 1 to PL_BUNDLE_SEG_MOST.  value: position of its first byte
 *   2 ACK   value: bytes that the program has taken, in order.  length: how many more have
 *           come without a gap
 *   3 LOST  value: number of a lane that has ended at the end that sends this.  length: 0
 *
 * PL_BUNDLE_WINDOW bytes at most are beyond the last ACK's value.  So that is what each end
 * stores of what it sends, and of what it receives.
 */
#ifndef PL_BUNDLE_H
#define PL_BUNDLE_H

#include "base.h"

#define PL_BUNDLE_HEAD 16u
#define PL_BUNDLE_SEG_MOST (256u << 10)
#define PL_BUNDLE_WINDOW (32u << 20)
#define PL_BUNDLE_LANES 16u	/* at a time */

struct pl_bundle;

struct pl_bundle_lane {
	uint32_t number;
	int32_t error;		/* of its end, positive; 0: the peer ended it */
	bool ended;
};

/*
 * fd: a stream socket to the program at this end; the caller's.  stall_ms: a lane that
 * holds up the others' data for so long has ended; 0: never.
 */
int pl_bundle_new(struct pl_bundle **out, int fd, uint32_t stall_ms) PL_CHECKED PL_NONNULL;
void pl_bundle_free(struct pl_bundle *b);
/*
 * Any thread, also before pl_bundle_run: one lane more.  rfd, wfd: non-blocking; the caller's,
 * and open until the lane has ended or pl_bundle_run has returned.  number: the same at both
 * ends, each used once.  -EBUSY: PL_BUNDLE_LANES are there.  -ECANCELED: it has ended.
 */
int pl_bundle_add(struct pl_bundle *b, int rfd, int wfd, uint32_t number)
	PL_CHECKED PL_NONNULL;
/*
 * One thread: move bytes until the program closes its socket (0), pl_bundle_stop
 * (-ECANCELED), or a failure: -EPROTO: the peer does not keep to the frames above.  Without
 * a lane it waits for one.
 */
int pl_bundle_run(struct pl_bundle *b) PL_CHECKED PL_NONNULL;
/* Any thread. */
void pl_bundle_stop(struct pl_bundle *b) PL_NONNULL;
/* Any thread: bytes of DATA that were given to lanes, or have come, those sent again, too. */
uint64_t pl_bundle_moved(const struct pl_bundle *b) PL_NONNULL;
/* Any thread: the lanes so far that are still listed, `most` at most; returns how many. */
unsigned pl_bundle_lanes(struct pl_bundle *b, struct pl_bundle_lane *to, unsigned most)
	PL_NONNULL;

#endif

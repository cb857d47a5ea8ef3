/* SPDX-License-Identifier: Apache-2.0 */
/* What bundle.c (lanes and the loop), bundle_out.c and bundle_in.c share. */
#ifndef PL_BUNDLE_INTERNAL_H
#define PL_BUNDLE_INTERNAL_H

#include <pthread.h>

#include "bundle.h"

enum { BUNDLE_DATA = 1, BUNDLE_ACK, BUNDLE_LOST };

#define SEG_NEW (128u << 10)	/* bytes of a segment that we make */
#define SEGS 4096u		/* unacknowledged at a time */
#define GAPS 4096u		/* runs of bytes that have come behind a gap */
#define LOST_MOST 1024u		/* lanes that have ended in one bundle */
#define ACK_BYTES (256u << 10)	/* taken, after which the peer hears of it at once ... */
#define ACK_NS (10u * 1000000u)	/* ... and else after so long */
#define TICK_MS 500u		/* between two looks at stalled lanes */

struct seg {			/* sent, and not known to have come */
	uint64_t pos;
	uint32_t len;
	uint32_t lane;		/* the slot of its lane; NO_LANE: it goes again */
	uint64_t sent_ns;
};
#define NO_LANE UINT32_MAX

struct lane {
	bool used;		/* this slot has a lane */
	bool dead;		/* it has ended, and stays listed until the slot is needed */
	int error;
	uint32_t number;
	int rfd, wfd;
	/* out: the frame that is being written */
	uint8_t head[PL_BUNDLE_HEAD];
	uint64_t pos;
	uint32_t len;		/* bytes of its data */
	uint32_t done;		/* bytes of head and data that are written */
	bool busy;
	bool ack;		/* it shall say what has come */
	unsigned told;		/* of `lost`: how many the peer has been sent by this lane */
	/* in: the frame that is being read */
	uint8_t in_head[PL_BUNDLE_HEAD];
	uint32_t in_got;	/* bytes of head and data that have come */
	uint64_t in_pos;
	uint32_t in_len;
};

struct gap_run {
	uint64_t start, end;
};

struct pl_bundle {
	int fd, wake;		/* wake: an eventfd */
	uint32_t stall_ms;
	bool stopped;		/* atomic */
	uint64_t moved;		/* atomic */
	pthread_mutex_t lock;	/* for what other threads look at: the lanes, and whether it is over */
	bool over;
	struct lane lane[PL_BUNDLE_LANES];	/* slots; only pl_bundle_run changes them */
	struct lane coming[PL_BUNDLE_LANES];	/* by pl_bundle_add */
	unsigned lives, n_coming;
	uint32_t lost[LOST_MOST];
	unsigned n_lost;

	/* out */
	uint8_t *out;		/* a ring; a byte's place is its position modulo the window */
	uint64_t taken;		/* by the peer's program */
	uint64_t come;		/* to the peer, without a gap */
	uint64_t next;		/* not given to a lane yet */
	uint64_t end;		/* of what our program has written */
	struct seg seg[SEGS];	/* ascending; seg_first is the oldest */
	unsigned seg_first, segs, again;	/* again: segments of NO_LANE */

	/* in */
	uint8_t *in;
	uint8_t *waste;		/* PL_BUNDLE_SEG_MOST: what has come before */
	uint64_t given;		/* to our program */
	uint64_t whole;		/* without a gap */
	struct gap_run run[GAPS];
	unsigned runs;
	uint64_t said_given, said_whole;	/* what the peer was sent last */
	uint64_t ack_ns;	/* when it must hear of more; 0: nothing is new */
};

static inline bool pl_lane_lives(const struct lane *l)
{
	return l->used && !l->dead;
}

/* bundle.c */
void pl_bundle_lane_ended(struct pl_bundle *b, struct lane *l, int err);
/* bundle_out.c: the slot's lane takes bytes; whether it has something to write; what the
   peer says of ours; a lane has ended; a lane holds all others up. */
void pl_bundle_write(struct pl_bundle *b, struct lane *l);
bool pl_bundle_wants(const struct pl_bundle *b, const struct lane *l);
int pl_bundle_acked(struct pl_bundle *b, uint64_t taken, uint32_t more) PL_CHECKED;
void pl_bundle_again(struct pl_bundle *b, const struct lane *l);
void pl_bundle_look(struct pl_bundle *b, uint64_t now);
int pl_bundle_take(struct pl_bundle *b) PL_CHECKED;	/* from our program; 1: it has closed */
/* bundle_in.c: bytes have come; to our program. */
int pl_bundle_read(struct pl_bundle *b, struct lane *l) PL_CHECKED;
int pl_bundle_give(struct pl_bundle *b) PL_CHECKED;

#endif

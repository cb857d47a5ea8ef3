/* SPDX-License-Identifier: Apache-2.0 */
/* The sending pump's lanes; pump_lanes.c tells how they move. */
#ifndef PL_PUMP_LANES_H
#define PL_PUMP_LANES_H

#include "bitmap.h"
#include "patience.h"
#include "wire.h"

struct slot;
struct pl_pump;

/* Frames of a lane that are remembered one by one: some more than are under way. */
#ifndef PL_LANE_FRAMES	/* tests take fewer */
#define PL_LANE_FRAMES 4096u
#endif

/* What a lane was given since all of it was known to be there. */
struct lane_log {
	struct lane_frame {
		uint64_t pos, end;	/* in the source; in the lane's stream */
		uint32_t len;
	} *frame;			/* a ring of the last ones */
	uint64_t n;			/* that were added; the ring has the last ones */
	uint64_t since;			/* the stream's byte that the log begins at */
	struct pl_bitmap sent;		/* all of them, in coarse granules */
};

struct pump_lane {
	int fd;
	uint32_t number;
	int err;		/* why it was given up, or 0 */
	bool splices;
	struct slot *slot;	/* what is being sent, and how far: */
	unsigned run;		/* the frame is of this run, */
	uint32_t part;		/* from here on, */
	uint32_t off;		/* and so many bytes of it, header included, are gone */
	uint8_t control[PL_D1_HEADER + PL_BARRIER_HEAD + 2 * PL_BARRIER_NAMES];
	uint32_t control_len, control_off;	/* goes before the slot */
	uint64_t given;		/* bytes of its stream, those that wait included */
	uint64_t taken;		/* atomic: of these by the system */
	bool blocked;		/* it took no more the last time */
	struct pl_patience takes;
	uint64_t total;		/* pump_lanes.total when it last moved */
	struct lane_log log;
};

struct pump_lanes {
	struct pump_lane *lane[PL_LANES + 1];	/* lane 0 first; without gaps */
	unsigned n;		/* 0: there was never any but lane 0, which keeps no log */
	bool barriers;		/* there was one: each SYNC needs another */
	bool broken;		/* atomic: pl_pump_disconnect */
	struct pump_lane *joining[PL_LANES];
	unsigned njoining;
	int wake_fd;		/* eventfd: a slot is ready, or a lane joins */
	uint32_t sequence;	/* of the last barrier */
	bool sent;		/* data since then */
	uint64_t total;		/* bytes that all lanes took */
	struct pl_bitmap lost;	/* what must go again; no words: nothing yet */
};

/* pump_log.c */
int pl_log_init(struct lane_log *log, uint64_t size) PL_CHECKED PL_NONNULL;
void pl_log_fini(struct lane_log *log) PL_NONNULL;
void pl_log_add(struct lane_log *log, uint64_t pos, uint32_t len, uint64_t end)
	PL_NONNULL;
/* All up to this byte of the stream is there. */
void pl_log_forget(struct lane_log *log, uint64_t since) PL_NONNULL;
/* Mark what was given after `received` bytes of the stream. */
void pl_log_lost(const struct lane_log *log, uint64_t received,
		 struct pl_bitmap *lost) PL_NONNULL;

/*
 * pump_lanes.c.  One turn of a pass with lanes, with the lock.  False: the pass is
 * over.
 */
bool pl_lanes_turn(struct pl_pump *p) PL_CHECKED PL_NONNULL;
/* Lock held: let those take part that were added.  True: there are lanes. */
bool pl_lanes_adopt(struct pl_pump *p) PL_CHECKED PL_NONNULL;
/* Without the lock, between two passes: what comes next overtakes nothing. */
int pl_lanes_barrier(struct pl_pump *p, bool always, struct pl_fault *fault)
	PL_CHECKED PL_NONNULL;
/* Lock held: a pass has ended. */
void pl_lanes_rest(struct pl_pump *p) PL_NONNULL;
/* PL_FEATURE_RESUME: lane 0 keeps a log from the beginning. */
int pl_lanes_keep_log(struct pl_pump *p) PL_CHECKED PL_NONNULL;
/* A pass has failed: what it claimed and no lane was given is lost, too. */
int pl_lanes_unsent(struct pl_pump *p) PL_CHECKED PL_NONNULL;
/* A control frame went into the stream, beside the lanes. */
void pl_lanes_wrote(struct pl_pump *p, size_t len) PL_NONNULL;
/* Any thread: the thread of the pass looks around anew. */
void pl_lanes_wake(struct pl_pump *p) PL_NONNULL;
void pl_lanes_fini(struct pl_pump *p) PL_NONNULL;

#endif

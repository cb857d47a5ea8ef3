/* SPDX-License-Identifier: Apache-2.0 */
/* The receiving pump's own structures; recv.c tells how they move. */
#ifndef PL_RECV_INTERNAL_H
#define PL_RECV_INTERNAL_H

#include <pthread.h>
#include <sys/uio.h>

#include "ahead.h"
#include "counters.h"
#include "direct.h"
#include "huge.h"
#include "patience.h"
#include "recv.h"

#define RECV_PARTS 256u
#define RECV_ADD(r, field, n) pl_count(&(r)->stats.field, n)

/* Types of D1's frames that have markers of their own; no type of D2. */
enum { RECV_FRAME_BARRIER = 1 << 16 };
/* What a lane's pl_recv_run returns for BARRIER. */
#define RECV_BARRIER 16

struct recv_barrier {
	uint32_t sequence;
	uint32_t count;		/* a lane: its number */
	bool given_up;		/* lane 0: the sender has given up lanes */
	uint16_t name[PL_BARRIER_NAMES];
};

/* The lanes of a receiver; recv_lanes.c. */
struct recv_lanes {
	pthread_mutex_t lock;	/* guards all below */
	pthread_cond_t changed;	/* CLOCK_MONOTONIC */
	struct recv_lane *lane[PL_LANES];
	struct pl_lane_end lost[PL_BARRIER_NAMES];
	unsigned nlost;
	uint32_t done;		/* the last barrier that all have passed */
	uint64_t first_ns;	/* when data since the last event began to come */
	uint64_t dirty_bytes;	/* see pl_recv_msg; at the last barrier */
	struct pl_recv_stats gone;	/* of lanes that have ended */
	bool open;		/* lanes may be added */
	bool used;		/* one was */
	bool begun;		/* the sender has used one: then it writes barriers */
};

struct recv_header {
	uint32_t mark, type;
	uint32_t size;		/* of the data */
	uint32_t packed;	/* bytes of a zstd frame that are they; 0: not compressed */
	uint64_t pos;
};

struct recv_part {
	uint64_t pos;
	uint32_t len;
	uint32_t off;		/* in the slot's buffer */
};

struct recv_slot {
	uint8_t *buf;
	uint32_t used;
	unsigned nparts;
	unsigned replies;	/* packets that end here and are answered */
	uint64_t start, end;	/* of the file, whole blocks: all parts lie there */
	struct recv_part part[RECV_PARTS];
	struct recv_part *run;	/* what must be written */
	unsigned nruns;
	bool done;		/* written, but an earlier one is not yet */
};

struct pl_recv {
	struct pl_recv_cfg cfg;
	struct pl_recv_stats stats;	/* atomic, field by field */
	struct recv_slot *slot;
	int cancel_fd;
	uint8_t *memory;	/* of all slots */
	pthread_t *thread;
	unsigned nthreads;

	/* reader only: the next header, as far as it has come; and the fields of
	   the last complete one */
	uint8_t raw[PL_D2_HEADER + PL_DIGEST];
	uint32_t raw_got;
	struct recv_header head;
	enum pl_dialect dialect;
	uint32_t command;	/* of a CMD that is refused */
	struct pl_patience peer_gives;
	uint64_t first_ns;	/* pl_recv_msg has it next */
	bool ended;
	bool digests;		/* each packet carries one from now on */
	uint64_t features;	/* frames of these are taken from now on */
	struct unpacker *unpacker;	/* of the first compressed frame on */
	uint8_t proof_data[PL_NODES_MAX * 8];	/* of the last PROOF frame */
	uint32_t proof_len;
	bool claimed;		/* it is a claim, and nothing has come since */
	bool is_lane;		/* not lane 0: data and barriers only */
	bool at_barrier;	/* the last frame was one: */
	struct recv_barrier barrier;
	uint64_t whole_bytes;	/* of the stream: the frames that have come whole */
	uint64_t base_bytes;	/* of the stream, from which on `whole` is counted */
	bool broken;		/* atomic: pl_recv_disconnect */
	bool relinked;		/* no barrier has come since */
	struct recv_lanes lanes;	/* of lane 0; locks itself */

	/* reader only: recv_place.c */
	struct pl_huge huge;
	uint64_t read_end;	/* nothing was read for a place at or past it */
	uint64_t run_start, run_end;	/* what came last, without a gap */
	uint8_t *page;		/* the huge page that is being filled, or NULL */
	uint64_t page_pos;
	uint32_t page_used;
	uint64_t page_zero[PL_HUGE / PL_BLOCK / 64];	/* its zero blocks */
	uint64_t placed_end;	/* atomic: nothing was placed at or past it */

	/* of the writer that plans, in the order of the slots */
	uint64_t written_end;	/* the file has no data at or past it */
	uint64_t covered_end;	/* with `fill`: all below was written or made zero */
	struct pl_ahead ahead;

	/* of the writer that writes buffered (direct.h: alone) */
	struct pl_direct direct;
	uint64_t flush_start, flush_end;	/* written, writeback not started */
	uint64_t flushing_start, flushing_end;	/* writeback under way */
	uint64_t unflushed, flushing;	/* bytes in these */
	bool was_synced;	/* atomic: forget them */

	struct pl_patience peer_takes;	/* of the writer that answers */

	pthread_mutex_t lock;	/* guards all below */
	pthread_cond_t work, done;
	pthread_cond_t planned;	/* for pl_recv_share */
	uint64_t filled, taken, written;	/* slots handed over / begun / finished */
	bool planning, retiring;	/* a writer does it */
	bool writer_idle, reader_waits, quit;
	int err;
	struct pl_fault fault;
};

/* recv_ring.c.  Note a failure; the first one is reported. */
void pl_recv_fail(struct pl_recv *r, int err, enum pl_stage stage, uint64_t pos)
	PL_NONNULL;
/* The same for a failure of one of its lanes. */
void pl_recv_fail_as(struct pl_recv *r, int err, const struct pl_fault *fault)
	PL_NONNULL;
/* The first failure so far, or 0. */
int pl_recv_failed(struct pl_recv *r) PL_CHECKED PL_NONNULL;
/* Wake a reader that waits for its peer. */
void pl_recv_wake(struct pl_recv *r) PL_NONNULL;
/* Any thread.  Others are about to write to the file, too: nothing is written past the
   page cache any more, and nothing is known of where the file has no data. */
void pl_recv_share(struct pl_recv *r) PL_NONNULL;
/* The slot to fill; NULL after a failure. */
struct recv_slot *pl_recv_slot(struct pl_recv *r) PL_CHECKED PL_NONNULL;
/* Give it to the writer. */
void pl_recv_hand_over(struct pl_recv *r) PL_NONNULL;
/* Wait until all is written: 0, or the first failure. */
int pl_recv_drain(struct pl_recv *r) PL_CHECKED PL_NONNULL;
/* Start the writers, and end them. */
int pl_recv_start(struct pl_recv *r) PL_CHECKED PL_NONNULL;
void pl_recv_stop(struct pl_recv *r) PL_NONNULL;

/*
 * recv_in.c.  Read at least `must` bytes into the vector, at most all of it: how
 * many, or -errno; -ENODATA at end of file.
 */
ssize_t pl_recv_read(struct pl_recv *r, struct iovec *iov, unsigned n,
		     size_t must) PL_CHECKED PL_NONNULL;

/*
 * recv_head.c.  Complete and check the next header -> r->head; on failure *stage is
 * READ or PROTOCOL.
 */
int pl_recv_head(struct pl_recv *r, enum pl_stage *stage) PL_CHECKED PL_NONNULL;
/* The features that it knows. */
uint64_t pl_recv_features(void);
/* Bytes of the next header. */
uint32_t pl_recv_head_size(const struct pl_recv *r) PL_NONNULL;
/*
 * Add data of the packet r->head to its digest, where digests are agreed.  `last`:
 * these end the packet; -EBADE if they are not what its digest says.
 */
int pl_recv_digest(struct pl_recv *r, const void *data, uint32_t len, bool last)
	PL_CHECKED PL_NONNULL_AT(1) PL_READS(2, 3);

/*
 * recv.c.  Read `len` bytes of the payload; behind the last ones, as much of the next
 * header as is there.
 */
int pl_recv_payload(struct pl_recv *r, uint8_t *to, uint32_t len, bool last)
	PL_CHECKED PL_NONNULL;

/*
 * recv_unpack.c.  The payload of a compressed frame, r->head: begin, then its data in
 * pieces.  `last`: these end them.  -EILSEQ: it is not one zstd frame of just so many
 * bytes, or takes too much memory.
 */
int pl_recv_unpack_begin(struct pl_recv *r) PL_CHECKED PL_NONNULL;
int pl_recv_unpack(struct pl_recv *r, uint8_t *to, uint32_t len, bool last)
	PL_CHECKED PL_NONNULL;
void pl_recv_unpack_fini(struct pl_recv *r) PL_NONNULL;

/* recv_reply.c.  Answer `count` packets, RECV_PARTS at most, with success. */
int pl_recv_reply(struct pl_recv *r, unsigned count) PL_CHECKED PL_NONNULL;

/*
 * recv_place.c.  Where in the file itself the next bytes, which belong to `pos`, can
 * be read to; *room <- how many of `left`.  NULL: take a slot.
 */
uint8_t *pl_recv_place(struct pl_recv *r, uint64_t pos, uint32_t left,
		       uint32_t *room) PL_CHECKED PL_NONNULL;
/* So many bytes were read there. */
void pl_recv_placed(struct pl_recv *r, uint32_t len) PL_NONNULL;
/* Note bytes that were read, to a slot or a place, in the order of the stream. */
void pl_recv_saw(struct pl_recv *r, uint64_t pos, uint32_t len) PL_NONNULL;
/* No more of the page follows: what is unused or zero becomes a hole. */
void pl_recv_end_page(struct pl_recv *r) PL_NONNULL;

/* recv_fill.c.  With `fill`: what the stream has passed over becomes zeroes, before
   data for [pos, pos + len) are written. */
int pl_recv_fill(struct pl_recv *r, uint64_t pos, uint32_t len) PL_CHECKED PL_NONNULL;

/*
 * recv_out.c.  Write a slot, in two steps; on failure *pos is where.  The first, in the
 * order of the slots: find what must be written -> run[], and make the holes.
 */
int pl_recv_plan(struct pl_recv *r, struct recv_slot *s, uint64_t *pos)
	PL_CHECKED PL_NONNULL;
/* Then, beside other slots that are for other blocks: write it. */
int pl_recv_write(struct pl_recv *r, const struct recv_slot *s, uint64_t *pos)
	PL_CHECKED PL_NONNULL;
/* Buffered, alone (direct.h). */
int pl_recv_write_buffered(void *ctx, const uint8_t *data, uint32_t len, uint64_t pos)
	PL_CHECKED PL_NONNULL;
/* Bytes that may not be on the disk; while the writers are idle. */
uint64_t pl_recv_dirty(struct pl_recv *r) PL_CHECKED PL_NONNULL;

/*
 * recv_lanes.c.  Read the BARRIER r->head, and pass it when all lanes have: 0;
 * RECV_BARRIER for a lane, which has only written what came before it; or -errno.
 */
int pl_recv_barrier(struct pl_recv *r, enum pl_stage *stage) PL_CHECKED PL_NONNULL;
/* At SYNC or END: complete *msg.  0, PL_RECV_LOST, or -EPROTO: no barrier came before
   it.  After END no lane is read any more. */
int pl_recv_lanes_event(struct pl_recv *r, struct pl_recv_msg *msg, bool end)
	PL_CHECKED PL_NONNULL;
/* Between two runs: lanes may be added from now on. */
void pl_recv_lanes_open(struct pl_recv *r) PL_NONNULL;
/* No lane reads or writes any more, nor will one. */
void pl_recv_lanes_stop(struct pl_recv *r) PL_NONNULL;
/* A barrier may wait: it looks for failures anew. */
void pl_recv_lanes_wake(struct pl_recv *r) PL_NONNULL;
/* The stream has failed: end all lanes, and note what came of them and of lane 0. */
int pl_recv_lanes_broken(struct pl_recv *r, uint64_t received) PL_CHECKED PL_NONNULL;
/* The file was synced. */
void pl_recv_lanes_synced(struct pl_recv *r) PL_NONNULL;
/* Add those of all lanes. */
void pl_recv_lanes_stats(struct pl_recv *r, struct pl_recv_stats *to) PL_NONNULL;
int pl_recv_lanes_init(struct pl_recv *r) PL_CHECKED PL_NONNULL;
void pl_recv_lanes_fini(struct pl_recv *r) PL_NONNULL;

#endif

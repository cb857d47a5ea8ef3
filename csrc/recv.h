/* SPDX-License-Identifier: Apache-2.0 */
/*
 * recv.h - the receiving pump: stream -> ring -> file.  The calling thread
 * reads, helpers write, so that the two overlap.  Never reads past END.
 * The first marker decides the dialect; another one later is -EBADMSG.  In D2
 * a helper answers DATA once it is written; SYNC, END and failures are the
 * caller's to answer, and nobody else writes to reply_fd while a run returns.
 *
 * With PL_FEATURE_LANES, data may come over further streams, too: lanes.  Each has
 * a reader, a few slots and a writer of its own (recv_lanes.c).
 */
#ifndef PL_RECV_H
#define PL_RECV_H

#include "proof.h"
#include "direct.h"
#include "wire.h"

enum pl_recv_event {
	PL_RECV_SYNC = 1,	/* everything before it is written (not durable) */
	PL_RECV_END = 2,
	PL_RECV_QUESTION = 3,	/* a PROOF frame that asks for nodes: msg->pos, and
				   pl_recv_proof_data */
	PL_RECV_LOST = 4,	/* SYNC or END, but lanes have ended before the barrier
				   (pl_recv_lost), or the sender has given some up.
				   Answered so, the peer sends again what was lost,
				   and asks again. */
	PL_RECV_BROKEN = 5,	/* PL_FEATURE_RESUME: the stream has failed.  All that came
				   whole is written, and no lane reads or writes any more
				   (pl_recv_lost).  pl_recv_relink goes on. */
};

struct pl_recv_cfg {
	int in_fd;
	int out_fd;
	uint32_t slots, slot_size;	/* memory is the product */
	uint32_t max_frame;	/* larger sizes are refused (-EMSGSIZE) */
	uint32_t stall_ms;	/* less than 64 KiB, or no END, in so long a wait:
				   -ETIMEDOUT (patience.h); 0: never */
	uint64_t window;	/* dirty bytes of the target kept unwritten at
				   most, roughly; 0: no rolling writeback */
	uint32_t lane_stall_ms;	/* a lane that gives nothing for so long, while a
				   barrier waits for it, has ended; 0: never */
	uint32_t sparse;	/* 1: zero blocks become holes */
	uint64_t old_end;	/* the file may hold data below this position; 0: it
				   is new */
	uint64_t largest;	/* data past this position are refused (-EFBIG); 0:
				   no limit */
	uint32_t fill;		/* 1: the file is full of what it had before: what the
				   stream passes over becomes zeroes, up to the end of
				   the data.  Then old_end is the end of the file */
	struct pl_direct_cfg direct;
	uint32_t writers;	/* threads for direct writes, at most 64; 0: one */
	uint32_t ahead;		/* 1: allocate room before direct writes (a file) */
	int reply_fd;		/* socket that D2 is answered on; -1: D2 is refused */
	pl_digest digest;	/* or NULL */
	void *digest_ctx;
	struct pl_proof *proof;	/* NULL; see pl_recv_expect_proof */
};

struct pl_recv_stats {
	uint64_t stream_bytes, data_bytes, frames, written_bytes, hole_bytes;
	uint64_t image_size;	/* highest position + size seen */
	uint64_t huge_bytes;	/* of the file, made as huge pages (tmpfs) */
	uint64_t packed_bytes, packed_frames;	/* of the data, that came compressed */
	uint64_t direct_bytes;	/* written past the page cache */
	uint64_t filled_bytes;	/* made zero, since the stream passed over them */
};
_Static_assert(sizeof(struct pl_recv_stats) == 11 * sizeof(uint64_t),
	       "counters.h reads it as an array");

struct pl_recv_msg {
	uint64_t pos;
	uint8_t data[PL_SYNC_SIZE];	/* SYNC's (in D2 a command of zero) */
	/* CLOCK_MONOTONIC, ns: when the first data since the last event began to
	   be there (0: there were none), when this event was read, and when all
	   before it was written. */
	uint64_t first_ns, arrived_ns, written_ns;
	/* Written since pl_recv_synced, and not known to be on the disk, bytes. */
	uint64_t dirty_bytes;
};

struct pl_recv;
int pl_recv_new(struct pl_recv **out, const struct pl_recv_cfg *cfg)
	PL_CHECKED PL_NONNULL;
void pl_recv_free(struct pl_recv *r);
/*
 * Run until a SYNC or END frame: returns the event, or -errno with *fault.
 * -ENODATA: the stream ended before END.  -EBADMSG: bad marker.  -EMSGSIZE:
 * frame too large.  -ERANGE: position past 2^63 - size.  -EFBIG: past `largest`.
 * -EPROTO: a command or PROOF of the wrong size.  D2: -EOPNOTSUPP: a type
 * or command that is not taken.  -EBADE: wrong digest.  -ENOTSOCK: no reply_fd.
 * With features: -EILSEQ: a compressed frame that is not exactly what it says.
 */
int pl_recv_run(struct pl_recv *r, struct pl_recv_msg *msg,
		struct pl_fault *fault) PL_CHECKED PL_NONNULL;
/* Between two runs: the caller has had the file synced. */
void pl_recv_synced(struct pl_recv *r) PL_NONNULL;
/* Of what was received so far. */
enum pl_dialect pl_recv_dialect(const struct pl_recv *r) PL_NONNULL;
/* Between two runs: every packet from now on carries a digest.  -EINVAL unless
   this is D2 and the configuration has one. */
int pl_recv_expect_digests(struct pl_recv *r) PL_CHECKED PL_NONNULL;
/* Between two runs: frames of these features (pl_feature) are taken from now on.
   -EINVAL unless this is D1, the receiver knows them all, and it has what PROOF
   needs.  LANES are not for `fill`, which needs to know what a stream passes over. */
int pl_recv_expect(struct pl_recv *r, uint64_t features) PL_CHECKED PL_NONNULL;
/*
 * Between two runs, before any data: from now on `proof`, which is borrowed, becomes that
 * of what is written, and data past its size are refused (-EFBIG).  -EINVAL unless this
 * is D1.
 */
int pl_recv_expect_proof(struct pl_recv *r, struct pl_proof *proof)
	PL_CHECKED PL_NONNULL;
/* Between two runs: the payload of the PROOF frame right before the event END, or of
   the event QUESTION; NULL and a length of 0: there is none. */
const uint8_t *pl_recv_proof_data(const struct pl_recv *r, uint32_t *len)
	PL_CHECKED PL_NONNULL;
/* After PL_RECV_END: the stream goes on, with questions and blocks that are sent again,
   without lanes. */
void pl_recv_reopen(struct pl_recv *r) PL_NONNULL;
/*
 * Any thread.  A further stream for data; `number`, 1 to 65535, is the one that its
 * first frame has.  `fd` is read until END, a failure, or until the lane has ended.
 * -EINVAL unless lanes are agreed; -EEXIST: there is such a lane; -ENOSPC: too many;
 * -ECANCELED: nothing is received any more.  From the first one on, everything is
 * written through the page cache: one descriptor cannot be both ways for several writers.
 */
int pl_recv_add_lane(struct pl_recv *r, int fd, uint32_t number) PL_CHECKED PL_NONNULL;
/*
 * After PL_RECV_BROKEN, and pl_recv_lost: read from `fd`, which comes from the same sender.
 * It begins with a frame, and counts its bytes from 0 on.
 */
void pl_recv_relink(struct pl_recv *r, int fd) PL_NONNULL;
/* Any thread, with PL_FEATURE_RESUME: the stream has failed, although its descriptor does
   not say so, until pl_recv_relink. */
void pl_recv_disconnect(struct pl_recv *r) PL_NONNULL;
/* Between two runs: no lane reads or writes any more, and their descriptors may be closed. */
void pl_recv_end_lanes(struct pl_recv *r) PL_NONNULL;
/* After PL_RECV_LOST and PL_RECV_BROKEN: the lanes that have ended since the last call,
   PL_BARRIER_NAMES at most; how many.  With BROKEN, lane 0 is one. */
unsigned pl_recv_lost(struct pl_recv *r, struct pl_lane_end *out) PL_NONNULL;
/* Any thread. */
void pl_recv_cancel(struct pl_recv *r) PL_NONNULL;
void pl_recv_stats(struct pl_recv *r, struct pl_recv_stats *out) PL_NONNULL;

#endif

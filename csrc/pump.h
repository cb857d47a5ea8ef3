/* SPDX-License-Identifier: Apache-2.0 */
/*
 * pump.h - the sending pump: reads extents of a source with several reads in
 * flight, compares it with what the target is known to hold, and writes what
 * must be sent - in order as D1 frames or D2 packets into a stream, or in place
 * into a file; or looks at them only, for their hashes.
 *
 *      claim (ordered) -> hook -> read -> classify -> ring -> emit (ordered)
 *
 * The thread that calls pl_pump_pass emits; when it has nothing to emit it
 * reads too, so on a machine with few cores nobody waits for a wake-up.
 * Memory is slots * slot_size, whatever the size of the source.
 */
#ifndef PL_PUMP_H
#define PL_PUMP_H

#include "direct.h"
#include "known.h"
#include "prior.h"
#include "proof.h"
#include "wire.h"

enum pl_sink {
	PL_SINK_FRAMES = 1,	/* D1 frames into out_fd, which is O_NONBLOCK or
				   a socket */
	PL_SINK_FILE = 2,	/* pwrite at the source's positions */
	PL_SINK_PACKETS = 3,	/* D2 packets into out_fd, a socket, where they
				   are answered */
	PL_SINK_NONE = 4,	/* nothing is written: for `proof` */
};

enum pl_compress {
	PL_COMPRESS_NEVER,
	PL_COMPRESS_AUTO,	/* while it pays */
	PL_COMPRESS_ALWAYS,	/* in the freeze only while the stream is the bottleneck */
};

enum pl_pass_flags {
	/* Do not send a block that is zero where the target is known to hold
	   zeroes (needs known). */
	PL_PASS_SKIP_ZERO = 1,
	/* Send only chunks that differ from what was sent last (needs `known`);
	   extents are widened to whole chunks. */
	PL_PASS_CHANGED = 2,
	/* The extents are holes of the source: do not read, they are zeroes.
	   They are narrowed to whole chunks, as the extents of the data between
	   them are widened (CHANGED, LAST). */
	PL_PASS_HOLES = 4,
	/* Send the source's last byte whatever it is: it carries the size.  The
	   first pass: with `known`, extents are widened to whole chunks. */
	PL_PASS_LAST = 8,
	/* Call the hook before each read. */
	PL_PASS_HOOK = 16,
	/* What is sent may be newer than what was looked at, as long as nothing
	   is written without the tracker's knowing; `known` then says only that
	   it may be anything but zeroes.  Lets page cache go into a pipe without
	   a copy, where that can be. */
	PL_PASS_LIVE = 32,
	/* Do not send blocks that `prior` says the target has (needs `known`, and not
	   LIVE).  Where it has a digest, `known` must assume data. */
	PL_PASS_PRIOR = 64,
};

struct pl_pump_cfg {
	int src_fd;
	uint64_t src_base;	/* where the source starts in src_fd */
	uint64_t size;		/* bytes of the source */
	uint32_t align;		/* of position and length for src_fd: 1 for buffered
				   reads, a power of two <= 65536 for O_DIRECT */
	uint32_t tail;		/* bytes at the source's end that O_DIRECT cannot
				   read, since they are no whole sector; < align */
	int tail_fd;		/* what they are read from, buffered, */
	uint64_t tail_pos;	/* and where they begin in it */
	int out_fd;
	enum pl_sink sink;
	struct pl_direct_cfg direct;	/* PL_SINK_FILE only */
	uint32_t ahead;		/* 1: allocate room before direct writes (a new file) */
	uint32_t zero_holes;	/* PL_SINK_FILE, 1: the target is full of what it had
				   before, and can make a range zero (a device) */
	uint32_t cluster;	/* largest frame, cut from an extent's start; a
				   multiple of PL_BLOCK, at most 64 MiB */
	uint32_t slots;		/* >= 2 */
	uint32_t readers;	/* helper threads, 0..64 */
	uint32_t lane_stall_ms;	/* a lane that took less than 64 KiB in so long is given
				   up, if the peer takes data on others; 0: never */
	uint32_t stall_ms;	/* give up (-ETIMEDOUT) when the stream took less
				   than 64 KiB in so long (patience.h); 0: never */
	uint64_t rate;		/* bytes per second to the target, on the wire, where
				   there is one; 0: no limit */
	struct pl_known *known;	/* borrowed; NULL: send all, remember nothing */
	struct pl_proof *proof;	/* borrowed, of the same size: becomes that of the
				   target when all that was sent is written there; NULL:
				   none.  With it, extents are widened to whole blocks */
	const struct pl_prior *prior;	/* borrowed, of the same size; NULL: none.  What
					   it has of a pass is there before that */
	pl_hook hook;
	void *hook_ctx;
	uint64_t features;	/* PL_SINK_FRAMES only: what the peer agreed to
				   (pl_feature) */
	enum pl_compress compress;	/* needs PL_FEATURE_COMPRESSED */
	int level;		/* zstd's, 1..19 */
	/* PL_SINK_PACKETS only: */
	bool async;		/* DATA_ASYNC, which is not answered */
	uint32_t window;	/* answers outstanding at most, >= 256 */
	pl_digest digest;	/* each packet carries one; NULL: none does */
	void *digest_ctx;
};

/* Monotonic counters, readable from any thread while a pass runs. */
struct pl_pump_stats {
	uint64_t read_bytes;	/* read from the source */
	uint64_t data_bytes;	/* sent as payload */
	uint64_t wire_bytes;	/* payload, compressed where it was, + headers */
	uint64_t zero_bytes;	/* not sent: zero at both ends */
	uint64_t same_bytes;	/* not sent: unchanged */
	uint64_t frames;
	uint64_t done_bytes;	/* of the extents of this pass, finished */
	uint64_t huge_bytes;	/* of the file, made as huge pages (tmpfs) */
	uint64_t packed_bytes, packed_frames;	/* of the data, that went compressed */
	uint64_t direct_bytes;	/* written past the page cache */
	uint64_t filled_bytes;	/* holes that were made zero, instead of written */
	uint64_t again_bytes;	/* sent again, since a lane had failed */
};
_Static_assert(sizeof(struct pl_pump_stats) == 13 * sizeof(uint64_t),
	       "counters.h reads it as an array");

struct pl_pump;
int pl_pump_new(struct pl_pump **out, const struct pl_pump_cfg *cfg)
	PL_CHECKED PL_NONNULL;
void pl_pump_free(struct pl_pump *p);
/*
 * Send `n` extents (ascending, disjoint, within the size).  0, or -errno with
 * *fault set; -ECANCELED after pl_pump_cancel.  -ENODATA: the source is
 * shorter than it was.  A frame never has 4 data bytes (that is SYNC).
 */
int pl_pump_pass(struct pl_pump *p, const struct pl_extent *ext, size_t n,
		 unsigned flags, struct pl_fault *fault)
	PL_CHECKED PL_NONNULL_AT(1, 5) PL_READS(2, 3);
/*
 * Write raw bytes (a control frame) into the stream; same rules.  With lanes, a
 * barrier comes before it.
 */
int pl_pump_write(struct pl_pump *p, const void *buf, size_t len,
		  struct pl_fault *fault) PL_CHECKED PL_NONNULL PL_READS(2, 3);
/*
 * PL_SINK_PACKETS: write a control packet and wait for its answer, and all that
 * are due before it, for timeout_ms at most (0: for ever).  -EREMOTEIO: an answer was a
 * failure, fault->reply; -EPROTO: there was one too many.  Passes can fail with
 * these too.
 */
int pl_pump_ask(struct pl_pump *p, const void *buf, size_t len,
		uint32_t timeout_ms, struct pl_fault *fault)
	PL_CHECKED PL_NONNULL PL_READS(2, 3);
/*
 * Any thread.  Send data over this stream, too: a lane (PL_SINK_FRAMES with
 * PL_FEATURE_LANES).  `fd` is O_NONBLOCK or a socket; number, 1 to 65535, is new, and
 * the one by which the peer knows it.  A lane that fails is left out; what the peer
 * did not get of it goes again after the next answer (pl_pump_settle).  -EINVAL;
 * -EEXIST; -ENOSPC: there are too many; -ENOMEM.
 */
int pl_pump_add_lane(struct pl_pump *p, int fd, uint32_t number) PL_CHECKED PL_NONNULL;
struct pl_pump_lane {
	uint32_t number;
	int32_t err;		/* why it was left out, or 0 */
	uint64_t bytes;		/* that its stream has taken */
};
/* Any thread.  The lanes, PL_LANES at most, until they are settled; how many. */
unsigned pl_pump_lanes(struct pl_pump *p, struct pl_pump_lane *out) PL_NONNULL;
/*
 * The control frame that was written last is answered: all that was sent before it
 * is there, but what these lanes carried after so many bytes.  1: something must go
 * again (pl_pump_resend), 0: nothing; -EPROTO: that was never sent.
 */
int pl_pump_settle(struct pl_pump *p, const struct pl_lane_end *ends, unsigned n)
	PL_CHECKED PL_NONNULL_AT(1) PL_READS(2, 3);
/* Send what was lost, as the source has it now.  As pl_pump_pass. */
int pl_pump_resend(struct pl_pump *p, struct pl_fault *fault) PL_CHECKED PL_NONNULL;
/*
 * With PL_FEATURE_RESUME, after the stream has failed (PL_STAGE_WRITE) or its answers
 * have: go on with `fd`, which leads to the same receiver.  `ends` say what it has of
 * each lane, lane 0 (the stream that was) among them.  Returns as pl_pump_settle.  All
 * other lanes are given up: their descriptors may be closed.  The pass that has failed
 * must be run again from pl_pump_floor on; what it had claimed goes by pl_pump_resend.
 */
int pl_pump_relink(struct pl_pump *p, int fd, const struct pl_lane_end *ends, unsigned n)
	PL_CHECKED PL_NONNULL_AT(1) PL_READS(3, 4);
/* Of the last pass: nothing below has to be claimed again. */
uint64_t pl_pump_floor(struct pl_pump *p) PL_NONNULL;
/* Any thread, with PL_FEATURE_RESUME: the stream has failed, although its descriptor does
   not say so (-ECONNABORTED), until pl_pump_relink. */
void pl_pump_disconnect(struct pl_pump *p) PL_NONNULL;
/* Between two passes; bytes per second, 0: no limit. */
void pl_pump_limit(struct pl_pump *p, uint64_t rate) PL_NONNULL;
/* Between two passes: the source is frozen now, or runs again. */
void pl_pump_frozen(struct pl_pump *p, bool frozen) PL_NONNULL;
/* Any thread. */
void pl_pump_cancel(struct pl_pump *p) PL_NONNULL;
void pl_pump_stats(const struct pl_pump *p, struct pl_pump_stats *out) PL_NONNULL;

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/* The sending pump's own structures; pump.c tells how they move. */
#ifndef PL_PUMP_INTERNAL_H
#define PL_PUMP_INTERNAL_H

#include <pthread.h>
#include <sys/uio.h>

#include "ahead.h"
#include "counters.h"
#include "huge.h"
#include "patience.h"
#include "pays.h"
#include "pump.h"
#include "pump_lanes.h"

#define PL_FRAGS 256u	/* fragments a slot holds at most */

/* A part of the source in a slot's buffer. */
struct frag {
	uint64_t pos;		/* in the source */
	uint32_t len;
	uint32_t off;		/* of the first byte, in the buffer */
	uint32_t packed;	/* of a run: the bytes there are so many, compressed; 0:
				   they are the source's */
};

/* Which threads compress what they have read. */
enum pump_packs { PACKS_NOBODY, PACKS_READERS, PACKS_ALL };
struct packer;

/* A thread that reads. */
struct reader {
	struct pl_pump *p;
	struct packer *packer;	/* NULL: nothing is ever compressed */
	pthread_t thread;
};

#define PL_BATCH 256u		/* frames in one write at most */

/* D2's answers: to how many packets they are due, and what has come. */
struct pump_reply {
	uint64_t asked, answered;
	int32_t value;			/* of the last one */
	uint8_t buf[1024];		/* the beginning of one may stay in it */
	unsigned got;
	struct pl_patience peer_answers;
};
_Static_assert(sizeof(((struct pump_reply *)0)->buf) % sizeof(int32_t) == 0,
	       "a part of an answer never fills the buffer");

/* A huge page of the target, mapped; slots may be read straight into it. */
#define PUMP_PLACES 4u
struct pump_place {
	uint64_t page;			/* its number, or NO_PAGE */
	unsigned users;			/* slots that are in it */
};

struct slot {
	uint8_t *buf;
	uint8_t *data;			/* what was read: buf, or a place */
	struct pump_place *place;	/* data is in it; or NULL */
	struct frag frag[PL_FRAGS];	/* what was claimed */
	unsigned nfrags;
	struct frag *run;		/* what must be sent */
	uint8_t *hdr;			/* of p->hdr_room bytes each */
	unsigned nruns;
	uint64_t bytes;			/* of the extents, for progress */
	uint64_t number;		/* slots that were claimed before */
	bool busy;			/* claimed and not yet emitted */
	bool ready;			/* classified */
};

/*
 * What one kind of sink does.  A file is written in any order, by the threads
 * that read; a stream in the order of the extents, by the thread of the pass.
 */
struct pl_sink_ops {
	bool in_order;		/* emit() is called in the order of the slots, by
				   one thread; else once a slot is classified */
	bool splices;		/* a frame's data may go without a look at them */
	bool digests;		/* a header ends with PL_DIGEST bytes, if there is
				   a digest */
	uint32_t header_size;	/* bytes, without the digest; 0: no frames */
	uint32_t reserved_size;	/* a frame of so many bytes is no data: they go in
				   two halves, which every receiver takes; or 0 */
	uint32_t min_window;	/* answers outstanding that a pump must allow */

	/* Send run[] of a slot. */
	int (*emit)(struct pl_pump *p, struct slot *s, struct pl_fault *fault);
	/* Only of streams: the header of a frame of `len` bytes of data. */
	int (*put_header)(const struct pl_pump *p, uint8_t *to, uint64_t pos,
			  const uint8_t *data, uint32_t len);
	/* Wait until so many frames may be written.  NULL: at once. */
	int (*admit)(struct pl_pump *p, unsigned frames, struct pl_fault *fault);
	/* See pl_reply_take.  NULL: the peer does not answer here. */
	int (*take_answers)(struct pl_pump *p);
};

extern const struct pl_sink_ops pl_sink_frames;		/* pump_d1.c */
extern const struct pl_sink_ops pl_sink_packets;	/* pump_d2.c */
extern const struct pl_sink_ops pl_sink_file;		/* pump_file.c */
extern const struct pl_sink_ops pl_sink_none;		/* pump_none.c */

struct pl_pump {
	struct pl_pump_cfg cfg;
	const struct pl_sink_ops *sink;
	size_t buf_size;
	unsigned max_runs;
	unsigned hdr_size;		/* of a frame that is not compressed */
	unsigned hdr_room;
	struct pump_reply reply;	/* of the thread that writes the stream */
	struct slot *slot;
	uint8_t *memory;		/* of all slots */
	int cancel_fd;			/* eventfd: readable once cancelled */
	bool cancelled;			/* atomic */
	struct pl_pump_stats stats;	/* atomic, field by field */
	struct pl_patience peer_takes;	/* emitter only */
	bool can_splice;
	bool frozen;
	struct packer *packer;		/* of the thread of the pass */
	enum pump_packs packs;		/* atomic */
	struct pl_pays pays;		/* these three are of the thread of the pass */
	uint64_t counted_ns;		/* `pays` knows of all before */
	uint64_t waited_ns;		/* since then, for the stream */
	struct pl_direct direct;		/* of a file */
	struct pl_ahead ahead;			/* these two are of the slot whose turn it is */
	uint64_t written_end;			/* the file has no data at or past it */
	pthread_mutex_t rate_lock;		/* guards the next line */
	uint64_t rate_t0_ns, rate_bytes;
	struct pl_huge huge;			/* of the thread that has set `making` */
	pthread_mutex_t huge_lock;		/* guards the next three lines */
	bool making;
	struct pl_bitmap huge_made;		/* in this pass */
	struct pump_place place[PUMP_PLACES];

	pthread_mutex_t lock;		/* guards all below */
	pthread_cond_t work;		/* something to claim, or quit */
	pthread_cond_t done;		/* a slot is ready, or a reader idle */
	pthread_cond_t turn;		/* `planned` has changed, or the pass has failed */
	struct reader *reader;
	unsigned nthreads;
	unsigned sleeping;		/* readers waiting on `work` */
	bool emitter_waits;
	bool quit;

	/* of the pass */
	const struct pl_extent *ext;
	size_t next, n;			/* next extent to claim from */
	uint64_t pos;			/* next byte to claim in it, or 0 */
	uint64_t floor;			/* nothing below is claimed again */
	unsigned flags;
	bool live;			/* PL_PASS_LIVE, and it can be done */
	unsigned frags_per_slot;
	uint64_t claimed, emitted;	/* slots, this pass */
	uint64_t planned;		/* of a file with room ahead */
	unsigned processing;		/* slots between claim and ready */
	int err;
	struct pl_fault fault;

	/* The thread of the pass changes it with the lock, and reads it without;
	   what joins is others', too. */
	struct pump_lanes lanes;
};

#define STAT_ADD(p, field, n) pl_count(&(p)->stats.field, n)

/* pump.c.  With the lock: note the first failure, */
void pl_pump_fail(struct pl_pump *p, int err, const struct pl_fault *fault) PL_NONNULL;
/* read a claimed slot, which is ready then (or written), */
void pl_slot_process(struct pl_pump *p, struct slot *s, struct packer *packer,
		     enum pump_packs when) PL_NONNULL_AT(1, 2);
/* and give it back. */
void pl_slot_finish(struct pl_pump *p, struct slot *s) PL_NONNULL;

/*
 * pump_claim.c.  With the lock: claim a slot of fragments to read.  NULL: there is
 * none now; when the hook has failed or the pump is cancelled, p->err says so.
 */
struct slot *pl_slot_claim(struct pl_pump *p) PL_CHECKED PL_NONNULL;

/* pump_read.c.  Without the lock: read a claimed slot and classify it; where slots
   need no order, write it too.  packer: compress it; or NULL. */
int pl_slot_fill(struct pl_pump *p, struct slot *s, struct packer *packer,
		 struct pl_fault *fault) PL_CHECKED PL_NONNULL_AT(1, 2, 4);

/* pump_classify.c.  Decide what of a filled slot must be sent -> run[]. */
void pl_slot_classify(struct pl_pump *p, struct slot *s) PL_NONNULL;
/* Nothing of this part of a hole must be sent. */
bool pl_hole_is_known(const struct pl_pump *p, const struct frag *f) PL_NONNULL;

/* pump_pack.c.  For one thread; NULL: no memory. */
struct packer *pl_packer_new(const struct pl_pump *p) PL_CHECKED PL_NONNULL;
void pl_packer_free(struct packer *k);
/* Compress the runs of a classified slot that become smaller. */
void pl_slot_pack(struct pl_pump *p, struct slot *s, struct packer *k) PL_NONNULL;
/* The thread of the pass: a pass begins; a slot was emitted.  Decides on p->packs. */
void pl_pack_begin(struct pl_pump *p) PL_NONNULL;
void pl_pack_emitted(struct pl_pump *p, const struct slot *s) PL_NONNULL;

/* pump_emit.c.  The streams' pl_sink_ops.emit. */
int pl_emit_frames(struct pl_pump *p, struct slot *s, struct pl_fault *fault)
	PL_CHECKED PL_NONNULL;

/* pump_rate.c.  Wait until so many bytes may be sent: 0, or -ECANCELED. */
int pl_rate_obey(struct pl_pump *p, size_t bytes) PL_CHECKED PL_NONNULL;

/* pump_stream.c.  Write the whole vector, which is changed on the way. */
int pl_stream_write(struct pl_pump *p, struct iovec *iov, unsigned n,
		    struct pl_fault *fault) PL_CHECKED PL_NONNULL;
/* Count bytes that the stream has taken. */
void pl_stream_moved(struct pl_pump *p, size_t n) PL_NONNULL;
/* Wait until the stream takes more; take answers meanwhile, with their errors. */
int pl_stream_wait(struct pl_pump *p) PL_CHECKED PL_NONNULL;
/* Wait until the rate limit allows so many bytes, which the stream then takes: a
   limit is a slow stream.  0, or -ECANCELED. */
int pl_stream_due(struct pl_pump *p, size_t bytes) PL_CHECKED PL_NONNULL;
/* Describe the failure `err`, which is returned. */
int pl_stream_fault(struct pl_pump *p, int err, struct pl_fault *fault)
	PL_CHECKED PL_NONNULL;

/* pump_splice.c.  Whether this source and this stream allow it at all. */
bool pl_can_splice(const struct pl_pump *p, int out_fd) PL_NONNULL;
/* Whether the data of a run go without a copy, */
bool pl_run_is_spliced(const struct pl_pump *p, const struct frag *r) PL_NONNULL;
/* and send them. */
int pl_splice_run(struct pl_pump *p, const struct slot *s, const struct frag *r,
		  struct pl_fault *fault) PL_CHECKED PL_NONNULL;

/*
 * pump_reply.c.  Take the answers that have come.  0; -EREMOTEIO: one is a failure;
 * -EPROTO: one too many; -EPIPE: the peer has closed.
 */
int pl_reply_take(struct pl_pump *p) PL_CHECKED PL_NONNULL;
/* Wait until the window has room for so many packets; from now on their answers are
   due. */
int pl_reply_room(struct pl_pump *p, unsigned packets) PL_CHECKED PL_NONNULL;
/* Describe the failure `err` of the two. */
void pl_reply_explain(const struct pl_pump *p, int err, struct pl_fault *fault)
	PL_NONNULL;

/* pump_huge.c.  Huge pages of a target on tmpfs; nothing for others. */
int pl_pump_huge_init(struct pl_pump *p) PL_CHECKED PL_NONNULL;
void pl_pump_huge_fini(struct pl_pump *p) PL_NONNULL;
/* Before [pos, end) is written: make the next page, if it pays. */
void pl_huge_ahead(struct pl_pump *p, uint64_t pos, uint64_t end) PL_NONNULL;
/* After a pass: what was data but zero becomes a hole again. */
void pl_huge_settle(struct pl_pump *p) PL_NONNULL;
/* Without the lock: choose s->data and s->place for what is about to be read, */
void pl_slot_place(struct pl_pump *p, struct slot *s) PL_NONNULL;
/* and give the place back. */
void pl_slot_unplace(struct pl_pump *p, struct slot *s) PL_NONNULL;

#endif

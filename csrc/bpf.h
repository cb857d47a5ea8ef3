/* SPDX-License-Identifier: Apache-2.0 */
/*
 * bpf.h - dirty tracking of one block device by BPF programs at the block
 * layer's tracepoints.  Needs bpf(2) with BTF (/sys/kernel/btf/vmlinux),
 * nothing else: no clang, no libbpf, no tracefs.
 *
 * Two kinds of marks, because completion events can be lost on some
 * machines while the sum of what completed is known to the kernel:
 *   done   - set when a write (or discard, write-zeroes ...) has completed,
 *            before its writer is woken;
 *   queued - set when a bio is submitted, in the submitter's own context.
 * Counters are 512-byte sectors of the WHOLE disk, not clipped to
 * [start, end), so that they can be compared with /sys/block/X/stat.  With
 * PL_BPF_BIO write-zeroes count as discards: zram accounts neither.
 */
#ifndef PL_BPF_H
#define PL_BPF_H

#include "bitmap.h"

enum pl_bpf_source {
	PL_BPF_RQ = 1,	   /* done marks from block_rq_complete (has blk-mq) */
	PL_BPF_BIO = 2,	   /* done marks from block_bio_complete (zram, brd) */
	PL_BPF_QUEUE = 3,  /* no done marks; queued marks only (dm, md) */
};

struct pl_bpf_cfg {
	uint32_t major, minor;	/* of the whole disk (gendisk major, first_minor) */
	uint64_t start, end;	/* bytes of the disk that are tracked; the whole
				   disk or a partition; multiples of 512 */
	uint32_t done_shift;	/* granule of the done bitmap, >= 12 */
	uint32_t queued_shift;	/* granule of the queued bitmap, >= 12 */
	enum pl_bpf_source source;
};

struct pl_bpf_counters {
	uint64_t done_write, done_discard;	/* sectors completed */
	uint64_t queued_write, queued_discard;	/* sectors submitted */
	uint64_t everything;			/* times "all is dirty" was declared */
};
_Static_assert(sizeof(struct pl_bpf_counters) == 5 * sizeof(uint64_t),
	       "memcmp compares two of them: there is no padding");

struct pl_bpf;

/* On failure *why (>= 256 bytes) gets one line a person can act on. */
int pl_bpf_open(struct pl_bpf **out, const struct pl_bpf_cfg *cfg,
		char *why, size_t why_len)
	PL_CHECKED PL_NONNULL_AT(1, 2) PL_WRITES(3, 4);
void pl_bpf_close(struct pl_bpf *t);
void pl_bpf_counters(const struct pl_bpf *t, struct pl_bpf_counters *out) PL_NONNULL;
/*
 * Move the marks into `into` (atomic exchange word by word, OR into the
 * destination); the bitmap must have been made for end - start bytes and
 * the matching shift, else -EINVAL.  An "everything is dirty" declaration
 * since the last take sets the whole destination.  Returns 0.
 */
int pl_bpf_take_done(struct pl_bpf *t, struct pl_bitmap *into) PL_CHECKED PL_NONNULL;
int pl_bpf_take_queued(struct pl_bpf *t, struct pl_bitmap *into) PL_CHECKED PL_NONNULL;
/*
 * pl_bpf_take_done as runs, ascending: each is given to `run`, whose failure
 * ends it (and loses marks).  A bitmap in between would cost page faults over
 * the whole of a large source.
 */
int pl_bpf_take_runs(struct pl_bpf *t,
		     int (*run)(void *ctx, uint64_t start, uint64_t end),
		     void *ctx) PL_CHECKED PL_NONNULL_AT(1, 2);
/*
 * Bits now set in the done bitmap, without touching them; all bits when
 * everything is dirty.
 */
uint64_t pl_bpf_peek_done(const struct pl_bpf *t) PL_NONNULL;
/*
 * Pump hook (any thread): drop the done marks of granules that lie wholly in
 * [start, end), source-relative; called just BEFORE that range is read
 * (clear, then read).  Never drops an "everything" declaration.
 */
int pl_bpf_forget(void *tracker, uint64_t start, uint64_t end) PL_CHECKED PL_NONNULL;

/*
 * One look at the counters and at the kernel's own accounting
 * (/sys/block/X/stat, fields 7 and 14), as consistent as a running system
 * allows.  Loops up to `tries` times until nothing moved between two
 * readings of the counters around one of the file.
 */
struct pl_bpf_snapshot {
	struct pl_bpf_counters before, after;	/* around the reading of stat */
	uint64_t stat_write, stat_discard;	/* sectors, since boot */
	uint64_t inflight;	/* stat field 9 (requests in flight, reads too) */
	int stable;		/* 1: before == after, and stat read twice alike */
};
int pl_bpf_snapshot(const struct pl_bpf *t, int stat_fd, unsigned tries,
		    struct pl_bpf_snapshot *out) PL_CHECKED PL_NONNULL;

#endif

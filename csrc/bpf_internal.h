/* SPDX-License-Identifier: Apache-2.0 */
/*
 * bpf_internal.h - what the files bpf_*.c and btf.c share.  Nobody else
 * includes it, except their test.
 */
#ifndef PL_BPF_INTERNAL_H
#define PL_BPF_INTERNAL_H

#include "bpf.h"

#include <linux/bpf.h>
#include <linux/btf.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define PL_BTF_VMLINUX "/sys/kernel/btf/vmlinux"

/* --------------------------------------------------------------- btf.c
 * A read-only view of one BTF blob.  Every offset in the blob is checked
 * before it is followed, so a damaged blob gives errors, not crashes.
 */
struct pl_btf {
	unsigned char *blob;	/* owned */
	size_t mapped;		/* bytes to unmap; 0: malloced */
	const char *str;	/* string section, ends in NUL */
	uint32_t str_len;
	uint32_t *off;		/* owned; offset in blob of type id, [1, ntypes) */
	uint32_t ntypes;
};

/* -EPROTO: not BTF as we know it. */
int pl_btf_load(struct pl_btf *b, const char *path) PL_CHECKED PL_NONNULL;
/* Takes `blob` (malloced) over, also on failure. */
int pl_btf_parse(struct pl_btf *b, void *blob, size_t len) PL_CHECKED PL_NONNULL;
void pl_btf_free(struct pl_btf *b) PL_NONNULL;

/* Type id > 0, or -ENOENT. */
int pl_btf_find(const struct pl_btf *b, const char *name, unsigned kind)
	PL_CHECKED PL_NONNULL;
/*
 * A member of struct or union `id`, seen through anonymous members.
 * *off grows by its byte offset; *type becomes its type.  -ENOENT: no such
 * member; -EPROTO: a bit field, or broken BTF.
 */
int pl_btf_member(const struct pl_btf *b, uint32_t id, const char *name,
		  uint32_t *off, uint32_t *type) PL_CHECKED PL_NONNULL;
/* The struct that `id` is or, past one pointer, points to; or -ENOENT. */
int pl_btf_struct(const struct pl_btf *b, uint32_t id) PL_CHECKED PL_NONNULL;
int pl_btf_pointee(const struct pl_btf *b, uint32_t id) PL_CHECKED PL_NONNULL;
/* Is `id` an integer of `size` bytes? */
bool pl_btf_is_int(const struct pl_btf *b, uint32_t id, uint32_t size)
	PL_NONNULL;
/*
 * The parameters of the function that typedef `id` (btf_trace_*) points to.
 * Returns how many there are and stores the types of up to `max` of them.
 */
int pl_btf_params(const struct pl_btf *b, uint32_t id, uint32_t *type,
		  unsigned max) PL_CHECKED PL_NONNULL;
const char *pl_btf_name(const struct pl_btf *b, uint32_t id) PL_NONNULL;

/* ---------------------------------------------------------- bpf_prog.c */

/*
 * Sums of one kind of events.  CPUs that complete and submit at the same time
 * would fight for one cache line, at a cost of several times the rest of the
 * program; so each has a line of its own (above PL_BPF_LANES CPUs they share,
 * hence still atomics), and the reader adds them up.
 */
#define PL_BPF_LANES 32u
#define PL_BPF_LANE_SHIFT 6
struct pl_bpf_lane {
	uint64_t write, discard;
	uint64_t pad[6];
};
_Static_assert((PL_BPF_LANES & (PL_BPF_LANES - 1)) == 0,
	       "the program masks the CPU's number");
_Static_assert(sizeof(struct pl_bpf_lane) == 1u << PL_BPF_LANE_SHIFT,
	       "the program shifts the lane's number");

/* The first pages of the map; the program adds at these offsets. */
struct pl_bpf_page {
	struct pl_bpf_lane done[PL_BPF_LANES], queued[PL_BPF_LANES];
	uint64_t everything;
};
_Static_assert(offsetof(struct pl_bpf_page, queued) ==
	       PL_BPF_LANES * sizeof(struct pl_bpf_lane) &&
	       offsetof(struct pl_bpf_page, everything) ==
	       2 * PL_BPF_LANES * sizeof(struct pl_bpf_lane),
	       "lanes stand side by side, each in a cache line of its own");

#define PL_BPF_MAX_PATH 2

/* Where the facts stand in the tracepoint's object: a request or a bio. */
struct pl_bpf_object {
	uint32_t btf_id;	/* of the btf_trace_* typedef */
	uint32_t arg;		/* position of the object in the arguments */
	int bytes_arg;		/* position of nr_bytes, or -1: load off_bytes */
	uint32_t off_op, off_sector, off_bytes;
	uint32_t path[PL_BPF_MAX_PATH];	/* pointers to follow to the gendisk */
	unsigned npath;
	uint32_t off_major, off_minor;	/* in the gendisk */
};

/* One bitmap in the map's value. */
struct pl_bpf_marks {
	uint32_t off;		/* of the bitmap, bytes */
	uint32_t nwords;
	uint32_t shift;		/* of a granule, bytes */
	uint32_t lanes;		/* offset of its sums */
	/*
	 * Look before setting: cheaper where most bits are set already.  Not for
	 * done marks, where the atomic is also the barrier between the data
	 * and a reader that has just cleared the bit.
	 */
	bool look_first;
};

struct pl_bpf_target {
	int map_fd;
	uint32_t ones_off;	/* an area of all ones, see bpf_prog.c */
	uint32_t ones_words;
	uint32_t major, minor;
	uint64_t first, end;	/* tracked sectors of the disk */
	/*
	 * The sums must match what the driver accounts.  blk-mq counts
	 * write-zeroes as writes; zram counts neither them nor discards.
	 */
	bool zeroes_with_discards;
};

#define PL_BPF_MAX_INSN 128

struct pl_bpf_code {
	struct bpf_insn insn[PL_BPF_MAX_INSN];
	unsigned n;
};

/* How many whole words one event of 4 GiB can need at this granule. */
uint32_t pl_bpf_ones_words(uint32_t shift);
int pl_bpf_assemble(struct pl_bpf_code *code, const struct pl_bpf_target *t,
		    const struct pl_bpf_object *o,
		    const struct pl_bpf_marks *m) PL_CHECKED PL_NONNULL;
extern const char pl_bpf_licence[];

/* -------------------------------------------------------- bpf_layout.c */

enum pl_bpf_event { PL_EV_RQ_COMPLETE, PL_EV_BIO_COMPLETE, PL_EV_BIO_QUEUE };

/* Fill `o` for one tracepoint of the running kernel from its BTF. */
int pl_bpf_object_find(const struct pl_btf *b, enum pl_bpf_event ev,
		       struct pl_bpf_object *o, char *why, size_t why_len)
	PL_CHECKED PL_NONNULL_AT(1, 3) PL_WRITES(4, 5);

/* ------------------------------------- bpf_tracker.c and bpf_marks.c */

struct pl_bpf_bits {
	struct pl_bpf_marks in_map;
	uint64_t *word;		/* in the shared memory */
	uint64_t seen;		/* "everything" declarations already taken */
};

struct pl_bpf {
	struct pl_bpf_cfg cfg;
	struct pl_bpf_bits done, queued;
	uint32_t ones_off, ones_words;
	size_t len;		/* of the map's value */
	struct pl_bpf_page *page;	/* the value, shared with the kernel */
	int map_fd, link_fd[2];
};

#endif /* PL_BPF_INTERNAL_H */

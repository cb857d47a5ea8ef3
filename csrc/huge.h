/* SPDX-License-Identifier: Apache-2.0 */
/*
 * huge.h - huge pages for a new file on tmpfs.  Shared by the two pumps.
 *
 * A page of tmpfs costs more to allocate, charge and index than to fill, and
 * write(2) does it under the inode's lock.  One huge page takes the place of
 * 512, and needs neither mount options nor settings: MADV_COLLAPSE (Linux 6.1)
 * makes one where the file has a hole.  It only ever helps: whatever stands
 * in the way, pages come one by one as always, and errors from write(2).
 */
#ifndef PL_HUGE_H
#define PL_HUGE_H

#include <stdbool.h>
#include <stdint.h>

#include "attr.h"

#ifndef PL_HUGE_SHIFT	/* tests take smaller ones */
#define PL_HUGE_SHIFT 21u
#endif
#define PL_HUGE (1u << PL_HUGE_SHIFT)
/* Punching takes a transaction, or the splitting of a huge page; below this,
   zeroes are cheaper. */
#define MIN_PUNCH 65536u

struct pl_huge {
	int fd;			/* borrowed */
	uint8_t *reserved;	/* address space; NULL: not for this file */
	uint8_t *at;		/* the huge pages' places in it */
	unsigned places;
	uint64_t skip;		/* so many chances to pass by yet */
	uint64_t backoff;	/* and so many after the next disappointment */
};

/* Never fails; does nothing unless `fd` is a file on tmpfs and readable.  So
   many pages can be mapped at a time. */
void pl_huge_init(struct pl_huge *h, int fd, unsigned places) PL_NONNULL;
void pl_huge_fini(struct pl_huge *h) PL_NONNULL;
bool pl_huge_usable(const struct pl_huge *h) PL_NONNULL;
/*
 * The file ends at or past `end`, or is made to.  That cuts off what another
 * thread writes past `end` meanwhile: with such threads, ask for the whole file
 * before they start.
 */
bool pl_huge_reach(const struct pl_huge *h, uint64_t end) PL_CHECKED PL_NONNULL;
/*
 * Make the hole [pos, pos + PL_HUGE) of the file one huge page of zeroes; pos
 * is a multiple of PL_HUGE, and the file reaches to its end.  What others write
 * there at the same time stays.  Returns where it is mapped, until the next call
 * for this place or pl_huge_unmap, or NULL when there is none; then at most the
 * first page was allocated.
 */
uint8_t *pl_huge_make(struct pl_huge *h, uint64_t pos, unsigned place)
	PL_CHECKED PL_NONNULL;
void pl_huge_unmap(struct pl_huge *h, unsigned place) PL_NONNULL;
/* The page was made in vain, or has turned out to be of holes: make fewer. */
void pl_huge_regret(struct pl_huge *h) PL_NONNULL;
/* [start, end) of the file becomes a hole again. */
void pl_huge_punch(const struct pl_huge *h, uint64_t start, uint64_t end) PL_NONNULL;

#endif

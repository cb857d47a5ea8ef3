/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Huge pages for a local copy to tmpfs (huge.h): made one page ahead of the
 * writers, so that none of them waits for another's, and only where the source
 * has data for the whole of one.  What was data but zero is a hole again when
 * the pass has ended.
 */
#include <string.h>

#include "pump_internal.h"

/* No writer is further behind the first one. */
#define BEHIND (1u << 20)

/* Is [start, end), whole words of the bitmap, known to be all data / zero? */
static bool known_all(const struct pl_known *k, uint64_t start, uint64_t end,
		      bool data)
{
	for (uint64_t w = start / PL_BLOCK / 64; w < end / PL_BLOCK / 64; w++)
		if (__atomic_load_n(&k->nonzero.word[w], __ATOMIC_RELAXED) !=
		    (data ? ~0ull : 0))
			return false;
	return true;
}

/* Does one extent of the pass cover it all? */
static bool covered(const struct pl_pump *p, uint64_t start, uint64_t end)
{
	size_t low = 0, high = p->n;

	while (low < high) {
		size_t mid = low + (high - low) / 2;

		if (p->ext[mid].end > start)
			high = mid;
		else
			low = mid + 1;
	}
	return low < p->n && p->ext[low].start <= start && p->ext[low].end >= end;
}

void pl_huge_ahead(struct pl_pump *p, uint64_t pos, uint64_t end)
{
	uint64_t begun = (pos + PL_HUGE - 1) / PL_HUGE * PL_HUGE;
	uint64_t next = begun + PL_HUGE;

	if (!pl_huge_usable(&p->huge) || begun >= end ||
	    begun < PL_HUGE + BEHIND || !covered(p, next, next + PL_HUGE) ||
	    !known_all(p->cfg.known, begun - BEHIND - PL_HUGE, begun - BEHIND,
		       true) ||
	    !known_all(p->cfg.known, next, next + PL_HUGE, false))
		return;
	if (pthread_mutex_trylock(&p->huge_lock))
		return;
	if (pl_huge_make(&p->huge, next)) {
		pl_bitmap_set(&p->huge_made, next, next + PL_HUGE);
		STAT_ADD(p, huge_bytes, PL_HUGE);
	}
	pthread_mutex_unlock(&p->huge_lock);
}

static void settle_page(struct pl_pump *p, uint64_t page)
{
	uint64_t end = page + PL_HUGE, hole = page, next;
	struct pl_extent data;

	while (hole < end) {
		next = end;
		if (pl_bitmap_next(&p->cfg.known->nonzero, hole, &data) &&
		    data.start < end)
			next = data.start;
		if (next - hole >= MIN_PUNCH)
			pl_huge_punch(&p->huge, hole, next);
		hole = next < end ? data.end : end;
	}
}

void pl_huge_settle(struct pl_pump *p)
{
	struct pl_extent made;

	if (!pl_huge_usable(&p->huge))
		return;
	for (uint64_t at = 0; pl_bitmap_next(&p->huge_made, at, &made);
	     at = made.end)
		for (uint64_t page = made.start; page < made.end; page += PL_HUGE)
			if (!known_all(p->cfg.known, page, page + PL_HUGE, true))
				settle_page(p, page);
	pl_bitmap_zero(&p->huge_made);
	pl_huge_unmap(&p->huge);
}

int pl_pump_huge_init(struct pl_pump *p)
{
	int err;

	if (p->cfg.sink != PL_SINK_FILE || !p->cfg.known)
		return 0;
	pl_huge_init(&p->huge, p->cfg.out_fd);
	/* All of it before there are writers. */
	if (pl_huge_usable(&p->huge) && !pl_huge_reach(&p->huge, p->cfg.size))
		pl_huge_fini(&p->huge);
	if (!pl_huge_usable(&p->huge))
		return 0;
	err = pl_bitmap_init(&p->huge_made, p->cfg.size, PL_HUGE_SHIFT);
	if (err)
		pl_huge_fini(&p->huge);
	return err;
}

void pl_pump_huge_fini(struct pl_pump *p)
{
	pl_huge_fini(&p->huge);
	pl_bitmap_fini(&p->huge_made);
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Huge pages for a local copy to tmpfs (huge.h): made one page ahead of the
 * writers, so that none of them waits for another's, and only where the source
 * has data for the whole of one.  What lies in one is read straight into it.
 * What was data but zero is a hole again when the pass has ended.
 */
#include <string.h>

#include "pump_internal.h"

/* No writer is further behind the first one. */
#define BEHIND (1u << 20)
#define NO_PAGE UINT64_MAX
/* What one word of the bitmap stands for. */
#define WORD (64u * PL_BLOCK)
_Static_assert(PL_HUGE % WORD == 0 && BEHIND % WORD == 0,
	       "known_all looks at whole words");

/* Is [start, end), whole words of the bitmap, known to be all data / zero? */
static bool known_all(const struct pl_known *k, uint64_t start, uint64_t end,
		      bool data)
{
	for (uint64_t w = start / WORD; w < end / WORD; w++)
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

static struct pump_place *place_of(struct pl_pump *p, uint64_t pos)
{
	return &p->place[pos / PL_HUGE % PUMP_PLACES];
}

/* Make the page at `pos`, if no other one is being made and its place is free. */
static void make(struct pl_pump *p, uint64_t pos)
{
	struct pump_place *place = place_of(p, pos);
	bool mine, made;

	pthread_mutex_lock(&p->huge_lock);
	mine = !p->making && !place->users;
	if (mine) {
		p->making = true;
		place->page = NO_PAGE;
	}
	pthread_mutex_unlock(&p->huge_lock);
	if (!mine)
		return;
	made = pl_huge_make(&p->huge, pos, (unsigned)(place - p->place));
	pthread_mutex_lock(&p->huge_lock);
	p->making = false;
	if (made) {
		place->page = pos / PL_HUGE;
		pl_bitmap_set(&p->huge_made, pos, pos + PL_HUGE);
	}
	pthread_mutex_unlock(&p->huge_lock);
	if (made)
		STAT_ADD(p, huge_bytes, PL_HUGE);
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
	make(p, next);
}

void pl_slot_place(struct pl_pump *p, struct slot *s)
{
	const struct frag *f = &s->frag[0];
	struct pump_place *place = place_of(p, f->pos);

	s->data = s->buf;
	s->place = NULL;
	/* O_DIRECT would pin the page, and read more than what was asked for. */
	if (!pl_huge_usable(&p->huge) || s->nfrags != 1 || p->cfg.align != 1 ||
	    f->pos / PL_HUGE != (f->pos + f->len - 1) / PL_HUGE)
		return;
	pthread_mutex_lock(&p->huge_lock);
	if (place->page == f->pos / PL_HUGE) {
		place->users++;
		s->place = place;
		s->data = p->huge.at + (size_t)(place - p->place) * PL_HUGE +
			  f->pos % PL_HUGE;
	}
	pthread_mutex_unlock(&p->huge_lock);
}

void pl_slot_unplace(struct pl_pump *p, struct slot *s)
{
	if (!s->place)
		return;
	pthread_mutex_lock(&p->huge_lock);
	s->place->users--;
	pthread_mutex_unlock(&p->huge_lock);
	s->place = NULL;
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
	for (unsigned i = 0; i < PUMP_PLACES; i++) {
		p->place[i].page = NO_PAGE;
		pl_huge_unmap(&p->huge, i);
	}
}

int pl_pump_huge_init(struct pl_pump *p)
{
	int err;

	for (unsigned i = 0; i < PUMP_PLACES; i++)
		p->place[i].page = NO_PAGE;
	if (p->sink->in_order || !p->cfg.known || p->cfg.prior)
		return 0;
	pl_huge_init(&p->huge, p->cfg.out_fd, PUMP_PLACES);
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

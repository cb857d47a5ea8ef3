/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The pump's front: extents in, slots of fragments to read out.
 *
 * Invariant: the hook (which clears dirty marks) runs under the lock, in
 * ascending order, before the range is read (pump_read.c).  Clear, then read.
 */
#include <assert.h>
#include <errno.h>

#include "pump_internal.h"

static uint64_t widen(const struct pl_pump *p)
{
	/* A hash covers a chunk: those of the first pass are to be known too, and
	   what is data and what is a hole must part at the same places. */
	unsigned whole = PL_PASS_CHANGED | PL_PASS_HOLES | PL_PASS_LAST;

	if (p->cfg.known && (p->flags & whole))
		return 1ull << p->cfg.known->shift;
	return PL_BLOCK;
}

/* The next piece of at most `room` bytes; false when the extents are used up. */
static bool next_piece(struct pl_pump *p, uint32_t room, struct pl_extent *out)
{
	uint64_t unit = widen(p);

	for (; p->next < p->n; p->next++, p->pos = 0) {
		uint64_t start = p->ext[p->next].start, end = p->ext[p->next].end;

		if (p->flags & PL_PASS_HOLES) {
			/* Whole blocks, but none that has data in it: the pass
			   over the data, widened, has sent those. */
			start += (unit - start % unit) % unit;
			if (end != p->cfg.size)
				end -= end % unit;
			if (start > end)
				start = end;
		} else if (p->cfg.known || p->cfg.proof) {
			/* Whole blocks, so that `known` can judge and `proof` can
			   hash them. */
			start -= start % unit;
			end += (unit - end % unit) % unit;
			if (end > p->cfg.size)
				end = p->cfg.size;
			if (start < p->floor)
				start = p->floor;
		}
		if (p->pos > start)
			start = p->pos;
		if (start >= end)
			continue;
		if (end - start > p->cfg.cluster)
			end = start + p->cfg.cluster;
		if (end - start > room)
			return false;
		*out = (struct pl_extent){ start, end };
		return true;
	}
	return false;
}

/* NULL: none is free.  Lanes give them back in any order. */
static struct slot *free_slot(struct pl_pump *p)
{
	struct slot *s = &p->slot[p->claimed % p->cfg.slots];

	for (unsigned i = 0; p->lanes.n && s->busy && i < p->cfg.slots; i++)
		s = &p->slot[i];
	return s->busy ? NULL : s;
}

struct slot *pl_slot_claim(struct pl_pump *p)
{
	uint32_t align = p->cfg.align, used = 0;
	struct pl_extent piece;
	struct slot *s;

	if (p->err)
		return NULL;
	if (__atomic_load_n(&p->cancelled, __ATOMIC_RELAXED)) {
		/* Else the caller would take no slot for no extents left. */
		pl_pump_fail(p, -ECANCELED, &p->fault);
		return NULL;
	}
	s = free_slot(p);
	if (!s)
		return NULL;
	s->nfrags = 0;
	s->bytes = 0;
	while (s->nfrags < p->frags_per_slot &&
	       next_piece(p, s->nfrags ? p->cfg.cluster - used : p->cfg.cluster,
			  &piece)) {
		uint32_t lead = (uint32_t)((p->cfg.src_base + piece.start) % align);
		uint32_t len = (uint32_t)(piece.end - piece.start);
		uint32_t need = (lead + len + align - 1) / align * align;

		if (used + need > p->buf_size)
			break;
		/* The hook sees each byte once, in ascending order. */
		assert(piece.start >= p->floor && piece.end <= p->cfg.size);
		if ((p->flags & PL_PASS_HOOK) && p->cfg.hook) {
			int err = p->cfg.hook(p->cfg.hook_ctx, piece.start,
					      piece.end);
			if (err) {
				struct pl_fault fault = {
					.stage = PL_STAGE_HOOK, .pos = piece.start };

				pl_pump_fail(p, err, &fault);
				return NULL;
			}
		}
		s->frag[s->nfrags++] = (struct frag){
			.pos = piece.start, .len = len, .off = used + lead };
		s->bytes += len;
		/* Fragments start at PL_BLOCK in memory: O_DIRECT wants it. */
		used += (need + PL_BLOCK - 1) / PL_BLOCK * PL_BLOCK;
		p->pos = p->floor = piece.end;
		if (used >= p->cfg.cluster)
			break;
	}
	if (!s->nfrags)
		return NULL;
	assert(p->claimed - p->emitted < p->cfg.slots);
	s->busy = true;
	s->ready = false;
	s->number = p->claimed++;
	p->processing++;
	return s;
}

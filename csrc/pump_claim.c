/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The pump's front: extents in, slots with classified data out.
 *
 * Invariant: the hook (which clears dirty marks) runs under the lock, in
 * ascending order, before the range is read.  Clear, then read.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

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
		} else if (p->cfg.known) {
			/* Whole blocks, so that `known` can judge them. */
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

struct slot *pl_slot_claim(struct pl_pump *p)
{
	uint32_t align = p->cfg.align, used = 0;
	struct pl_extent piece;
	struct slot *s;

	if (p->err || __atomic_load_n(&p->cancelled, __ATOMIC_RELAXED))
		return NULL;
	s = &p->slot[p->claimed % p->cfg.slots];
	if (s->busy)
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
		if ((p->flags & PL_PASS_HOOK) && p->cfg.hook) {
			int err = p->cfg.hook(p->cfg.hook_ctx, piece.start,
					      piece.end);
			if (err) {
				p->err = err;
				p->fault.stage = PL_STAGE_HOOK;
				p->fault.pos = piece.start;
				return NULL;
			}
		}
		s->frag[s->nfrags++] = (struct frag){ piece.start, len, used + lead };
		s->bytes += len;
		/* Fragments start at PL_BLOCK in memory: O_DIRECT wants it. */
		used += (need + PL_BLOCK - 1) / PL_BLOCK * PL_BLOCK;
		p->pos = p->floor = piece.end;
		if (used >= p->cfg.cluster)
			break;
	}
	if (!s->nfrags)
		return NULL;
	s->busy = true;
	s->ready = false;
	p->claimed++;
	p->processing++;
	return s;
}

/* One read of [pos, pos + room) of src_fd, of which `want` bytes are wanted.  The
   tail is another read, and of what the disk has now, not of what was cached. */
static ssize_t read_part(const struct pl_pump *p, uint8_t *buf, uint32_t want,
			 uint32_t room, uint64_t pos)
{
	uint64_t tail = p->cfg.src_base + p->cfg.size - p->cfg.tail;
	off_t begin = (off_t)p->cfg.tail_pos;

	if (!p->cfg.tail)
		return pread(p->cfg.src_fd, buf, room, (off_t)pos);
	if (pos < tail)
		return pread(p->cfg.src_fd, buf,
			     room < tail - pos ? room : tail - pos, (off_t)pos);
	(void)posix_fadvise(p->cfg.tail_fd, begin, 0, POSIX_FADV_DONTNEED);
	return pread(p->cfg.tail_fd, buf, want, begin + (off_t)(pos - tail));
}

static int read_frag(struct pl_pump *p, struct slot *s, const struct frag *f)
{
	uint32_t align = p->cfg.align;
	uint64_t pos = p->cfg.src_base + f->pos;
	uint32_t lead = (uint32_t)(pos % align), got = 0;
	uint32_t want = lead + f->len;
	uint32_t ask = (want + align - 1) / align * align;
	uint8_t *buf = s->data + f->off - lead;

	pos -= lead;
	while (got < want) {
		ssize_t n = read_part(p, buf + got, want - got, ask - got,
				      pos + got);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		if (n == 0)
			return -ENODATA;
		got += (uint32_t)n;
	}
	STAT_ADD(p, read_bytes, f->len);
	return 0;
}

static int fill(struct pl_pump *p, struct slot *s, struct pl_fault *fault)
{
	for (unsigned i = 0; i < s->nfrags; i++) {
		const struct frag *f = &s->frag[i];
		int err = 0;

		if (!(p->flags & PL_PASS_HOLES))
			err = read_frag(p, s, f);
		else if (!pl_hole_is_known(p, f))
			memset(s->data + f->off, 0, f->len);
		if (err) {
			*fault = (struct pl_fault){ .stage = PL_STAGE_READ,
						    .pos = f->pos };
			return err;
		}
	}
	pl_slot_classify(p, s);
	return p->cfg.sink == PL_SINK_FILE ? pl_slot_emit(p, s, fault) : 0;
}

int pl_slot_fill(struct pl_pump *p, struct slot *s, struct pl_fault *fault)
{
	int err;

	pl_slot_place(p, s);
	err = fill(p, s, fault);
	pl_slot_unplace(p, s);
	return err;
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The receiver's end: parts into the file, zeroes as holes, and writeback that
 * keeps pace, so that an fdatasync finds little to do at any moment.
 *
 * What is a hole depends on what was written before, and to make one waits for all
 * direct writes; so that is done in the order of the slots, and only the writing is
 * done side by side.
 */
#define _GNU_SOURCE
#include <assert.h>
#include <errno.h>
#include <fcntl.h>

#include "hash.h"
#include "io.h"
#include "recv_internal.h"

/* What was synced needs no writeback. */
static void forget_synced(struct pl_recv *r)
{
	if (!__atomic_exchange_n(&r->was_synced, false, __ATOMIC_RELAXED))
		return;
	r->flushing_start = r->flushing_end = r->flushing = 0;
	r->flush_start = r->flush_end = 0;
	r->unflushed = 0;
}

/*
 * Start writing back what was written since the last time, and wait for the
 * range before that: at most two half windows are dirty.  An error of
 * writeback is not taken from here but from fdatasync, which reports it again.
 */
static void roll(struct pl_recv *r)
{
	if (!r->cfg.window || r->unflushed < r->cfg.window / 2)
		return;
	sync_file_range(r->cfg.out_fd, (off_t)r->flush_start,
			(off_t)(r->flush_end - r->flush_start),
			SYNC_FILE_RANGE_WRITE);
	if (r->flushing_end > r->flushing_start)
		sync_file_range(r->cfg.out_fd, (off_t)r->flushing_start,
				(off_t)(r->flushing_end - r->flushing_start),
				SYNC_FILE_RANGE_WAIT_BEFORE |
				SYNC_FILE_RANGE_WRITE |
				SYNC_FILE_RANGE_WAIT_AFTER);
	r->flushing_start = r->flush_start;
	r->flushing_end = r->flush_end;
	r->flushing = r->unflushed;
	r->flush_start = r->flush_end = 0;
	r->unflushed = 0;
}

void pl_recv_synced(struct pl_recv *r)
{
	/* A lane's writer may be at work: it takes this in itself. */
	__atomic_store_n(&r->was_synced, true, __ATOMIC_RELAXED);
	pl_recv_lanes_synced(r);
}

uint64_t pl_recv_dirty(struct pl_recv *r)
{
	forget_synced(r);
	return r->unflushed + r->flushing;
}

int pl_recv_write_buffered(void *ctx, const uint8_t *data, uint32_t len, uint64_t pos)
{
	struct pl_recv *r = ctx;
	int err = pl_pwrite_full(r->cfg.out_fd, data, len, pos);

	if (err)
		return err;
	forget_synced(r);
	if (r->unflushed == 0 || pos < r->flush_start)
		r->flush_start = pos;
	if (pos + len > r->flush_end)
		r->flush_end = pos + len;
	r->unflushed += len;
	roll(r);
	return 0;
}

/* Bytes of the slot that must be written. */
static void add_run(struct pl_recv *r, struct recv_slot *s, uint32_t off, uint32_t len,
		    uint64_t pos)
{
	struct recv_part *last = s->nruns ? &s->run[s->nruns - 1] : NULL;

	pl_ahead_data(&r->ahead, pos, len, r->written_end);
	if (pos + len > r->written_end)
		r->written_end = pos + len;
	if (last && last->pos + last->len == pos && last->off + last->len == off)
		last->len += len;
	else
		s->run[s->nruns++] = (struct recv_part){ pos, len, off };
}

/* An earlier part of the slot will be written there, after the hole was made. */
static bool is_planned(const struct recv_slot *s, uint64_t pos, uint64_t end)
{
	for (unsigned i = 0; i < s->nruns; i++)
		if (s->run[i].pos < end && pos < s->run[i].pos + s->run[i].len)
			return true;
	return false;
}

/* Zeroes [pos, pos + len), which are whole blocks. */
static void plan_hole(struct pl_recv *r, struct recv_slot *s, uint32_t off,
		      uint32_t len, uint64_t pos)
{
	uint64_t data_end = __atomic_load_n(&r->placed_end, __ATOMIC_RELAXED);

	assert(pos % PL_BLOCK == 0 && len % PL_BLOCK == 0);
	if (data_end < r->written_end)
		data_end = r->written_end;
	if (pos + len > r->ahead.run_end && pos < r->ahead.end)
		pl_ahead_close(&r->ahead);
	/* Past all that was written the new file has a hole anyway. */
	if (pos < data_end) {
		uint64_t end = pos + len;
		uint64_t cut = end < data_end ? end : data_end;

		if (len < MIN_PUNCH || is_planned(s, pos, cut) ||
		    fallocate(r->cfg.out_fd,
			      FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
			      (off_t)pos, (off_t)(cut - pos)) < 0) {
			add_run(r, s, off, len, pos);
			return;
		}
	}
	RECV_ADD(r, hole_bytes, len);
}

/* One part: alternating runs of zero blocks and other bytes. */
static void plan_part(struct pl_recv *r, struct recv_slot *s,
		      const struct recv_part *part)
{
	const uint8_t *data = s->buf + part->off;
	uint32_t at = 0;

	/* recv_head.c has refused all others. */
	assert(part->len <= r->cfg.max_frame &&
	       (!r->cfg.largest || part->pos + part->len <= r->cfg.largest));
	if (r->cfg.proof)
		pl_proof_note(r->cfg.proof, data, part->len, part->pos);
	if (!r->cfg.sparse) {
		add_run(r, s, part->off, part->len, part->pos);
		return;
	}
	while (at < part->len) {
		uint32_t end = at, step;
		bool hole = false;

		for (; end < part->len; end += step) {
			uint32_t in_block = (uint32_t)((part->pos + end) % PL_BLOCK);
			bool zero;

			step = PL_BLOCK - in_block;
			if (step > part->len - end)
				step = part->len - end;
			/* Only a whole block can become a hole. */
			zero = step == PL_BLOCK && pl_is_zero(data + end, step);
			if (end == at)
				hole = zero;
			else if (zero != hole)
				break;
		}
		if (hole)
			plan_hole(r, s, part->off + at, end - at, part->pos + at);
		else
			add_run(r, s, part->off + at, end - at, part->pos + at);
		at = end;
	}
}

int pl_recv_plan(struct pl_recv *r, struct recv_slot *s, uint64_t *pos)
{
	s->nruns = 0;
	/* Not before there is something to write: until then the target may be read, for
	   the digests of what it has kept. */
	pl_direct_begin(&r->direct);
	for (unsigned i = 0; i < s->nparts; i++) {
		int err = pl_recv_fill(r, s->part[i].pos, s->part[i].len);

		if (err) {
			*pos = s->part[i].pos;
			return err;
		}
		plan_part(r, s, &s->part[i]);
	}
	return 0;
}

int pl_recv_write(struct pl_recv *r, const struct recv_slot *s, uint64_t *pos)
{
	for (unsigned i = 0; i < s->nruns; i++) {
		const struct recv_part *run = &s->run[i];
		int err = pl_direct_write(&r->direct, s->buf + run->off, run->len,
					  run->pos, pl_recv_write_buffered, r);

		if (err) {
			*pos = run->pos;
			return err;
		}
		RECV_ADD(r, written_bytes, run->len);
	}
	return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The receiver's end: parts into the file, zeroes as holes, and writeback that
 * keeps pace, so that an fdatasync finds little to do at any moment.
 */
#define _GNU_SOURCE
#include <assert.h>
#include <errno.h>
#include <fcntl.h>

#include "hash.h"
#include "io.h"
#include "recv_internal.h"

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
	r->flushing_start = r->flushing_end = r->flushing = 0;
	r->flush_start = r->flush_end = 0;
	r->unflushed = 0;
}

static int write_data(struct pl_recv *r, const uint8_t *data, uint32_t len,
		      uint64_t pos)
{
	int err = pl_pwrite_full(r->cfg.out_fd, data, len, pos);

	if (err)
		return err;
	RECV_ADD(r, written_bytes, len);
	if (r->unflushed == 0 || pos < r->flush_start)
		r->flush_start = pos;
	if (pos + len > r->flush_end)
		r->flush_end = pos + len;
	r->unflushed += len;
	if (pos + len > r->written_end)
		r->written_end = pos + len;
	roll(r);
	return 0;
}

/* Zeroes [pos, pos + len), which are whole blocks. */
static int write_hole(struct pl_recv *r, const uint8_t *zeroes, uint32_t len,
		      uint64_t pos)
{
	uint64_t data_end = __atomic_load_n(&r->placed_end, __ATOMIC_RELAXED);

	assert(pos % PL_BLOCK == 0 && len % PL_BLOCK == 0);
	if (data_end < r->written_end)
		data_end = r->written_end;
	/* Past all that was written the new file has a hole anyway. */
	if (pos < data_end) {
		uint64_t end = pos + len;
		uint64_t cut = end < data_end ? end : data_end;

		if (len < MIN_PUNCH)
			return write_data(r, zeroes, len, pos);

		if (fallocate(r->cfg.out_fd,
			      FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
			      (off_t)pos, (off_t)(cut - pos)) < 0)
			return write_data(r, zeroes, len, pos);
	}
	RECV_ADD(r, hole_bytes, len);
	return 0;
}

/* One part: alternating runs of zero blocks and other bytes. */
static int write_part(struct pl_recv *r, const uint8_t *data,
		      const struct recv_part *part, uint64_t *fault_pos)
{
	uint32_t at = 0;
	int err = 0;

	/* recv_head.c has refused all others. */
	assert(part->len <= r->cfg.max_frame &&
	       (!r->cfg.largest || part->pos + part->len <= r->cfg.largest));
	if (r->cfg.proof)
		pl_proof_note(r->cfg.proof, data, part->len, part->pos);
	if (!r->cfg.sparse) {
		*fault_pos = part->pos;
		return write_data(r, data, part->len, part->pos);
	}
	while (at < part->len && !err) {
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
		*fault_pos = part->pos + at;
		err = hole ? write_hole(r, data + at, end - at, part->pos + at) :
			     write_data(r, data + at, end - at, part->pos + at);
		at = end;
	}
	return err;
}

int pl_recv_write_slot(struct pl_recv *r, struct recv_slot *s, uint64_t *pos)
{
	int err = 0;

	for (unsigned i = 0; i < s->nparts && !err; i++)
		err = write_part(r, s->buf + s->part[i].off, &s->part[i], pos);
	return err;
}

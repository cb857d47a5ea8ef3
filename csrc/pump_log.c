/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a lane carried, so that it can go again when the lane breaks off.  The last
 * frames are known exactly, all others by a bitmap of coarse granules: memory is
 * bounded, whatever was sent, and a lane that breaks off costs what was under way.
 */
#include <errno.h>
#include <stdlib.h>

#include "pump_lanes.h"

/* At most 512 KiB of bitmap for a lane; 64 KiB granules up to 256 GiB. */
#define MIN_SHIFT 16u
#define MAX_BITS (1ull << 22)

int pl_log_init(struct lane_log *log, uint64_t size)
{
	uint32_t shift = MIN_SHIFT;

	while (size >> shift > MAX_BITS)
		shift++;
	log->frame = calloc(PL_LANE_FRAMES, sizeof(*log->frame));
	if (!log->frame)
		return -ENOMEM;
	return pl_bitmap_init(&log->sent, size, shift);
}

void pl_log_fini(struct lane_log *log)
{
	pl_bitmap_fini(&log->sent);
	free(log->frame);
	log->frame = NULL;
}

void pl_log_add(struct lane_log *log, uint64_t pos, uint32_t len, uint64_t end)
{
	log->frame[log->n++ % PL_LANE_FRAMES] = (struct lane_frame){ pos, end, len };
	pl_bitmap_set(&log->sent, pos, pos + len);
}

void pl_log_forget(struct lane_log *log, uint64_t since)
{
	log->n = 0;
	log->since = since;
	pl_bitmap_zero(&log->sent);
}

void pl_log_lost(const struct lane_log *log, uint64_t received,
		 struct pl_bitmap *lost)
{
	uint64_t first = log->n > PL_LANE_FRAMES ? log->n - PL_LANE_FRAMES : 0;
	struct pl_extent run = { 0, 0 };

	/* The ring reaches back to what was received. */
	if (!first || log->frame[first % PL_LANE_FRAMES].end <= received) {
		for (uint64_t i = first; i < log->n; i++) {
			const struct lane_frame *f = &log->frame[i % PL_LANE_FRAMES];

			if (f->end > received)
				pl_bitmap_set(lost, f->pos, f->pos + f->len);
		}
		return;
	}
	while (pl_bitmap_next(&log->sent, run.end, &run))
		pl_bitmap_set(lost, run.start, run.end);
}

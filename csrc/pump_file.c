/* SPDX-License-Identifier: Apache-2.0 */
/* The sink that is a file: each run at the source's position, by the thread that
   has read it. */
#define _GNU_SOURCE
#include <fcntl.h>

#include "io.h"
#include "pump_internal.h"

static int emit(struct pl_pump *p, struct slot *s, struct pl_fault *fault)
{
	for (unsigned i = 0; i < s->nruns; i++) {
		struct frag *r = &s->run[i];
		int err = pl_rate_obey(p, r->len);

		pl_huge_ahead(p, r->pos, r->pos + r->len);
		if (!err && !s->place)
			err = pl_pwrite_full(p->cfg.out_fd, s->data + r->off,
					     r->len, r->pos);
		if (err) {
			fault->stage = PL_STAGE_WRITE;
			fault->pos = r->pos;
			return err;
		}
		/* Writeback starts at once, so that dirty pages do not pile up
		   and the last fdatasync is short; its errors are kept for that. */
		sync_file_range(p->cfg.out_fd, (off_t)r->pos, (off_t)r->len,
				SYNC_FILE_RANGE_WRITE);
		STAT_ADD(p, data_bytes, r->len);
		STAT_ADD(p, wire_bytes, r->len);
	}
	STAT_ADD(p, frames, s->nruns);
	return 0;
}

const struct pl_sink_ops pl_sink_file = {
	.emit = emit,
};

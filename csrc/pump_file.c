/* SPDX-License-Identifier: Apache-2.0 */
/* The sink that is a file: each run at the source's position, by the thread that
   has read it. */
#define _GNU_SOURCE
#include <fcntl.h>

#include "io.h"
#include "pump_internal.h"

static int write_buffered(void *ctx, const uint8_t *data, uint32_t len, uint64_t pos)
{
	struct pl_pump *p = ctx;
	int err = pl_pwrite_full(p->cfg.out_fd, data, len, pos);

	/* Writeback starts at once, so that dirty pages do not pile up and the last
	   fdatasync is short; its errors are kept for that. */
	if (!err)
		sync_file_range(p->cfg.out_fd, (off_t)pos, (off_t)len,
				SYNC_FILE_RANGE_WRITE);
	return err;
}

/* A hole of the source, on a target that may have anything there. */
static bool zeroed(struct pl_pump *p, const struct frag *r)
{
	if (!p->cfg.zero_holes || !(p->flags & PL_PASS_HOLES) || r->pos % PL_BLOCK ||
	    r->len % PL_BLOCK ||
	    fallocate(p->cfg.out_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
		      (off_t)r->pos, (off_t)r->len) < 0)
		return false;
	STAT_ADD(p, filled_bytes, r->len);
	return true;
}

/* Room is allocated in the order of the slots (ahead.h), and what they write side by
   side after that.  A slot whose turn has not come waits for one that is being read. */
static void make_room(struct pl_pump *p, const struct slot *s)
{
	bool failed;

	if (!p->cfg.ahead || !p->cfg.direct.block)
		return;
	pthread_mutex_lock(&p->lock);
	while (p->planned != s->number && !p->err)
		pthread_cond_wait(&p->turn, &p->lock);
	failed = p->err != 0;
	pthread_mutex_unlock(&p->lock);
	if (failed)
		return;
	for (unsigned i = 0; i < s->nruns; i++) {
		const struct frag *r = &s->run[i];

		pl_ahead_data(&p->ahead, r->pos, r->len, p->written_end);
		if (r->pos + r->len > p->written_end)
			p->written_end = r->pos + r->len;
	}
	pthread_mutex_lock(&p->lock);
	p->planned++;
	pthread_cond_broadcast(&p->turn);
	pthread_mutex_unlock(&p->lock);
}

static int emit(struct pl_pump *p, struct slot *s, struct pl_fault *fault)
{
	make_room(p, s);
	for (unsigned i = 0; i < s->nruns; i++) {
		struct frag *r = &s->run[i];
		int err;

		if (zeroed(p, r))
			continue;
		err = pl_rate_obey(p, r->len);
		pl_huge_ahead(p, r->pos, r->pos + r->len);
		if (!err && !s->place)
			err = pl_direct_write(&p->direct, s->data + r->off, r->len,
					      r->pos, write_buffered, p);
		if (err) {
			fault->stage = PL_STAGE_WRITE;
			fault->pos = r->pos;
			return err;
		}
		STAT_ADD(p, data_bytes, r->len);
		STAT_ADD(p, wire_bytes, r->len);
	}
	STAT_ADD(p, frames, s->nruns);
	return 0;
}

const struct pl_sink_ops pl_sink_file = {
	.emit = emit,
};

/* SPDX-License-Identifier: Apache-2.0 */
/* The sending pump's end: the runs of a slot as frames into a stream. */
#define _GNU_SOURCE
#include <assert.h>
#include <limits.h>

#include "pump_internal.h"

static int emit_spliced(struct pl_pump *p, struct slot *s, const struct frag *r,
			struct pl_fault *fault)
{
	struct iovec iov = { s->hdr, p->hdr_size };
	int err = pl_rate_obey(p, r->len);

	if (err)
		return pl_stream_fault(p, err, fault);
	err = p->sink->put_header(p, s->hdr, r->pos, NULL, r->len);
	if (!err)
		err = pl_stream_write(p, &iov, 1, fault);
	if (!err)
		err = pl_splice_run(p, s, r, fault);
	if (!err) {
		STAT_ADD(p, data_bytes, r->len);
		STAT_ADD(p, frames, 1);
	}
	return err;
}

int pl_emit_frames(struct pl_pump *p, struct slot *s, struct pl_fault *fault)
{
	struct iovec iov[2 * PL_BATCH];
	uint8_t *hdr = s->hdr;
	unsigned i = 0;
	int err = 0;

	_Static_assert(2 * PL_BATCH <= IOV_MAX, "one call takes a whole batch");
	while (i < s->nruns && !err) {
		unsigned n = 0, frames = 0;
		uint64_t bytes = 0;

		fault->pos = s->run[i].pos;
		if (pl_run_is_spliced(p, &s->run[i])) {
			err = emit_spliced(p, s, &s->run[i++], fault);
			continue;
		}
		/* Room for the two frames that one run may need. */
		for (; i < s->nruns && n + 4 <= 2 * PL_BATCH && !err &&
		       !pl_run_is_spliced(p, &s->run[i]); i++) {
			struct frag r = s->run[i];
			bool halves = r.len == p->sink->reserved_size;
			uint32_t step = halves ? r.len / 2 : r.len;

			assert(step && step != p->sink->reserved_size);
			for (uint32_t at = 0; at < r.len && !err; at += step) {
				uint8_t *data = s->data + r.off + at;

				err = p->sink->put_header(p, hdr, r.pos + at,
							  data, step);
				iov[n++] = (struct iovec){ hdr, p->hdr_size };
				iov[n++] = (struct iovec){ data, step };
				hdr += p->hdr_size;
				frames++;
			}
			bytes += r.len;
		}
		if (!err && p->sink->admit)
			err = p->sink->admit(p, frames, fault);
		if (!err)
			err = pl_stream_write(p, iov, n, fault);
		if (!err) {
			STAT_ADD(p, data_bytes, bytes);
			STAT_ADD(p, frames, frames);
		}
	}
	return err;
}

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
	int err = pl_stream_due(p, r->len);

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

/* One frame of the run r, at `at` of its bytes, into iov[2]. */
static int put_frame(struct pl_pump *p, struct iovec *iov, uint8_t *hdr,
		     const struct slot *s, const struct frag *r, uint32_t at,
		     uint32_t len)
{
	uint8_t *data = s->data + r->off + at;

	if (r->packed) {
		pl_d1_put_packed(hdr, r->packed, r->pos, r->len);
		iov[0] = (struct iovec){ hdr, PL_D1_HEADER + PL_PACKED_HEADER };
		iov[1] = (struct iovec){ data, r->packed };
		return 0;
	}
	iov[0] = (struct iovec){ hdr, p->hdr_size };
	iov[1] = (struct iovec){ data, len };
	return p->sink->put_header(p, hdr, r->pos + at, data, len);
}

int pl_emit_frames(struct pl_pump *p, struct slot *s, struct pl_fault *fault)
{
	struct iovec iov[2 * PL_BATCH];
	uint8_t *hdr = s->hdr;
	unsigned i = 0;
	int err = 0;

	_Static_assert(2 * PL_BATCH <= IOV_MAX, "one call takes a whole batch");
	while (i < s->nruns && !err) {
		unsigned n = 0, frames = 0, packed_frames = 0;
		uint64_t bytes = 0, packed_bytes = 0;

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
				err = put_frame(p, iov + n, hdr, s, &r, at, step);
				n += 2;
				hdr += p->hdr_room;
				frames++;
			}
			bytes += r.len;
			packed_bytes += r.packed ? r.len : 0;
			packed_frames += r.packed != 0;
		}
		if (!err && p->sink->admit)
			err = p->sink->admit(p, frames, fault);
		if (!err)
			err = pl_stream_write(p, iov, n, fault);
		if (!err) {
			STAT_ADD(p, data_bytes, bytes);
			STAT_ADD(p, frames, frames);
			STAT_ADD(p, packed_bytes, packed_bytes);
			STAT_ADD(p, packed_frames, packed_frames);
		}
	}
	return err;
}

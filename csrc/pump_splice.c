/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Payload straight from the source's page cache into a pipe: no copy, and no
 * page to allocate for it.  Not the bytes go into the pipe but the pages, so
 * the peer gets what they hold when it reads them; hence PL_PASS_LIVE.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>

#include "pump_internal.h"

/* Below this the system calls cost more than the copy. */
#define MIN_SPLICE 65536u

bool pl_can_splice(const struct pl_pump *p, int out_fd)
{
	const struct pl_pump_cfg *c = &p->cfg;
	struct stat src, out;

	return p->sink->splices && c->align == 1 && c->known &&
	       fstat(c->src_fd, &src) == 0 && S_ISREG(src.st_mode) &&
	       fstat(out_fd, &out) == 0 && S_ISFIFO(out.st_mode);
}

bool pl_run_is_spliced(const struct pl_pump *p, const struct frag *r)
{
	return p->live && !r->packed && r->len >= MIN_SPLICE;
}

int pl_splice_run(struct pl_pump *p, const struct slot *s, const struct frag *r,
		  struct pl_fault *fault)
{
	loff_t pos = (loff_t)(p->cfg.src_base + r->pos);
	size_t left = r->len;

	while (left) {
		ssize_t n = splice(p->cfg.src_fd, &pos, p->cfg.out_fd, NULL, left,
				   SPLICE_F_NONBLOCK | SPLICE_F_MORE);
		int err = n < 0 ? -errno : 0;

		if (n > 0) {
			pl_stream_moved(p, (size_t)n);
			left -= (size_t)n;
			continue;
		}
		if (err == -EAGAIN)
			err = pl_stream_wait(p);
		else if (err == -EINVAL) {
			/* This file system cannot; the bytes are here too. */
			struct iovec iov = { s->data + r->off + (r->len - left),
					     left };

			return pl_stream_write(p, &iov, 1, fault);
		} else if (n == 0) {
			*fault = (struct pl_fault){ .stage = PL_STAGE_READ,
						    .pos = r->pos };
			return -ENODATA;
		}
		if (err && err != -EINTR)
			return pl_stream_fault(p, err, fault);
	}
	return 0;
}

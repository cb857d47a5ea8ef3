/* SPDX-License-Identifier: Apache-2.0 */
/* The pump's reads: the fragments of a claimed slot into memory, classified. */
#define _GNU_SOURCE
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "pump_internal.h"

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

	assert(s->busy && !s->ready && f->off >= lead);
	assert(s->place || f->off - lead + ask <= p->buf_size);
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

static int fill(struct pl_pump *p, struct slot *s, struct packer *packer,
		struct pl_fault *fault)
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
	if (packer)
		pl_slot_pack(p, s, packer);
	return p->sink->in_order ? 0 : p->sink->emit(p, s, fault);
}

int pl_slot_fill(struct pl_pump *p, struct slot *s, struct packer *packer,
		 struct pl_fault *fault)
{
	int err;

	pl_slot_place(p, s);
	err = fill(p, s, packer, fault);
	pl_slot_unplace(p, s);
	return err;
}

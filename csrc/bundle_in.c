/* SPDX-License-Identifier: Apache-2.0 */
/* What a bundle receives: see bundle.h. */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "bundle_internal.h"
#include "clock.h"
#include "wire.h"

static void news(struct pl_bundle *b)
{
	if (!b->ack_ns)
		b->ack_ns = pl_now_ns() + ACK_NS;
}

int pl_bundle_give(struct pl_bundle *b)
{
	uint64_t at = b->given % PL_BUNDLE_WINDOW, most = b->whole - b->given;
	ssize_t n;

	most = most < PL_BUNDLE_WINDOW - at ? most : PL_BUNDLE_WINDOW - at;
	n = write(b->fd, b->in + at, most);
	if (n < 0)
		return errno == EAGAIN || errno == EINTR ? 0 : errno == EPIPE ? 1 : -errno;
	b->given += (uint64_t)n;
	news(b);
	return 0;
}

/* The first run that ends at `pos` or later. */
static unsigned run_at(const struct pl_bundle *b, uint64_t pos)
{
	unsigned i = 0;

	while (i < b->runs && b->run[i].end < pos)
		i++;
	return i;
}

/* 1: all of [start, end) has come; 0: nothing of it; -EPROTO: a part, which no honest peer
   sends, as a segment that goes again is the same one. */
static int has(const struct pl_bundle *b, uint64_t start, uint64_t end)
{
	unsigned i;

	if (end <= b->whole)
		return 1;
	if (start < b->whole)
		return -EPROTO;
	for (i = run_at(b, start); i < b->runs && b->run[i].start < end; i++) {
		if (b->run[i].start <= start && end <= b->run[i].end)
			return 1;
		if (b->run[i].end > start)
			return -EPROTO;
	}
	return 0;
}

static int add_run(struct pl_bundle *b, uint64_t start, uint64_t end)
{
	unsigned i = run_at(b, start), last;

	for (last = i; last < b->runs && b->run[last].start <= end; last++) {
		start = b->run[last].start < start ? b->run[last].start : start;
		end = b->run[last].end > end ? b->run[last].end : end;
	}
	if (last == i && b->runs == GAPS)
		return -EPROTO;
	memmove(&b->run[i + 1], &b->run[last], (b->runs - last) * sizeof(b->run[0]));
	b->run[i] = (struct gap_run){ start, end };
	b->runs = b->runs - (last - i) + 1;
	return 0;
}

/* A whole segment. */
static int came(struct pl_bundle *b, uint64_t start, uint64_t end)
{
	int err = has(b, start, end);

	if (err)
		return err < 0 ? err : 0;
	if (start == b->whole) {
		b->whole = end;
		if (b->runs && b->run[0].start == end) {
			b->whole = b->run[0].end;
			memmove(&b->run[0], &b->run[1], --b->runs * sizeof(b->run[0]));
		}
	} else {
		err = add_run(b, start, end);
	}
	news(b);
	return err;
}

static int lost(struct pl_bundle *b, const struct lane *by, uint64_t number)
{
	for (unsigned i = 0; i < PL_BUNDLE_LANES; i++) {
		struct lane *l = &b->lane[i];

		if (pl_lane_lives(l) && l != by && l->number == number)
			pl_bundle_lane_ended(b, l, 0);
	}
	return 0;
}

/* A head has come. */
static int headed(struct pl_bundle *b, struct lane *l)
{
	uint32_t kind = pl_get32(l->in_head), length = pl_get32(l->in_head + 4);
	uint64_t value = pl_get64(l->in_head + 8);

	l->in_len = 0;
	switch (kind) {
	case BUNDLE_DATA:
		if (!length || length > PL_BUNDLE_SEG_MOST || value > UINT64_MAX / 2 ||
		    value + length > b->given + PL_BUNDLE_WINDOW)
			return -EPROTO;
		l->in_pos = value;
		l->in_len = length;
		return 0;
	case BUNDLE_ACK:
		return pl_bundle_acked(b, value, length);
	case BUNDLE_LOST:
		return length ? -EPROTO : lost(b, l, value);
	default:
		return -EPROTO;
	}
}

/*
 * Where the next bytes of the segment go.  What has come by another lane meanwhile may be
 * with the program already, and its place in the ring have other bytes: so this is asked
 * before each read.
 */
static int place(struct pl_bundle *b, struct lane *l, uint8_t **to, size_t *most)
{
	uint32_t got = l->in_got - PL_BUNDLE_HEAD;
	uint64_t at = (l->in_pos + got) % PL_BUNDLE_WINDOW;
	int known = has(b, l->in_pos, l->in_pos + l->in_len);

	if (known < 0)
		return known;
	*most = l->in_len - got;
	*to = b->waste;
	if (!known) {
		*to = b->in + at;
		if (*most > PL_BUNDLE_WINDOW - at)
			*most = PL_BUNDLE_WINDOW - at;
	}
	return 0;
}

static int advance(struct pl_bundle *b, struct lane *l, size_t n)
{
	int err = 0;

	l->in_got += (uint32_t)n;
	if (l->in_got == PL_BUNDLE_HEAD)
		err = headed(b, l);
	if (!err && l->in_got == PL_BUNDLE_HEAD + l->in_len) {
		if (l->in_len) {
			__atomic_fetch_add(&b->moved, l->in_len, __ATOMIC_RELAXED);
			err = came(b, l->in_pos, l->in_pos + l->in_len);
		}
		l->in_got = l->in_len = 0;
	}
	return err;
}

int pl_bundle_read(struct pl_bundle *b, struct lane *l)
{
	uint8_t *to = l->in_head + l->in_got;
	size_t most = PL_BUNDLE_HEAD - l->in_got;
	ssize_t n;
	int err;

	if (l->in_got >= PL_BUNDLE_HEAD) {
		err = place(b, l, &to, &most);
		if (err)
			return err;
	}
	n = read(l->rfd, to, most);
	if (n > 0)
		return advance(b, l, (size_t)n);
	if (!n || (errno != EAGAIN && errno != EINTR))
		pl_bundle_lane_ended(b, l, n ? errno : 0);
	return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/* What a bundle sends: see bundle.h. */
#define _GNU_SOURCE
#include <errno.h>
#include <unistd.h>

#include "bundle_internal.h"
#include "clock.h"
#include "io.h"
#include "wire.h"

#define TAKE_MOST (1u << 20)

static struct seg *seg_at(struct pl_bundle *b, unsigned i)
{
	return &b->seg[(b->seg_first + i) % SEGS];
}

int pl_bundle_take(struct pl_bundle *b)
{
	uint64_t room = PL_BUNDLE_WINDOW - (b->end - b->taken);
	uint64_t at = b->end % PL_BUNDLE_WINDOW, most = TAKE_MOST;
	ssize_t n;

	most = most < room ? most : room;
	most = most < PL_BUNDLE_WINDOW - at ? most : PL_BUNDLE_WINDOW - at;
	if (!most)
		return 0;
	n = read(b->fd, b->out + at, most);
	if (!n)
		return 1;
	if (n < 0)
		return errno == EAGAIN || errno == EINTR ? 0 : -errno;
	b->end += (uint64_t)n;
	return 0;
}

static bool ack_due(const struct pl_bundle *b)
{
	return b->ack_ns && (b->given - b->said_given >= ACK_BYTES || pl_now_ns() >= b->ack_ns);
}

bool pl_bundle_wants(const struct pl_bundle *b, const struct lane *l)
{
	return l->busy || l->ack || l->told < b->n_lost || b->again ||
	       (b->next < b->end && b->segs < SEGS) || ack_due(b);
}

static void begin(struct lane *l, uint32_t kind, uint32_t length, uint64_t value)
{
	pl_put32(l->head, kind);
	pl_put32(l->head + 4, length);
	pl_put64(l->head + 8, value);
	l->pos = value;
	l->len = kind == BUNDLE_DATA ? length : 0;
	l->done = 0;
	l->busy = true;
}

static void begin_seg(struct pl_bundle *b, struct lane *l, struct seg *s)
{
	s->lane = (uint32_t)(l - b->lane);
	s->sent_ns = pl_now_ns();
	begin(l, BUNDLE_DATA, s->len, s->pos);
	__atomic_fetch_add(&b->moved, s->len, __ATOMIC_RELAXED);
}

static void begin_again(struct pl_bundle *b, struct lane *l)
{
	for (unsigned i = 0; i < b->segs; i++)
		if (seg_at(b, i)->lane == NO_LANE) {
			b->again--;
			begin_seg(b, l, seg_at(b, i));
			return;
		}
}

static void begin_new(struct pl_bundle *b, struct lane *l)
{
	struct seg *s = seg_at(b, b->segs++);
	uint64_t left = b->end - b->next;

	*s = (struct seg){ .pos = b->next, .len = left < SEG_NEW ? (uint32_t)left : SEG_NEW };
	b->next += s->len;
	begin_seg(b, l, s);
}

/* The next frame of a lane; false: there is nothing to say. */
static bool choose(struct pl_bundle *b, struct lane *l)
{
	if (l->told < b->n_lost) {
		begin(l, BUNDLE_LOST, 0, b->lost[l->told++]);
	} else if (l->ack || ack_due(b)) {
		l->ack = false;
		b->said_given = b->given;
		b->said_whole = b->whole;
		b->ack_ns = 0;
		begin(l, BUNDLE_ACK, (uint32_t)(b->whole - b->given), b->given);
	} else if (b->again) {
		begin_again(b, l);
	} else if (b->next < b->end && b->segs < SEGS) {
		begin_new(b, l);
	}
	return l->busy;
}

/* A vector of what is left of the frame; the ring may be cut in two. */
static unsigned rest(struct pl_bundle *b, struct lane *l, struct iovec iov[3])
{
	unsigned n = 0;
	uint32_t done = l->done;

	if (done < PL_BUNDLE_HEAD) {
		iov[n++] = (struct iovec){ l->head + done, PL_BUNDLE_HEAD - done };
		done = PL_BUNDLE_HEAD;
	}
	for (uint32_t at = done - PL_BUNDLE_HEAD; at < l->len;) {
		uint64_t place = (l->pos + at) % PL_BUNDLE_WINDOW;
		uint64_t len = PL_BUNDLE_WINDOW - place;

		len = len < l->len - at ? len : l->len - at;
		iov[n++] = (struct iovec){ b->out + place, (size_t)len };
		at += (uint32_t)len;
	}
	return n;
}

void pl_bundle_write(struct pl_bundle *b, struct lane *l)
{
	struct iovec iov[3];
	ssize_t n;

	if (!l->busy && !choose(b, l))
		return;
	n = writev(l->wfd, iov, (int)rest(b, l, iov));
	if (n < 0) {
		if (errno != EAGAIN && errno != EINTR)
			pl_bundle_lane_ended(b, l, errno);
		return;
	}
	l->done += (uint32_t)n;
	if (l->done == PL_BUNDLE_HEAD + l->len)
		l->busy = false;
}

int pl_bundle_acked(struct pl_bundle *b, uint64_t taken, uint32_t more)
{
	uint64_t come = taken + more;

	if (more > PL_BUNDLE_WINDOW || taken > b->next || come > b->next)
		return -EPROTO;
	/* ACKs of several lanes overtake each other. */
	if (taken > b->taken)
		b->taken = taken;
	if (come > b->come)
		b->come = come;
	while (b->segs && seg_at(b, 0)->pos + seg_at(b, 0)->len <= b->come) {
		b->again -= seg_at(b, 0)->lane == NO_LANE;
		b->seg_first = (b->seg_first + 1) % SEGS;
		b->segs--;
	}
	return 0;
}

void pl_bundle_again(struct pl_bundle *b, const struct lane *l)
{
	uint32_t slot = (uint32_t)(l - b->lane);

	for (unsigned i = 0; i < b->segs; i++)
		if (seg_at(b, i)->lane == slot) {
			seg_at(b, i)->lane = NO_LANE;
			b->again++;
		}
}

/* What came last may not have reached the peer: each lane says it again now and then.  And a
   lane that holds up the oldest segment while others live has ended. */
void pl_bundle_look(struct pl_bundle *b, uint64_t now)
{
	unsigned lives = 0;

	for (unsigned i = 0; i < PL_BUNDLE_LANES; i++)
		if (pl_lane_lives(&b->lane[i])) {
			b->lane[i].ack = true;
			lives++;
		}
	if (lives > 1 && b->stall_ms && b->segs) {
		struct seg *s = seg_at(b, 0);

		if (s->lane != NO_LANE &&
		    now - s->sent_ns > b->stall_ms * (uint64_t)PL_NS_PER_MS)
			pl_bundle_lane_ended(b, &b->lane[s->lane], ETIMEDOUT);
	}
}

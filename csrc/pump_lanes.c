/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The sending pump over several streams.
 *
 * The thread of the pass serves all lanes: a slot that is ready goes to a lane that
 * has none, and each lane is given bytes until it takes no more.  So the fastest
 * lane gets the most, and a slow one keeps one slot only.
 *
 * Within a pass each block goes once, so lanes need no order.  Between two passes,
 * and before each control frame, there is a barrier.  A lane that fails is not named
 * in the next one.  What the peer did not get of it goes again after an answer that
 * came later (pl_pump_settle), when nothing of that lane can be written any more.
 */
#define _GNU_SOURCE
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "clock.h"
#include "io.h"
#include "pump_internal.h"

/* Bytes that others take while a lane takes nothing: the peer does read. */
#define OTHERS_TAKE (1u << 20)

#define LOST_SHIFT 12u
_Static_assert(1u << LOST_SHIFT == PL_BLOCK, "what was lost goes again in blocks");

static bool is_pending(const struct pump_lane *l)
{
	return !l->err && (l->slot || l->control_off < l->control_len);
}

static bool is_free(const struct pump_lane *l)
{
	return !l->err && !l->slot;
}

static bool any_lane(const struct pl_pump *p, bool (*is)(const struct pump_lane *l))
{
	for (unsigned i = 0; i < p->lanes.n; i++)
		if (is(p->lanes.lane[i]))
			return true;
	return false;
}

/* ---- the frames of a slot, one after the other */

struct frame {
	uint64_t pos;
	const uint8_t *data;
	uint32_t len;		/* of the source */
	uint32_t wire_len;	/* the same, unless it is compressed */
	uint32_t hdr_len;
	bool spliced, last;	/* last: of its run */
};

static struct frame frame_at(const struct pl_pump *p, const struct pump_lane *l,
			     unsigned run, uint32_t part)
{
	const struct frag *r = &l->slot->run[run];
	/* As in pl_emit_frames. */
	bool halves = r->len == p->sink->reserved_size;
	uint32_t len = halves ? r->len / 2 : r->len;

	return (struct frame){
		.pos = r->pos + part, .data = l->slot->data + r->off + part,
		.len = len, .last = part + len == r->len,
		.wire_len = r->packed ? r->packed : len,
		.hdr_len = p->hdr_size + (r->packed ? PL_PACKED_HEADER : 0),
		.spliced = l->splices && pl_run_is_spliced(p, r),
	};
}

/* The lane has taken so many bytes: move on. */
static void advance(const struct pl_pump *p, struct pump_lane *l, size_t n)
{
	size_t control = l->control_len - l->control_off;

	control = control < n ? control : n;
	l->control_off += (uint32_t)control;
	n -= control;
	while (n) {
		struct frame f = frame_at(p, l, l->run, l->part);
		size_t left = f.hdr_len + f.wire_len - l->off;

		if (n < left) {
			l->off += (uint32_t)n;
			return;
		}
		n -= left;
		l->off = 0;
		l->part = f.last ? 0 : l->part + f.len;
		l->run += f.last;
	}
}

/* Whole frames from here on, up to data that are spliced.  Headers are written into
   the slot: it is this lane's. */
static int gather(struct pl_pump *p, struct pump_lane *l, struct iovec *iov, unsigned *n)
{
	unsigned run = l->run, most = *n;
	uint8_t *hdr = l->slot ? l->slot->hdr : NULL;
	uint32_t part = l->part, off = l->off;

	*n = 0;
	if (l->control_off < l->control_len)
		iov[(*n)++] = (struct iovec){ l->control + l->control_off,
					      l->control_len - l->control_off };
	while (l->slot && run < l->slot->nruns && *n + 2 <= most) {
		struct frame f = frame_at(p, l, run, part);
		int err = 0;

		if (f.hdr_len == p->hdr_size)
			err = p->sink->put_header(p, hdr, f.pos, f.data, f.len);
		else
			pl_d1_put_packed(hdr, f.wire_len, f.pos, f.len);
		if (err)
			return err;
		if (off < f.hdr_len)
			iov[(*n)++] = (struct iovec){ hdr + off, f.hdr_len - off };
		if (f.spliced)
			break;
		off = off > f.hdr_len ? off - f.hdr_len : 0;
		iov[(*n)++] = (struct iovec){ (void *)(f.data + off), f.wire_len - off };
		off = 0;
		hdr += p->hdr_room;
		part = f.last ? 0 : part + f.len;
		run += f.last;
	}
	return 0;
}

/* ---- bytes into a lane */

static ssize_t write_some(int fd, struct iovec *iov, unsigned n)
{
	struct msghdr msg = { .msg_iov = iov, .msg_iovlen = n };
	ssize_t done = sendmsg(fd, &msg, MSG_DONTWAIT | MSG_NOSIGNAL);

	if (done < 0 && errno == ENOTSOCK)
		done = writev(fd, iov, (int)n);
	return done < 0 ? -errno : done;
}

/* Data of the frame at hand straight from the page cache. */
static ssize_t splice_some(struct pl_pump *p, struct pump_lane *l)
{
	struct frame f = frame_at(p, l, l->run, l->part);
	uint32_t gone = l->off - p->hdr_size;
	loff_t pos = (loff_t)(p->cfg.src_base + f.pos + gone);
	ssize_t n = splice(p->cfg.src_fd, &pos, l->fd, NULL, f.len - gone,
			   SPLICE_F_NONBLOCK | SPLICE_F_MORE);

	if (n < 0 && errno == EINVAL) {
		l->splices = false;	/* the bytes are in the slot, too */
		return 0;
	}
	if (n == 0)
		return -ENODATA;
	return n < 0 ? -errno : n;
}

static bool is_at_spliced_data(const struct pl_pump *p, const struct pump_lane *l)
{
	return l->control_off == l->control_len && l->off >= p->hdr_size &&
	       frame_at(p, l, l->run, l->part).spliced;
}

static void moved(struct pl_pump *p, struct pump_lane *l, size_t n)
{
	advance(p, l, n);
	pl_count(&l->taken, n);
	p->lanes.total += n;
	pl_patience_moved(&l->takes, n);
	if (!l->takes.moved)
		l->total = p->lanes.total;
	STAT_ADD(p, wire_bytes, n);
}

/* Write until the lane has nothing left, or takes no more: 0, or its failure.
   -ENODATA is the source's. */
static int push(struct pl_pump *p, struct pump_lane *l)
{
	struct iovec iov[PL_BATCH];

	l->blocked = false;
	while (is_pending(l)) {
		ssize_t n;

		if (l->slot && l->run == l->slot->nruns &&
		    l->control_off == l->control_len)
			return 0;	/* pl_lanes_turn takes the slot back */
		if (__atomic_load_n(&p->cancelled, __ATOMIC_RELAXED))
			return -ECANCELED;
		if (__atomic_load_n(&p->lanes.broken, __ATOMIC_RELAXED))
			return -ECONNABORTED;
		if (l->slot && is_at_spliced_data(p, l)) {
			n = splice_some(p, l);
		} else {
			unsigned vectors = PL_BATCH;
			int err = gather(p, l, iov, &vectors);

			if (err)
				return err;
			n = write_some(l->fd, iov, vectors);
		}
		if (n == -EAGAIN || n == -EWOULDBLOCK) {
			l->blocked = true;
			return 0;
		}
		if (n < 0 && n != -EINTR)
			return (int)n;
		if (n > 0)
			moved(p, l, (size_t)n);
	}
	l->takes = (struct pl_patience){ 0 };
	return 0;
}

/* A lane has failed.  Lane 0 is the copy itself, and so is a source that has ended. */
static int give_up(struct pl_pump *p, struct pump_lane *l, int err, struct pl_fault *fault)
{
	if (err == -ENODATA) {
		*fault = (struct pl_fault){ .stage = PL_STAGE_READ,
					    .pos = l->slot->run[l->run].pos };
		return err;
	}
	if (!l->number || err == -ECANCELED)
		return pl_stream_fault(p, err, fault);
	__atomic_store_n(&l->err, err, __ATOMIC_RELAXED);
	return 0;
}

static int push_all(struct pl_pump *p, struct pl_fault *fault)
{
	int err = 0;

	for (unsigned i = 0; i < p->lanes.n && !err; i++) {
		struct pump_lane *l = p->lanes.lane[i];
		int failed = l->err ? 0 : push(p, l);

		if (failed)
			err = give_up(p, l, failed, fault);
	}
	return err;
}

/* ---- waiting */

static uint32_t limit_of(const struct pl_pump *p, const struct pump_lane *l)
{
	return l->number ? p->cfg.lane_stall_ms : p->cfg.stall_ms;
}

/* It has waited for too long, and the peer reads the others. */
static bool has_stalled(const struct pl_pump *p, const struct pump_lane *l)
{
	uint64_t limit = limit_of(p, l);

	if (!l->blocked || !limit || l->takes.waited_ns < limit * PL_NS_PER_MS)
		return false;
	return !l->number || !p->lanes.lane[0]->blocked ||
	       p->lanes.total - l->total >= OTHERS_TAKE;
}

/* Milliseconds until a lane's time is over; -1: never. */
static int time_left(const struct pl_pump *p)
{
	uint64_t least = UINT64_MAX;

	for (unsigned i = 0; i < p->lanes.n; i++) {
		const struct pump_lane *l = p->lanes.lane[i];
		uint64_t limit = (uint64_t)limit_of(p, l) * PL_NS_PER_MS;

		if (!l->err && l->blocked && l->takes.waited_ns < limit &&
		    limit - l->takes.waited_ns < least)
			least = limit - l->takes.waited_ns;
	}
	if (least == UINT64_MAX)
		return -1;
	least = (least + PL_NS_PER_MS - 1) / PL_NS_PER_MS;
	return least > INT32_MAX ? INT32_MAX : (int)least;
}

/* Give up the lanes that have stalled.  Lane 0 ends the copy. */
static int judge(struct pl_pump *p, bool *any, struct pl_fault *fault)
{
	int err = 0;

	for (unsigned i = 0; i < p->lanes.n && !err; i++) {
		struct pump_lane *l = p->lanes.lane[i];

		if (!l->err && has_stalled(p, l)) {
			err = give_up(p, l, -ETIMEDOUT, fault);
			*any = true;
		}
	}
	return err;
}

/* Until a lane takes more, or has stalled, or somebody wakes us. */
static int wait(struct pl_pump *p, struct pl_fault *fault)
{
	struct pollfd pfd[PL_LANES + 3] = {
		{ .fd = p->cancel_fd, .events = POLLIN },
		{ .fd = p->lanes.wake_fd, .events = POLLIN },
	};
	struct pump_lanes *all = &p->lanes;
	uint64_t start = pl_now_ns(), woken;
	bool any = false;
	nfds_t n = 2;
	int err = judge(p, &any, fault);

	if (any)
		return err;
	for (unsigned i = 0; i < all->n; i++)
		if (!all->lane[i]->err && all->lane[i]->blocked)
			pfd[n++] = (struct pollfd){ .fd = all->lane[i]->fd,
						    .events = POLLOUT };
	/* POLLERR (reader gone) is left to write(2), which names it. */
	if (poll(pfd, n, time_left(p)) < 0 && errno != EINTR)
		return pl_stream_fault(p, -errno, fault);
	if (pfd[0].revents)
		return pl_stream_fault(p, -ECANCELED, fault);
	if (pfd[1].revents && read(all->wake_fd, &woken, sizeof(woken)) < 0 &&
	    errno != EAGAIN)
		return pl_stream_fault(p, -errno, fault);
	if (__atomic_load_n(&all->broken, __ATOMIC_RELAXED))
		return pl_stream_fault(p, -ECONNABORTED, fault);
	start = pl_now_ns() - start;
	if (!any_lane(p, is_free))
		p->waited_ns += start;	/* for the peer, and not for data */
	for (unsigned i = 0; i < all->n; i++)
		if (!all->lane[i]->err && all->lane[i]->blocked)
			all->lane[i]->takes.waited_ns += start;
	return 0;
}

void pl_lanes_wake(struct pl_pump *p)
{
	uint64_t one = 1;

	if (write(p->lanes.wake_fd, &one, sizeof(one)) < 0)
		return;		/* full counter: it is readable already */
}

/* ---- a pass */

/* The slot that was claimed first of those that are ready. */
static struct slot *next_ready(struct pl_pump *p)
{
	struct slot *first = NULL;

	for (unsigned i = 0; i < p->cfg.slots; i++) {
		struct slot *s = &p->slot[i];

		if (s->ready && (!first || s->number < first->number))
			first = s;
	}
	return first;
}

/* The lane will send this slot.  Returns its bytes of the stream. */
static uint64_t give(struct pl_pump *p, struct pump_lane *l, struct slot *s)
{
	uint64_t bytes = 0;

	assert(!l->slot && !l->err && s->busy);
	s->ready = false;
	l->slot = s;
	l->run = 0;
	l->part = l->off = 0;
	while (l->run < s->nruns) {
		struct frame f = frame_at(p, l, l->run, l->part);

		l->given += f.hdr_len + f.wire_len;
		bytes += f.hdr_len + f.wire_len;
		if (l->log.frame)
			pl_log_add(&l->log, f.pos, f.len, l->given);
		l->part = f.last ? 0 : l->part + f.len;
		l->run += f.last;
	}
	l->run = 0;
	l->part = 0;
	if (bytes)
		p->lanes.sent = true;
	return bytes;
}

/* Lock held.  Take back what lanes have sent, or never will. */
static bool take_back(struct pl_pump *p)
{
	bool any = false;

	for (unsigned i = 0; i < p->lanes.n; i++) {
		struct pump_lane *l = p->lanes.lane[i];
		struct slot *s = l->slot;

		if (!s || (!l->err && l->run < s->nruns))
			continue;
		/* A lane that has failed has it in its log. */
		for (unsigned run = 0; run < l->run; run++) {
			STAT_ADD(p, data_bytes, s->run[run].len);
			STAT_ADD(p, frames, s->run[run].len == p->sink->reserved_size ?
					    2 : 1);
			if (s->run[run].packed) {
				STAT_ADD(p, packed_bytes, s->run[run].len);
				STAT_ADD(p, packed_frames, 1);
			}
		}
		l->slot = NULL;
		pl_pack_emitted(p, s);
		pl_slot_finish(p, s);
		any = true;
	}
	return any;
}

/* Lock held.  Give each free lane a slot that is ready. */
static bool give_out(struct pl_pump *p, uint64_t *bytes)
{
	bool any = false;

	for (unsigned i = 0; i < p->lanes.n; i++) {
		struct pump_lane *l = p->lanes.lane[i];
		struct slot *s = is_free(l) ? next_ready(p) : NULL;

		if (s) {
			*bytes += give(p, l, s);
			any = true;
		}
	}
	return any;
}

bool pl_lanes_turn(struct pl_pump *p)
{
	struct pl_fault fault = { 0 };
	uint64_t bytes = 0;
	struct slot *s;
	bool moves;
	int err;

	if (p->err) {
		if (!p->processing)
			return false;
		p->emitter_waits = true;
		pthread_cond_wait(&p->done, &p->lock);
		p->emitter_waits = false;
		return true;
	}
	moves = give_out(p, &bytes);
	pthread_mutex_unlock(&p->lock);
	err = bytes ? pl_stream_due(p, bytes) : 0;
	err = err ? pl_stream_fault(p, err, &fault) : push_all(p, &fault);
	pthread_mutex_lock(&p->lock);
	pl_pump_fail(p, err, &fault);
	moves |= take_back(p);
	if (err || moves)
		return true;
	if (any_lane(p, is_free)) {
		/* One may have become ready meanwhile, and nobody says so again. */
		if (next_ready(p))
			return true;
		s = pl_slot_claim(p);
		if (s) {
			pl_slot_process(p, s, p->packer, PACKS_ALL);
			return true;
		}
		if (p->err)
			return true;
		if (!p->processing && p->claimed == p->emitted)
			return false;
	}
	p->emitter_waits = true;
	pthread_mutex_unlock(&p->lock);
	err = wait(p, &fault);
	pthread_mutex_lock(&p->lock);
	p->emitter_waits = false;
	pl_pump_fail(p, err, &fault);
	return true;
}

void pl_lanes_rest(struct pl_pump *p)
{
	for (unsigned i = 0; i < p->lanes.n; i++) {
		struct pump_lane *l = p->lanes.lane[i];

		/* Only after a failure: this stream ends in the middle of a frame. */
		if (l->slot && !l->err)
			l->err = -ECANCELED;
		l->slot = NULL;
	}
}

/* ---- barriers */

/* Until all lanes have taken all: 0, or the failure of lane 0. */
static int flush(struct pl_pump *p, struct pl_fault *fault)
{
	int err = push_all(p, fault);

	while (!err && any_lane(p, is_pending)) {
		err = wait(p, fault);
		if (!err)
			err = push_all(p, fault);
	}
	return err;
}

static void put_barrier(struct pump_lane *l, uint32_t sequence, uint32_t number,
			uint32_t size, bool given_up)
{
	uint8_t *to = l->control + (l->control_off < l->control_len ? l->control_len : 0);

	/* At most behind the first frame of a lane. */
	assert(to + PL_D1_HEADER + size <= l->control + sizeof(l->control));
	pl_d1_put(to, PL_BARRIER_MARK, size, given_up);
	pl_put32(to + PL_D1_HEADER, sequence);
	pl_put32(to + PL_D1_HEADER + 4, number);
	if (to == l->control)
		l->control_off = 0;
	l->control_len = (uint32_t)(to - l->control) + PL_D1_HEADER + size;
	l->given += PL_D1_HEADER + size;
}

int pl_lanes_barrier(struct pl_pump *p, bool always, struct pl_fault *fault)
{
	struct pump_lanes *all = &p->lanes;
	struct pump_lane *main;
	uint32_t names = 0;
	uint8_t *name;
	bool any;
	int err;

	pthread_mutex_lock(&p->lock);
	any = pl_lanes_adopt(p);
	pthread_mutex_unlock(&p->lock);
	if (!any || !all->barriers || !(always || all->sent))
		return 0;
	all->sequence++;
	for (unsigned i = 1; i < all->n; i++)
		if (!all->lane[i]->err)
			put_barrier(all->lane[i], all->sequence,
				    all->lane[i]->number, PL_BARRIER_HEAD, false);
	err = flush(p, fault);
	if (err)
		return err;
	main = all->lane[0];
	name = main->control + PL_D1_HEADER + PL_BARRIER_HEAD;
	for (unsigned i = 0; i < all->n; i++)
		if (!all->lane[i]->err)
			pl_put16(name + 2 * names++, (uint16_t)all->lane[i]->number);
	put_barrier(main, all->sequence, names, PL_BARRIER_HEAD + 2 * names,
		    names < all->n);
	all->sent = false;
	return flush(p, fault);
}

/* ---- lanes come and go */

static void free_lane(struct pump_lane *l)
{
	if (l)
		pl_log_fini(&l->log);
	free(l);
}

static int new_lane(struct pump_lane **out, struct pl_pump *p, int fd, uint32_t number,
		    bool log)
{
	struct pump_lane *l = calloc(1, sizeof(*l));
	int err;

	if (!l)
		return -ENOMEM;
	l->fd = fd;
	l->number = number;
	l->splices = pl_can_splice(p, fd);
	err = log ? pl_log_init(&l->log, p->cfg.size) : 0;
	if (err) {
		free_lane(l);
		return err;
	}
	*out = l;
	return 0;
}

/* Lock held. */
static int check_new(const struct pl_pump *p, uint32_t number)
{
	const struct pump_lanes *all = &p->lanes;

	for (unsigned i = 0; i < all->n; i++)
		if (all->lane[i]->number == number)
			return -EEXIST;
	for (unsigned i = 0; i < all->njoining; i++)
		if (all->joining[i]->number == number)
			return -EEXIST;
	return (all->n ? all->n : 1) + all->njoining > PL_LANES ? -ENOSPC : 0;
}

int pl_pump_add_lane(struct pl_pump *p, int fd, uint32_t number)
{
	struct pump_lanes *all = &p->lanes;
	struct pump_lane *l = NULL, *main = NULL;
	int err;

	if (!(p->cfg.features & PL_FEATURE_LANES) || fd < 0 || !number ||
	    number > UINT16_MAX)
		return -EINVAL;
	pthread_mutex_lock(&p->lock);
	err = check_new(p, number);
	if (!err)
		err = new_lane(&l, p, fd, number, true);
	if (!err && !all->lane[0])
		err = new_lane(&main, p, p->cfg.out_fd, 0, false);
	if (!err) {
		if (main)
			all->lane[0] = main;
		all->joining[all->njoining++] = l;
		l = NULL;
		pl_lanes_wake(p);
	}
	free_lane(l);
	pthread_mutex_unlock(&p->lock);
	return err;
}

/* It names lane 0 only. */
static void put_first_barrier(struct pump_lanes *all)
{
	pl_put16(all->lane[0]->control + PL_D1_HEADER + PL_BARRIER_HEAD, 0);
	put_barrier(all->lane[0], ++all->sequence, 1, PL_BARRIER_HEAD + 2, false);
	all->barriers = true;
}

int pl_lanes_keep_log(struct pl_pump *p)
{
	int err = new_lane(&p->lanes.lane[0], p, p->cfg.out_fd, 0, true);

	if (!err)
		p->lanes.n = 1;
	return err;
}

void pl_lanes_wrote(struct pl_pump *p, size_t len)
{
	if (p->lanes.n) {
		p->lanes.lane[0]->given += len;
		pl_count(&p->lanes.lane[0]->taken, len);
	}
}

bool pl_lanes_adopt(struct pl_pump *p)
{
	struct pump_lanes *all = &p->lanes;

	if (all->njoining && !all->barriers) {
		/* Lane 0 was alone, without barriers: what it has sent before comes
		   first. */
		if (all->lane[0]->slot)
			return true;	/* not in the middle of a frame */
		put_first_barrier(all);
		all->n = 1;
	}
	for (unsigned i = 0; i < all->njoining; i++) {
		struct pump_lane *l = all->joining[i];

		/* It begins behind the last barrier. */
		put_barrier(l, all->sequence, l->number, PL_BARRIER_HEAD, false);
		all->lane[all->n++] = l;
	}
	all->njoining = 0;
	return all->n;
}

unsigned pl_pump_lanes(struct pl_pump *p, struct pl_pump_lane *out)
{
	struct pump_lanes *all = &p->lanes;
	unsigned n = 0;

	pthread_mutex_lock(&p->lock);
	for (unsigned i = 1; i < all->n; i++) {
		struct pump_lane *l = all->lane[i];

		out[n++] = (struct pl_pump_lane){
			l->number, __atomic_load_n(&l->err, __ATOMIC_RELAXED),
			__atomic_load_n(&l->taken, __ATOMIC_RELAXED) };
	}
	for (unsigned i = 0; i < all->njoining; i++)
		out[n++] = (struct pl_pump_lane){ all->joining[i]->number, 0, 0 };
	pthread_mutex_unlock(&p->lock);
	return n;
}

void pl_lanes_fini(struct pl_pump *p)
{
	struct pump_lanes *all = &p->lanes;

	for (unsigned i = 0; i <= PL_LANES; i++)
		free_lane(all->lane[i]);
	for (unsigned i = 0; i < all->njoining; i++)
		free_lane(all->joining[i]);
	if (all->lost.word)
		pl_bitmap_fini(&all->lost);
	if (all->wake_fd >= 0)
		close(all->wake_fd);
}

/* ---- what was lost */

static const struct pl_lane_end *end_of(const struct pl_lane_end *ends, unsigned n,
					uint32_t number)
{
	for (unsigned i = 0; i < n; i++)
		if (ends[i].lane == number)
			return &ends[i];
	return NULL;
}

static int lose(struct pl_pump *p, const struct pump_lane *l, uint64_t received)
{
	struct pl_bitmap *lost = &p->lanes.lost;
	int err = lost->word ? 0 : pl_bitmap_init(lost, p->cfg.size, LOST_SHIFT);

	if (!err)
		pl_log_lost(&l->log, received, lost);
	return err;
}

int pl_pump_settle(struct pl_pump *p, const struct pl_lane_end *ends, unsigned n)
{
	struct pump_lanes *all = &p->lanes;
	struct pl_extent run;
	unsigned kept = 1;
	int err = 0;

	for (unsigned i = 1; i < all->n; i++) {
		const struct pl_lane_end *end = end_of(ends, n, all->lane[i]->number);

		if (end && end->received > all->lane[i]->given)
			return -EPROTO;
	}
	for (unsigned i = 1; i < all->n && !err; i++) {
		struct pump_lane *l = all->lane[i];
		const struct pl_lane_end *end = end_of(ends, n, l->number);

		if (l->err || end)
			err = lose(p, l, end ? end->received : l->log.since);
		else
			pl_log_forget(&l->log, l->given);
	}
	if (err || !all->n)
		return err;
	if (all->lane[0]->log.frame)
		pl_log_forget(&all->lane[0]->log, all->lane[0]->given);
	pthread_mutex_lock(&p->lock);
	for (unsigned i = 1; i < all->n; i++) {
		struct pump_lane *l = all->lane[i];

		if (l->err || end_of(ends, n, l->number))
			free_lane(l);
		else
			all->lane[kept++] = l;
	}
	for (unsigned i = kept; i < all->n; i++)
		all->lane[i] = NULL;
	all->n = kept;
	pthread_mutex_unlock(&p->lock);
	return all->lost.word ? pl_bitmap_next(&all->lost, 0, &run) : 0;
}

/* ---- a stream that has failed, and goes on over another one */

void pl_pump_disconnect(struct pl_pump *p)
{
	__atomic_store_n(&p->lanes.broken, true, __ATOMIC_RELAXED);
	pl_lanes_wake(p);
}

uint64_t pl_pump_floor(struct pl_pump *p)
{
	uint64_t floor;

	pthread_mutex_lock(&p->lock);
	floor = p->floor;
	pthread_mutex_unlock(&p->lock);
	return floor;
}

/* What lanes were given is in their logs. */
static bool was_given(const struct pump_lanes *all, const struct slot *s)
{
	for (unsigned i = 0; i < all->n; i++)
		if (all->lane[i]->slot == s)
			return true;
	return false;
}

int pl_lanes_unsent(struct pl_pump *p)
{
	struct pl_bitmap *lost = &p->lanes.lost;
	int err = lost->word ? 0 : pl_bitmap_init(lost, p->cfg.size, LOST_SHIFT);

	for (unsigned i = 0; i < p->cfg.slots && !err; i++) {
		const struct slot *s = &p->slot[i];

		if (!s->busy || was_given(&p->lanes, s))
			continue;
		for (unsigned f = 0; f < s->nfrags; f++)
			pl_bitmap_set(lost, s->frag[f].pos,
				      s->frag[f].pos + s->frag[f].len);
	}
	return err;
}

static void restart(struct pl_pump *p, struct pump_lane *l, int fd)
{
	pl_log_forget(&l->log, 0);
	l->fd = fd;
	l->err = 0;
	l->splices = pl_can_splice(p, fd);
	l->slot = NULL;
	l->control_len = l->control_off = 0;
	l->given = 0;
	__atomic_store_n(&l->taken, 0, __ATOMIC_RELAXED);
	l->blocked = false;
	l->takes = (struct pl_patience){ 0 };
}

int pl_pump_relink(struct pl_pump *p, int fd, const struct pl_lane_end *ends, unsigned n)
{
	struct pump_lanes *all = &p->lanes;
	struct pl_extent run;
	int err = 0;

	if (!(p->cfg.features & PL_FEATURE_RESUME) || fd < 0 || !end_of(ends, n, 0))
		return -EINVAL;
	for (unsigned i = 0; i < all->n; i++) {
		const struct pl_lane_end *end = end_of(ends, n, all->lane[i]->number);

		if (end && end->received > all->lane[i]->given)
			return -EPROTO;
	}
	for (unsigned i = 0; i < all->n && !err; i++) {
		const struct pump_lane *l = all->lane[i];
		const struct pl_lane_end *end = end_of(ends, n, l->number);

		err = lose(p, l, end ? end->received : l->log.since);
	}
	if (err)
		return err;
	pthread_mutex_lock(&p->lock);
	for (unsigned i = 1; i < all->n; i++) {
		free_lane(all->lane[i]);
		all->lane[i] = NULL;
	}
	for (unsigned i = 0; i < all->njoining; i++)
		free_lane(all->joining[i]);
	all->n = 1;
	all->njoining = 0;
	all->sent = false;
	__atomic_store_n(&all->broken, false, __ATOMIC_RELAXED);
	p->cfg.out_fd = fd;
	p->peer_takes = (struct pl_patience){ 0 };
	restart(p, all->lane[0], fd);
	/* A lane of before that the peer takes in only now is not waited for, and
	   nothing of it is written any more. */
	if (p->cfg.features & PL_FEATURE_LANES)
		put_first_barrier(all);
	pthread_mutex_unlock(&p->lock);
	return pl_bitmap_next(&all->lost, 0, &run);
}

int pl_pump_resend(struct pl_pump *p, struct pl_fault *fault)
{
	struct pl_bitmap *lost = &p->lanes.lost;
	struct pl_extent ext[512];
	int err = 0;

	*fault = (struct pl_fault){ 0 };
	while (lost->word && !err) {
		uint64_t at = 0;
		size_t n = 0;

		for (; n < 512 && pl_bitmap_next(lost, at, &ext[n]); n++) {
			at = ext[n].end;
			STAT_ADD(p, again_bytes, ext[n].end - ext[n].start);
		}
		if (!n)
			break;
		pl_bitmap_clear(lost, 0, at);
		/* Without flags all of it is sent, whatever `known` says. */
		err = pl_pump_pass(p, ext, n, 0, fault);
		/* The stream may fail again. */
		for (size_t i = 0; err && i < n; i++) {
			uint64_t from = ext[i].start > p->floor ? ext[i].start : p->floor;

			if (from < ext[i].end)
				pl_bitmap_set(lost, from, ext[i].end);
		}
	}
	return err;
}

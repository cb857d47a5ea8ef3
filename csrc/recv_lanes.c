/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The receiver's lanes: further streams of one copy, for data only.
 *
 * A lane is a receiver of its own: a thread that reads, a few slots, and a writer.
 * Between two barriers a block comes once, so no order between lanes is needed.  At
 * a barrier all that take part wait for each other, with everything before it
 * written.  So what comes after a barrier is never overtaken by what came before.
 *
 * A lane that a barrier does not name was given up by the sender.  Its thread has
 * ended before the barrier is passed: nothing of it is written after its blocks
 * have come again over another lane.
 */
#include <assert.h>
#include <errno.h>
#include <signal.h>
#include <stdlib.h>

#include "clock.h"
#include "recv_internal.h"

/* Of each lane: all of them together have no more memory than lane 0 is given. */
#define LANE_SLOTS 4u
#define LANE_SLOT_SIZE (256u << 10)
/* Each lane has its own rolling writeback, with a part of the window. */
#define WINDOW_PARTS 4u

struct recv_lane {
	struct pl_recv *main, *in;
	uint32_t number;
	pthread_t thread;
	/* main->lanes.lock guards all below */
	uint32_t from;		/* the barrier behind which it began, */
	bool begun;		/* once its first frame has come */
	uint32_t at;		/* the last barrier that it has reached */
	bool closing;
	bool ended;		/* its thread neither reads nor writes any more */
};

static struct recv_lane *find(const struct recv_lanes *all, uint32_t number)
{
	for (unsigned i = 0; i < PL_LANES; i++)
		if (all->lane[i] && all->lane[i]->number == number)
			return all->lane[i];
	return NULL;
}

static bool was_lost(const struct recv_lanes *all, uint32_t number)
{
	for (unsigned i = 0; i < all->nlost; i++)
		if (all->lost[i].lane == number)
			return true;
	return false;
}

/* ---- a lane's thread */

/* Everything before its BARRIER is written: wait until the others are there, too. */
static int reach(struct recv_lane *l)
{
	struct recv_lanes *all = &l->main->lanes;
	const struct recv_barrier *b = &l->in->barrier;
	uint64_t first = l->in->first_ns;
	int err = 0;

	pthread_mutex_lock(&all->lock);
	if (b->count != l->number || (l->begun && b->sequence <= l->at)) {
		err = -EPROTO;
	} else if (!l->begun) {
		/* Too late: the sender has gone on without it. */
		l->begun = b->sequence >= all->done;
		l->from = b->sequence;
		err = l->begun ? 0 : -ESTALE;
		all->begun |= l->begun;
	}
	if (!err) {
		l->at = b->sequence;
		all->dirty_bytes += pl_recv_dirty(l->in);
		if (first && (!all->first_ns || first < all->first_ns))
			all->first_ns = first;
		l->in->first_ns = 0;
		pthread_cond_broadcast(&all->changed);
	}
	while (!err && all->done < l->at) {
		if (l->closing)
			err = -ECANCELED;
		else
			pthread_cond_wait(&all->changed, &all->lock);
	}
	pthread_mutex_unlock(&all->lock);
	return err;
}

/* A lane that breaks off costs only itself.  Data that cannot be written, or a
   stream that is none, end the copy. */
static bool ends_the_copy(int err, const struct pl_fault *fault)
{
	return fault->stage == PL_STAGE_WRITE ||
	       (fault->stage == PL_STAGE_PROTOCOL && err != -ESTALE);
}

static void *lane_main(void *arg)
{
	struct recv_lane *l = arg;
	struct recv_lanes *all = &l->main->lanes;
	struct pl_fault fault = { 0 };
	struct pl_recv_msg msg;
	int ret;

	do {
		ret = pl_recv_run(l->in, &msg, &fault);
		if (ret == RECV_BARRIER) {
			fault = (struct pl_fault){
				.stage = PL_STAGE_PROTOCOL, .mark = PL_BARRIER_MARK,
				.size = PL_BARRIER_HEAD,
				.stream = l->in->whole_bytes };
			ret = reach(l);
			if (ret == -ECANCELED)
				fault.stage = PL_STAGE_READ;
		}
	} while (!ret);
	fault.lane = l->number;
	if (ends_the_copy(ret, &fault))
		pl_recv_fail_as(l->main, ret, &fault);
	pthread_mutex_lock(&all->lock);
	l->ended = true;
	pthread_cond_broadcast(&all->changed);
	pthread_mutex_unlock(&all->lock);
	return NULL;
}

static int start(struct recv_lane *l)
{
	sigset_t set, old;
	int err;

	sigfillset(&set);
	pthread_sigmask(SIG_SETMASK, &set, &old);
	err = -pthread_create(&l->thread, NULL, lane_main, l);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	return err;
}

/* Lock held. */
static int add(struct pl_recv *r, struct recv_lane **place, int fd, uint32_t number)
{
	struct pl_recv_cfg cfg = r->cfg;
	struct recv_lane *l = calloc(1, sizeof(*l));
	int err;

	if (!l)
		return -ENOMEM;
	cfg.in_fd = fd;
	cfg.slots = LANE_SLOTS;
	if (cfg.slot_size > LANE_SLOT_SIZE)
		cfg.slot_size = LANE_SLOT_SIZE;
	cfg.direct = (struct pl_direct_cfg){ 0 };
	cfg.window /= WINDOW_PARTS;
	/* How long the lane may be silent is judged at the barriers. */
	cfg.stall_ms = 0;
	cfg.reply_fd = -1;
	/* Other lanes write to the file, too: it may hold data anywhere. */
	cfg.old_end = INT64_MAX;
	l->main = r;
	l->number = number;
	err = pl_recv_new(&l->in, &cfg);
	if (!err) {
		l->in->is_lane = true;
		l->in->dialect = PL_DIALECT_D1;
		l->in->features = r->features & ~(uint64_t)PL_FEATURE_PROOF;
		pl_recv_share(r);
		err = start(l);
	}
	if (err) {
		pl_recv_free(l->in);
		free(l);
		return err;
	}
	*place = l;
	r->lanes.used = true;
	/* A barrier may wait for it. */
	pthread_cond_broadcast(&r->lanes.changed);
	return 0;
}

int pl_recv_add_lane(struct pl_recv *r, int fd, uint32_t number)
{
	struct recv_lanes *all = &r->lanes;
	unsigned i = 0;
	int err;

	if (fd < 0 || !number || number > UINT16_MAX)
		return -EINVAL;
	pthread_mutex_lock(&all->lock);
	while (i < PL_LANES && all->lane[i])
		i++;
	if (!all->open)
		err = all->used ? -ECANCELED : -EINVAL;
	else if (find(all, number) || was_lost(all, number))
		err = -EEXIST;
	else if (i == PL_LANES || all->nlost + PL_LANES >= PL_BARRIER_NAMES)
		err = -ENOSPC;	/* each may be lost before the next answer, and lane 0 */
	else
		err = add(r, &all->lane[i], fd, number);
	pthread_mutex_unlock(&all->lock);
	return err;
}

/* ---- lane 0's thread; the lock is held */

static int note_lost(struct recv_lanes *all, uint32_t number, uint64_t received)
{
	if (was_lost(all, number))
		return 0;
	if (all->nlost == PL_BARRIER_NAMES)
		return -EPROTO;		/* of lanes that never came, too */
	all->lost[all->nlost++] = (struct pl_lane_end){ number, received };
	return 0;
}

static void add_stats(struct pl_recv_stats *to, const struct pl_recv_stats *from)
{
	to->stream_bytes += from->stream_bytes;
	to->data_bytes += from->data_bytes;
	to->frames += from->frames;
	to->written_bytes += from->written_bytes;
	to->hole_bytes += from->hole_bytes;
	to->huge_bytes += from->huge_bytes;
	to->packed_bytes += from->packed_bytes;
	to->packed_frames += from->packed_frames;
	to->direct_bytes += from->direct_bytes;
	to->filled_bytes += from->filled_bytes;
	if (to->image_size < from->image_size)
		to->image_size = from->image_size;
}

/* End the lane.  What it has read in whole frames is written when this returns, if
   the copy goes on. */
static int retire(struct recv_lanes *all, struct recv_lane **place)
{
	struct recv_lane *l = *place;
	struct pl_recv_stats stats;
	int err = 0;

	l->closing = true;
	pthread_cond_broadcast(&all->changed);
	pthread_mutex_unlock(&all->lock);
	pl_recv_wake(l->in);
	pthread_join(l->thread, NULL);
	pthread_mutex_lock(&all->lock);
	assert(l->ended);
	/* One that has sent nothing has nothing to send again. */
	if (l->begun)
		err = note_lost(all, l->number, l->in->whole_bytes);
	pl_read_counters(&stats, &l->in->stats, sizeof(stats));
	add_stats(&all->gone, &stats);
	pl_recv_free(l->in);
	free(l);
	*place = NULL;
	return err;
}

static struct recv_lane **place_of(struct recv_lanes *all, const struct recv_lane *l)
{
	unsigned i = 0;

	while (all->lane[i] != l)
		i++;
	return &all->lane[i];
}

/* Until this lane is at the barrier, or has ended: 0; or the copy's failure. */
static int await(struct pl_recv *r, uint32_t number, uint32_t sequence)
{
	uint64_t limit = (uint64_t)r->cfg.lane_stall_ms * PL_NS_PER_MS;
	uint64_t seen = 0, deadline = pl_now_ns() + limit;
	struct recv_lanes *all = &r->lanes;
	int err;

	while (!(err = pl_recv_failed(r)) && !was_lost(all, number)) {
		struct recv_lane *l = find(all, number);
		struct timespec until = pl_timespec(deadline);
		uint64_t bytes = 0;

		if (l && l->begun && l->at >= sequence)
			break;
		if (__atomic_load_n(&r->broken, __ATOMIC_RELAXED))
			return -ECONNABORTED;
		if (l)
			bytes = __atomic_load_n(&l->in->stats.stream_bytes,
						__ATOMIC_RELAXED);
		if ((l ? l->ended : !all->open) ||
		    (bytes == seen && limit && pl_now_ns() >= deadline)) {
			err = l ? retire(all, place_of(all, l)) : 0;
			if (!err)	/* it may not have come at all */
				err = note_lost(all, number, 0);
			if (err)
				return err;
			continue;	/* its failure may be the copy's */
		}
		if (bytes != seen) {
			seen = bytes;
			deadline = pl_now_ns() + limit;
		}
		if (limit)
			pthread_cond_timedwait(&all->changed, &all->lock, &until);
		else
			pthread_cond_wait(&all->changed, &all->lock);
	}
	return err;
}

static bool names(const struct recv_barrier *b, uint32_t number)
{
	for (uint32_t i = 0; i < b->count; i++)
		if (b->name[i] == number)
			return true;
	return false;
}

static int pass(struct pl_recv *r, const struct recv_barrier *b)
{
	struct recv_lanes *all = &r->lanes;
	int err = 0;

	all->dirty_bytes = 0;
	for (unsigned i = 0; i < PL_LANES; i++) {
		const struct recv_lane *l = all->lane[i];

		if (l && !names(b, l->number) &&
		    (l->ended || (l->begun && l->from < b->sequence)))
			err = retire(all, &all->lane[i]);
		if (err)
			return err;
	}
	for (uint32_t i = 0; i < b->count && !err; i++)
		if (b->name[i])
			err = await(r, b->name[i], b->sequence);
	if (!err) {
		all->done = b->sequence;
		pthread_cond_broadcast(&all->changed);
	}
	return err;
}

static int read_barrier(struct pl_recv *r)
{
	uint8_t raw[PL_BARRIER_HEAD + 2 * PL_BARRIER_NAMES];
	struct iovec iov = { raw, r->head.size };
	struct recv_barrier *b = &r->barrier;
	ssize_t n = pl_recv_read(r, &iov, 1, r->head.size);

	if (n < 0)
		return (int)n;
	r->raw_got = 0;
	b->sequence = pl_get32(raw);
	b->count = pl_get32(raw + 4);
	b->given_up = r->head.pos;
	if (r->is_lane)
		return 0;
	if (b->count != (r->head.size - PL_BARRIER_HEAD) / 2)
		return -EPROTO;
	for (uint32_t i = 0; i < b->count; i++)
		b->name[i] = pl_get16(raw + PL_BARRIER_HEAD + 2 * i);
	return 0;
}

int pl_recv_barrier(struct pl_recv *r, enum pl_stage *stage)
{
	int err = read_barrier(r);

	if (err == -EPROTO)
		*stage = PL_STAGE_PROTOCOL;
	if (!err)
		err = pl_recv_drain(r);
	if (err)
		return err;
	r->whole_bytes = r->stats.stream_bytes;
	if (r->is_lane)
		return RECV_BARRIER;
	pthread_mutex_lock(&r->lanes.lock);
	/* Of another stream, several may have been lost with the first. */
	if (r->barrier.sequence != r->lanes.done + 1 &&
	    !(r->relinked && r->barrier.sequence > r->lanes.done)) {
		*stage = PL_STAGE_PROTOCOL;
		err = -EPROTO;
	} else {
		err = pass(r, &r->barrier);
		r->relinked = false;
	}
	pthread_mutex_unlock(&r->lanes.lock);
	r->at_barrier = !err;
	return err;
}

int pl_recv_lanes_event(struct pl_recv *r, struct pl_recv_msg *msg, bool end)
{
	struct recv_lanes *all = &r->lanes;
	int ret = 0;

	if (!(r->features & PL_FEATURE_LANES))
		return 0;
	pthread_mutex_lock(&all->lock);
	if (all->begun && !r->at_barrier)
		ret = -EPROTO;
	else if (all->nlost || (r->at_barrier && r->barrier.given_up))
		ret = PL_RECV_LOST;
	if (all->first_ns && (!msg->first_ns || all->first_ns < msg->first_ns))
		msg->first_ns = all->first_ns;
	all->first_ns = 0;
	msg->dirty_bytes += all->dirty_bytes;
	pthread_mutex_unlock(&all->lock);
	if (!ret && end)
		pl_recv_lanes_stop(r);
	else
		r->at_barrier = false;
	return ret;
}

unsigned pl_recv_lost(struct pl_recv *r, struct pl_lane_end *out)
{
	struct recv_lanes *all = &r->lanes;
	unsigned n;

	pthread_mutex_lock(&all->lock);
	n = all->nlost;
	for (unsigned i = 0; i < n; i++)
		out[i] = all->lost[i];
	all->nlost = 0;
	pthread_mutex_unlock(&all->lock);
	return n;
}

/* ---- all of them */

void pl_recv_lanes_open(struct pl_recv *r)
{
	pthread_mutex_lock(&r->lanes.lock);
	r->lanes.open = true;
	pthread_mutex_unlock(&r->lanes.lock);
}

void pl_recv_lanes_stop(struct pl_recv *r)
{
	struct recv_lanes *all = &r->lanes;
	bool failed = pl_recv_failed(r);

	pthread_mutex_lock(&all->lock);
	all->open = false;
	for (unsigned i = 0; i < PL_LANES; i++) {
		if (!all->lane[i])
			continue;
		if (failed)
			pl_recv_cancel(all->lane[i]->in);
		(void)!retire(all, &all->lane[i]);
	}
	all->nlost = 0;
	pthread_mutex_unlock(&all->lock);
}

void pl_recv_end_lanes(struct pl_recv *r)
{
	pl_recv_lanes_stop(r);
}

void pl_recv_lanes_wake(struct pl_recv *r)
{
	pthread_mutex_lock(&r->lanes.lock);
	pthread_cond_broadcast(&r->lanes.changed);
	pthread_mutex_unlock(&r->lanes.lock);
}

int pl_recv_lanes_broken(struct pl_recv *r, uint64_t received)
{
	struct recv_lanes *all = &r->lanes;
	int err = 0;

	pthread_mutex_lock(&all->lock);
	for (unsigned i = 0; i < PL_LANES && !err; i++)
		if (all->lane[i])
			err = retire(all, &all->lane[i]);
	if (!err)
		err = note_lost(all, 0, received);
	pthread_mutex_unlock(&all->lock);
	if (!err)
		err = pl_recv_failed(r);
	return err;
}

void pl_recv_lanes_synced(struct pl_recv *r)
{
	struct recv_lanes *all = &r->lanes;

	pthread_mutex_lock(&all->lock);
	for (unsigned i = 0; i < PL_LANES; i++)
		if (all->lane[i])
			pl_recv_synced(all->lane[i]->in);
	pthread_mutex_unlock(&all->lock);
}

void pl_recv_lanes_stats(struct pl_recv *r, struct pl_recv_stats *to)
{
	struct recv_lanes *all = &r->lanes;
	struct pl_recv_stats stats;

	pthread_mutex_lock(&all->lock);
	add_stats(to, &all->gone);
	for (unsigned i = 0; i < PL_LANES; i++) {
		if (!all->lane[i])
			continue;
		pl_read_counters(&stats, &all->lane[i]->in->stats, sizeof(stats));
		add_stats(to, &stats);
	}
	pthread_mutex_unlock(&all->lock);
}

int pl_recv_lanes_init(struct pl_recv *r)
{
	pthread_condattr_t attr;
	int err = -pthread_condattr_init(&attr);

	if (err)
		return err;
	pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
	err = -pthread_cond_init(&r->lanes.changed, &attr);
	pthread_condattr_destroy(&attr);
	if (!err)
		err = -pthread_mutex_init(&r->lanes.lock, NULL);
	return err;
}

void pl_recv_lanes_fini(struct pl_recv *r)
{
	pl_recv_lanes_stop(r);
	pthread_cond_destroy(&r->lanes.changed);
	pthread_mutex_destroy(&r->lanes.lock);
}

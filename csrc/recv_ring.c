/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Between the receiver's reader and its writing threads: slots in a ring, in
 * order, and the first failure of any.
 */
#include <assert.h>
#include <errno.h>
#include <signal.h>
#include <unistd.h>

#include "recv_internal.h"

void pl_recv_fail(struct pl_recv *r, int err, enum pl_stage stage, uint64_t pos)
{
	pthread_mutex_lock(&r->lock);
	if (!r->err) {
		r->err = err;
		r->fault = (struct pl_fault){
			.stage = stage, .pos = pos,
			.stream = __atomic_load_n(&r->stats.stream_bytes,
						  __ATOMIC_RELAXED),
			.frame = __atomic_load_n(&r->stats.frames,
						 __ATOMIC_RELAXED) };
		/* The header is the reader's, and only its faults name it. */
		if (stage == PL_STAGE_READ || stage == PL_STAGE_PROTOCOL) {
			r->fault.mark = r->head.mark;
			r->fault.size = r->head.size;
			r->fault.type = r->head.type;
			r->fault.command = r->command;
		}
	}
	pthread_mutex_unlock(&r->lock);
}

void pl_recv_fail_as(struct pl_recv *r, int err, const struct pl_fault *fault)
{
	pthread_mutex_lock(&r->lock);
	if (!r->err) {
		r->err = err;
		r->fault = *fault;
	}
	pthread_mutex_unlock(&r->lock);
	pl_recv_wake(r);
}

int pl_recv_failed(struct pl_recv *r)
{
	int err;

	pthread_mutex_lock(&r->lock);
	err = r->err;
	pthread_mutex_unlock(&r->lock);
	return err;
}

/* The reader waits for a peer, which may wait for an answer that will not come. */
void pl_recv_wake(struct pl_recv *r)
{
	uint64_t one = 1;

	if (write(r->cancel_fd, &one, sizeof(one)) < 0)
		return;		/* full counter: it is readable already */
}

/* Lock held: the next slot can be begun.  Not while an earlier one for the same
   blocks is written: of two, the later one must win. */
static bool can_take(const struct pl_recv *r)
{
	const struct recv_slot *s = &r->slot[r->taken % r->cfg.slots];

	if (r->planning || r->taken == r->filled)
		return false;
	for (uint64_t i = r->written; i < r->taken; i++) {
		const struct recv_slot *other = &r->slot[i % r->cfg.slots];

		if (!other->done && s->start < other->end && other->start < s->end)
			return false;
	}
	return true;
}

/* Lock held.  Plan and write a slot, that is done then. */
static void process(struct pl_recv *r, struct recv_slot *s)
{
	uint64_t pos = 0;
	int err;

	r->planning = true;
	r->taken++;
	pthread_mutex_unlock(&r->lock);
	err = pl_recv_plan(r, s, &pos);
	pthread_mutex_lock(&r->lock);
	r->planning = false;
	pthread_cond_broadcast(&r->planned);
	if (r->cfg.writers > 1)
		pthread_cond_broadcast(&r->work);
	pthread_mutex_unlock(&r->lock);
	if (!err)
		err = pl_recv_write(r, s, &pos);
	if (err) {
		pl_recv_fail(r, err, PL_STAGE_WRITE, pos);
		pl_recv_wake(r);
	}
	pthread_mutex_lock(&r->lock);
}

/* Lock held.  Answer the slots that are done, in order, and give them back. */
static void retire(struct pl_recv *r)
{
	struct recv_slot *s = &r->slot[r->written % r->cfg.slots];

	if (r->retiring)
		return;		/* that writer sees ours when it has the lock */
	r->retiring = true;
	for (; r->written < r->taken && s->done;
	     s = &r->slot[r->written % r->cfg.slots]) {
		if (s->replies && !r->err) {
			int err;

			pthread_mutex_unlock(&r->lock);
			err = pl_recv_reply(r, s->replies);
			if (err) {
				pl_recv_fail(r, err, PL_STAGE_REPLY, 0);
				pl_recv_wake(r);
			}
			pthread_mutex_lock(&r->lock);
		}
		s->done = false;
		s->nparts = s->used = s->replies = 0;
		r->written++;
		if (r->reader_waits)
			pthread_cond_signal(&r->done);
	}
	r->retiring = false;
}

static void *writer(void *arg)
{
	struct pl_recv *r = arg;

	pthread_mutex_lock(&r->lock);
	for (;;) {
		struct recv_slot *s = &r->slot[r->taken % r->cfg.slots];

		if (!can_take(r)) {
			if (r->quit && r->taken == r->filled)
				break;
			if (r->written == r->filled)
				__atomic_store_n(&r->writer_idle, true, __ATOMIC_RELAXED);
			pthread_cond_wait(&r->work, &r->lock);
			continue;
		}
		__atomic_store_n(&r->writer_idle, false, __ATOMIC_RELAXED);
		if (r->err)
			r->taken++;
		else
			process(r, s);
		s->done = true;
		retire(r);
		/* What waited for these blocks, or to end. */
		if (r->cfg.writers > 1)
			pthread_cond_broadcast(&r->work);
	}
	pthread_mutex_unlock(&r->lock);
	return NULL;
}

void pl_recv_hand_over(struct pl_recv *r)
{
	pthread_mutex_lock(&r->lock);
	assert(r->filled - r->written < r->cfg.slots);
	r->filled++;
	/* One that is busy sees it by itself, others may sleep beside it. */
	if (r->writer_idle || r->cfg.writers > 1)
		pthread_cond_signal(&r->work);
	pthread_mutex_unlock(&r->lock);
}

void pl_recv_share(struct pl_recv *r)
{
	pthread_mutex_lock(&r->lock);
	while (r->planning)
		pthread_cond_wait(&r->planned, &r->lock);
	/* What is allocated ahead becomes holes later: there may be their data. */
	pl_ahead_close(&r->ahead);
	r->ahead.fd = -1;
	r->written_end = INT64_MAX;
	pthread_mutex_unlock(&r->lock);
	pl_direct_refuse(&r->direct);
}

struct recv_slot *pl_recv_slot(struct pl_recv *r)
{
	struct recv_slot *s = NULL;

	pthread_mutex_lock(&r->lock);
	while (!r->err && r->filled - r->written >= r->cfg.slots) {
		r->reader_waits = true;
		pthread_cond_wait(&r->done, &r->lock);
		r->reader_waits = false;
	}
	if (!r->err)
		s = &r->slot[r->filled % r->cfg.slots];
	pthread_mutex_unlock(&r->lock);
	return s;
}

int pl_recv_drain(struct pl_recv *r)
{
	int err;

	pl_recv_end_page(r);
	pthread_mutex_lock(&r->lock);
	/* A slot that is being filled goes as it is. */
	if (r->filled - r->written < r->cfg.slots &&
	    r->slot[r->filled % r->cfg.slots].nparts) {
		r->filled++;
		pthread_cond_signal(&r->work);
	}
	while (r->written != r->filled) {
		r->reader_waits = true;
		pthread_cond_wait(&r->done, &r->lock);
		r->reader_waits = false;
	}
	/* The writers are idle: what is theirs is ours. */
	pl_ahead_close(&r->ahead);
	err = r->err;
	pthread_mutex_unlock(&r->lock);
	return err;
}

int pl_recv_start(struct pl_recv *r)
{
	sigset_t all, old;
	int err = 0;

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	while (r->nthreads < r->cfg.writers && !err) {
		err = -pthread_create(&r->thread[r->nthreads], NULL, writer, r);
		if (!err)
			r->nthreads++;
	}
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	return err;
}

void pl_recv_stop(struct pl_recv *r)
{
	pthread_mutex_lock(&r->lock);
	r->quit = true;
	/* What is still queued belongs to a stream that was given up. */
	if (!r->err)
		r->err = -ECANCELED;
	pthread_cond_broadcast(&r->work);
	pthread_mutex_unlock(&r->lock);
	for (unsigned i = 0; i < r->nthreads; i++)
		pthread_join(r->thread[i], NULL);
	pl_ahead_close(&r->ahead);
}

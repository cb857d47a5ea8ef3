/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Between the receiver's reader and its writing thread: slots in a ring, in
 * order, and the first failure of either.
 */
#include <assert.h>
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

/* The reader waits for a peer, which may wait for an answer that will not come. */
void pl_recv_wake(struct pl_recv *r)
{
	uint64_t one = 1;

	if (write(r->cancel_fd, &one, sizeof(one)) < 0)
		return;		/* full counter: it is readable already */
}

static void *writer(void *arg)
{
	struct pl_recv *r = arg;

	pthread_mutex_lock(&r->lock);
	for (;;) {
		struct recv_slot *s = &r->slot[r->written % r->cfg.slots];
		uint64_t pos = 0;
		int err = 0;

		if (r->written == r->filled) {
			if (r->quit)
				break;
			__atomic_store_n(&r->writer_idle, true, __ATOMIC_RELAXED);
			pthread_cond_wait(&r->work, &r->lock);
			__atomic_store_n(&r->writer_idle, false, __ATOMIC_RELAXED);
			continue;
		}
		if (!r->err) {
			pthread_mutex_unlock(&r->lock);
			err = pl_recv_write_slot(r, s, &pos);
			if (err)
				pl_recv_fail(r, err, PL_STAGE_WRITE, pos);
			else if (s->replies && (err = pl_recv_reply(r, s->replies)))
				pl_recv_fail(r, err, PL_STAGE_REPLY, 0);
			if (err)
				pl_recv_wake(r);
			pthread_mutex_lock(&r->lock);
		}
		assert(r->written < r->filled);
		s->nparts = s->used = s->replies = 0;
		r->written++;
		if (r->reader_waits)
			pthread_cond_signal(&r->done);
	}
	pthread_mutex_unlock(&r->lock);
	return NULL;
}

void pl_recv_hand_over(struct pl_recv *r)
{
	pthread_mutex_lock(&r->lock);
	assert(r->filled - r->written < r->cfg.slots);
	r->filled++;
	if (r->writer_idle)
		pthread_cond_signal(&r->work);
	pthread_mutex_unlock(&r->lock);
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
	err = r->err;
	pthread_mutex_unlock(&r->lock);
	return err;
}

int pl_recv_start(struct pl_recv *r)
{
	sigset_t all, old;
	int err;

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	err = -pthread_create(&r->thread, NULL, writer, r);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	r->has_thread = !err;
	return err;
}

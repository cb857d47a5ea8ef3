/* SPDX-License-Identifier: Apache-2.0 */
/* The shared writing end: see gate.h. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>

#include "clock.h"
#include "gate.h"
#include "io.h"

#define LOOK_MS 100u	/* between two looks at whether the gate was shut */

struct pl_gate {
	int fd;
	bool shut;		/* atomic */
	pthread_mutex_t lock;	/* guards all below */
	pthread_cond_t left;
	bool entered;
	unsigned urgent;	/* of those who wait */
};

int pl_gate_new(struct pl_gate **out, int fd)
{
	struct pl_gate *g = calloc(1, sizeof(*g));
	pthread_condattr_t attr;

	if (!g)
		return -ENOMEM;
	g->fd = fd;
	pthread_mutex_init(&g->lock, NULL);
	pthread_condattr_init(&attr);
	pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
	pthread_cond_init(&g->left, &attr);
	pthread_condattr_destroy(&attr);
	*out = g;
	return 0;
}

void pl_gate_free(struct pl_gate *g)
{
	if (!g)
		return;
	pthread_cond_destroy(&g->left);
	pthread_mutex_destroy(&g->lock);
	free(g);
}

int pl_gate_enter(struct pl_gate *g, bool urgent, uint32_t ms)
{
	struct timespec until = pl_timespec(pl_now_ns() + ms * (uint64_t)PL_NS_PER_MS);
	int err = 0;

	pthread_mutex_lock(&g->lock);
	g->urgent += urgent;
	while (!err && (g->entered || (!urgent && g->urgent))) {
		if (ms)
			err = -pthread_cond_timedwait(&g->left, &g->lock, &until);
		else
			pthread_cond_wait(&g->left, &g->lock);
	}
	g->urgent -= urgent;
	if (!err)
		g->entered = true;
	else if (!g->entered)
		pthread_cond_broadcast(&g->left);	/* one less is urgent */
	pthread_mutex_unlock(&g->lock);
	return err ? -EAGAIN : 0;
}

void pl_gate_leave(struct pl_gate *g)
{
	pthread_mutex_lock(&g->lock);
	g->entered = false;
	pthread_cond_broadcast(&g->left);
	pthread_mutex_unlock(&g->lock);
}

static bool is_set(const int *stopped)
{
	return __atomic_load_n(stopped, __ATOMIC_ACQUIRE) != 0;
}

static int write_all(struct pl_gate *g, struct iovec *iov, unsigned n, uint32_t silence_ms,
		     const int *stopped)
{
	uint64_t end = silence_ms ? pl_now_ns() + silence_ms * (uint64_t)PL_NS_PER_MS
				  : UINT64_MAX;
	bool begun = false, hurry = false;

	pl_iov_skip(&iov, &n, 0);
	while (n) {
		struct pollfd pfd = { .fd = g->fd, .events = POLLOUT };
		ssize_t k;

		if (__atomic_load_n(&g->shut, __ATOMIC_ACQUIRE))
			return -ESHUTDOWN;
		if (is_set(stopped) && !hurry) {
			uint64_t soon = pl_now_ns() + PL_GATE_GRACE_MS * (uint64_t)PL_NS_PER_MS;

			if (!begun)
				return __atomic_load_n(stopped, __ATOMIC_ACQUIRE);
			end = soon < end ? soon : end;
			hurry = true;
		}
		k = writev(g->fd, iov, (int)n);
		if (k >= 0) {
			begun = begun || k > 0;
			pl_iov_skip(&iov, &n, (size_t)k);
			continue;
		}
		if (errno == EINTR)
			continue;
		if (errno != EAGAIN)
			return -errno;
		if (pl_now_ns() > end)
			return -ETIME;
		if (poll(&pfd, 1, LOOK_MS) < 0 && errno != EINTR)
			return -errno;
	}
	return 0;
}

int pl_gate_write(struct pl_gate *g, struct iovec *iov, unsigned n, bool urgent,
		  uint32_t silence_ms, const int *stopped)
{
	int err;

	do {
		if (is_set(stopped))
			return __atomic_load_n(stopped, __ATOMIC_ACQUIRE);
		err = pl_gate_enter(g, urgent, LOOK_MS);
	} while (err == -EAGAIN);
	if (err)
		return err;
	/* Its time begins now: what others write may take long on a slow link. */
	err = write_all(g, iov, n, silence_ms, stopped);
	pl_gate_leave(g);
	return err;
}

void pl_gate_shut(struct pl_gate *g)
{
	__atomic_store_n(&g->shut, true, __ATOMIC_RELEASE);
}

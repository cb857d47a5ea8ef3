/* SPDX-License-Identifier: Apache-2.0 */
/* The lanes of a bundle, and its loop: see bundle.h. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "bundle_internal.h"
#include "clock.h"
#include "io.h"

int pl_bundle_new(struct pl_bundle **out, int fd, uint32_t stall_ms)
{
	struct pl_bundle *b = calloc(1, sizeof(*b));

	if (!b)
		return -ENOMEM;
	b->fd = fd;
	b->stall_ms = stall_ms;
	pthread_mutex_init(&b->lock, NULL);
	b->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	b->out = pl_buf_new(PL_BUNDLE_WINDOW);
	b->in = pl_buf_new(PL_BUNDLE_WINDOW);
	b->waste = malloc(PL_BUNDLE_SEG_MOST);
	if (b->wake < 0 || !b->out || !b->in || !b->waste) {
		pl_bundle_free(b);
		return -ENOMEM;
	}
	*out = b;
	return 0;
}

void pl_bundle_free(struct pl_bundle *b)
{
	if (!b)
		return;
	if (b->wake >= 0)
		close(b->wake);
	if (b->out)
		pl_buf_free(b->out, PL_BUNDLE_WINDOW);
	if (b->in)
		pl_buf_free(b->in, PL_BUNDLE_WINDOW);
	free(b->waste);
	pthread_mutex_destroy(&b->lock);
	free(b);
}

static void wake(struct pl_bundle *b)
{
	eventfd_write(b->wake, 1);
}

int pl_bundle_add(struct pl_bundle *b, int rfd, int wfd, uint32_t number)
{
	int err = 0;

	pthread_mutex_lock(&b->lock);
	if (b->over)
		err = -ECANCELED;
	else if (b->lives + b->n_coming >= PL_BUNDLE_LANES)
		err = -EBUSY;
	else
		b->coming[b->n_coming++] = (struct lane){ .used = true, .number = number,
							  .rfd = rfd, .wfd = wfd,
							  .ack = true };
	pthread_mutex_unlock(&b->lock);
	wake(b);
	return err;
}

void pl_bundle_stop(struct pl_bundle *b)
{
	__atomic_store_n(&b->stopped, true, __ATOMIC_RELEASE);
	wake(b);
}

uint64_t pl_bundle_moved(const struct pl_bundle *b)
{
	return __atomic_load_n(&b->moved, __ATOMIC_RELAXED);
}

static struct pl_bundle_lane listed(const struct lane *l)
{
	return (struct pl_bundle_lane){ .number = l->number, .error = l->error,
					.ended = l->dead };
}

unsigned pl_bundle_lanes(struct pl_bundle *b, struct pl_bundle_lane *to, unsigned most)
{
	unsigned n = 0;

	pthread_mutex_lock(&b->lock);
	for (unsigned i = 0; i < PL_BUNDLE_LANES && n < most; i++)
		if (b->lane[i].used)
			to[n++] = listed(&b->lane[i]);
	for (unsigned i = 0; i < b->n_coming && n < most; i++)
		to[n++] = listed(&b->coming[i]);
	pthread_mutex_unlock(&b->lock);
	return n;
}

/* Its descriptors are not used any more.  The other end hears of it by the others. */
void pl_bundle_lane_ended(struct pl_bundle *b, struct lane *l, int err)
{
	if (b->n_lost < LOST_MOST)
		b->lost[b->n_lost++] = l->number;
	pl_bundle_again(b, l);
	pthread_mutex_lock(&b->lock);
	l->dead = true;
	l->error = err;
	b->lives--;
	pthread_mutex_unlock(&b->lock);
}

/* Under the lock: each gets a slot that was never used, or whose lane has ended. */
static void admit(struct pl_bundle *b)
{
	for (unsigned i = 0; i < PL_BUNDLE_LANES && b->n_coming; i++)
		if (!pl_lane_lives(&b->lane[i])) {
			b->lane[i] = b->coming[--b->n_coming];
			b->lives++;
		}
}

static unsigned watch(struct pl_bundle *b, struct pollfd *p, struct lane **of)
{
	unsigned n = 2;

	p[0] = (struct pollfd){ .fd = b->wake, .events = POLLIN };
	p[1] = (struct pollfd){ .fd = b->fd };
	if (b->end - b->taken < PL_BUNDLE_WINDOW)
		p[1].events |= POLLIN;
	if (b->whole > b->given)
		p[1].events |= POLLOUT;
	pthread_mutex_lock(&b->lock);
	admit(b);
	pthread_mutex_unlock(&b->lock);
	for (unsigned i = 0; i < PL_BUNDLE_LANES; i++) {
		struct lane *l = &b->lane[i];

		if (!pl_lane_lives(l))
			continue;
		of[n] = l;
		p[n++] = (struct pollfd){ .fd = l->rfd, .events = POLLIN };
		of[n] = l;
		p[n++] = (struct pollfd){ .fd = l->wfd,
					  .events = pl_bundle_wants(b, l) ? POLLOUT : 0 };
	}
	return n;
}

static int program(struct pl_bundle *b, const struct pollfd *p)
{
	int err = 0;

	if (p->revents & POLLOUT)
		err = pl_bundle_give(b);
	if (!err && (p->revents & (POLLIN | POLLHUP | POLLERR)))
		err = pl_bundle_take(b);
	return err;
}

static int timeout_ms(const struct pl_bundle *b, uint64_t now)
{
	uint64_t left;

	if (!b->ack_ns)
		return TICK_MS;
	left = b->ack_ns > now ? (b->ack_ns - now) / PL_NS_PER_MS + 1 : 0;
	return left < TICK_MS ? (int)left : (int)TICK_MS;
}

static int step(struct pl_bundle *b, uint64_t *looked)
{
	struct pollfd p[2 + 2 * PL_BUNDLE_LANES];
	struct lane *of[2 + 2 * PL_BUNDLE_LANES];
	uint64_t now = pl_now_ns(), count;
	unsigned n;
	int err;

	if (now - *looked > TICK_MS * (uint64_t)PL_NS_PER_MS) {
		*looked = now;
		pl_bundle_look(b, now);
	}
	n = watch(b, p, of);
	if (poll(p, n, timeout_ms(b, now)) < 0)
		return errno == EINTR ? 0 : -errno;
	if (p[0].revents)
		eventfd_read(b->wake, &count);
	if (__atomic_load_n(&b->stopped, __ATOMIC_ACQUIRE))
		return -ECANCELED;
	err = program(b, &p[1]);
	for (unsigned i = 2; i < n && !err; i += 2) {
		if (p[i].revents && pl_lane_lives(of[i]))
			err = pl_bundle_read(b, of[i]);
		if (err)
			break;
		if ((p[i + 1].revents & (POLLERR | POLLHUP)) && pl_lane_lives(of[i]))
			pl_bundle_lane_ended(b, of[i], EPIPE);
		if ((p[i + 1].revents & POLLOUT) && pl_lane_lives(of[i]))
			pl_bundle_write(b, of[i]);
	}
	return err;
}

int pl_bundle_run(struct pl_bundle *b)
{
	uint64_t looked = pl_now_ns();
	int err;

	do
		err = step(b, &looked);
	while (!err);
	pthread_mutex_lock(&b->lock);
	b->over = true;
	pthread_mutex_unlock(&b->lock);
	return err < 0 ? err : 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The sending pump's rate limit: a token bucket with a burst of one second at
 * most, shared by all threads that write.
 */
#define _GNU_SOURCE
#include <errno.h>

#include "clock.h"
#include "pump_internal.h"

/* 0, or -ECANCELED. */
static int sleep_ms(struct pl_pump *p, int ms)
{
	struct pollfd pfd = { .fd = p->cancel_fd, .events = POLLIN };
	int n = poll(&pfd, 1, ms);

	if (n < 0)
		return errno == EINTR ? 0 : -errno;
	return n ? -ECANCELED : 0;
}

/* Wait until the bytes sent so far are due; rate_lock held. */
static int wait_due(struct pl_pump *p, size_t bytes)
{
	uint64_t now = pl_now_ns(), due, ms;

	due = p->rate_t0_ns +
	      (uint64_t)((double)p->rate_bytes * PL_NS_PER_S / (double)p->cfg.rate);
	if (!p->rate_t0_ns || now > due + PL_NS_PER_S) {
		p->rate_t0_ns = now;
		p->rate_bytes = 0;
		due = now;
	}
	p->rate_bytes += bytes;
	while (now < due) {
		int err;

		ms = (due - now + PL_NS_PER_MS - 1) / PL_NS_PER_MS;
		err = sleep_ms(p, (int)ms);
		if (err)
			return err;
		now = pl_now_ns();
	}
	return 0;
}

int pl_rate_obey(struct pl_pump *p, size_t bytes)
{
	int err;

	if (!p->cfg.rate)
		return 0;
	pthread_mutex_lock(&p->rate_lock);
	err = wait_due(p, bytes);
	pthread_mutex_unlock(&p->rate_lock);
	return err;
}

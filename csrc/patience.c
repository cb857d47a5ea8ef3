/* SPDX-License-Identifier: Apache-2.0 */
/* How long a peer may keep us waiting: see patience.h. */
#define _GNU_SOURCE
#include <errno.h>

#include "clock.h"
#include "patience.h"

int pl_patient_poll(struct pl_patience *p, struct pollfd *pfd, nfds_t n,
		    uint32_t stall_ms)
{
	uint64_t limit = (uint64_t)stall_ms * PL_NS_PER_MS;

	for (;;) {
		uint64_t start = pl_now_ns();
		uint64_t left = limit > p->waited_ns ? limit - p->waited_ns : 0;
		/* Rounded up: never busy, never early. */
		int ms = stall_ms ? (int)((left + PL_NS_PER_MS - 1) / PL_NS_PER_MS) : -1;
		int ready = poll(pfd, n, ms);
		int err = errno;

		p->waited_ns += pl_now_ns() - start;
		if (ready > 0)
			return ready;
		if (ready == 0)
			return -ETIMEDOUT;
		if (err != EINTR)
			return -err;
	}
}

void pl_patience_moved(struct pl_patience *p, size_t bytes)
{
	p->moved += bytes;
	if (p->moved >= PL_PROGRESS)
		*p = (struct pl_patience){ 0 };
}

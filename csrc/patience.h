/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How long a peer may keep us waiting.  A timer that starts anew at every byte
 * lets a peer that drips keep us for ever; so what counts is the sum of the waits
 * for each PL_PROGRESS bytes.  Time in which we do not wait for the peer does not
 * count.  The receiver also begins anew after a SYNC (recv.c): a peer that asks
 * for an answer is alive.
 */
#ifndef PATIENCE_H
#define PATIENCE_H

#include <poll.h>
#include <stddef.h>
#include <stdint.h>

#include "attr.h"

#define PL_PROGRESS 65536u	/* a few hundred bytes a second, by default */

struct pl_patience {		/* of one direction; starts as zeroes */
	uint64_t waited_ns;	/* since the last PL_PROGRESS bytes */
	uint64_t moved;
};

/* poll(2), for the rest of `stall_ms` at most (0: for ever): the number of
   ready descriptors, -ETIMEDOUT, or -errno. */
int pl_patient_poll(struct pl_patience *p, struct pollfd *pfd, nfds_t n,
		    uint32_t stall_ms) PL_CHECKED PL_NONNULL;
/* The peer took or gave so many bytes. */
void pl_patience_moved(struct pl_patience *p, size_t bytes) PL_NONNULL;

#endif

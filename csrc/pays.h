/* SPDX-License-Identifier: Apache-2.0 */
/*
 * pays.h - whether it pays to compress: a judge of the last moments of a stream.
 *
 * Who waits for whom says what the bottleneck is.  A stream that takes nothing most of
 * the time is one: then compression is tried.  But the stream may be slow because of the
 * wire, or because of the peer's CPU or disk, which compression would not help.  So what
 * counts is the data that get through per second: it stays on only while they are more
 * than without it.  No clock and no lock: the caller says what happened.
 */
#ifndef PL_PAYS_H
#define PL_PAYS_H

#include "base.h"

/* What the thread that writes the stream did in a while. */
struct pl_while {
	uint64_t ns;		/* its time, */
	uint64_t waited_ns;	/* of that, until the stream took more */
	uint64_t bytes;		/* of data that it wrote, */
	uint64_t packed_bytes;	/* of these, compressed (their size before) */
};

struct pl_pays {
	struct pl_while now;	/* the window that has not ended */
	bool on;		/* compress */
	bool proven;		/* on, and it was faster than without */
	bool waits;		/* in the last window the stream was the bottleneck */
	unsigned age;		/* windows since `on` changed */
	unsigned pause;		/* windows until the next trial */
	unsigned backoff;	/* the next pause */
	double plain_rate;	/* bytes per second without it, when it was tried last */
};

/* Starts as zeroes: off. */
void pl_pays_add(struct pl_pays *p, const struct pl_while *w) PL_NONNULL;

#endif

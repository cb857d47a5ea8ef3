/* SPDX-License-Identifier: Apache-2.0 */
/*
 * gate.h - the writing end of a connection that several threads share.  Who has
 * entered it writes one whole frame.  Urgent writers go first, so that a message
 * waits for one frame at most, however much a stream has to send.
 */
#ifndef PL_GATE_H
#define PL_GATE_H

#include <sys/uio.h>

#include "base.h"

struct pl_gate;
/* fd: the connection's writing end, which is non-blocking. */
int pl_gate_new(struct pl_gate **out, int fd) PL_CHECKED PL_NONNULL;
void pl_gate_free(struct pl_gate *g);
/* Any thread, as all below: wait `ms` at most, 0: for ever.  -EAGAIN: it took longer. */
int pl_gate_enter(struct pl_gate *g, bool urgent, uint32_t ms) PL_CHECKED PL_NONNULL;
void pl_gate_leave(struct pl_gate *g) PL_NONNULL;
/*
 * Enter, write all of the vector, which is changed, and leave.  `stopped` (any thread
 * sets it, atomically): once it is not 0, what was not begun is not written: *stopped is
 * the result, and the connection goes on.  What was begun is ended, for PL_GATE_GRACE_MS
 * at most.  -ETIME: the peer did not take all of it within that or `silence_ms` (0: for
 * ever).  -ESHUTDOWN: the gate was shut.  After these two, and after another failure, a
 * part may have been written: the connection is of no use.
 */
#define PL_GATE_GRACE_MS 1000u
int pl_gate_write(struct pl_gate *g, struct iovec *iov, unsigned n, bool urgent,
		  uint32_t silence_ms, const int *stopped) PL_CHECKED PL_NONNULL;
/* The connection is dead: each pl_gate_write fails. */
void pl_gate_shut(struct pl_gate *g) PL_NONNULL;

#endif

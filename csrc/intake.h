/* SPDX-License-Identifier: Apache-2.0 */
/*
 * intake.h - the reading end of a connection.  One thread reads it.  DATA of channels
 * that have a receiver here (files_in.h) goes there; all else is the caller's.
 */
#ifndef PL_INTAKE_H
#define PL_INTAKE_H

#include "files_in.h"

struct pl_intake_cfg {
	int fd;			/* of the connection */
	int stop_fd;		/* readable: give up (-ECANCELED) */
	uint32_t silence_ms;	/* without a byte: -ETIMEDOUT; 0: never */
	const uint8_t *early;	/* bytes that were read from it before; copied */
	size_t early_len;
};

struct pl_intake;
int pl_intake_new(struct pl_intake **out, const struct pl_intake_cfg *cfg)
	PL_CHECKED PL_NONNULL;
void pl_intake_free(struct pl_intake *in);
/* Read exactly so many bytes: 0 or -errno; -ENODATA: the connection ended. */
int pl_intake_read(struct pl_intake *in, void *buf, size_t len)
	PL_CHECKED PL_NONNULL_AT(1) PL_WRITES(2, 3);
/*
 * The head of the next frame that is not for one of the receivers; its payload is not
 * read yet.  -EDQUOT: more DATA than a channel's credit.  -EPROTO: DATA after its END.
 */
int pl_intake_head(struct pl_intake *in, uint8_t head[8]) PL_CHECKED PL_NONNULL;
/*
 * Any thread: DATA of the receiver's channel goes to it from the next frame on, or does
 * no more.  The intake is one of its owners for that time.  -EBUSY: there are too many.
 */
int pl_intake_add(struct pl_intake *in, struct pl_files_in *f) PL_CHECKED PL_NONNULL;
void pl_intake_remove(struct pl_intake *in, struct pl_files_in *f) PL_NONNULL;

#endif

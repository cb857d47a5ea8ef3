/* SPDX-License-Identifier: Apache-2.0 */
/*
 * files_out.h - the sender of a file stream (memory images, above all): file -> pieces
 * -> DATA frames of one channel, written straight into the connection.
 */
#ifndef PL_FILES_OUT_H
#define PL_FILES_OUT_H

#include "gate.h"

struct pl_files_out_cfg {
	struct pl_gate *gate;	/* borrowed; outlives the sender */
	uint16_t channel;
	uint64_t window;	/* bytes of credit at the start; PL_FRAME_MOST at least */
	uint64_t rate;		/* bytes of data per second at most; 0: any */
	uint32_t stall_ms;	/* for credit for one frame; 0: for ever */
	uint32_t silence_ms;	/* as of pl_gate_write */
};

struct pl_files_out_stats {
	uint64_t data_bytes;	/* sent */
	uint64_t zero_bytes;	/* of pages that were zero, and were not sent */
};

struct pl_files_out;
int pl_files_out_new(struct pl_files_out **out, const struct pl_files_out_cfg *cfg)
	PL_CHECKED PL_NONNULL;
void pl_files_out_free(struct pl_files_out *o);
/*
 * Send what the file has from *pos on, as pieces of that name, up to the end that it
 * has now; *pos <- that end.  Pages (PL_BLOCK) of zeroes are left out, and so are
 * holes, which read as zeroes; but for a few, so that the peer hears of a sender at work.
 * `name`: of PL_PIECE_NAME bytes at most.
 * -errno with *stage: READ: the file's; WRITE: the connection broke; REPLY: this channel
 * has ended (pl_files_out_stop), or -ETIMEDOUT: the peer gave no credit for `stall_ms`.
 */
int pl_files_out_grow(struct pl_files_out *o, const char *name, uint16_t len,
		      uint16_t mode, int fd, uint64_t *pos, enum pl_stage *stage)
	PL_CHECKED PL_NONNULL;
/* A piece without data: the file of that name is complete, and `size` bytes long; of no
   name: the stream ends. */
int pl_files_out_complete(struct pl_files_out *o, const char *name, uint16_t len,
			  uint16_t mode, uint64_t size, enum pl_stage *stage)
	PL_CHECKED PL_NONNULL;
/* Any thread.  -EDQUOT: more than the window. */
int pl_files_out_credit(struct pl_files_out *o, uint32_t bytes) PL_CHECKED PL_NONNULL;
/* Any thread: all fails with `err` (-errno) from now on; the first one counts. */
void pl_files_out_stop(struct pl_files_out *o, int err) PL_NONNULL;
/* Any thread. */
void pl_files_out_get_stats(const struct pl_files_out *o, struct pl_files_out_stats *to)
	PL_NONNULL;

#endif

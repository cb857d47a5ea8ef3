/* SPDX-License-Identifier: Apache-2.0 */
/*
 * files_in.h - the receiver of a file stream: what the connection's reader puts into a
 * ring, pieces are made of in another thread, and their data written to files.  The
 * ring is as large as the window, so the reader never waits for it.
 *
 * Which file a piece may go to is the caller's to say; it is asked for each piece but
 * those that go on with the same file.
 */
#ifndef PL_FILES_IN_H
#define PL_FILES_IN_H

#include "gate.h"
#include "mux_wire.h"

struct pl_files_in_cfg {
	struct pl_gate *gate;	/* borrowed; outlives the receiver */
	uint16_t channel;
	uint64_t window;	/* bytes that the peer may have under way */
	uint32_t stall_ms;	/* for 64 KiB (patience.h); 0: for ever */
	uint32_t silence_ms;	/* as of pl_gate_write */
};

struct pl_piece {
	uint16_t name_len, mode;
	uint32_t length;	/* of the data, which are not read yet */
	uint64_t pos;
	char name[PL_PIECE_NAME];
};

struct pl_files_in;
int pl_files_in_new(struct pl_files_in **out, const struct pl_files_in_cfg *cfg)
	PL_CHECKED PL_NONNULL;
/* Give it back.  The last one who has it, which may be an intake, frees it. */
void pl_files_in_free(struct pl_files_in *f);
/*
 * The next piece's head and name -> *p.  The data of the one before must be taken.
 * -EMSGSIZE: a name that is too long; -ENODATA: the channel ended; -ETIMEDOUT: too little
 * came; or as pl_files_in_stop says.  *stage as below.
 */
int pl_files_in_next(struct pl_files_in *f, struct pl_piece *p, enum pl_stage *stage)
	PL_CHECKED PL_NONNULL;
/*
 * Write the data of the piece *p to `fd`; then those of the pieces that follow, as long as
 * they have data, the same name, at most `most` bytes, end at `largest` at most, and all
 * of them together have at most *budget bytes, which becomes less.  *p <- the piece after
 * them.  The caller has checked the first one.
 * -errno with *stage: READ: the stream's, as of pl_files_in_next; WRITE: the file's;
 * REPLY: credit could not be given, the connection broke.
 */
int pl_files_in_take(struct pl_files_in *f, int fd, uint32_t most, uint64_t largest,
		     uint64_t *budget, struct pl_piece *p, enum pl_stage *stage)
	PL_CHECKED PL_NONNULL;

/* Any thread: no more will come. */
void pl_files_in_finish(struct pl_files_in *f) PL_NONNULL;
/* Any thread: all fails with `err` (-errno) from now on, unless all has come; what comes
   is dropped. */
void pl_files_in_stop(struct pl_files_in *f, int err) PL_NONNULL;

/* ---- for intake.c: its thread */

/* One more pl_files_in_free is due. */
void pl_files_in_keep(struct pl_files_in *f) PL_NONNULL;
uint16_t pl_files_in_channel(const struct pl_files_in *f) PL_NONNULL;
/* Where in the ring `len` bytes go: iov[0], iov[1]; how many of these are used, or -EDQUOT,
   -EPROTO, or 0: they are dropped. */
int pl_files_in_room(struct pl_files_in *f, uint32_t len, struct iovec iov[2])
	PL_CHECKED PL_NONNULL;
/* They are there. */
void pl_files_in_put(struct pl_files_in *f, uint32_t len) PL_NONNULL;

#endif

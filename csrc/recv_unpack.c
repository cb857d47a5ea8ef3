/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The receiver's decompression, in the thread that reads: the data of a compressed
 * frame come out piece by piece, straight into slots or into the file's page.
 *
 * What is compressed comes from the peer.  So memory does not depend on what it says:
 * a window of WINDOW at most, and ROOM bytes of the stream.  A frame of a dictionary or
 * of an old format, a skippable one, one that is not at its end with its last byte, and
 * one with another length than was announced are all refused.
 */
#include <errno.h>
#include <stdlib.h>

#include "recv_internal.h"
#include "zstd_h.h"

#define WINDOW_LOG 20	/* the largest that a sender of ours makes: 1 MiB */
#define ROOM 65536u
#define SHORTEST 9u	/* both headers, and that of an empty block */

struct unpacker {
	ZSTD_DCtx *ctx;
	uint32_t at, got;	/* of `in`: taken by zstd, read from the stream */
	uint32_t left;		/* of the frame, not read yet */
	uint8_t in[ROOM];
};

static int refill(struct pl_recv *r)
{
	struct unpacker *u = r->unpacker;
	uint32_t len = u->left < ROOM ? u->left : ROOM;
	int err;

	if (!len)
		return -EILSEQ;
	err = pl_recv_payload(r, u->in, len, len == u->left);
	if (err)
		return err;
	u->at = 0;
	u->got = len;
	u->left -= len;
	return 0;
}

/* Begins one (RFC 8878), which neither needs a dictionary nor a larger window.  zstd
   would also take skippable frames, those of its old formats, and, where it needs no
   memory of its own for it, any window. */
static bool is_ours(const struct unpacker *u)
{
	bool single = u->in[4] & 0x20;	/* the window is as large as the data */

	return u->got >= SHORTEST && pl_get32(u->in) == ZSTD_MAGICNUMBER &&
	       !(u->in[4] & 3) && (single || u->in[5] <= (WINDOW_LOG - 10) << 3);
}

int pl_recv_unpack_begin(struct pl_recv *r)
{
	struct unpacker *u = r->unpacker;
	int err;

	if (!u) {
		u = r->unpacker = calloc(1, sizeof(*u));
		if (!u)
			return -ENOMEM;
		u->ctx = ZSTD_createDCtx();
	}
	if (!u->ctx || ZSTD_isError(ZSTD_DCtx_reset(u->ctx, ZSTD_reset_session_only)) ||
	    ZSTD_isError(ZSTD_DCtx_setParameter(u->ctx, ZSTD_d_windowLogMax, WINDOW_LOG)))
		return -ENOMEM;
	u->left = r->head.packed;
	err = refill(r);
	if (err)
		return err;
	return is_ours(u) ? 0 : -EILSEQ;
}

int pl_recv_unpack(struct pl_recv *r, uint8_t *to, uint32_t len, bool last)
{
	struct unpacker *u = r->unpacker;
	ZSTD_outBuffer out = { to, len, 0 };

	for (;;) {
		ZSTD_inBuffer in = { u->in, u->got, u->at };
		size_t before = out.pos;
		size_t ret = ZSTD_decompressStream(u->ctx, &out, &in);
		bool moved = out.pos != before || in.pos != u->at;

		if (ZSTD_isError(ret))
			return -EILSEQ;
		u->at = (uint32_t)in.pos;
		if (!ret)	/* the frame's end: it must be ours, too */
			return last && out.pos == len && u->at == u->got && !u->left ?
				       0 : -EILSEQ;
		if (out.pos == len && !last)
			return 0;
		if (u->at == u->got) {
			int err = refill(r);

			if (err)
				return err;
		} else if (!moved) {
			return -EILSEQ;		/* there are more data than room */
		}
	}
}

void pl_recv_unpack_fini(struct pl_recv *r)
{
	if (r->unpacker)
		ZSTD_freeDCtx(r->unpacker->ctx);
	free(r->unpacker);
}

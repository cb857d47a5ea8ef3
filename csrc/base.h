/* SPDX-License-Identifier: Apache-2.0 */
/*
 * base.h - what several headers share.  pl.h has the rules for all of them.
 */
#ifndef PL_BASE_H
#define PL_BASE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "attr.h"

/* The granule of hashes, the zero test, tracker bitmaps and O_DIRECT. */
#define PL_BLOCK 4096u

struct pl_extent {
	uint64_t start;
	uint64_t end;
};

/* Called just before [start, end) of the source is read; 0 or -errno. */
typedef int (*pl_hook)(void *ctx, uint64_t start, uint64_t end);

/* Where a pump failed. */
enum pl_stage { PL_STAGE_NONE, PL_STAGE_READ, PL_STAGE_WRITE, PL_STAGE_HOOK,
		PL_STAGE_PROTOCOL, PL_STAGE_REPLY };
struct pl_fault {
	enum pl_stage stage;
	uint64_t pos;		/* in the source (READ) or image (WRITE) */
	uint64_t stream;	/* bytes of the stream before the fault */
	uint64_t frame;		/* frames before the fault */
	uint32_t mark, size;	/* the offending header (PROTOCOL) */
	uint32_t type, command;	/* of D2's, the same */
	int32_t reply;		/* the peer's failure (REPLY with -EREMOTEIO) */
	uint32_t lane;		/* 0: the main stream */
};

#endif

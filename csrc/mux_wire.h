/* SPDX-License-Identifier: Apache-2.0 */
/*
 * mux_wire.h - bytes of the agent's protocol as far as the core moves them: frames, and
 * the pieces of a file stream (docs/internals/agent-protocol.md; pyploop/wire/mux.py).
 */
#ifndef PL_MUX_WIRE_H
#define PL_MUX_WIRE_H

#include <endian.h>
#include <string.h>

#include "base.h"

#define PL_FRAME_HEAD 8u	/* kind u8, zero u8, channel u16, length u32 */
#ifndef PL_FRAME_MOST		/* tests take smaller ones */
#define PL_FRAME_MOST 262144u	/* bytes of a DATA frame */
#endif
enum pl_frame_kind { PL_FRAME_DATA = 2, PL_FRAME_CREDIT = 3, PL_FRAME_END = 4 };

#define PL_PIECE_HEAD 16u	/* name length u16, mode u16, data length u32, position u64 */
#define PL_PIECE_NAME 1024u	/* bytes of a name */

struct pl_frame_head {
	uint8_t kind, zero;
	uint16_t channel;
	uint32_t length;
};
struct pl_piece_head {
	uint16_t name, mode;
	uint32_t length;
	uint64_t pos;
};
_Static_assert(sizeof(struct pl_frame_head) == PL_FRAME_HEAD &&
	       offsetof(struct pl_frame_head, channel) == 2 &&
	       offsetof(struct pl_frame_head, length) == 4,
	       "a frame's head has its fields where the protocol says");
_Static_assert(sizeof(struct pl_piece_head) == PL_PIECE_HEAD &&
	       offsetof(struct pl_piece_head, mode) == 2 &&
	       offsetof(struct pl_piece_head, length) == 4 &&
	       offsetof(struct pl_piece_head, pos) == 8,
	       "a piece's head has its fields where the protocol says");

static inline struct pl_frame_head pl_frame(enum pl_frame_kind kind, uint16_t channel,
					    uint32_t length)
{
	return (struct pl_frame_head){ .kind = (uint8_t)kind, .channel = htole16(channel),
				       .length = htole32(length) };
}

static inline struct pl_piece_head pl_piece(uint16_t name, uint16_t mode, uint32_t length,
					    uint64_t pos)
{
	return (struct pl_piece_head){ .name = htole16(name), .mode = htole16(mode),
				       .length = htole32(length), .pos = htole64(pos) };
}

#endif

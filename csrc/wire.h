/* SPDX-License-Identifier: Apache-2.0 */
/*
 * wire.h - the stream dialects: which bytes stand where (docs/internals/protocol.md).
 * D3 is D2 with features that both ends have agreed on.
 */
#ifndef PL_WIRE_H
#define PL_WIRE_H

#include <endian.h>
#include <string.h>

#include "base.h"

enum pl_dialect { PL_DIALECT_NONE, PL_DIALECT_D1, PL_DIALECT_D2 };
#define PL_D1_MARK 0x4cc0ac3du
#define PL_D2_MARK 0x4cc0ac3eu
#define PL_D1_COMPRESSED_MARK 0x4cc0ac50u
/* Of D1, once agreed.  At position 0, right before END: what the image is; at position
   N + 1 a question about nodes of level N. */
#define PL_PROOF_MARK 0x4cc0ac51u
#define PL_CLAIM_SIZE 48u
#define PL_NODES_MAX 256u	/* in one question, 8 bytes each */
#define PL_D1_HEADER 16u
#define PL_PACKED_HEADER 8u	/* behind D1's, in a compressed frame */
#define PL_CODEC_ZSTD 1u
#define PL_D2_HEADER 24u	/* and PL_DIGEST bytes more with digests */
#define PL_SYNC_SIZE 4u		/* bytes of a SYNC's data, in either dialect */
enum pl_feature {	/* what the two ends of D1 may agree on; a set of bits */
	PL_FEATURE_COMPRESSED = 1, PL_FEATURE_PROOF = 2, PL_FEATURE_LANES = 4,
	PL_FEATURE_DIGESTS = 8,	/* no frames: what goes back after the agreement */
	PL_FEATURE_RESUME = 16,
};
/*
 * BARRIER (PL_FEATURE_LANES): on lane 0 the sequence, the number of lanes that take
 * part, and their numbers; on a lane the sequence and the lane's own number.
 */
#define PL_BARRIER_MARK 0x4cc0ac52u
#define PL_BARRIER_HEAD 8u	/* bytes: u32 sequence, u32 count or number */
#define PL_BARRIER_NAMES 64u	/* lanes that one BARRIER names at most, u16 each */
#define PL_LANES 16u		/* lanes beside lane 0 at a time, at most */
/* What the receiver has of a lane that has ended. */
struct pl_lane_end {
	uint32_t lane;
	uint64_t received;	/* bytes of its stream, up to the end of a frame; their
				   data are written */
};
enum pl_packet {	/* D2's types; a SYNC of D1 is a command too */
	PL_PACKET_DATA = 0, PL_PACKET_CMD = 1, PL_PACKET_DATA_ASYNC = 2,
};

/*
 * A digest (MD5) of data that comes in pieces, computed by the caller's code:
 * none is built in.  With `out`, these were the last: write the digest there,
 * and begin anew.  0 or -errno.
 */
#define PL_DIGEST 16u
typedef int (*pl_digest)(void *ctx, const void *data, size_t len, uint8_t *out);

/* The headers as they go over the wire, all numbers little-endian.  Only the
   functions below see them like this. */
struct pl_d1_header {
	uint32_t mark, size;
	uint64_t pos;
};
struct pl_d2_header {
	uint32_t mark, type, size, padding;
	uint64_t pos;
};
struct pl_packed_header {
	uint32_t size;		/* of the data, before they were compressed */
	uint8_t codec, zero[3];
};
_Static_assert(sizeof(struct pl_packed_header) == PL_PACKED_HEADER &&
	       offsetof(struct pl_packed_header, codec) == 4,
	       "a compressed frame has its fields where the protocol says");
_Static_assert(sizeof(struct pl_d1_header) == PL_D1_HEADER &&
	       offsetof(struct pl_d1_header, size) == 4 &&
	       offsetof(struct pl_d1_header, pos) == 8,
	       "D1's header has its fields where the protocol says");
_Static_assert(sizeof(struct pl_d2_header) == PL_D2_HEADER &&
	       offsetof(struct pl_d2_header, type) == 4 &&
	       offsetof(struct pl_d2_header, size) == 8 &&
	       offsetof(struct pl_d2_header, pos) == 16,
	       "D2's header has its fields where the protocol says");

/* A number at any address: a marker, a command, an answer. */
static inline uint32_t pl_get32(const void *from)
{
	uint32_t value;

	memcpy(&value, from, sizeof(value));
	return le32toh(value);
}

static inline uint16_t pl_get16(const uint8_t *from)
{
	uint16_t value;

	memcpy(&value, from, sizeof(value));
	return le16toh(value);
}

static inline uint64_t pl_get64(const void *from)
{
	uint64_t value;

	memcpy(&value, from, sizeof(value));
	return le64toh(value);
}

static inline void pl_put32(uint8_t *to, uint32_t value)
{
	value = htole32(value);
	memcpy(to, &value, sizeof(value));
}

static inline void pl_put64(uint8_t *to, uint64_t value)
{
	value = htole64(value);
	memcpy(to, &value, sizeof(value));
}

static inline void pl_put16(uint8_t *to, uint16_t value)
{
	value = htole16(value);
	memcpy(to, &value, sizeof(value));
}

static inline void pl_d1_put(uint8_t *to, uint32_t mark, uint32_t size, uint64_t pos)
{
	struct pl_d1_header h = {
		.mark = htole32(mark), .size = htole32(size),
		.pos = htole64(pos),
	};

	memcpy(to, &h, sizeof(h));
}

/* Both headers of `size` bytes of data, which zstd has made `packed` bytes. */
static inline void pl_d1_put_packed(uint8_t *to, uint32_t packed, uint64_t pos,
				    uint32_t size)
{
	struct pl_packed_header h = { .size = htole32(size), .codec = PL_CODEC_ZSTD };

	pl_d1_put(to, PL_D1_COMPRESSED_MARK, PL_PACKED_HEADER + packed, pos);
	memcpy(to + PL_D1_HEADER, &h, sizeof(h));
}

static inline struct pl_packed_header pl_packed_get(const uint8_t *from)
{
	struct pl_packed_header h;

	memcpy(&h, from, sizeof(h));
	h.size = le32toh(h.size);
	return h;
}

static inline struct pl_d1_header pl_d1_get(const uint8_t *from)
{
	struct pl_d1_header h;

	memcpy(&h, from, sizeof(h));
	return (struct pl_d1_header){
		.mark = le32toh(h.mark), .size = le32toh(h.size),
		.pos = le64toh(h.pos),
	};
}

static inline void pl_d2_put(uint8_t *to, enum pl_packet type, uint32_t size,
			     uint64_t pos)
{
	struct pl_d2_header h = {
		.mark = htole32(PL_D2_MARK), .type = htole32(type),
		.size = htole32(size), .pos = htole64(pos),
	};

	memcpy(to, &h, sizeof(h));
}

static inline struct pl_d2_header pl_d2_get(const uint8_t *from)
{
	struct pl_d2_header h;

	memcpy(&h, from, sizeof(h));
	return (struct pl_d2_header){
		.mark = le32toh(h.mark), .type = le32toh(h.type),
		.size = le32toh(h.size), .pos = le64toh(h.pos),
	};
}

#endif

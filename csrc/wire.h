/* SPDX-License-Identifier: Apache-2.0 */
/*
 * wire.h - the stream dialects (docs/protocol.md).  D3 is D2 with features that
 * both ends have agreed on.
 */
#ifndef PL_WIRE_H
#define PL_WIRE_H

#include "base.h"

enum pl_dialect { PL_DIALECT_NONE, PL_DIALECT_D1, PL_DIALECT_D2 };
#define PL_D1_MARK 0x4cc0ac3du
#define PL_D2_MARK 0x4cc0ac3eu
#define PL_D1_HEADER 16u
#define PL_D2_HEADER 24u	/* and PL_DIGEST bytes more with digests */
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

#endif

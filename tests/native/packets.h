/* SPDX-License-Identifier: Apache-2.0 */
/* D2's packets as the tests see them, and a digest for D3's. */
#ifndef PACKETS_H
#define PACKETS_H

#include "testing.h"

enum { DATA, CMD, ASYNC };	/* types */

struct packet {
	uint32_t mark, type, size, padding;
	uint64_t pos;
};
_Static_assert(sizeof(struct packet) == 24, "as on the wire");

/* Not MD5: any function of the data and their order will do. */
struct toy {
	uint64_t a, b;
};

static inline int toy_digest(void *ctx, const void *data, size_t len, uint8_t *out)
{
	struct toy *t = ctx;
	const uint8_t *p = data;

	for (size_t i = 0; i < len; i++) {
		t->a = (t->a + p[i]) * 0x9e3779b97f4a7c15ull + 1;
		t->b += t->a ^ (t->a >> 29);
	}
	if (out) {
		memcpy(out, t, PL_DIGEST);
		*t = (struct toy){ 0 };
	}
	return 0;
}

#endif

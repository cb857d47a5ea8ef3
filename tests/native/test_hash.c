/* SPDX-License-Identifier: Apache-2.0 */
/* Hashes: the fast code gives what the reference gives; 0 means zeroes. */
#define _GNU_SOURCE
#include "testing.h"

int main(void)
{
	enum { MAX = 10240 };
	uint8_t *big = must_alloc(MAX + 64);

	fill_random(big, MAX + 64);
	for (size_t len = 0; len <= MAX; len++) {
		/* Its own allocation: ASan sees a read past the end. */
		uint8_t *exact = must_alloc(len);
		uint64_t h;

		memcpy(exact, big + len % 61, len);
		h = pl_hash_block(exact, len);
		OK(h == pl_hash_block_ref(exact, len));
		/* Unaligned memory gives the same. */
		OK(h == pl_hash_block(big + len % 61, len));
		OK(h != PL_HASH_UNKNOWN);
		EQ(h == PL_HASH_ZERO, len == 0);
		EQ(pl_is_zero(exact, len), len == 0);

		memset(exact, 0, len);
		OK(pl_hash_block(exact, len) == PL_HASH_ZERO);
		OK(pl_hash_block_ref(exact, len) == PL_HASH_ZERO);
		OK(pl_is_zero(exact, len));
		if (len) {
			/* One byte anywhere, the first and the last too. */
			size_t at[] = { 0, len - 1, len / 2, rnd(len) };

			for (size_t i = 0; i < 4; i++) {
				exact[at[i]] = 0x80;
				OK(!pl_is_zero(exact, len));
				OK(pl_hash_block(exact, len) != PL_HASH_ZERO);
				exact[at[i]] = 0;
			}
		}
		free(exact);
	}
	/* Every position of a single byte in a block. */
	memset(big, 0, 4096);
	for (size_t i = 0; i < 4096; i++) {
		big[i] = 1;
		OK(!pl_is_zero(big, 4096));
		big[i] = 0;
	}
	/* The published value of XXH3-64 of "a" with seed 0. */
	OK(pl_hash_block_ref("a", 1) == 0xe6c632b61e964e1full);
	printf("kernel %s\n", pl_hash_kernel());
	free(big);
	return 0;
}

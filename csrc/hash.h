/* SPDX-License-Identifier: Apache-2.0 */
/*
 * hash.h - content hashes, and the test for zeroes.
 */
#ifndef PL_HASH_H
#define PL_HASH_H

#include "base.h"

/* 64-bit XXH3; PL_HASH_ZERO if and only if all bytes are zero. */
uint64_t pl_hash_block(const void *data, size_t len)
	PL_NONNULL PL_READS(1, 2);
/* The same value by the portable code: the reference for tests. */
uint64_t pl_hash_block_ref(const void *data, size_t len)
	PL_NONNULL PL_READS(1, 2);
bool pl_is_zero(const void *data, size_t len) PL_NONNULL PL_READS(1, 2);
/* "avx2" or "portable": what these run on this machine. */
const char *pl_hash_kernel(void);

/* 128-bit XXH3 in its canonical form, big-endian. */
#define PL_HASH128 16u
void pl_hash128(const void *data, size_t len, uint8_t out[PL_HASH128])
	PL_NONNULL PL_READS(1, 2);
/* The same by the portable code. */
void pl_hash128_ref(const void *data, size_t len, uint8_t out[PL_HASH128])
	PL_NONNULL PL_READS(1, 2);

#define PL_HASH_ZERO 0ull
#define PL_HASH_UNKNOWN (~0ull)

#endif

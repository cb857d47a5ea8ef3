/* SPDX-License-Identifier: Apache-2.0 */
/* hash.c's function once more, compiled for AVX2; chosen at load time. */
#include "hash_internal.h"

#ifdef PL_HAVE_AVX2
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2")
#endif

#include <immintrin.h>
#define XXH_INLINE_ALL
#define XXH_VECTOR 2 /* XXH_AVX2 */
#include <xxhash.h>

uint64_t pl_hash_avx2(const void *data, size_t len)
{
	return XXH3_64bits(data, len);
}

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#else
typedef int pl_hash_avx2_is_for_x86_64;
#endif

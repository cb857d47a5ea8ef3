/* SPDX-License-Identifier: Apache-2.0 */
/* hash.c's functions once more, compiled for AVX2; chosen at load time. */
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

void pl_hash128_avx2(const void *data, size_t len, uint8_t *out)
{
	XXH128_canonical_t canonical;

	XXH128_canonicalFromHash(&canonical, XXH3_128bits(data, len));
	__builtin_memcpy(out, canonical.digest, sizeof(canonical.digest));
}

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#else
typedef int pl_hash_avx2_is_for_x86_64;
#endif

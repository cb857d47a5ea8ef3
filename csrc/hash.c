/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Content hashes: XXH3 of 64 and 128 bits, from libxxhash's header.  The portable
 * code is the reference; hash_avx2.c is the same code compiled for AVX2.  They
 * give the same values, a test holds them to it, and pl_hash_kernel() says
 * which one runs.
 */
#include <string.h>

#define XXH_INLINE_ALL
#define XXH_VECTOR 0 /* scalar: what every machine has */
#include <xxhash.h>

#include "hash.h"
#include "hash_internal.h"

static uint64_t portable(const void *data, size_t len)
{
	return XXH3_64bits(data, len);
}

static void portable128(const void *data, size_t len, uint8_t out[PL_HASH128])
{
	XXH128_canonical_t canonical;

	XXH128_canonicalFromHash(&canonical, XXH3_128bits(data, len));
	memcpy(out, canonical.digest, PL_HASH128);
}
_Static_assert(sizeof(XXH128_canonical_t) == PL_HASH128, "as many bytes");

/* Resolved at load time: before any thread exists. */
static uint64_t (*hash_fn)(const void *, size_t) = portable;
static void (*hash128_fn)(const void *, size_t, uint8_t *) = portable128;

__attribute__((constructor)) static void choose(void)
{
#ifdef PL_HAVE_AVX2
	__builtin_cpu_init();
	if (__builtin_cpu_supports("avx2")) {
		hash_fn = pl_hash_avx2;
		hash128_fn = pl_hash128_avx2;
	}
#endif
}

const char *pl_hash_kernel(void)
{
	return hash_fn == portable ? "portable" : "avx2";
}

bool pl_is_zero(const void *data, size_t len)
{
	const unsigned char *p = data;
	size_t head = len < 16 ? len : 16;

	/* Most blocks with data show it in their first bytes; past those, a
	   buffer that equals itself shifted by 16 zero bytes is all zero. */
	for (size_t i = 0; i < head; i++)
		if (p[i])
			return false;
	return len <= 16 || memcmp(p, p + 16, len - 16) == 0;
}

static uint64_t finish(uint64_t h)
{
	/* Both values have a meaning of their own, so no data may hash to them. */
	return h == PL_HASH_ZERO || h == PL_HASH_UNKNOWN ? 1 : h;
}

uint64_t pl_hash_block(const void *data, size_t len)
{
	return pl_is_zero(data, len) ? PL_HASH_ZERO : finish(hash_fn(data, len));
}

uint64_t pl_hash_block_ref(const void *data, size_t len)
{
	return pl_is_zero(data, len) ? PL_HASH_ZERO : finish(portable(data, len));
}

void pl_hash128(const void *data, size_t len, uint8_t out[PL_HASH128])
{
	hash128_fn(data, len, out);
}

void pl_hash128_ref(const void *data, size_t len, uint8_t out[PL_HASH128])
{
	portable128(data, len, out);
}

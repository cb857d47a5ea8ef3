/* SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_HASH_INTERNAL_H
#define PL_HASH_INTERNAL_H

#include <stddef.h>
#include <stdint.h>

#include "attr.h"

#if defined(__x86_64__)
#define PL_HAVE_AVX2 1
/* Call only where the CPU has AVX2. */
uint64_t pl_hash_avx2(const void *data, size_t len)
	PL_NONNULL PL_READS(1, 2);
void pl_hash128_avx2(const void *data, size_t len, uint8_t *out)
	PL_NONNULL PL_READS(1, 2);
#endif

#endif

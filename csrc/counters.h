/* SPDX-License-Identifier: Apache-2.0 */
/*
 * counters.h - structs of nothing but uint64_t, which some threads add to while
 * another one reads them as an array.  Each counter is right by itself; they need
 * not be of the same moment.
 */
#ifndef PL_COUNTERS_H
#define PL_COUNTERS_H

#include <stddef.h>
#include <stdint.h>

static inline void pl_count(uint64_t *counter, uint64_t n)
{
	__atomic_fetch_add(counter, n, __ATOMIC_RELAXED);
}

static inline void pl_read_counters(void *to, const void *from, size_t size)
{
	const uint64_t *counter = from;
	uint64_t *copy = to;

	for (size_t i = 0; i < size / sizeof(*copy); i++)
		copy[i] = __atomic_load_n(&counter[i], __ATOMIC_RELAXED);
}

#endif

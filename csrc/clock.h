/* SPDX-License-Identifier: Apache-2.0 */
/*
 * clock.h - the one clock of the core: CLOCK_MONOTONIC in nanoseconds, which is
 * also what the events and the records of times have.
 */
#ifndef PL_CLOCK_H
#define PL_CLOCK_H

#include <stdint.h>
#include <time.h>

#define PL_NS_PER_S 1000000000u
#define PL_NS_PER_MS 1000000u

static inline uint64_t pl_now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * PL_NS_PER_S + (uint64_t)t.tv_nsec;
}

/* For a condition variable whose clock is CLOCK_MONOTONIC. */
static inline struct timespec pl_timespec(uint64_t ns)
{
	return (struct timespec){ .tv_sec = (time_t)(ns / PL_NS_PER_S),
				  .tv_nsec = (long)(ns % PL_NS_PER_S) };
}

#endif

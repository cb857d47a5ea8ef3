/* SPDX-License-Identifier: Apache-2.0 */
/* What the native tests share; each includes it once. */
#ifndef TESTING_H
#define TESTING_H

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "pl.h"

#define KiB 1024ull
#define MiB (1ull << 20)
#define GiB (1ull << 30)
#define DIE(...) (fprintf(stderr, "FAIL %s:%d ", __FILE__, __LINE__), \
		  fprintf(stderr, __VA_ARGS__), fputc('\n', stderr), exit(1))
#define OK(x) do { if (!(x)) DIE("%s (errno %d)", #x, errno); } while (0)
#define EQ(a, b) do { long long a_ = (long long)(a), b_ = (long long)(b); \
		if (a_ != b_) \
			DIE("%s is %lld, not %s (%lld)", #a, a_, #b, b_); } while (0)

/* xorshift64: the same numbers in every run. */
static inline uint64_t after(uint64_t x)
{
	x ^= x << 13;
	x ^= x >> 7;
	return x ^ x << 17;
}

static uint64_t seed = 88172645463325252ull;

static inline uint64_t rnd(uint64_t below)
{
	seed = after(seed);
	return seed % below;
}

/* No byte is zero.  Word by word: sanitizers make each access expensive. */
static inline void fill_random(void *buf, size_t len)
{
	uint64_t x = seed;
	size_t n;

	for (uint8_t *p = buf; len; p += n, len -= n) {
		uint64_t word;

		x = after(x);
		word = x | 0x0101010101010101ull;
		n = len < sizeof(word) ? len : sizeof(word);
		memcpy(p, &word, n);
	}
	seed = x;
}

/* How often, or how much, of what is tried that has random orders or bytes.  ThreadSanitizer
   makes each access expensive; all of it with PYPLOOP_MATRIX (`tests/run nightly`). */
static inline uint64_t so_many(uint64_t all)
{
#ifdef __SANITIZE_THREAD__
	if (!getenv("PYPLOOP_MATRIX"))
		return (all + 2) / 3;
#endif
	return all;
}

/* A nameless file of so many bytes. */
static inline int temp_file(const void *data, size_t len)
{
	int fd = memfd_create("test", MFD_CLOEXEC);

	OK(fd >= 0);
	if (data)
		OK(pwrite(fd, data, len, 0) == (ssize_t)len);
	else
		OK(ftruncate(fd, (off_t)len) == 0);
	return fd;
}

static inline void *must_alloc(size_t n)
{
	void *p = calloc(1, n ? n : 1);

	OK(p);
	return p;
}

#endif

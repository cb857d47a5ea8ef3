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
static uint64_t seed = 88172645463325252ull;

static inline uint64_t rnd(uint64_t below)
{
	seed ^= seed << 13;
	seed ^= seed >> 7;
	seed ^= seed << 17;
	return seed % below;
}

static inline void fill_random(void *buf, size_t len)
{
	uint8_t *p = buf;

	for (size_t i = 0; i < len; i++)
		p[i] = (uint8_t)(rnd(255) + 1);
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

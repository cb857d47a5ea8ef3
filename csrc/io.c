/* SPDX-License-Identifier: Apache-2.0 */
/* Whole transfers: see io.h. */
#define _GNU_SOURCE
#include <assert.h>
#include <errno.h>
#include <sys/mman.h>
#include <unistd.h>

#include "io.h"

/* Or (off_t)pos would cut positions off; build with _FILE_OFFSET_BITS=64. */
_Static_assert(sizeof(off_t) == sizeof(uint64_t), "positions have 64 bits");

int pl_pwrite_full(int fd, const void *buf, size_t len, uint64_t pos)
{
	const char *p = buf;

	assert(len <= INT64_MAX && pos <= INT64_MAX - len);
	while (len) {
		ssize_t n = pwrite(fd, p, len, (off_t)pos);

		if (n < 0) {
			if (errno == EINTR)
				continue;
			return -errno;
		}
		if (n == 0)
			return -ENOSPC;
		p += n;
		pos += (uint64_t)n;
		len -= (size_t)n;
	}
	return 0;
}

int pl_fdatasync(int fd)
{
	/* Not retried after a failure: the kernel reports an error of writeback
	   once and a second call would claim success (fsync(2), NOTES). */
	while (fdatasync(fd) < 0)
		if (errno != EINTR)
			return -errno;
	return 0;
}

#define HUGE ((size_t)2 << 20)

/* What is large is of huge pages, where there are some: the kernel finds the memory
   of a direct request by its pages, and a disk gets each as a segment. */
static size_t unit_of(size_t len)
{
	return len < HUGE ? PL_BLOCK : HUGE;
}

static size_t round_up(size_t len)
{
	size_t unit = unit_of(len);

	return (len + unit - 1) & ~(unit - 1);
}

void *pl_buf_new(size_t len)
{
	size_t size = round_up(len), unit = unit_of(len);
	size_t room = unit == HUGE ? size + HUGE : size, lead;
	char *p = mmap(NULL, room, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (p == MAP_FAILED)
		return NULL;
	if (unit == HUGE) {
		lead = (HUGE - (uintptr_t)p % HUGE) % HUGE;
		if (lead)
			munmap(p, lead);
		if (HUGE - lead)
			munmap(p + lead + size, HUGE - lead);
		p += lead;
		(void)madvise(p, size, MADV_HUGEPAGE);
	}
	return p;
}

void pl_buf_free(void *buf, size_t len)
{
	if (buf)
		munmap(buf, round_up(len));
}

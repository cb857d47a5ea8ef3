/* SPDX-License-Identifier: Apache-2.0 */
/* Huge pages for a new file on tmpfs: see huge.h. */
#define _GNU_SOURCE
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "clock.h"
#include "huge.h"

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25	/* glibc 2.36 has it not */
#endif

/*
 * What 512 single pages cost to allocate, roughly.  A huge page that took
 * longer did not pay: where a hypervisor has taken the free memory back, say,
 * and gives it again page by page.
 */
#define DEAR_NS 700000u
#define MAX_BACKOFF 64u

/* Does this machine map huge pages of the size that we mean? */
static bool size_fits(void)
{
	char text[32] = "";
	int fd = open("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size",
		      O_RDONLY | O_CLOEXEC);
	ssize_t n;

	if (fd < 0)
		return false;
	n = read(fd, text, sizeof(text) - 1);
	close(fd);
	return n > 0 && strtoul(text, NULL, 10) == PL_HUGE;
}

void pl_huge_init(struct pl_huge *h, int fd, unsigned places)
{
	struct statfs fs;
	void *p;

	*h = (struct pl_huge){ .fd = fd, .places = places };
	if (fstatfs(fd, &fs) < 0 || fs.f_type != TMPFS_MAGIC ||
	    (fcntl(fd, F_GETFL) & O_ACCMODE) != O_RDWR || !size_fits())
		return;
	/* Only a mapping at a multiple of its size can be one huge page. */
	p = mmap(NULL, (places + 1ul) * PL_HUGE, PROT_NONE,
		 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (p == MAP_FAILED)
		return;
	h->reserved = p;
	h->at = h->reserved + (PL_HUGE - (uintptr_t)p % PL_HUGE) % PL_HUGE;
}

void pl_huge_fini(struct pl_huge *h)
{
	if (h->reserved)
		munmap(h->reserved, (h->places + 1ul) * PL_HUGE);
	h->reserved = NULL;
}

bool pl_huge_usable(const struct pl_huge *h)
{
	return h->reserved;
}

void pl_huge_regret(struct pl_huge *h)
{
	h->backoff = h->backoff ? 2 * h->backoff : 1;
	if (h->backoff > MAX_BACKOFF)
		h->backoff = MAX_BACKOFF;
	h->skip = h->backoff;
}

void pl_huge_unmap(struct pl_huge *h, unsigned place)
{
	if (h->reserved)
		mmap(h->at + (size_t)place * PL_HUGE, PL_HUGE, PROT_NONE,
		     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED,
		     -1, 0);
}

void pl_huge_punch(const struct pl_huge *h, uint64_t start, uint64_t end)
{
	/* Where this fails the file is right, and larger than it need be. */
	if (start < end)
		(void)!fallocate(h->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
				 (off_t)start, (off_t)(end - start));
}

/* What is mapped past the end of the file cannot be touched. */
bool pl_huge_reach(const struct pl_huge *h, uint64_t end)
{
	struct rlimit limit;
	struct stat st;

	/* Not even asked for when it would bring a signal: the file itself may
	   end before. */
	if (fstat(h->fd, &st) < 0 || getrlimit(RLIMIT_FSIZE, &limit) < 0 ||
	    limit.rlim_cur < end)
		return false;
	return (uint64_t)st.st_size >= end || ftruncate(h->fd, (off_t)end) == 0;
}

uint8_t *pl_huge_make(struct pl_huge *h, uint64_t pos, unsigned place)
{
	uint8_t *at = h->at + (size_t)place * PL_HUGE;
	uint64_t start = pl_now_ns();
	int tries = 3;

	assert(pos % PL_HUGE == 0 && place < h->places);
	if (!h->reserved)
		return NULL;
	if (h->skip) {
		h->skip--;
		return NULL;
	}
	/* A range without any page is refused: it could have been truncated.
	   Allocated and not written, since another writer may just have been
	   there. */
	if (!pl_huge_reach(h, pos + PL_HUGE) ||
	    fallocate(h->fd, FALLOC_FL_KEEP_SIZE, (off_t)pos, 1) < 0 ||
	    mmap(at, PL_HUGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
		 h->fd, (off_t)pos) == MAP_FAILED)
		goto none;
	/* EAGAIN: a page was busy elsewhere, in a list of another CPU, say. */
	while (madvise(at, PL_HUGE, MADV_COLLAPSE) < 0)
		if (errno != EAGAIN || --tries == 0)
			goto none;
	if (pl_now_ns() - start > DEAR_NS)
		pl_huge_regret(h);
	else
		h->backoff /= 2;
	return at;
none:
	pl_huge_unmap(h, place);
	pl_huge_regret(h);
	return NULL;
}

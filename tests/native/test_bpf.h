/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_bpf.h - devices to write to, and a tracker on one with its oracle.
 * Only test_bpf.c includes it.
 */
#define _GNU_SOURCE
#include "bpf_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/blkpg.h>
#include <linux/fs.h>
#include <linux/loop.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MiB (1ull << 20)
#define GiB (1ull << 30)
#define DIE(...) (printf("FAIL %s:%d ", __FILE__, __LINE__), \
		  printf(__VA_ARGS__), putchar('\n'), exit(1))
#define OK(x) do { if (!(x)) DIE("%s: errno %d", #x, errno); } while (0)

static unsigned lost;

struct dev {
	char path[32], part[40];
	int fd, stat;		/* O_DIRECT; /sys/block/X/stat */
	unsigned major, minor;
	uint64_t size;
};

/* A tracker on a device and what it should say. */
struct run {
	struct dev *d;
	struct pl_bpf *t;
	struct pl_bpf_cfg cfg;
	struct pl_bitmap want, want_q;
	struct pl_bpf_snapshot base;
};

/* The accounting is on; a device that is used anew has what it was left with. */
static void account(const struct dev *d)
{
	char sys[64];
	int fd;

	snprintf(sys, sizeof(sys), "/sys/block/%s/queue/iostats", d->path + 5);
	fd = open(sys, O_WRONLY | O_CLOEXEC);
	OK(fd >= 0 && write(fd, "1", 1) == 1);
	close(fd);
}

static void dev_open(struct dev *d)
{
	char sys[64];
	struct stat st;

	account(d);
	d->fd = open(d->path, O_RDWR | O_DIRECT | O_CLOEXEC);
	OK(d->fd >= 0);
	OK(fstat(d->fd, &st) == 0 && ioctl(d->fd, BLKGETSIZE64, &d->size) == 0);
	d->major = major(st.st_rdev);
	d->minor = minor(st.st_rdev);
	snprintf(sys, sizeof(sys), "/sys/block/%s/stat", d->path + 5);
	d->stat = open(sys, O_RDONLY | O_CLOEXEC);
	OK(d->stat >= 0);
}

static void loop_open(struct dev *d, uint64_t size, unsigned flags)
{
	char name[] = "/tmp/test_bpf.XXXXXX";
	int ctl = open("/dev/loop-control", O_RDWR | O_CLOEXEC);
	int img = mkstemp(name), fd, n;
	struct loop_config c = { .fd = (uint32_t)img,
		.info.lo_flags = LO_FLAGS_AUTOCLEAR | flags };

	OK(ctl >= 0 && img >= 0 && ftruncate(img, (off_t)size) == 0);
	unlink(name);
	for (;;) {
		OK((n = ioctl(ctl, LOOP_CTL_GET_FREE)) >= 0);
		snprintf(d->path, sizeof(d->path), "/dev/loop%d", n);
		fd = open(d->path, O_RDWR | O_CLOEXEC);
		OK(fd >= 0);
		if (ioctl(fd, LOOP_CONFIGURE, &c) == 0)
			break;
		OK(errno == EBUSY);	/* somebody else was faster */
		close(fd);
	}
	dev_open(d);
	close(fd), close(img), close(ctl);
}

static void dev_close(struct dev *d)
{
	close(d->fd), close(d->stat);
}

static double now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (double)ts.tv_sec + (double)ts.tv_nsec / 1e9;
}

static void run_open(struct run *r, struct dev *d, enum pl_bpf_source src,
		     uint64_t start, uint64_t end, unsigned shift, unsigned qshift)
{
	char why[256] = "";
	double at = now();
	int ret;

	memset(r, 0, sizeof(*r));
	r->d = d;
	r->cfg = (struct pl_bpf_cfg){ d->major, d->minor, start, end, shift,
				      qshift, src };
	ret = pl_bpf_open(&r->t, &r->cfg, why, sizeof(why));
	if (ret < 0)
		DIE("open %s: %d %s", d->path, ret, why);
	printf("  open %s, %llu MiB at 2^%u/2^%u: %.1f ms\n", d->path,
	       (unsigned long long)((end - start) >> 20), shift, qshift,
	       (now() - at) * 1e3);
	OK(pl_bitmap_init(&r->want, end - start, shift) == 0);
	OK(pl_bitmap_init(&r->want_q, end - start, qshift) == 0);
	OK(pl_bpf_snapshot(r->t, d->stat, 1000, &r->base) == 0 && r->base.stable);
}

static void run_close(struct run *r)
{
	pl_bpf_close(r->t);
	pl_bitmap_fini(&r->want);
	pl_bitmap_fini(&r->want_q);
}

/* [start, end) of the disk was written. */
static void expect(struct run *r, uint64_t start, uint64_t end)
{
	start = start > r->cfg.start ? start - r->cfg.start : 0;
	end = end > r->cfg.start ? end - r->cfg.start : 0;
	if (start < end) {
		pl_bitmap_set(&r->want, start, end);
		pl_bitmap_set(&r->want_q, start, end);
	}
}

static int compare(const char *what, const struct pl_bitmap *want,
		   const struct pl_bitmap *got, bool exact)
{
	uint64_t miss = 0, more = 0;

	for (uint64_t i = 0; i < want->nwords; i++) {
		miss += (uint64_t)__builtin_popcountll(want->word[i] & ~got->word[i]);
		more += (uint64_t)__builtin_popcountll(got->word[i] & ~want->word[i]);
	}
	if (miss || (more && exact))
		printf("  %s: %llu granules missing, %llu too many\n", what,
		       (unsigned long long)miss, (unsigned long long)more);
	if (more && exact)
		DIE("%s marks too much", what);
	return miss != 0;
}

/* Compare, and begin anew.  True: fine.  False: an event was lost. */
static bool settle(struct run *r, bool exact, bool has_stat)
{
	bool done = r->cfg.source != PL_BPF_QUEUE;
	struct pl_bpf_snapshot s = { 0 };
	struct pl_bitmap got, got_q;
	uint64_t dw, dd;
	bool miss = false;

	/* A waiter is woken before the kernel's accounting is seen by all. */
	for (int i = 0; i < 2000; i++) {
		OK(pl_bpf_snapshot(r->t, r->d->stat, 10, &s) == 0);
		dw = s.stat_write - r->base.stat_write -
		     (s.before.done_write - r->base.before.done_write);
		dd = s.stat_discard - r->base.stat_discard -
		     (s.before.done_discard - r->base.before.done_discard);
		if (s.stable && !s.inflight && (!done || (!dw && (!dd || !has_stat))))
			break;
		usleep(100);
	}
	if (!has_stat)
		dd = 0;
	OK(pl_bitmap_init(&got, r->want.size, r->want.shift) == 0);
	OK(pl_bitmap_init(&got_q, r->want_q.size, r->want_q.shift) == 0);
	OK(pl_bpf_peek_done(r->t) <= r->want.nbits);
	OK(pl_bpf_take_done(r->t, &got) == 0);
	OK(pl_bpf_take_queued(r->t, &got_q) == 0);
	OK(pl_bpf_peek_done(r->t) == 0);
	if (done)
		miss = compare("done", &r->want, &got, exact);
	else
		OK(pl_bitmap_count(&got) == 0);
	if (compare("queued", &r->want_q, &got_q, exact))
		DIE("queued marks are missing");
	if (done && (int64_t)dw < 0)
		DIE("more sectors summed than the kernel knows of");
	if (done && (dw || dd)) {
		printf("  lost: %llu sectors written, %llu discarded\n",
		       (unsigned long long)dw, (unsigned long long)dd);
		lost++;
	} else if (miss) {
		DIE("marks are missing though no event was lost");
	}
	OK(pl_bpf_take_queued(r->t, &got_q) == 0);
	r->base = s;
	pl_bitmap_fini(&got);
	pl_bitmap_fini(&got_q);
	pl_bitmap_zero(&r->want);
	pl_bitmap_zero(&r->want_q);
	return !done || !(dw || dd);
}

static void *buffer(void)
{
	static void *b;

	if (!b) {
		OK(posix_memalign(&b, 4096, MiB) == 0);
		memset(b, 0x5a, MiB);
	}
	return b;
}

static void wr(struct run *r, uint64_t off, uint64_t len)
{
	OK(pwrite(r->d->fd, buffer(), len, (off_t)off) == (ssize_t)len);
	expect(r, off, off + len);
}

static void discard(struct run *r, unsigned long op, uint64_t off, uint64_t len)
{
	uint64_t range[2] = { off, len };

	if (ioctl(r->d->fd, op, range) < 0) {
		printf("  ioctl %lx: %s (not tested)\n", op, strerror(errno));
		return;
	}
	expect(r, off, off + len);
}

static void random_writes(struct run *r, unsigned n, uint64_t unit)
{
	for (unsigned i = 0; i < n; i++) {
		uint64_t len = (1 + (uint64_t)random() % (random() % 8 ? 16 : 256));
		uint64_t off = (uint64_t)random() % (r->d->size / unit - len);

		wr(r, off * unit, len * unit);
	}
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_bpf.c - the BPF tracker against real devices and an oracle.
 *
 *	gcc -std=gnu11 -g -fsanitize=address,undefined -I csrc -pthread
 *	    tests/native/test_bpf.c csrc/b*.c
 *
 * Exit: 0 good, 1 bad, 77 skipped.  Loop devices clear themselves when
 * their last descriptor is closed; the zram device is removed at exit.
 *
 * On some machines a completion is lost now and then, and the kernel's
 * accounting tells so.  Marks may be missing only then, and the attempt is
 * repeated; missing without such a shortfall is a failure at once.
 */
#include "test_bpf.h"
#include "test_bpf_units.h"

/* Every kind of write that a raw device takes, against the oracle. */
static void test_raw(struct dev *d, enum pl_bpf_source src, uint64_t start,
		     uint64_t end, unsigned shift, unsigned qshift,
		     uint64_t unit, bool has_stat)
{
	struct run r;
	uint64_t mid = d->size / 2;
	int fd;

	run_open(&r, d, src, start, end, shift, qshift);
	for (int attempt = 0; ; attempt++) {
		if (attempt == 4)
			DIE("events are lost all the time");
		random_writes(&r, 200, unit);
		if (!settle(&r, true, has_stat))
			continue;
		OK((fd = open(d->path, O_RDWR)) >= 0);
		OK(pwrite(fd, buffer(), MiB, (off_t)mid) == (ssize_t)MiB);
		OK(fsync(fd) == 0);
		close(fd);
		expect(&r, mid, mid + MiB);
		if (!settle(&r, true, has_stat))
			continue;
		OK(fsync(d->fd) == 0);	/* a flush marks nothing */
		OK(pread(d->fd, buffer(), MiB, 0) == (ssize_t)MiB);
		if (!settle(&r, true, has_stat))
			continue;
		discard(&r, BLKDISCARD, 4 * MiB + 4096, 9 * MiB);
		if (!settle(&r, true, has_stat))
			continue;
		discard(&r, BLKZEROOUT, mid - 40960, 3 * MiB + 8192);
		if (!settle(&r, true, has_stat))
			continue;
		discard(&r, BLKDISCARD, 0, d->size);
		if (settle(&r, true, has_stat))
			break;
	}
	run_close(&r);
}

static void test_partition(void)
{
	struct blkpg_partition p = { .start = 5 * (int64_t)MiB + 512,
				     .length = 20 * (int64_t)MiB, .pno = 2 };
	struct blkpg_ioctl_arg a = { .op = BLKPG_ADD_PARTITION,
				     .datalen = sizeof(p), .data = &p };
	uint64_t start = (uint64_t)p.start;
	struct dev d, part;
	struct run r;

	loop_open(&d, 64 * MiB, LO_FLAGS_PARTSCAN);
	if (ioctl(d.fd, BLKPG, &a) < 0) {
		printf("  no partitions on loop: %s\n", strerror(errno));
		dev_close(&d);
		return;
	}
	part = d;
	snprintf(part.part, sizeof(part.part), "%sp2", d.path);
	part.fd = open(part.part, O_RDWR | O_DIRECT | O_CLOEXEC);
	OK(part.fd >= 0);
	run_open(&r, &d, PL_BPF_RQ, start, start + (uint64_t)p.length, 12, 14);
	do {	/* around the edges, by way of the disk and of the partition */
		wr(&r, start - 4096, 4096);
		wr(&r, start - 512, 1024);
		wr(&r, start + 20 * MiB - 512, 8192);
		wr(&r, start + 20 * MiB, 8192);
		wr(&r, 0, MiB);
		OK(pwrite(part.fd, buffer(), 512, 8192 - 512) == 512);
		expect(&r, start + 8192 - 512, start + 8192);
		OK(pwrite(part.fd, buffer(), 4096, 20 * MiB - 4096) == 4096);
		expect(&r, start + 20 * MiB - 4096, start + 20 * MiB);
	} while (!settle(&r, true, true));
	do
		discard(&r, BLKDISCARD, 0, 64 * MiB);
	while (!settle(&r, true, true));
	run_close(&r);
	close(part.fd);
	dev_close(&d);
}

/* Discards of up to 4 GiB each are marked wholly, and are not "everything". */
static void test_huge(void)
{
	struct pl_bpf_counters c;
	struct dev d;
	struct run r;

	loop_open(&d, 40 * GiB, 0);
	run_open(&r, &d, PL_BPF_RQ, 0, d.size, 12, 16);
	do
		discard(&r, BLKDISCARD, GiB + 4096, 4 * GiB);
	while (!settle(&r, true, true));
	do
		discard(&r, BLKDISCARD, 3 * 4096, d.size - 9 * 4096);
	while (!settle(&r, true, true));
	pl_bpf_counters(r.t, &c);
	OK(c.everything == 0);
	run_close(&r);
	dev_close(&d);
}

static void snapshot_blocks(int fd, uint64_t size, uint64_t *sum)
{
	for (uint64_t i = 0; i < size / 4096; i++) {
		uint64_t h = 1469598103934665603ull, *w = buffer();

		OK(pread(fd, w, 4096, (off_t)(i * 4096)) == 4096);
		for (int k = 0; k < 512; k++)
			h = (h ^ w[k]) * 1099511628211ull;
		sum[i] = h;
	}
}

static void sh(const char *fmt, const char *a, const char *b)
{
	char cmd[512];

	snprintf(cmd, sizeof(cmd), fmt, a, b);
	if (system(cmd) != 0)
		DIE("%s", cmd);
}

/* ext4 does as it likes: whatever differs afterwards must be marked. */
static void test_ext4(void)
{
	uint64_t n = 128 * MiB / 4096, *a, *b;
	char dir[] = "/tmp/test_bpf_mnt.XXXXXX";
	struct dev d;
	struct run r;
	bool good = false;

	a = calloc(n, 8), b = calloc(n, 8);
	OK(a && b && mkdtemp(dir));
	loop_open(&d, n * 4096, 0);
	sh("mkfs.ext4 -q -F %s", d.path, "");
	run_open(&r, &d, PL_BPF_RQ, 0, d.size, 12, 16);
	for (int i = 0; i < 4 && !good; i++) {
		snapshot_blocks(d.fd, d.size, a);
		OK(mount(d.path, dir, "ext4", 0, "") == 0);
		if (system(NULL)) {
			char cmd[512];
			int ret;

			snprintf(cmd, sizeof(cmd), "cd %s && cp -r /usr/include/linux . &&"
				 " head -c 20M /dev/urandom > big && sync && rm -r linux &&"
				 " fstrim . ; head -c 3M /dev/urandom > big", dir);
			ret = system(cmd);
			OK(umount(dir) == 0 && ret == 0);
		}
		snapshot_blocks(d.fd, d.size, b);
		for (uint64_t k = 0; k < n; k++)
			if (a[k] != b[k])
				expect(&r, k * 4096, (k + 1) * 4096);
		printf("  ext4: %llu MiB differ\n",
		       (unsigned long long)(pl_bitmap_bytes(&r.want) >> 20));
		good = settle(&r, false, true);
	}
	OK(good);
	rmdir(dir);
	free(a), free(b);
	run_close(&r);
	dev_close(&d);
}

static struct dev zram = { .fd = -1 };
static char zram_id[12];

static void zram_remove(void)
{
	int fd;

	if (!*zram_id)
		return;
	if (zram.fd >= 0)
		dev_close(&zram);	/* else it is busy */
	zram.fd = -1;
	fd = open("/sys/class/zram-control/hot_remove", O_WRONLY);
	if (fd < 0 || write(fd, zram_id, strlen(zram_id)) < 0)
		printf("zram%s is left behind: %s\n", zram_id, strerror(errno));
	*zram_id = '\0';
	close(fd);
}

static void test_zram(void)
{
	int fd = open("/sys/class/zram-control/hot_add", O_RDONLY);

	if (fd < 0 || read(fd, zram_id, sizeof(zram_id) - 1) <= 0) {
		printf("  no zram: %s\n", strerror(errno));
		return;
	}
	close(fd);
	zram_id[strcspn(zram_id, "\n")] = '\0';
	atexit(zram_remove);
	snprintf(zram.path, sizeof(zram.path), "/dev/zram%s", zram_id);
	sh("echo 64M > /sys/block/%s/disksize", zram.path + 5, "");
	dev_open(&zram);
	/* zram does not account discards */
	test_raw(&zram, PL_BPF_BIO, 0, zram.size, 12, 16, 4096, false);
	test_raw(&zram, PL_BPF_QUEUE, 0, zram.size, 12, 13, 4096, false);
	zram_remove();
}

int main(void)
{
	struct dev d;

	setvbuf(stdout, NULL, _IOLBF, 0);
	if (geteuid() != 0 || access(PL_BTF_VMLINUX, R_OK) != 0 ||
	    access("/dev/loop-control", R_OK | W_OK) != 0) {
		printf("skipped: needs root, BTF and loop devices\n");
		return 77;
	}
	printf("BTF reader\n"), test_btf();
	printf("refusals\n"), test_refusals();
	loop_open(&d, 64 * MiB, 0);
	printf("loop, whole disk\n");
	test_raw(&d, PL_BPF_RQ, 0, d.size, 12, 16, 512, true);
	printf("loop, ranges and granules\n");
	test_raw(&d, PL_BPF_RQ, 5 * MiB + 512, 33 * MiB - 512, 12, 12, 512, true);
	test_raw(&d, PL_BPF_RQ, 512, 1024, 12, 20, 512, true);
	test_raw(&d, PL_BPF_RQ, 0, 64 * MiB - 512, 23, 30, 512, true);
	test_raw(&d, PL_BPF_QUEUE, 4096, d.size, 12, 14, 512, true);
	printf("forget, everything\n"), test_forget(&d);
	dev_close(&d);
	printf("partition\n"), test_partition();
	printf("huge discards\n"), test_huge();
	printf("ext4\n"), test_ext4();
	printf("zram\n"), test_zram();
	printf("good; %u attempts repeated for lost events\n", lost);
	return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Direct writes, and targets with old contents: streams of every kind of frame into real
 * files, by several writers at once.  A file system that has no O_DIRECT, as well.
 */
#define _GNU_SOURCE
#include <signal.h>

#include "stream.h"

#define WRITERS 4u

/* An open file on a disk, if the folder of temporary files is on one. */
static int disk_file(void)
{
	const char *folder = getenv("TMPDIR");
	int fd = open(folder ? folder : "/var/tmp", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);

	OK(fd >= 0);
	return fd;
}

static bool is_direct(int fd)
{
	return fcntl(fd, F_GETFL) & O_DIRECT;
}

static struct pl_recv *receiver(int in, int out, uint32_t memory, uint64_t old_end)
{
	struct pl_recv_cfg cfg = {
		.in_fd = in, .out_fd = out, .slots = 6, .slot_size = 64 * KiB,
		.max_frame = 64u << 20, .window = 64 * KiB, .sparse = 1, .reply_fd = -1,
		.direct = { .block = 512, .memory = memory }, .writers = WRITERS,
		.ahead = 1, .old_end = old_end, .fill = old_end > 0,
	};
	struct pl_recv *r;

	EQ(pl_recv_new(&r, &cfg), 0);
	return r;
}

/* Receive; the file is then `image`, and what it had past that, if it had something. */
static struct pl_recv_stats received(const struct stream *s, int out, const uint8_t *image,
				     size_t size, uint32_t memory, uint64_t old_end)
{
	size_t total = old_end > size ? old_end : size;
	uint8_t *got = must_alloc(total);
	struct pl_recv_stats stats;
	struct pl_recv_msg msg;
	struct pl_fault fault;
	struct pl_recv *r;
	struct feeder f;
	int in = open_feed(&f, s, 65536, 0, false), ret;

	r = receiver(in, out, memory, old_end);
	while ((ret = pl_recv_run(r, &msg, &fault)) == PL_RECV_SYNC)
		OK(!is_direct(out));	/* the caller syncs it, and may read */
	EQ(ret, PL_RECV_END);
	OK(!is_direct(out));
	pl_recv_stats(r, &stats);
	EQ(stats.image_size, size);
	pl_recv_free(r);
	OK(fdatasync(out) == 0);
	if (!old_end)
		OK(ftruncate(out, (off_t)size) == 0);
	OK(pread(out, got, total, 0) == (ssize_t)total);
	OK(!memcmp(got, image, size));
	for (size_t i = size; i < total; i++)
		EQ(got[i], 0xa5);
	close(in);
	pthread_join(f.thread, NULL);
	free(got);
	return stats;
}

/* Frames of every size and position, over each other, with a SYNC now and then. */
static void make(struct stream *s, uint8_t *image, size_t size)
{
	uint8_t *buf = must_alloc(size);

	fill_random(buf, size / 2);
	for (int i = 0; i < 1500; i++) {
		uint64_t pos = rnd(size), from = rnd(size);
		uint32_t len = (uint32_t)rnd(rnd(8) ? 9000 : 400000) + 1;

		if (rnd(2)) {	/* as most are: whole blocks */
			pos -= pos % PL_BLOCK;
			len += PL_BLOCK - len % PL_BLOCK;
		}
		if (rnd(3) == 0)	/* again, at once: the later one must win */
			pos = size / 2;
		if (pos + len > size)
			len = (uint32_t)(size - pos);
		if (from + len > size)
			from = size - len;
		if (len == 4 || len == 0)
			continue;
		memcpy(image + pos, buf + from, len);
		frame(s, pos, buf + from, len);
		if (rnd(300) == 0)
			frame(s, 0, "sync", 4);
	}
	memcpy(image + size - 7, "the end", 7);
	frame(s, size - 7, "the end", 7);
	frame(s, 0, NULL, 0);
	free(buf);
}

static void any_stream(size_t size)
{
	uint8_t *image = must_alloc(size), *old = must_alloc(size + MiB);
	struct stream s = { 0 };
	struct pl_recv_stats stats;
	int out = disk_file(), takes;

	takes = fcntl(out, F_SETFL, O_DIRECT) == 0;
	OK(fcntl(out, F_SETFL, 0) == 0);
	make(&s, image, size);
	stats = received(&s, out, image, size, 512, 0);
	OK(stats.direct_bytes > 0 || !takes);
	OK(stats.direct_bytes < stats.written_bytes);
	EQ(stats.written_bytes + stats.hole_bytes, stats.data_bytes);
	EQ(stats.filled_bytes, 0);

	/* Onto what was there before. */
	memset(old, 0xa5, size + MiB);
	OK(pwrite(out, old, size + MiB, 0) == (ssize_t)(size + MiB));
	received(&s, out, image, size, 512, size + MiB);
	close(out);

	/* tmpfs has O_DIRECT since Linux 6.6, and refuses it before. */
	out = temp_file(NULL, 0);
	received(&s, out, image, size, 512, 0);
	close(out);
	free(s.data);
	free(image);
	free(old);
}

/* A descriptor that does not take the flag: all goes through the page cache. */
static void refused(void)
{
	struct pl_direct d;
	int fd = open("/dev/null", O_WRONLY | O_CLOEXEC);
	uint8_t *data = pl_buf_new(PL_BLOCK);

	OK(fd >= 0 && data);
	EQ(pl_direct_init(&d, fd, &(struct pl_direct_cfg){ 512, 512 }), 0);
	pl_direct_begin(&d);
	OK(d.refused && !is_direct(fd));
	pl_direct_end(&d);
	pl_direct_fini(&d);
	pl_buf_free(data, PL_BLOCK);
	close(fd);
}

struct seen {
	int fd;
	uint32_t bytes;		/* written buffered */
};

static int see(void *ctx, const uint8_t *data, uint32_t len, uint64_t pos)
{
	struct seen *seen = ctx;

	(void)data;
	(void)pos;
	OK(!is_direct(seen->fd));	/* it would be refused */
	seen->bytes += len;
	return 0;
}

/* What is no whole block, or not aligned in memory, goes buffered; the rest direct. */
static void odd_addresses(void)
{
	struct pl_direct d;
	uint8_t *data = pl_buf_new(16 * PL_BLOCK);
	int fd = disk_file();
	struct seen seen = { .fd = fd };

	OK(data);
	EQ(pl_direct_init(&d, fd, &(struct pl_direct_cfg){ 512, 512 }), 0);
	pl_direct_begin(&d);
	if (!d.refused) {
		/* Whole blocks in memory that is not aligned: buffered, not EINVAL. */
		EQ(pl_direct_write(&d, data + 8, 2 * PL_BLOCK, 0, see, &seen), 0);
		EQ(seen.bytes, 2 * PL_BLOCK);
		EQ(d.bytes, 0);
		/* A head, blocks, a tail. */
		seen.bytes = 0;
		EQ(pl_direct_write(&d, data + 100, 5 * PL_BLOCK, 100, see, &seen), 0);
		EQ(d.bytes, 4 * PL_BLOCK);
		EQ(seen.bytes, PL_BLOCK);
		OK(is_direct(fd));
	}
	pl_direct_end(&d);
	OK(!is_direct(fd));
	pl_direct_fini(&d);
	pl_buf_free(data, 16 * PL_BLOCK);
	close(fd);
}

/* Room that was allocated ahead of data is given back where no data came. */
static void ahead(void)
{
	size_t data = 12 * MiB, gap = 40 * MiB, size = data + gap + data;
	uint8_t *image = must_alloc(size);
	struct stream s = { 0 };
	struct stat st;
	int out = disk_file();

	fill_random(image, data);
	memcpy(image + data + gap, image, data);
	for (size_t at = 0; at < data; at += 64 * KiB)
		frame(&s, at, image + at, 64 * KiB);
	for (size_t at = data + gap; at < size; at += 64 * KiB)
		frame(&s, at, image + at, 64 * KiB);
	frame(&s, 0, NULL, 0);
	received(&s, out, image, size, 512, 0);
	OK(fstat(out, &st) == 0);
	OK((uint64_t)st.st_blocks * 512 < 2 * data + MiB);
	close(out);
	free(image);
	free(s.data);
}

struct room {
	int out;
	uint64_t most;		/* bytes of the file past what is being claimed */
};

static int see_room(void *ctx, uint64_t start, uint64_t end)
{
	struct room *room = ctx;
	struct stat st;

	(void)start;
	OK(fstat(room->out, &st) == 0);
	if ((uint64_t)st.st_size > end && (uint64_t)st.st_size - end > room->most)
		room->most = (uint64_t)st.st_size - end;
	return 0;
}

/* A local copy, by several threads: room comes before the data, as long as they come
   without a gap.  What was zero is a hole in the end, and nothing lies past the end. */
static void copied_ahead(void)
{
	size_t data = 12 * MiB, gap = 40 * MiB, size = data + gap + data + 777;
	uint8_t *image = must_alloc(size), *got = must_alloc(size);
	struct room room = { .out = disk_file() };
	struct pl_pump_stats stats;
	struct pl_fault fault;
	struct pl_known known;
	struct pl_pump *p;
	struct stat st;
	int src;

	fill_random(image, data);
	memset(image + 5 * MiB, 0, MiB);
	memcpy(image + data + gap, image, data);
	memcpy(image + size - 777, image, 777);
	src = temp_file(image, size);
	EQ(pl_known_init(&known, size, 12), 0);
	EQ(pl_pump_new(&p, &(struct pl_pump_cfg){
		.src_fd = src, .size = size, .align = 1, .out_fd = room.out,
		.sink = PL_SINK_FILE, .direct = { 512, 512 }, .ahead = 1,
		.cluster = 64 * KiB, .slots = 8, .readers = 3, .known = &known,
		.hook = see_room, .hook_ctx = &room }), 0);
	for (int pass = 0; pass < 2; pass++) {
		struct pl_extent all = { 0, size };

		EQ(pl_pump_pass(p, &all, 1, PL_PASS_SKIP_ZERO | PL_PASS_LAST |
				(pass ? PL_PASS_CHANGED : PL_PASS_HOOK), &fault), 0);
		OK(!is_direct(room.out));
		OK(fstat(room.out, &st) == 0);
		OK((uint64_t)st.st_size >= size && (uint64_t)st.st_size < size + PL_BLOCK);
		OK((uint64_t)st.st_blocks * 512 < 2 * (data - MiB) + MiB);
		OK(pread(room.out, got, size, 0) == (ssize_t)size);
		OK(!memcmp(got, image, size));
		/* Then a block in the middle, and one in a hole. */
		image[data / 2 + 10] ^= 1;
		image[data + gap / 2] = 7;
		OK(pwrite(src, image, size, 0) == (ssize_t)size);
	}
	pl_pump_stats(p, &stats);
	EQ(stats.data_bytes, 2 * (data - MiB) + 777 + 2 * PL_BLOCK + 777);
	OK(room.most >= MiB || !stats.direct_bytes);
	/* One whose read fails: those that wait for their turn behind it end, too. */
	OK(ftruncate(src, (off_t)data / 2) == 0);
	EQ(pl_pump_pass(p, &(struct pl_extent){ 0, size }, 1, 0, &fault), -ENODATA);
	pl_pump_free(p);
	pl_known_fini(&known);
	close(room.out);
	close(src);
	free(image);
	free(got);
}

static void bad_configs(void)
{
	static const struct pl_direct_cfg bad[] = {
		{ 512, 0 }, { 0, 512 }, { 513, 512 }, { 512, 3 }, { 1u << 17, 512 },
	};
	struct pl_direct d;

	for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); i++)
		EQ(pl_direct_init(&d, 0, &bad[i]), -EINVAL);
}

int main(void)
{
	signal(SIGPIPE, SIG_IGN);
	bad_configs();
	refused();
	odd_addresses();
	any_stream(5 * MiB + 123);
	any_stream(300 * KiB);
	ahead();
	copied_ahead();
	return 0;
}

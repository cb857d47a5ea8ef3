/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The short cuts of tmpfs: huge pages on both sides, and page cache into a
 * pipe.  Files here are memfds, which are files of tmpfs.
 */
#define _GNU_SOURCE
#include <signal.h>
#include <sys/resource.h>

#include "huge.h"
#include "stream.h"

#define SIZE (40 * MiB + 12345)
#define FRAME (256 * KiB)

static uint64_t allocated(int fd)
{
	struct stat st;

	OK(fstat(fd, &st) == 0);
	return (uint64_t)st.st_blocks * 512;
}

static void same(int fd, const uint8_t *image, size_t size)
{
	uint8_t *got = must_alloc(size);

	OK(ftruncate(fd, (off_t)size) == 0);
	OK(pread(fd, got, size, 0) == (ssize_t)size);
	OK(!memcmp(got, image, size));
	free(got);
}

/* Does this kernel make them? */
static bool huge_pages(void)
{
	int fd = temp_file(NULL, 0);
	struct pl_huge h;
	bool made = false;

	pl_huge_init(&h, fd, 1);
	for (int i = 0; i < 100 && !made; i++)
		made = pl_huge_make(&h, PL_HUGE * (uint64_t)i, 0);
	pl_huge_fini(&h);
	close(fd);
	return made;
}

static uint64_t receive(const struct stream *s, size_t piece, int out)
{
	struct pl_recv_cfg cfg = {
		.out_fd = out, .slots = 4, .slot_size = FRAME, .max_frame = 64u << 20,
		.sparse = 1, .reply_fd = -1,
	};
	struct pl_recv_stats stats;
	struct pl_recv_msg msg;
	struct pl_fault fault;
	struct pl_recv *r;
	struct feeder f;

	cfg.in_fd = open_feed(&f, s, piece, 0, false);
	EQ(pl_recv_new(&r, &cfg), 0);
	EQ(pl_recv_run(r, &msg, &fault), PL_RECV_END);
	pl_recv_stats(r, &stats);
	EQ(stats.written_bytes + stats.hole_bytes, stats.data_bytes);
	pl_recv_free(r);
	close(cfg.in_fd);
	pthread_join(f.thread, NULL);
	return stats.huge_bytes;
}

/* Data without gaps, zeroes in it, a gap within a page, parts that come again
   while their page is open and later, and an end that is no block's. */
static void received_in_place(bool huge)
{
	uint8_t *image = must_alloc(SIZE), *again = must_alloc(100000);
	struct stream s = { 0 };
	uint64_t made;
	int out;

	fill_random(image, SIZE);
	fill_random(again, 100000);
	memset(image + 9 * MiB, 0, MiB);	/* of that a hole is made */
	memset(image + 21 * MiB, 0, 4096);	/* and of that none */
	memset(image + 25 * MiB + 77, 0, 5 * MiB);	/* the gap */
	for (uint64_t at = 0; at < SIZE; at += FRAME) {
		uint64_t end = at + FRAME < SIZE ? at + FRAME : SIZE;

		if (at >= 25 * MiB && end <= 30 * MiB) {
			if (at == 25 * MiB)
				frame(&s, at, image + at, 77);
			continue;
		}
		frame(&s, at, image + at, (uint32_t)(end - at));
		if (at == 15 * MiB) {
			memcpy(image + at - 5000, again, 100000);
			frame(&s, at - 5000, again, 100000);
			frame(&s, at + 95000, image + at + 95000,
			      (uint32_t)(FRAME - 95000));
		}
	}
	memcpy(image + 3 * MiB + 1, again, 100000);
	frame(&s, 3 * MiB + 1, again, 100000);
	memset(image + 35 * MiB, 0, MiB);
	frame(&s, 35 * MiB, image + 35 * MiB, MiB);
	frame(&s, 0, NULL, 0);
	for (size_t piece = 4097; piece < 100000; piece *= 5) {
		out = temp_file(NULL, 0);
		made = receive(&s, piece, out);
		OK(!huge || made);
		same(out, image, SIZE);
		OK(allocated(out) <= SIZE - 7 * MiB + 64 * KiB + 8192);
		close(out);
	}
	free(s.data);
	free(image);
	free(again);
}

/* A limit on the size of files, which the image keeps, is not run into by
   making the file larger for a while. */
static void limited(void)
{
	struct rlimit old, limit;
	uint8_t *image = must_alloc(SIZE);
	struct stream s = { 0 };
	int out = temp_file(NULL, 0);

	OK(getrlimit(RLIMIT_FSIZE, &old) == 0);
	limit = (struct rlimit){ SIZE, old.rlim_max };
	fill_random(image, SIZE);
	for (uint64_t at = 0; at < SIZE; at += FRAME)
		frame(&s, at, image + at, (uint32_t)(SIZE - at < FRAME ?
						     SIZE - at : FRAME));
	frame(&s, 0, NULL, 0);
	signal(SIGXFSZ, SIG_DFL);
	OK(setrlimit(RLIMIT_FSIZE, &limit) == 0);
	receive(&s, 65536, out);
	OK(setrlimit(RLIMIT_FSIZE, &old) == 0);
	same(out, image, SIZE);
	close(out);
	free(s.data);
	free(image);
}

/* A pipe that is given up in the middle of a page. */
static void broken_off(void)
{
	uint8_t *data = must_alloc(8 * MiB);
	struct stream s = { 0 };
	int out = temp_file(NULL, 0);
	struct pl_recv_cfg cfg = {
		.out_fd = out, .slots = 4, .slot_size = FRAME, .max_frame = 64u << 20,
		.sparse = 1, .reply_fd = -1,
	};
	struct pl_recv_msg msg;
	struct pl_fault fault;
	struct pl_recv *r;
	struct feeder f;

	fill_random(data, 8 * MiB);
	frame(&s, 0, data, 8 * MiB);
	s.len -= 3 * MiB + 5;
	cfg.in_fd = open_feed(&f, &s, 65536, 0, false);
	EQ(pl_recv_new(&r, &cfg), 0);
	EQ(pl_recv_run(r, &msg, &fault), -ENODATA);
	EQ(fault.stage, PL_STAGE_READ);
	pl_recv_free(r);
	close(cfg.in_fd);
	pthread_join(f.thread, NULL);
	close(out);
	free(s.data);
	free(data);
}

/* While a page is made others write: in it, and past it. */
static void made_under_other_writers(bool huge)
{
	int fd = temp_file(NULL, 0), src = temp_file(NULL, SIZE);
	struct pl_known known;
	struct pl_pump *p;
	struct pl_huge h;
	struct stat st;
	char got = 0;

	pl_huge_init(&h, fd, 1);
	OK(pwrite(fd, "x", 1, PL_HUGE) == 1);
	for (int i = 0; i < 100 && !pl_huge_make(&h, PL_HUGE, 0) && huge; i++)
		h.skip = 0;
	OK(pread(fd, &got, 1, PL_HUGE) == 1 && got == 'x');
	pl_huge_fini(&h);
	close(fd);

	fd = temp_file(NULL, 0);
	EQ(pl_known_init(&known, SIZE, 12), 0);
	EQ(pl_pump_new(&p, &(struct pl_pump_cfg){
		.src_fd = src, .size = SIZE, .align = 1, .out_fd = fd,
		.sink = PL_SINK_FILE, .cluster = FRAME, .slots = 8,
		.known = &known }), 0);
	OK(fstat(fd, &st) == 0 && (!huge || st.st_size == SIZE));
	pl_pump_free(p);
	pl_known_fini(&known);
	close(src);
	close(fd);
}

/* A local copy: huge pages where there is data, holes where it is zero. */
static void copied_in_place(bool huge, uint32_t readers)
{
	uint8_t *image = must_alloc(SIZE);
	struct pl_extent ext[2] = { { 0, 24 * MiB }, { 27 * MiB, SIZE } };
	struct pl_pump_stats stats;
	struct pl_fault fault;
	struct pl_known known;
	struct pl_pump *p;
	int src, out = temp_file(NULL, 0);

	fill_random(image, 24 * MiB);
	fill_random(image + 27 * MiB, SIZE - 27 * MiB);
	memset(image + 13 * MiB, 0, 256 * KiB);
	memset(image + 17 * MiB + 4096, 0, 64 * KiB);
	src = temp_file(image, SIZE);
	EQ(pl_known_init(&known, SIZE, 12), 0);
	EQ(pl_pump_new(&p, &(struct pl_pump_cfg){
		.src_fd = src, .size = SIZE, .align = 1, .out_fd = out,
		.sink = PL_SINK_FILE, .cluster = FRAME, .slots = 8,
		.readers = readers, .known = &known }), 0);
	EQ(pl_pump_pass(p, ext, 2, PL_PASS_SKIP_ZERO | PL_PASS_LAST, &fault), 0);
	pl_pump_stats(p, &stats);
	OK(!huge || stats.huge_bytes);
	/* And again, over what is there. */
	memset(image + 5 * MiB, 0, 4096);
	fill_random(image + 13 * MiB, 8192);
	OK(pwrite(src, image, SIZE, 0) == SIZE);
	EQ(pl_pump_pass(p, ext, 2, PL_PASS_SKIP_ZERO | PL_PASS_CHANGED, &fault), 0);
	pl_pump_free(p);
	same(out, image, SIZE);
	OK(allocated(out) <= SIZE - 3 * MiB - 256 * KiB - 64 * KiB + 16384);
	pl_known_fini(&known);
	close(src);
	close(out);
	free(image);
}

static void *read_frames(void *arg)
{
	struct feeder *f = arg;
	struct header h;

	while (read(f->fd, &h, sizeof(h)) == sizeof(h)) {
		EQ(h.mark, PL_D1_MARK);
		for (uint32_t at = 0; at < h.size;) {
			ssize_t n = read(f->fd, (uint8_t *)f->data + h.pos + at,
					 h.size - at);

			OK(n > 0);
			at += (uint32_t)n;
		}
		f->len += h.size;
	}
	return NULL;
}

/*
 * Page cache into a pipe: the same bytes; zero blocks are not sent, and what
 * was sent is not taken for known afterwards, neither zero nor the same.
 */
static void spliced(void)
{
	uint8_t *image = must_alloc(SIZE), *got = must_alloc(SIZE);
	struct pl_extent all = { 0, SIZE };
	struct feeder f = { .data = got };
	struct pl_pump_stats stats;
	struct pl_fault fault;
	struct pl_known known;
	struct pl_pump *p;
	uint64_t first;
	int src, fd[2];

	fill_random(image, SIZE);
	memset(image + 2 * MiB, 0, MiB);	/* not sent */
	memset(image + 5 * MiB, 0, 4096);	/* not sent, in the midst */
	src = temp_file(NULL, SIZE + 512);
	OK(pwrite(src, image, SIZE, 512) == SIZE);
	OK(pipe2(fd, O_CLOEXEC) == 0 && fcntl(fd[1], F_SETFL, O_NONBLOCK) == 0);
	f.fd = fd[0];
	OK(pthread_create(&f.thread, NULL, read_frames, &f) == 0);
	EQ(pl_known_init(&known, SIZE, 12), 0);
	EQ(pl_pump_new(&p, &(struct pl_pump_cfg){
		.src_fd = src, .src_base = 512, .size = SIZE, .align = 1,
		.out_fd = fd[1], .sink = PL_SINK_FRAMES, .cluster = FRAME,
		.slots = 4, .readers = 1, .known = &known }), 0);
	EQ(pl_pump_pass(p, &all, 1, PL_PASS_SKIP_ZERO | PL_PASS_LAST | PL_PASS_LIVE,
			&fault), 0);
	pl_pump_stats(p, &stats);
	first = stats.data_bytes;
	EQ(first, SIZE - MiB - 4096);
	EQ(stats.zero_bytes, MiB + 4096);
	EQ(stats.wire_bytes, first + 16 * stats.frames);
	/* Nothing changed, but that is not known of what went. */
	EQ(pl_pump_pass(p, &all, 1, PL_PASS_SKIP_ZERO | PL_PASS_CHANGED, &fault), 0);
	pl_pump_stats(p, &stats);
	EQ(stats.data_bytes, 2 * first);
	EQ(stats.same_bytes, MiB + 4096);
	/* Now it is; and a zero is sent where there were data. */
	memset(image + 7 * MiB, 0, 8192);
	OK(pwrite(src, image, SIZE, 512) == SIZE);
	EQ(pl_pump_pass(p, &all, 1, PL_PASS_SKIP_ZERO | PL_PASS_CHANGED, &fault), 0);
	pl_pump_stats(p, &stats);
	EQ(stats.data_bytes, 2 * first + 8192);
	/* A source that shrinks is found out. */
	OK(ftruncate(src, 10 * MiB) == 0);
	EQ(pl_pump_pass(p, &all, 1, PL_PASS_LAST | PL_PASS_LIVE, &fault), -ENODATA);
	EQ(fault.stage, PL_STAGE_READ);
	pl_pump_free(p);
	close(fd[1]);
	pthread_join(f.thread, NULL);
	OK(!memcmp(got, image, SIZE));
	pl_known_fini(&known);
	close(fd[0]);
	close(src);
	free(image);
	free(got);
}

int main(void)
{
	bool huge = huge_pages();

	signal(SIGPIPE, SIG_IGN);
	if (!huge)
		puts("no huge pages here: nothing but the way without them was tried");
	received_in_place(huge);
	limited();
	broken_off();
	made_under_other_writers(huge);
	copied_in_place(huge, 0);
	copied_in_place(huge, 1);
	copied_in_place(huge, 4);
	spliced();
	return 0;
}

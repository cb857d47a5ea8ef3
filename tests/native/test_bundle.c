/* SPDX-License-Identifier: Apache-2.0 */
/* A bundle of lanes: exact bytes in both directions, whatever lanes do, and frames that no
   honest peer sends. */
#define _GNU_SOURCE
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>

#include "testing.h"
#include "wire.h"

enum { MOST_LANES = 600 };

struct side {
	struct pl_bundle *b;
	int program, own;	/* the two ends of the program's socket */
	pthread_t thread;
	int err;
};

struct pair {
	struct side a, z;
	int fds[MOST_LANES][4];	/* a reads, a writes, z reads, z writes */
	uint32_t lanes;
};

static void *run(void *arg)
{
	struct side *s = arg;

	s->err = pl_bundle_run(s->b);
	shutdown(s->own, SHUT_RDWR);
	return NULL;
}

static void start(struct side *s, uint32_t stall_ms)
{
	int fd[2];

	OK(!socketpair(AF_UNIX, SOCK_STREAM, 0, fd));
	s->program = fd[0];
	s->own = fd[1];
	OK(!fcntl(fd[1], F_SETFL, O_NONBLOCK));
	OK(!pl_bundle_new(&s->b, fd[1], stall_ms));
	OK(!pthread_create(&s->thread, NULL, run, s));
}

static void end(struct side *s, int expected)
{
	pl_bundle_stop(s->b);
	OK(!pthread_join(s->thread, NULL));
	EQ(s->err, expected);
	pl_bundle_free(s->b);
	close(s->program);
	close(s->own);
}

static struct pair *joined(uint32_t stall_ms)
{
	struct pair *p = must_alloc(sizeof(*p));

	start(&p->a, stall_ms);
	start(&p->z, stall_ms);
	return p;
}

/* A lane of two pipes, as ssh has them. */
static void add(struct pair *p)
{
	int there[2], back[2];
	int *fd = p->fds[p->lanes++];

	OK(!pipe2(there, O_NONBLOCK | O_CLOEXEC));
	OK(!pipe2(back, O_NONBLOCK | O_CLOEXEC));
	fd[0] = back[0];
	fd[1] = there[1];
	fd[2] = there[0];
	fd[3] = back[1];
	OK(!pl_bundle_add(p->z.b, fd[2], fd[3], p->lanes));
	OK(!pl_bundle_add(p->a.b, fd[0], fd[1], p->lanes));
}

static unsigned alive(struct pl_bundle *b)
{
	struct pl_bundle_lane lane[32];
	unsigned n = pl_bundle_lanes(b, lane, 32), count = 0;

	for (unsigned i = 0; i < n; i++)
		count += !lane[i].ended;
	return count;
}

static void until_alive(struct pl_bundle *b, unsigned n)
{
	for (unsigned i = 0; i < 20000 && alive(b) != n; i++)
		usleep(1000);
	EQ(alive(b), n);
}

static void done(struct pair *p, int expected)
{
	end(&p->a, -ECANCELED);
	end(&p->z, expected);
	for (uint32_t i = 0; i < p->lanes; i++)
		for (unsigned k = 0; k < 4; k++)
			if (p->fds[i][k] >= 0)
				close(p->fds[i][k]);
	free(p);
}

/* ---- bytes through it */

struct flow {
	int fd;
	uint64_t size, seed;
	pthread_t thread;
};

static void *feed(void *arg)
{
	struct flow *f = arg;
	uint64_t x = f->seed, at = 0;
	static const size_t most = 300 * KiB;
	uint64_t *buf = must_alloc(most);

	while (at < f->size) {
		size_t n = most, got = 0;

		x = after(x);
		if (x % 3 == 0)
			n = 8 + x % 100 * 8;
		n = n < f->size - at ? n : (size_t)(f->size - at);
		for (size_t i = 0; i < n / 8; i++)
			buf[i] = (at + i * 8) * 0x9E3779B97F4A7C15ull + f->seed;
		while (got < n) {
			ssize_t k = write(f->fd, (char *)buf + got, n - got);

			OK(k > 0);
			got += (size_t)k;
		}
		at += n;
	}
	free(buf);
	return NULL;
}

static void *drain(void *arg)
{
	struct flow *f = arg;
	static const size_t most = 256 * KiB;
	uint64_t *buf = must_alloc(most);

	for (uint64_t at = 0; at < f->size;) {
		size_t got = 0, n = most < f->size - at ? most : (size_t)(f->size - at);

		while (got < n) {
			ssize_t k = read(f->fd, (char *)buf + got, n - got);

			OK(k > 0);
			got += (size_t)k;
		}
		for (size_t i = 0; i < n / 8; i++)
			if (buf[i] != (at + i * 8) * 0x9E3779B97F4A7C15ull + f->seed)
				DIE("wrong bytes at %llu", (unsigned long long)(at + i * 8));
		at += n;
	}
	free(buf);
	return NULL;
}

static void begin(struct flow *f, int fd, uint64_t size, uint64_t of, void *(*what)(void *))
{
	*f = (struct flow){ .fd = fd, .size = size, .seed = of };
	OK(!pthread_create(&f->thread, NULL, what, f));
}

static void begin_both(struct flow f[4], struct pair *p, uint64_t there, uint64_t back)
{
	begin(&f[0], p->a.program, there, 11, feed);
	begin(&f[1], p->z.program, there, 11, drain);
	begin(&f[2], p->z.program, back, 23, feed);
	begin(&f[3], p->a.program, back, 23, drain);
}

static void end_both(struct flow f[4])
{
	for (unsigned i = 0; i < 4; i++)
		OK(!pthread_join(f[i].thread, NULL));
}

static void test_bytes_arrive_in_order_over_several_lanes(void)
{
	struct pair *p = joined(0);
	struct flow f[4];

	for (unsigned i = 0; i < 5; i++)
		add(p);
	begin_both(f, p, 100 * MiB, 70 * MiB);
	end_both(f);
	OK(pl_bundle_moved(p->a.b) >= 170 * MiB);
	EQ(alive(p->a.b), 5);
	done(p, -ECANCELED);
}

/* One end of a lane is closed: what was under way is lost. */
static void cut(struct pair *p, uint32_t i)
{
	for (unsigned k = 2; k < 4; k++) {
		int fd = open("/dev/null", O_RDWR | O_CLOEXEC);

		/* The bundle still has the number of the descriptor. */
		OK(fd >= 0 && dup3(fd, p->fds[i][k], O_CLOEXEC) >= 0);
		close(fd);
	}
}

static void test_what_dead_lanes_lost_goes_again(void)
{
	struct pair *p = joined(0);
	struct flow f[4];

	for (unsigned i = 0; i < 3; i++)
		add(p);
	begin_both(f, p, so_many(120) * MiB, so_many(40) * MiB);
	for (unsigned turn = 0; turn < so_many(40); turn++) {
		usleep((useconds_t)rnd(8000));
		cut(p, turn);
		until_alive(p->a.b, 2);
		until_alive(p->z.b, 2);
		add(p);
	}
	end_both(f);
	done(p, -ECANCELED);
}

static void test_it_waits_for_a_lane_when_it_has_none(void)
{
	struct pair *p = joined(0);
	struct flow f[4];

	begin_both(f, p, 8 * MiB, 8 * MiB);
	usleep(20000);
	add(p);
	usleep(3000);
	cut(p, 0);
	until_alive(p->a.b, 0);
	until_alive(p->z.b, 0);
	add(p);
	end_both(f);
	done(p, -ECANCELED);
}

/* A lane that takes bytes, and delivers none of them. */
static void test_a_lane_that_holds_others_up_is_given_up(void)
{
	struct pair *p = joined(300);
	struct flow f[4];
	int there[2], back[2];

	add(p);
	OK(!pipe2(there, O_NONBLOCK | O_CLOEXEC));
	OK(!pipe2(back, O_NONBLOCK | O_CLOEXEC));
	OK(!pl_bundle_add(p->a.b, back[0], there[1], 99));
	until_alive(p->a.b, 2);
	begin_both(f, p, 50 * MiB, 1 * MiB);
	end_both(f);
	EQ(alive(p->a.b), 1);
	done(p, -ECANCELED);
	for (unsigned i = 0; i < 2; i++) {
		close(there[i]);
		close(back[i]);
	}
}

static void test_the_end_of_the_program_is_its_end(void)
{
	struct side s;

	start(&s, 0);
	shutdown(s.program, SHUT_RDWR);
	OK(!pthread_join(s.thread, NULL));
	EQ(s.err, 0);
	EQ(pl_bundle_add(s.b, 0, 1, 1), -ECANCELED);
	pl_bundle_free(s.b);
	close(s.program);
	close(s.own);
}

static void test_there_are_not_too_many_lanes(void)
{
	struct pair *p = joined(0);

	for (unsigned i = 0; i < PL_BUNDLE_LANES; i++)
		add(p);
	EQ(pl_bundle_add(p->a.b, 0, 1, 999), -EBUSY);
	cut(p, 3);
	until_alive(p->a.b, PL_BUNDLE_LANES - 1);
	until_alive(p->z.b, PL_BUNDLE_LANES - 1);
	add(p);
	until_alive(p->a.b, PL_BUNDLE_LANES);
	done(p, -ECANCELED);
}

/* ---- a peer that does not keep to it */

struct frame {
	uint32_t kind, length;
	uint64_t value;
	uint32_t data;		/* bytes that follow, in fact */
};

static void put(int fd, const struct frame *f)
{
	uint8_t head[PL_BUNDLE_HEAD];
	char *data = must_alloc(f->data);

	pl_put32(head, f->kind);
	pl_put32(head + 4, f->length);
	pl_put64(head + 8, f->value);
	OK(write(fd, head, sizeof(head)) == (ssize_t)sizeof(head));
	OK(write(fd, data, f->data) == (ssize_t)f->data);
	free(data);
}

static void refused(const struct frame *f, unsigned n)
{
	struct side s;
	int there[2], back[2];

	start(&s, 0);
	OK(!pipe2(there, O_CLOEXEC));
	OK(!pipe2(back, O_NONBLOCK | O_CLOEXEC));
	OK(!fcntl(there[0], F_SETFL, O_NONBLOCK));
	OK(!pl_bundle_add(s.b, there[0], back[1], 1));
	for (unsigned i = 0; i < n; i++)
		put(there[1], &f[i]);
	OK(!pthread_join(s.thread, NULL));
	EQ(s.err, -EPROTO);
	pl_bundle_free(s.b);
	close(s.program);
	close(s.own);
	for (unsigned i = 0; i < 2; i++) {
		close(there[i]);
		close(back[i]);
	}
}

static void test_a_hostile_peer_ends_it(void)
{
	const struct frame one[] = {
		{ 0, 0, 0, 0 }, { 4, 0, 0, 0 }, { 1, 0, 0, 0 },
		{ 1, PL_BUNDLE_SEG_MOST + 1, 0, 0 },
		{ 1, 2, PL_BUNDLE_WINDOW - 1, 0 },
		{ 1, 1, UINT64_MAX, 0 }, { 1, 1, UINT64_MAX / 2 + 1, 0 },
		{ 2, 0, 1, 0 }, { 2, 1, 0, 0 }, { 2, UINT32_MAX, 0, 0 },
		{ 2, 0, UINT64_MAX, 0 }, { 2, 2, UINT64_MAX - 1, 0 }, { 3, 1, 1, 1 },
	};
	const struct frame overlaps[][3] = {
		{ { 1, 10, 0, 10 }, { 1, 10, 5, 10 } },
		{ { 1, 10, 20, 10 }, { 1, 10, 15, 10 } },
		{ { 1, 10, 20, 10 }, { 1, 10, 25, 10 } },
		{ { 1, 10, 20, 10 }, { 1, 30, 10, 30 } },
	};

	for (unsigned i = 0; i < sizeof(one) / sizeof(one[0]); i++)
		refused(&one[i], 1);
	for (unsigned i = 0; i < sizeof(overlaps) / sizeof(overlaps[0]); i++)
		refused(overlaps[i], 2);
}

static void test_too_many_gaps_end_it(void)
{
	enum { N = 5000 };
	struct frame *f = must_alloc(N * sizeof(*f));

	for (unsigned i = 0; i < N; i++)
		f[i] = (struct frame){ 1, 1, 2 * i + 1, 1 };
	/* It ends in the middle, and the pipe takes the rest. */
	refused(f, 4200);
	free(f);
}

int main(void)
{
	signal(SIGPIPE, SIG_IGN);
	test_bytes_arrive_in_order_over_several_lanes();
	test_what_dead_lanes_lost_goes_again();
	test_it_waits_for_a_lane_when_it_has_none();
	test_a_lane_that_holds_others_up_is_given_up();
	test_the_end_of_the_program_is_its_end();
	test_there_are_not_too_many_lanes();
	test_a_hostile_peer_ends_it();
	test_too_many_gaps_end_it();
	return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/* A file stream over a connection that others use, too: exact bytes, and what may not come. */
#define _GNU_SOURCE
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>

#include "testing.h"

enum { WINDOW = 2 << 20, CHANNEL = 7, STALL = 20000 };

/* One connection: the source's end and the target's. */
struct line {
	int to[2], stop[2], back[2];
	struct pl_gate *source, *target;
	struct pl_intake *intake, *credits;
	struct pl_files_out *out;
	struct pl_files_in *in;
	pthread_t reader, giver;
	int reader_err;
	unsigned others;	/* frames that were not for the receiver */
	uint8_t last[8];
	uint64_t credit_given;
};

static void *read_line(void *arg)
{
	struct line *l = arg;
	uint8_t head[8], payload[4096];
	uint32_t len;

	while (!(l->reader_err = pl_intake_head(l->intake, head))) {
		memcpy(l->last, head, 8);
		len = pl_get32(head + 4);
		OK(len <= sizeof(payload));
		OK(!pl_intake_read(l->intake, payload, len));
		l->others++;
		if (head[0] == PL_FRAME_END)
			pl_files_in_finish(l->in);
	}
	pl_files_in_stop(l->in, l->reader_err);
	return NULL;
}

static void *give_credit(void *arg)
{
	struct line *l = arg;
	uint8_t frame[12];

	while (!pl_intake_head(l->credits, frame)) {
		OK(!pl_intake_read(l->credits, frame + 8, 4));
		EQ(frame[0], PL_FRAME_CREDIT);
		OK(!pl_files_out_credit(l->out, pl_get32(frame + 8)));
		__atomic_add_fetch(&l->credit_given, pl_get32(frame + 8), __ATOMIC_RELAXED);
	}
	return NULL;
}

static struct pl_intake *intake_on(int fd, int stop)
{
	struct pl_intake_cfg cfg = { .fd = fd, .stop_fd = stop, .early = (const uint8_t *)"" };
	struct pl_intake *made;

	OK(!pl_intake_new(&made, &cfg));
	return made;
}

static void begin(struct line *l, uint64_t rate, uint32_t stall_ms)
{
	struct pl_files_out_cfg out = { .channel = CHANNEL, .window = WINDOW, .rate = rate,
					.stall_ms = stall_ms };
	struct pl_files_in_cfg in = { .channel = CHANNEL, .window = WINDOW,
				      .stall_ms = STALL };

	memset(l, 0, sizeof(*l));
	OK(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, l->to));
	OK(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, l->back));
	OK(!pipe2(l->stop, O_CLOEXEC));
	OK(!fcntl(l->to[0], F_SETFL, O_NONBLOCK));
	OK(!fcntl(l->back[0], F_SETFL, O_NONBLOCK));
	OK(!pl_gate_new(&l->source, l->to[0]));
	OK(!pl_gate_new(&l->target, l->back[0]));
	out.gate = l->source;
	in.gate = l->target;
	OK(!pl_files_out_new(&l->out, &out));
	OK(!pl_files_in_new(&l->in, &in));
	l->intake = intake_on(l->to[1], l->stop[0]);
	l->credits = intake_on(l->back[1], l->stop[0]);
	OK(!pl_intake_add(l->intake, l->in));
	OK(!pthread_create(&l->reader, NULL, read_line, l));
	OK(!pthread_create(&l->giver, NULL, give_credit, l));
}

static void finish(struct line *l)
{
	OK(write(l->stop[1], "x", 1) == 1);
	OK(!pthread_join(l->reader, NULL));
	OK(!pthread_join(l->giver, NULL));
	pl_intake_remove(l->intake, l->in);
	pl_files_out_free(l->out);
	pl_files_in_free(l->in);
	pl_intake_free(l->intake);
	pl_intake_free(l->credits);
	pl_gate_free(l->source);
	pl_gate_free(l->target);
	for (int i = 0; i < 2; i++) {
		close(l->to[i]);
		close(l->back[i]);
		close(l->stop[i]);
	}
}

static void raw(struct line *l, const void *data, size_t len)
{
	struct iovec iov = { (void *)data, len };

	OK(!pl_gate_write(l->source, &iov, 1, true, 0, &(int){ 0 }));
}

/* ---- exact bytes */

struct sending {
	struct line *l;
	int fd;
	const uint8_t *data;
	size_t size;
};

/* The file grows while it is sent, a page and a half at a time at first. */
static void *send_growing(void *arg)
{
	struct sending *s = arg;
	enum pl_stage stage;
	uint64_t pos = 0;
	size_t at = 0, step = PL_BLOCK * 3 / 2;

	while (at < s->size) {
		size_t n = s->size - at < step ? s->size - at : step;

		OK(pwrite(s->fd, s->data + at, n, (off_t)at) == (ssize_t)n);
		at += n;
		step *= 2;
		OK(!pl_files_out_grow(s->l->out, "pages-1.img", 11, 0600, s->fd, &pos, &stage));
		EQ(pos, at);
	}
	OK(!pl_files_out_complete(s->l->out, "pages-1.img", 11, 0600, pos, &stage));
	OK(!pl_files_out_grow(s->l->out, "b", 1, 0644, s->fd, &(uint64_t){ s->size - 5 }, &stage));
	OK(!pl_files_out_complete(s->l->out, "b", 1, 0644, 77, &stage));
	OK(!pl_files_out_complete(s->l->out, "", 0, 0, 0, &stage));
	return NULL;
}

static void all_bytes_arrive(void)
{
	enum { SIZE = 9 * 1000 * 1000 };
	uint8_t *data = must_alloc(SIZE), *got = must_alloc(SIZE);
	struct sending s = { .fd = temp_file(NULL, 0), .data = data, .size = SIZE };
	int to = temp_file(NULL, 0), other = temp_file(NULL, 0);
	struct pl_files_out_stats stats;
	uint64_t budget = 100 * MiB, zero = 0;
	struct pl_piece p;
	enum pl_stage stage;
	struct line l;
	pthread_t sender;
	unsigned times = 0;

	fill_random(data, SIZE);
	for (size_t at = 0; at + PL_BLOCK <= SIZE; at += PL_BLOCK)
		if (at > 4 * MiB && (rnd(3) == 0 || (at > 5 * MiB && at < 6 * MiB)))
			memset(data + at, 0, PL_BLOCK);
	begin(&l, 0, STALL);
	s.l = &l;
	OK(!pthread_create(&sender, NULL, send_growing, &s));
	OK(!pl_files_in_next(l.in, &p, &stage));
	while (p.length) {
		OK(p.name_len == 11 && !memcmp(p.name, "pages-1.img", 11));
		EQ(p.mode, 0600);
		/* A small budget now and then: then the caller is asked again. */
		zero = p.length + rnd(2) * MiB;
		budget -= zero;
		OK(!pl_files_in_take(l.in, to, MiB, SIZE, &zero, &p, &stage));
		budget += zero;
		times++;
	}
	EQ(p.pos, SIZE);
	OK(times > 1);
	OK(!pl_files_in_next(l.in, &p, &stage));
	OK(p.name_len == 1 && p.length == 5 && p.mode == 0644 && p.pos == SIZE - 5);
	OK(!pl_files_in_take(l.in, other, MiB, SIZE, &budget, &p, &stage));
	OK(p.name_len == 1 && !p.length && p.pos == 77);
	OK(!pl_files_in_next(l.in, &p, &stage));
	EQ(p.name_len, 0);
	OK(!pthread_join(sender, NULL));
	OK(!ftruncate(to, SIZE));
	OK(pread(to, got, SIZE, 0) == SIZE);
	OK(!memcmp(got, data, SIZE));
	OK(pread(other, got, SIZE, 0) == SIZE && !memcmp(got + SIZE - 5, data + SIZE - 5, 5));
	pl_files_out_get_stats(l.out, &stats);
	EQ(stats.data_bytes + stats.zero_bytes, SIZE + 5);
	OK(stats.zero_bytes > MiB);
	EQ(budget, 100 * MiB - stats.data_bytes);
	finish(&l);
	EQ(l.reader_err, -ECANCELED);
	EQ(l.others, 0);
	free(data);
	free(got);
	close(s.fd);
	close(to);
	close(other);
}

/* ---- others on the connection */

static void *send_zero_free(void *arg)
{
	struct sending *s = arg;
	enum pl_stage stage;
	uint64_t pos = 0;

	OK(!pl_files_out_grow(s->l->out, "p", 1, 0600, s->fd, &pos, &stage));
	OK(!pl_files_out_complete(s->l->out, "", 0, 0, 0, &stage));
	return NULL;
}

static void messages_go_between_its_frames(void)
{
	enum { SIZE = 24 << 20 };
	uint8_t *data = must_alloc(SIZE);
	uint8_t ping[8] = { 6 };
	struct sending s = { .size = SIZE };
	uint64_t budget = SIZE;
	struct pl_piece p;
	enum pl_stage stage;
	struct line l;
	pthread_t sender;
	int to = temp_file(NULL, 0);

	fill_random(data, SIZE);
	s.fd = temp_file(data, SIZE);
	begin(&l, 0, STALL);
	s.l = &l;
	OK(!pthread_create(&sender, NULL, send_zero_free, &s));
	OK(!pl_files_in_next(l.in, &p, &stage));
	for (int i = 0; i < 50; i++)
		raw(&l, ping, sizeof(ping));
	OK(!pl_files_in_take(l.in, to, MiB, SIZE, &budget, &p, &stage));
	EQ(p.name_len, 0);
	EQ(budget, 0);
	OK(!pthread_join(sender, NULL));
	/* What is due, and not given yet, is less than an eighth of the window. */
	while (__atomic_load_n(&l.credit_given, __ATOMIC_RELAXED) <= SIZE - WINDOW / 8)
		usleep(1000);
	finish(&l);
	EQ(l.others, 50);
	OK(l.credit_given <= SIZE + 256 * KiB);
	free(data);
	close(s.fd);
	close(to);
}

struct turns {
	struct pl_gate *gate;
	int order[2];
	int n;
};

static void *low(void *arg)
{
	struct turns *t = arg;

	OK(!pl_gate_enter(t->gate, false, 0));
	t->order[t->n++] = 1;
	pl_gate_leave(t->gate);
	return NULL;
}

static void the_urgent_goes_first(void)
{
	struct turns t = { 0 };
	pthread_t thread;
	int fd = temp_file(NULL, 0);

	OK(!pl_gate_new(&t.gate, fd));
	OK(!pl_gate_enter(t.gate, false, 0));
	EQ(pl_gate_enter(t.gate, true, 5), -EAGAIN);
	OK(!pthread_create(&thread, NULL, low, &t));
	usleep(2000);
	pl_gate_leave(t.gate);
	OK(!pl_gate_enter(t.gate, true, 0));	/* before it or after it */
	t.order[t.n++] = 2;
	pl_gate_leave(t.gate);
	OK(!pthread_join(thread, NULL));
	EQ(t.n, 2);
	/* One that has given up holds nobody up. */
	OK(!pl_gate_enter(t.gate, false, 1000));
	pl_gate_leave(t.gate);
	pl_gate_free(t.gate);
	close(fd);
}

/* ---- what may not come, and what fails */

static void more_than_the_credit_is_refused(void)
{
	struct pl_frame_head head = pl_frame(PL_FRAME_DATA, CHANNEL, PL_FRAME_MOST);
	uint8_t *zeroes = must_alloc(PL_FRAME_MOST);
	struct line l;

	begin(&l, 0, STALL);
	for (int i = 0; i <= WINDOW / (int)PL_FRAME_MOST; i++) {
		raw(&l, &head, sizeof(head));
		if (i < WINDOW / (int)PL_FRAME_MOST)
			raw(&l, zeroes, PL_FRAME_MOST);
	}
	OK(!pthread_join(l.reader, NULL));
	EQ(l.reader_err, -EDQUOT);
	OK(!pthread_create(&l.reader, NULL, read_line, &l));
	finish(&l);
	free(zeroes);
}

static void after_the_end_nothing_comes(void)
{
	struct pl_frame_head end = pl_frame(PL_FRAME_END, CHANNEL, 0);
	struct pl_frame_head head = pl_frame(PL_FRAME_DATA, CHANNEL, 1);
	struct pl_piece p;
	enum pl_stage stage;
	struct line l;

	begin(&l, 0, STALL);
	raw(&l, &end, sizeof(end));
	EQ(pl_files_in_next(l.in, &p, &stage), -ENODATA);
	EQ(stage, PL_STAGE_READ);
	raw(&l, &head, sizeof(head));
	raw(&l, "x", 1);
	OK(!pthread_join(l.reader, NULL));
	EQ(l.reader_err, -EPROTO);
	OK(!pthread_create(&l.reader, NULL, read_line, &l));
	finish(&l);
}

static void frames_that_are_not_valid_are_the_callers(void)
{
	const uint8_t wrong[][8] = {
		{ 2, 1, CHANNEL, 0, 1 }, { 2, 0, CHANNEL, 0, 0 }, { 2, 0, CHANNEL, 0, 1, 0, 4 },
		{ 2, 0, 0, 0, 1 }, { 9, 0, CHANNEL, 0, 0 }, { 2, 0, CHANNEL, 1, 1 },
	};

	for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
		struct pl_files_in_cfg cfg = { .channel = CHANNEL, .window = WINDOW };
		struct pl_files_in *in;
		struct pl_intake *intake;
		uint8_t head[8];
		int fds[2], stop[2];

		OK(!pipe(fds) && !pipe(stop));
		intake = intake_on(fds[0], stop[0]);
		OK(!pl_files_in_new(&in, &cfg));
		OK(!pl_intake_add(intake, in));
		OK(write(fds[1], wrong[i], 8) == 8);
		OK(!pl_intake_head(intake, head));
		OK(!memcmp(head, wrong[i], 8));
		pl_files_in_free(in);
		pl_intake_free(intake);
		for (int n = 0; n < 2; n++) {
			close(fds[n]);
			close(stop[n]);
		}
	}
}

static void what_breaks_a_limit_is_not_written(void)
{
	const struct { uint32_t length; uint64_t pos; } second[] = {
		{ 9, 0 }, { 4, 93 }, { 4, UINT64_MAX - 1 }, { 4, UINT64_MAX - 3 }, { 0, 3 },
	};

	for (size_t i = 0; i < sizeof(second) / sizeof(second[0]); i++) {
		struct pl_piece_head one = pl_piece(1, 0600, 4, 8);
		struct pl_piece_head two = pl_piece(1, 0600, second[i].length, second[i].pos);
		uint8_t stream[8 + 16 + 1 + 4 + 16 + 1];
		struct pl_frame_head head = pl_frame(PL_FRAME_DATA, CHANNEL, sizeof(stream) - 8);
		uint64_t budget = 12;
		struct pl_piece p;
		enum pl_stage stage;
		struct stat st;
		struct line l;
		int fd = temp_file(NULL, 0);

		memcpy(stream, &head, 8);
		memcpy(stream + 8, &one, 16);
		memcpy(stream + 24, "aDATA", 5);
		memcpy(stream + 29, &two, 16);
		stream[45] = 'a';
		begin(&l, 0, STALL);
		raw(&l, stream, sizeof(stream));
		OK(!pl_files_in_next(l.in, &p, &stage));
		OK(!pl_files_in_take(l.in, fd, 8, 96, &budget, &p, &stage));
		EQ(p.length, second[i].length);
		OK(p.pos == second[i].pos);
		EQ(budget, 8);
		OK(!fstat(fd, &st));
		EQ(st.st_size, 12);
		/* Nor does it go on with it, whatever the caller says. */
		if (p.length) {
			budget = p.length - 1;
			EQ(pl_files_in_take(l.in, fd, 8, 96, &budget, &p, &stage), -EINVAL);
		}
		finish(&l);
		close(fd);
	}
}

static void a_name_that_is_too_long_is_refused(void)
{
	struct pl_piece_head head = pl_piece(PL_PIECE_NAME + 1, 0, 1, 0);
	struct pl_frame_head frame = pl_frame(PL_FRAME_DATA, CHANNEL, sizeof(head));
	struct pl_piece p;
	enum pl_stage stage;
	struct line l;

	begin(&l, 0, STALL);
	raw(&l, &frame, sizeof(frame));
	raw(&l, &head, sizeof(head));
	EQ(pl_files_in_next(l.in, &p, &stage), -EMSGSIZE);
	EQ(p.name_len, PL_PIECE_NAME + 1);
	finish(&l);
}

static void a_full_disk_is_told_as_such(void)
{
	struct pl_piece_head head = pl_piece(1, 0, 4, 0);
	struct pl_frame_head frame = pl_frame(PL_FRAME_DATA, CHANNEL, sizeof(head) + 5);
	int full = open("/dev/full", O_WRONLY);
	uint64_t budget = MiB;
	struct pl_piece p;
	enum pl_stage stage;
	struct line l;

	OK(full >= 0);
	begin(&l, 0, STALL);
	raw(&l, &frame, sizeof(frame));
	raw(&l, &head, sizeof(head));
	raw(&l, "aDATA", 5);
	OK(!pl_files_in_next(l.in, &p, &stage));
	EQ(pl_files_in_take(l.in, full, MiB, MiB, &budget, &p, &stage), -ENOSPC);
	EQ(stage, PL_STAGE_WRITE);
	finish(&l);
	close(full);
}

static void *stop_soon(void *arg)
{
	struct line *l = arg;

	usleep(20000);
	pl_files_out_stop(l->out, -ECONNRESET);
	pl_files_in_stop(l->in, -ECANCELED);
	return NULL;
}

/* Nobody takes anything: the sender waits for credit, the receiver for a piece. */
static void both_ends_can_be_stopped(void)
{
	enum { SIZE = 3 * WINDOW };
	uint8_t *data = must_alloc(SIZE);
	struct pl_piece p;
	enum pl_stage stage;
	struct line l;
	pthread_t stopper;
	uint64_t pos = 0;
	int fd;

	fill_random(data, SIZE);
	fd = temp_file(data, SIZE);
	for (int slow = 0; slow < 2; slow++) {
		begin(&l, slow ? 1000 : 0, 0);
		OK(!pthread_create(&stopper, NULL, stop_soon, &l));
		pos = 0;
		EQ(pl_files_out_grow(l.out, "p", 1, 0, fd, &pos, &stage), -ECONNRESET);
		EQ(stage, PL_STAGE_REPLY);
		OK(!pthread_join(stopper, NULL));
		EQ(pl_files_out_complete(l.out, "p", 1, 0, pos, &stage), -ECONNRESET);
		EQ(pl_files_in_next(l.in, &p, &stage), -ECANCELED);
		finish(&l);
	}
	begin(&l, 0, 10);
	pos = 0;
	EQ(pl_files_out_grow(l.out, "p", 1, 0, fd, &pos, &stage), -ETIMEDOUT);
	EQ(stage, PL_STAGE_REPLY);
	EQ(pl_files_out_credit(l.out, WINDOW), -EDQUOT);
	finish(&l);
	free(data);
	close(fd);
}

static void a_peer_that_takes_nothing_is_given_up(void)
{
	uint8_t *data = must_alloc(4 * MiB);
	struct iovec iov = { data, 4 * MiB };
	struct pl_gate *gate;
	int fds[2], stopped = 0;

	OK(!pipe2(fds, O_NONBLOCK));
	OK(!pl_gate_new(&gate, fds[1]));
	EQ(pl_gate_write(gate, &iov, 1, true, 10, &stopped), -ETIME);
	/* What was begun is ended soon, what was not is not begun. */
	OK(read(fds[0], data, 8192) == 8192);
	iov = (struct iovec){ data, 4 * MiB };
	stopped = -ECANCELED;
	EQ(pl_gate_write(gate, &iov, 1, true, 0, &stopped), -ECANCELED);
	pl_gate_shut(gate);
	iov = (struct iovec){ data, 1 };
	stopped = 0;
	EQ(pl_gate_write(gate, &iov, 1, true, 0, &stopped), -ESHUTDOWN);
	pl_gate_free(gate);
	close(fds[0]);
	close(fds[1]);
	free(data);
}

/* Nobody reads the connection, and a frame is half written. */
static void one_who_waits_for_a_stuck_peer_can_be_stopped(void)
{
	enum { SIZE = 2 << 20 };
	struct pl_files_out_cfg cfg = { .channel = CHANNEL, .window = 2 * SIZE };
	struct line l = { 0 };
	uint8_t *data = must_alloc(SIZE);
	enum pl_stage stage;
	pthread_t stopper;
	uint64_t pos = 0;
	int fds[2], fd;

	fill_random(data, SIZE);
	fd = temp_file(data, SIZE);
	OK(!pipe2(fds, O_NONBLOCK));
	OK(!pl_gate_new(&cfg.gate, fds[1]));
	OK(!pl_files_out_new(&l.out, &cfg));
	OK(!pl_files_in_new(&l.in, &(struct pl_files_in_cfg){ .gate = cfg.gate,
			    .channel = CHANNEL, .window = WINDOW }));
	OK(!pthread_create(&stopper, NULL, stop_soon, &l));
	EQ(pl_files_out_grow(l.out, "p", 1, 0, fd, &pos, &stage), -ETIME);
	EQ(stage, PL_STAGE_WRITE);
	OK(!pthread_join(stopper, NULL));
	/* Nothing more is begun. */
	EQ(pl_files_out_complete(l.out, "p", 1, 0, 0, &stage), -ECONNRESET);
	EQ(stage, PL_STAGE_REPLY);
	pl_files_out_free(l.out);
	pl_files_in_free(l.in);
	pl_gate_free(cfg.gate);
	close(fds[0]);
	close(fds[1]);
	close(fd);
	free(data);
}

static void the_end_of_the_connection_is_the_end(void)
{
	struct line l;
	struct pl_piece p;
	enum pl_stage stage;

	begin(&l, 0, STALL);
	shutdown(l.to[0], SHUT_RDWR);
	EQ(pl_files_in_next(l.in, &p, &stage), -ENODATA);
	EQ(pl_files_out_complete(l.out, "", 0, 0, 0, &stage), -EPIPE);
	EQ(stage, PL_STAGE_WRITE);
	finish(&l);
	EQ(l.reader_err, -ENODATA);
}

int main(void)
{
	signal(SIGPIPE, SIG_IGN);
	all_bytes_arrive();
	messages_go_between_its_frames();
	the_urgent_goes_first();
	more_than_the_credit_is_refused();
	after_the_end_nothing_comes();
	frames_that_are_not_valid_are_the_callers();
	what_breaks_a_limit_is_not_written();
	a_name_that_is_too_long_is_refused();
	a_full_disk_is_told_as_such();
	both_ends_can_be_stopped();
	a_peer_that_takes_nothing_is_given_up();
	one_who_waits_for_a_stuck_peer_can_be_stopped();
	the_end_of_the_connection_is_the_end();
	return 0;
}

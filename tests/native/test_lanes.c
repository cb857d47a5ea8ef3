/* SPDX-License-Identifier: Apache-2.0 */
/* Copies over several lanes that hold bytes back, break off, and join at any time. */
#define _GNU_SOURCE
#include <poll.h>

#include "lines.h"
#include "pump_lanes.h"
#include "stream.h"

#define LINES 12
#define BLOCK ((uint64_t)PL_BLOCK)

/* Longer than a busy machine keeps a thread from running. */
#define LONG_STALL 20000

/* The receiving end, and its answers as a pyploop receiver gives them. */
struct peer {
	pthread_t thread;
	struct pl_recv *r;
	struct pl_proof proof;
	bool reopens;		/* after the first END */
	int go_on;		/* a byte: there is another stream */
	int answers;		/* the sender's end of these */
	int to;
	int ret;
	struct pl_fault fault;
};

struct answer {
	uint32_t event, n;
	struct pl_lane_end lost[PL_BARRIER_NAMES];
};

static void *peer_main(void *arg)
{
	struct peer *p = arg;
	struct pl_recv_msg msg;
	struct answer a;

	do {
		memset(&a, 0, sizeof(a));
		p->ret = pl_recv_run(p->r, &msg, &p->fault);
		if (p->ret < 0)
			break;
		a.event = (uint32_t)p->ret;
		if (p->ret == PL_RECV_LOST || p->ret == PL_RECV_BROKEN)
			a.n = pl_recv_lost(p->r, a.lost);
		else
			pl_recv_synced(p->r);
		if (p->ret == PL_RECV_END && p->reopens) {
			pl_recv_reopen(p->r);
			p->reopens = false;
			p->ret = 0;
		}
		OK(write(p->to, &a, sizeof(a)) == sizeof(a));
		if (p->ret == PL_RECV_BROKEN)
			OK(read(p->go_on, &(char){ 0 }, 1) == 1);
	} while (p->ret != PL_RECV_END);
	close(p->to);
	return NULL;
}

/* Lanes are agreed in the greeting, after the first SYNC. */
static void agree(struct pl_recv *r, int to, uint64_t features, struct pl_proof *proof)
{
	uint8_t sync[20] = { 0 };
	struct pl_recv_msg msg;
	struct pl_fault fault;

	EQ(pl_recv_expect(r, PL_FEATURE_LANES), -EINVAL);
	pl_d1_put(sync, PL_D1_MARK, PL_SYNC_SIZE, 0);
	OK(write(to, sync, sizeof(sync)) == sizeof(sync));
	EQ(pl_recv_run(r, &msg, &fault), PL_RECV_SYNC);
	EQ(pl_recv_add_lane(r, 0, 1), -EINVAL);
	if (proof)
		EQ(pl_recv_expect_proof(r, proof), 0);
	EQ(pl_recv_expect(r, features), 0);
}

/* On a disk, if the folder of temporary files is on one: lane 0 writes past the page
   cache until another lane comes. */
static int disk_file(void)
{
	const char *folder = getenv("TMPDIR");
	int fd = open(folder ? folder : "/var/tmp", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);

	OK(fd >= 0);
	return fd;
}

static bool take(int fd, void *buf, size_t len)
{
	for (char *p = buf; len;) {
		ssize_t n = read(fd, p, len);

		OK(n >= 0);
		if (n == 0)
			return false;
		p += n;
		len -= (size_t)n;
	}
	return true;
}

static void *cancel_soon(void *arg)
{
	usleep(20000);
	pl_recv_cancel(arg);
	return NULL;
}

static void *cancel_pump_soon(void *arg)
{
	usleep(20000);
	pl_pump_cancel(arg);
	return NULL;
}

struct copy {
	uint64_t size;
	uint8_t *data;		/* what the source has */
	int src, dst;
	struct pl_known known;
	struct pl_proof proof;
	struct pl_pump *pump;
	struct line main;
	struct peer peer;
	struct line line[LINES];
	unsigned lines;
	struct line later[LINES];	/* in place of the main one */
	unsigned cuts, most_cuts;	/* how often it broke, and may */
	int go_on;
	uint64_t again;
};

/* A main stream that breaks some time after the greeting. */
static struct line breaking_line(uint64_t size)
{
	return (struct line){
		.end = rnd(2) ? DROPS : DELIVERS_LATE, .seed = rnd(UINT32_MAX) + 1,
		.breaks_after = 200 + rnd(size),
	};
}

static void copy_open_cut(struct copy *c, uint64_t size, uint64_t line_seed, bool sock,
			  bool compressed, uint32_t stall_ms, unsigned most_cuts)
{
	struct pl_pump_cfg cfg = {
		.align = 1, .sink = PL_SINK_FRAMES, .cluster = 64 * KiB, .slots = 6,
		.readers = 1, .lane_stall_ms = stall_ms, .features = PL_FEATURE_LANES,
	};
	struct pl_recv_cfg peer = {
		.slots = 3, .slot_size = 16 * KiB, .max_frame = 1 << 20,
		.window = 256 * KiB, .sparse = 1, .reply_fd = -1,
		.lane_stall_ms = stall_ms,
		.direct = { 512, 512 }, .writers = 4, .ahead = 1,
	};
	int back[2];

	if (most_cuts)
		cfg.features |= PL_FEATURE_RESUME;
	if (compressed) {
		cfg.features |= PL_FEATURE_COMPRESSED;
		cfg.compress = PL_COMPRESS_ALWAYS;
		cfg.level = 1;
	}
	memset(c, 0, sizeof(*c));
	c->size = size;
	c->data = must_alloc(size);
	fill_random(c->data, size);
	memset(c->data + size / 4, 0, size / 8);
	memset(c->data + size / 2, 'x', size / 4);
	c->src = temp_file(c->data, size);
	c->dst = disk_file();
	c->main = (struct line){ .breaks_after = UINT64_MAX, .seed = line_seed };
	if (most_cuts)
		c->main = breaking_line(size);
	c->most_cuts = most_cuts;
	line_open(&c->main, sock);
	OK(pipe(back) == 0);
	c->peer.answers = back[0];
	c->peer.to = back[1];
	OK(pipe(back) == 0);
	c->peer.go_on = back[0];
	c->go_on = back[1];
	EQ(pl_known_init(&c->known, size, 12), 0);
	cfg.src_fd = c->src;
	cfg.size = size;
	cfg.out_fd = c->main.sender;
	EQ(pl_proof_init(&c->proof, size), 0);
	EQ(pl_proof_init(&c->peer.proof, size), 0);
	cfg.known = &c->known;
	cfg.proof = &c->proof;
	EQ(pl_pump_new(&c->pump, &cfg), 0);
	peer.in_fd = c->main.receiver;
	peer.out_fd = c->dst;
	EQ(pl_recv_new(&c->peer.r, &peer), 0);
	agree(c->peer.r, c->main.sender, cfg.features, &c->peer.proof);
	OK(pthread_create(&c->peer.thread, NULL, peer_main, &c->peer) == 0);
}

static void copy_open(struct copy *c, uint64_t size, uint64_t line_seed, bool sock,
		      bool compressed, uint32_t stall_ms)
{
	copy_open_cut(c, size, line_seed, sock, compressed, stall_ms, 0);
}

static void copy_add_line(struct copy *c, struct line how, bool sock)
{
	struct line *l = &c->line[c->lines];
	uint32_t number = ++c->lines;

	OK(number <= LINES);
	*l = how;
	line_open(l, sock);
	/* Either end may come first. */
	if (number % 2)
		EQ(pl_recv_add_lane(c->peer.r, l->receiver, number), 0);
	EQ(pl_pump_add_lane(c->pump, l->sender, number), 0);
	if (number % 2 == 0)
		EQ(pl_recv_add_lane(c->peer.r, l->receiver, number), 0);
	if (!c->most_cuts)
		EQ(pl_pump_add_lane(c->pump, l->sender, number), -EEXIST);
}

static bool was_cut(const struct copy *c, int ret, const struct pl_fault *fault)
{
	return c->most_cuts && fault->stage == PL_STAGE_WRITE &&
	       (ret == -EPIPE || ret == -ECONNRESET);
}

/* Both ends go on over another stream; what was lost has gone again. */
static void copy_relink(struct copy *c, const struct answer *broken)
{
	struct pl_fault fault;
	struct answer a;
	int ret;

	do {
		struct line *l = &c->later[c->cuts++];

		OK(c->cuts <= LINES);
		*l = c->cuts < c->most_cuts ?
			     breaking_line(c->size / 2) :
			     (struct line){ .breaks_after = UINT64_MAX };
		line_open(l, rnd(2));
		if (broken) {
			a = *broken;
			broken = NULL;
		} else if (!take(c->peer.answers, &a, sizeof(a))) {
			DIE("no answer: %d, stage %d", c->peer.ret, c->peer.fault.stage);
		}
		EQ(a.event, PL_RECV_BROKEN);
		ret = pl_pump_relink(c->pump, l->sender, a.lost, a.n);
		OK(ret >= 0);
		pl_recv_relink(c->peer.r, l->receiver);
		OK(write(c->go_on, "", 1) == 1);
		ret = pl_pump_resend(c->pump, &fault);
		OK(!ret || was_cut(c, ret, &fault));
	} while (ret);
}

static void copy_pass(struct copy *c, const struct pl_extent *ext, size_t n, unsigned flags)
{
	struct pl_extent left[64];
	struct pl_fault fault;
	int ret;

	OK(n <= 64);
	for (;;) {
		uint64_t floor;
		size_t k = 0;

		ret = pl_pump_pass(c->pump, ext, n, flags, &fault);
		if (!ret || !was_cut(c, ret, &fault))
			break;
		floor = pl_pump_floor(c->pump);
		copy_relink(c, NULL);
		for (size_t i = 0; i < n; i++)
			if (ext[i].end > floor)
				left[k++] = (struct pl_extent){
					ext[i].start > floor ? ext[i].start : floor,
					ext[i].end };
		ext = left;
		n = k;
	}
	if (ret)
		DIE("pass: %d, stage %d, lane %u; the peer: %d, stage %d, lane %u", ret,
		    fault.stage, fault.lane, c->peer.ret, c->peer.fault.stage,
		    c->peer.fault.lane);
}

/* Ask until nothing was lost.  Returns how often something was. */
static unsigned copy_ask(struct copy *c, bool end)
{
	uint8_t frame[20] = { 0 };
	struct pl_fault fault;
	struct answer a;

	pl_d1_put(frame, PL_D1_MARK, end ? 0 : PL_SYNC_SIZE, 0);
	for (unsigned times = 0;; times++) {
		int ret = pl_pump_write(c->pump, frame, end ? 16 : 20, &fault);

		if (ret && was_cut(c, ret, &fault)) {
			copy_relink(c, NULL);
			continue;
		}
		EQ(ret, 0);
		if (!take(c->peer.answers, &a, sizeof(a)))
			DIE("no answer: %d, stage %d, lane %u", c->peer.ret,
			    c->peer.fault.stage, c->peer.fault.lane);
		if (a.event == PL_RECV_BROKEN) {
			copy_relink(c, &a);
			continue;
		}
		ret = pl_pump_settle(c->pump, a.lost, a.n);

		OK(ret >= 0);
		if (a.event != PL_RECV_LOST) {
			EQ(a.event, end ? PL_RECV_END : PL_RECV_SYNC);
			EQ(ret, 0);
			return times;
		}
		ret = pl_pump_resend(c->pump, &fault);
		if (ret && was_cut(c, ret, &fault))
			copy_relink(c, NULL);
		else
			EQ(ret, 0);
	}
}

static void copy_close(struct copy *c, bool check)
{
	struct pl_pump_stats stats;
	struct pl_recv_stats got;
	uint8_t *target = must_alloc(c->size);

	pthread_join(c->peer.thread, NULL);
	pl_pump_stats(c->pump, &stats);
	pl_recv_stats(c->peer.r, &got);
	c->again = stats.again_bytes;
	pl_recv_free(c->peer.r);
	pl_pump_free(c->pump);
	if (check) {
		uint8_t sent[PL_HASH128], written[PL_HASH128];

		EQ(pl_proof_root(&c->proof, -1, sent), 0);
		EQ(pl_proof_root(&c->peer.proof, c->dst, written), 0);
		OK(!memcmp(sent, written, sizeof(sent)));
		EQ(got.image_size, c->size);
		OK(ftruncate(c->dst, (off_t)c->size) == 0);
		OK(pread(c->dst, target, c->size, 0) == (ssize_t)c->size);
		if (memcmp(target, c->data, c->size))
			for (uint64_t i = 0; i < c->size; i++)
				if (target[i] != c->data[i])
					DIE("byte %llu of %llu is not the source's",
					    (unsigned long long)i,
					    (unsigned long long)c->size);
	}
	line_close(&c->main);
	for (unsigned i = 0; i < c->cuts; i++)
		line_close(&c->later[i]);
	close(c->go_on);
	close(c->peer.go_on);
	for (unsigned i = 0; i < c->lines; i++)
		line_close(&c->line[i]);
	close(c->peer.answers);
	pl_known_fini(&c->known);
	pl_proof_fini(&c->proof);
	pl_proof_fini(&c->peer.proof);
	close(c->src);
	close(c->dst);
	free(c->data);
	free(target);
}

/* The writer: changes some extents, and says which. */
static size_t change(struct copy *c, struct pl_extent *ext, size_t most)
{
	uint64_t at = rnd(8) * BLOCK;
	size_t n = 0;

	while (n < most) {
		uint64_t len = (rnd(6) ? rnd(3) + 1 : rnd(40) + 1) * BLOCK;
		uint64_t end = at + len > c->size ? c->size : at + len;

		if (at >= c->size)
			break;
		/* Random, zero, or what can be compressed; each time another. */
		if (rnd(4))
			fill_random(c->data + at, end - at);
		else
			memset(c->data + at, (int)rnd(2) * (int)rnd(256), end - at);
		OK(pwrite(c->src, c->data + at, end - at, (off_t)at) ==
		   (ssize_t)(end - at));
		ext[n++] = (struct pl_extent){ at, end };
		at = end + (rnd(20) + 1) * BLOCK;
	}
	return n;
}

/* A line that is added while a pass runs. */
struct joiner {
	pthread_t thread;
	struct copy *copy;
	struct line how;
	bool sock;
	useconds_t after;
};

static void *join_main(void *arg)
{
	struct joiner *j = arg;

	usleep(j->after);
	copy_add_line(j->copy, j->how, j->sock);
	return NULL;
}

static struct line random_line(uint64_t size)
{
	static const enum end_of_line ends[] = {
		CARRIES, DROPS, DROPS, DELIVERS_LATE, DELIVERS_LATE, STALLS
	};
	enum end_of_line end = ends[rnd(6)];

	return (struct line){
		.end = end, .seed = rnd(UINT32_MAX) + 1,
		.breaks_after = end == CARRIES ? UINT64_MAX : rnd(size),
	};
}

/*
 * Rounds over a source that changes, with lanes that come and go: at the end the
 * target is what the source was, so no block was overtaken by an older one.
 */
static void random_schedule(uint64_t number, unsigned most_cuts)
{
	struct pl_extent ext[60];
	struct joiner j;
	struct copy c;
	uint64_t size = (rnd(3) + 1) * MiB + (rnd(2) ? rnd(9000) : 0);
	bool sock = number % 2, stalls = false;

	copy_open_cut(&c, size, number % 3 ? rnd(UINT32_MAX) + 1 : 0, sock,
		      number % 4 > 1, 300, most_cuts);
	for (unsigned round = 0; round < 8; round++) {
		size_t n = 1;

		ext[0] = (struct pl_extent){ 0, size };
		if (round)
			n = change(&c, ext, rnd(59) + 1);
		j = (struct joiner){ .copy = &c, .sock = rnd(2),
				     .after = (useconds_t)rnd(3000) };
		j.how = random_line(size / 2);
		/* One line that stalls costs time. */
		if (j.how.end == STALLS && (stalls || number % 8))
			j.how.end = DROPS;
		stalls |= j.how.end == STALLS;
		OK(pthread_create(&j.thread, NULL, join_main, &j) == 0);
		copy_pass(&c, ext, n, PL_PASS_LAST |
			  (round ? 0 : PL_PASS_SKIP_ZERO | (number % 5 ? 0 : PL_PASS_LIVE)));
		pthread_join(j.thread, NULL);
		if (!rnd(3))
			copy_ask(&c, false);
	}
	copy_ask(&c, true);
	copy_close(&c, true);
}

/* A lane that breaks off costs what was under way, and no more. */
static void one_breaks(enum end_of_line end)
{
	uint64_t size = 8 * MiB;
	struct pl_extent all = { 0, size };
	struct pl_pump_lane state[PL_LANES];
	struct copy c;
	unsigned n;

	copy_open(&c, size, 0, false, false, end == STALLS ? 1000 : LONG_STALL);
	copy_add_line(&c, (struct line){ .end = end, .breaks_after = 300 }, false);
	copy_add_line(&c, (struct line){ .breaks_after = UINT64_MAX }, true);
	do {
		/* Until it was given something: the others may be quicker. */
		copy_pass(&c, &all, 1, PL_PASS_LAST);
		n = pl_pump_lanes(c.pump, state);
		EQ(n, 2);
	} while (state[0].bytes < 1000);
	EQ(state[0].number, 1);
	EQ(state[1].number, 2);
	EQ(state[1].err, 0);
	EQ(copy_ask(&c, false), 1);
	n = pl_pump_lanes(c.pump, state);
	EQ(n, 1);
	EQ(state[0].number, 2);
	/* A replacement does its part. */
	copy_add_line(&c, (struct line){ .breaks_after = UINT64_MAX }, false);
	copy_pass(&c, &all, 1, PL_PASS_LAST);
	EQ(pl_pump_lanes(c.pump, state), 2);
	EQ(state[1].number, 3);
	OK(state[1].bytes > 0);
	EQ(copy_ask(&c, true), 0);
	copy_close(&c, true);
	OK(c.again > 0 && c.again < 600000);
}

/* A lane of which the receiver knows nothing: END is not taken before its blocks have
   gone again. */
static void a_lane_that_never_came(void)
{
	uint64_t size = 2 * MiB;
	struct pl_extent all = { 0, size };
	struct pl_pump_lane state[PL_LANES];
	struct copy c;
	int fd[2];

	copy_open(&c, size, 0, false, false, 300);
	OK(pipe(fd) == 0 && fcntl(fd[1], F_SETFL, O_NONBLOCK) == 0);
	EQ(pl_pump_add_lane(c.pump, fd[1], 99), 0);
	do {
		copy_pass(&c, &all, 1, PL_PASS_LAST);
		EQ(pl_pump_lanes(c.pump, state), 1);
	} while (state[0].bytes < 1000);
	close(fd[0]);
	EQ(copy_ask(&c, true), 1);
	copy_close(&c, true);
	OK(c.again > 0);
	close(fd[1]);
}

/* A target that was refused after END is mended over lane 0: all that the lanes carried is
   there, and no other one is waited for. */
static void what_follows_end_goes_over_lane_0(void)
{
	struct pl_extent all = { 0, 2 * MiB }, again = { 0, 64 * KiB };
	struct pl_pump_lane state[PL_LANES];
	struct pl_lane_end ends[PL_LANES];
	struct copy c;
	int fd[2];
	unsigned n;

	copy_open(&c, all.end, 0, false, false, LONG_STALL);
	c.peer.reopens = true;
	copy_add_line(&c, (struct line){ .breaks_after = UINT64_MAX }, false);
	copy_add_line(&c, (struct line){ .breaks_after = UINT64_MAX }, true);
	copy_pass(&c, &all, 1, PL_PASS_LAST);
	EQ(copy_ask(&c, true), 0);
	n = pl_pump_lanes(c.pump, state);
	EQ(n, 2);
	for (unsigned i = 0; i < n; i++)
		ends[i] = (struct pl_lane_end){ state[i].number, state[i].bytes };
	EQ(pl_pump_settle(c.pump, ends, n), 0);
	EQ(pl_pump_lanes(c.pump, state), 0);
	/* One that the sender adds too late. */
	OK(pipe(fd) == 0 && fcntl(fd[1], F_SETFL, O_NONBLOCK) == 0);
	EQ(pl_recv_add_lane(c.peer.r, fd[0], 99), -ECANCELED);
	EQ(pl_pump_add_lane(c.pump, fd[1], 99), 0);
	fill_random(c.data, again.end);
	OK(pwrite(c.src, c.data, again.end, 0) == (ssize_t)again.end);
	copy_pass(&c, &again, 1, PL_PASS_LAST);
	EQ(copy_ask(&c, true), 1);
	copy_close(&c, true);
	close(fd[0]);
	close(fd[1]);
}

/* A target with old contents needs one stream, which passes over its holes in order. */
static void lanes_are_not_for_old_contents(void)
{
	struct pl_recv_cfg cfg = { .slots = 2, .slot_size = 4096, .max_frame = 4096,
				   .reply_fd = -1, .fill = 1, .old_end = 4096 };
	struct stream s = { 0 };
	struct pl_recv_msg msg;
	struct pl_fault fault;
	struct pl_recv *r;
	int fd[2], out = temp_file("old!", 4);

	OK(pipe(fd) == 0);
	cfg.in_fd = fd[0];
	cfg.out_fd = out;
	EQ(pl_recv_new(&r, &cfg), 0);
	frame(&s, 0, "sync", 4);
	put(fd[1], s.data, s.len);
	EQ(pl_recv_run(r, &msg, &fault), PL_RECV_SYNC);
	EQ(pl_recv_expect(r, PL_FEATURE_LANES), -EINVAL);
	pl_recv_free(r);
	close(fd[0]);
	close(fd[1]);
	close(out);
	free(s.data);
}

/* What went over lane 0 alone, before there were others, comes first, too. */
static void the_first_lane_overtakes_nothing(void)
{
	for (unsigned i = 0; i < 5; i++) {
		uint64_t size = MiB;
		struct pl_extent all = { 0, size };
		/* What is under way on lane 0 then. */
		struct pl_extent last = { size - 192 * KiB, size };
		struct copy c;

		copy_open(&c, size, i + 1, i % 2, false, LONG_STALL);
		copy_pass(&c, &all, 1, PL_PASS_LAST);
		fill_random(c.data + last.start, size - last.start);
		OK(pwrite(c.src, c.data, size, 0) == (ssize_t)size);
		for (unsigned n = 0; n < 3; n++)
			copy_add_line(&c, (struct line){ .breaks_after = UINT64_MAX },
				      i % 2);
		copy_pass(&c, &last, 1, PL_PASS_LAST);
		EQ(copy_ask(&c, true), 0);
		copy_close(&c, true);
	}
}

/* What was lost: exactly, as long as the log reaches back, else more than that. */
static void log_of_a_lane(void)
{
	uint64_t size = 1 * GiB, frames = 3 * PL_LANE_FRAMES;
	struct lane_log log = { 0 };
	struct pl_bitmap lost;

	EQ(pl_bitmap_init(&lost, size, 12), 0);
	EQ(pl_log_init(&log, size), 0);
	for (uint64_t i = 0; i < frames; i++)
		pl_log_add(&log, i * 5 * BLOCK, PL_BLOCK, (i + 1) * (BLOCK + 16));
	pl_log_lost(&log, frames * (BLOCK + 16), &lost);
	EQ(pl_bitmap_count(&lost), 0);
	pl_log_lost(&log, (frames - 7) * (BLOCK + 16) + 1, &lost);
	EQ(pl_bitmap_count(&lost), 7);
	pl_log_lost(&log, BLOCK, &lost);
	OK(pl_bitmap_count(&lost) >= frames);
	for (uint64_t i = 0; i < frames; i++)
		OK(lost.word[i * 5 / 64] >> (i * 5 % 64) & 1);
	pl_bitmap_zero(&lost);
	pl_log_forget(&log, frames * (BLOCK + 16));
	pl_log_add(&log, 7 * BLOCK, PL_BLOCK, (frames + 1) * (BLOCK + 16));
	pl_log_lost(&log, 0, &lost);
	EQ(pl_bitmap_count(&lost), 1);
	pl_log_fini(&log);
	pl_bitmap_fini(&lost);
}

/* ---- what a hostile or broken sender may write */

struct hostile {
	struct pl_recv *r;
	int main[2], lane[2], out;
};

static void hostile_open(struct hostile *h, int out, uint32_t stall_ms)
{
	struct pl_recv_cfg cfg = {
		.slots = 3, .slot_size = 16 * KiB, .max_frame = 1 << 20, .sparse = 1,
		.reply_fd = -1, .lane_stall_ms = stall_ms, .largest = 1 << 20,
	};

	h->out = out;
	OK(pipe(h->main) == 0 && pipe(h->lane) == 0);
	cfg.in_fd = h->main[0];
	cfg.out_fd = out;
	EQ(pl_recv_new(&h->r, &cfg), 0);
	agree(h->r, h->main[1], PL_FEATURE_LANES, NULL);
	EQ(pl_recv_add_lane(h->r, h->lane[0], 7), 0);
	EQ(pl_recv_add_lane(h->r, h->lane[0], 7), -EEXIST);
	EQ(pl_recv_add_lane(h->r, h->lane[0], 0), -EINVAL);
	EQ(pl_recv_add_lane(h->r, h->lane[0], 65536), -EINVAL);
}

static void hostile_close(struct hostile *h)
{
	pl_recv_free(h->r);
	for (int i = 0; i < 2; i++) {
		if (h->main[i] >= 0)
			close(h->main[i]);
		if (h->lane[i] >= 0)
			close(h->lane[i]);
	}
	close(h->out);
}

static void say(int fd, const struct stream *s)
{
	put(fd, s->data, s->len);
}

static void barrier(struct stream *s, uint32_t sequence, const uint16_t *names, uint32_t n,
		    uint64_t given_up)
{
	struct header h = { PL_BARRIER_MARK, 8 + 2 * n, given_up };
	uint32_t body[2] = { sequence, n };

	add(s, &h, sizeof(h));
	add(s, body, sizeof(body));
	add(s, names, 2 * n);
}

static void own_barrier(struct stream *s, uint32_t sequence, uint32_t number)
{
	struct header h = { PL_BARRIER_MARK, 8, 0 };
	uint32_t body[2] = { sequence, number };

	add(s, &h, sizeof(h));
	add(s, body, sizeof(body));
}

static const uint16_t both[] = { 0, 7 };

static void refused(const struct stream *lane, const struct stream *main, int err,
		    enum pl_stage stage, uint32_t number)
{
	struct pl_fault fault = { 0 };
	struct pl_recv_msg msg;
	struct hostile h;

	hostile_open(&h, temp_file(NULL, 0), LONG_STALL);
	say(h.lane[1], lane);
	say(h.main[1], main);
	EQ(pl_recv_run(h.r, &msg, &fault), err);
	EQ(fault.stage, stage);
	EQ(fault.lane, number);
	EQ(pl_recv_add_lane(h.r, h.lane[0], 8), -ECANCELED);
	close(h.main[1]);
	h.main[1] = -1;
	EQ(pl_recv_run(h.r, &msg, &fault), err);	/* and stays so */
	hostile_close(&h);
}

static void what_a_lane_may_not_say(void)
{
	struct stream good = { 0 }, at_barrier = { 0 }, bad = { 0 };

	own_barrier(&good, 0, 7);
	barrier(&at_barrier, 1, both, 2, 0);

	own_barrier(&bad, 0, 6);			/* another lane's number */
	refused(&bad, &at_barrier, -EPROTO, PL_STAGE_PROTOCOL, 7);
	bad.len = 0;
	add(&bad, good.data, good.len);
	frame(&bad, 0, "sync", 4);			/* control frames */
	refused(&bad, &at_barrier, -EBADMSG, PL_STAGE_PROTOCOL, 7);
	bad.len = 0;
	frame(&bad, 0, NULL, 0);
	refused(&bad, &at_barrier, -EBADMSG, PL_STAGE_PROTOCOL, 7);
	bad.len = 0;
	add(&bad, "Last login: Monday", 18);		/* no stream of ours */
	refused(&bad, &at_barrier, -EBADMSG, PL_STAGE_PROTOCOL, 7);
	bad.len = 0;
	barrier(&bad, 0, both, 1, 0);			/* lane 0's form */
	refused(&bad, &at_barrier, -EPROTO, PL_STAGE_PROTOCOL, 7);
	bad.len = 0;
	own_barrier(&bad, 0, 7);
	own_barrier(&bad, 0, 7);			/* no progress */
	refused(&bad, &at_barrier, -EPROTO, PL_STAGE_PROTOCOL, 7);
	bad.len = 0;
	own_barrier(&bad, 0, 7);
	frame(&bad, 1 << 20, "past the end", 12);
	refused(&bad, &at_barrier, -EFBIG, PL_STAGE_PROTOCOL, 7);

	/* Lane 0. */
	bad.len = 0;
	barrier(&bad, 2, both, 2, 0);			/* not the next one */
	refused(&good, &bad, -EPROTO, PL_STAGE_PROTOCOL, 0);
	bad.len = 0;
	barrier(&bad, 1, both, 2, 0);
	pl_put32(bad.data + 20, 3);			/* not so many names */
	refused(&good, &bad, -EPROTO, PL_STAGE_PROTOCOL, 0);
	bad.len = 0;
	add(&bad, &(struct header){ PL_BARRIER_MARK, 8 + 2 * 65, 0 }, 16);
	refused(&good, &bad, -EPROTO, PL_STAGE_PROTOCOL, 0);
	bad.len = 0;
	own_barrier(&good, 1, 7);
	add(&bad, at_barrier.data, at_barrier.len);
	frame(&bad, 0, "some data", 9);
	frame(&bad, 0, NULL, 0);			/* END without a barrier */
	refused(&good, &bad, -EPROTO, PL_STAGE_PROTOCOL, 0);
	free(good.data);
	free(at_barrier.data);
	free(bad.data);
}

/* A lane that the sender has never used needs no barrier: it may have come too late there. */
static void a_lane_that_was_not_used(void)
{
	struct stream s = { 0 };
	struct pl_recv_msg msg;
	struct pl_fault fault;
	struct hostile h;

	hostile_open(&h, temp_file(NULL, 0), LONG_STALL);
	frame(&s, 0, NULL, 0);
	say(h.main[1], &s);
	EQ(pl_recv_run(h.r, &msg, &fault), PL_RECV_END);
	hostile_close(&h);
	free(s.data);
}

static void data_before_the_first_frame_of_a_lane(void)
{
	struct stream bad = { 0 }, at_barrier = { 0 };

	frame(&bad, 0, "who is this?", 12);
	barrier(&at_barrier, 1, both, 2, 0);
	refused(&bad, &at_barrier, -EBADMSG, PL_STAGE_PROTOCOL, 7);
	free(bad.data);
	free(at_barrier.data);
}

/* The markers are only known to those that have agreed. */
static void barriers_need_the_feature(void)
{
	struct pl_recv_cfg cfg = { .slots = 2, .slot_size = 4096, .max_frame = 4096,
				   .reply_fd = -1 };
	struct stream s = { 0 };
	struct pl_recv_msg msg;
	struct pl_fault fault;
	struct pl_recv *r;
	int fd[2], out = temp_file(NULL, 0);

	OK(pipe(fd) == 0);
	cfg.in_fd = fd[0];
	cfg.out_fd = out;
	EQ(pl_recv_new(&r, &cfg), 0);
	frame(&s, 0, "some data", 9);
	barrier(&s, 1, both, 1, 0);
	say(fd[1], &s);
	EQ(pl_recv_run(r, &msg, &fault), -EBADMSG);
	EQ(fault.mark, PL_BARRIER_MARK);
	EQ(fault.frame, 1);
	pl_recv_free(r);
	close(fd[0]);
	close(fd[1]);
	close(out);
	free(s.data);
}

/* A lane whose sender has gone on without it: nothing of it is written. */
static void a_lane_that_comes_late(void)
{
	struct pl_lane_end lost[PL_BARRIER_NAMES];
	static const uint16_t alone[] = { 0 };
	struct stream s = { 0 };
	struct pl_recv_msg msg;
	struct pl_fault fault;
	struct hostile h;
	char got[4] = "";

	hostile_open(&h, temp_file("new!", 4), LONG_STALL);
	barrier(&s, 1, alone, 1, 0);
	barrier(&s, 2, alone, 1, 1);
	frame(&s, 0, "sync", 4);
	say(h.main[1], &s);
	EQ(pl_recv_run(h.r, &msg, &fault), PL_RECV_LOST);
	EQ(pl_recv_lost(h.r, lost), 0);		/* it said nothing yet */
	s.len = 0;
	own_barrier(&s, 1, 7);
	frame(&s, 0, "stale data", 10);
	say(h.lane[1], &s);
	s.len = 0;
	barrier(&s, 3, alone, 1, 0);
	frame(&s, 0, NULL, 0);
	say(h.main[1], &s);
	EQ(pl_recv_run(h.r, &msg, &fault), PL_RECV_END);
	OK(pread(h.out, got, 4, 0) == 4 && !memcmp(got, "new!", 4));
	hostile_close(&h);
	free(s.data);
}

/* Its data are there up to the last whole frame; the stream ends in the next. */
static void what_came_of_a_lane_is_counted(void)
{
	struct pl_lane_end lost[PL_BARRIER_NAMES];
	struct stream s = { 0 }, sync = { 0 };
	uint64_t whole;
	struct pl_recv_msg msg;
	struct pl_fault fault;
	struct hostile h;
	char got[9] = "";

	hostile_open(&h, temp_file(NULL, 0), LONG_STALL);
	own_barrier(&s, 0, 7);
	frame(&s, 0, "some data", 9);
	whole = s.len;
	frame(&s, 100, "some that break off", 19);
	s.len -= 5;
	say(h.lane[1], &s);
	close(h.lane[1]);
	h.lane[1] = -1;
	barrier(&sync, 1, both, 2, 0);
	frame(&sync, 0, "sync", 4);
	say(h.main[1], &sync);
	EQ(pl_recv_run(h.r, &msg, &fault), PL_RECV_LOST);
	EQ(pl_recv_lost(h.r, lost), 1);
	EQ(lost[0].lane, 7);
	EQ(lost[0].received, whole);
	OK(pread(h.out, got, 9, 0) == 9 && !memcmp(got, "some data", 9));
	EQ(pl_recv_lost(h.r, lost), 0);		/* once */
	/* It is named no more, and the copy ends well. */
	sync.len = 0;
	barrier(&sync, 2, both, 1, 0);
	frame(&sync, 0, NULL, 0);
	say(h.main[1], &sync);
	EQ(pl_recv_run(h.r, &msg, &fault), PL_RECV_END);
	hostile_close(&h);
	free(s.data);
	free(sync.data);
}

/* A barrier does not wait for ever: not for a lane that is silent, not for one that
   never came, and not after a cancel. */
static void barriers_have_an_end(void)
{
	static const uint16_t more[] = { 0, 7, 9 };
	struct pl_lane_end lost[PL_BARRIER_NAMES];
	struct stream s = { 0 };
	struct pl_recv_msg msg;
	struct pl_fault fault;
	struct hostile h;
	pthread_t thread;

	hostile_open(&h, temp_file(NULL, 0), 100);
	own_barrier(&s, 0, 7);
	say(h.lane[1], &s);
	s.len = 0;
	barrier(&s, 1, more, 3, 0);
	frame(&s, 0, "sync", 4);
	say(h.main[1], &s);
	EQ(pl_recv_run(h.r, &msg, &fault), PL_RECV_LOST);
	EQ(pl_recv_lost(h.r, lost), 2);
	OK(lost[0].lane == 7 && lost[0].received == 24);
	OK(lost[1].lane == 9 && lost[1].received == 0);
	hostile_close(&h);

	hostile_open(&h, temp_file(NULL, 0), LONG_STALL);
	s.len = 0;
	barrier(&s, 1, both, 2, 0);
	say(h.main[1], &s);
	OK(pthread_create(&thread, NULL, cancel_soon, h.r) == 0);
	EQ(pl_recv_run(h.r, &msg, &fault), -ECANCELED);
	pthread_join(thread, NULL);
	hostile_close(&h);
	free(s.data);
}

static void a_full_disk_names_the_lane(void)
{
	struct stream s = { 0 }, main = { 0 };
	struct pl_recv_msg msg;
	struct pl_fault fault = { 0 };
	struct hostile h;
	int full = open("/dev/full", O_WRONLY | O_CLOEXEC);

	OK(full >= 0);
	hostile_open(&h, full, LONG_STALL);
	own_barrier(&s, 0, 7);
	frame(&s, 4096, "for a full disk", 15);
	say(h.lane[1], &s);
	barrier(&main, 1, both, 2, 0);
	say(h.main[1], &main);
	EQ(pl_recv_run(h.r, &msg, &fault), -ENOSPC);
	EQ(fault.stage, PL_STAGE_WRITE);
	EQ(fault.pos, 4096);
	EQ(fault.lane, 7);
	hostile_close(&h);
	free(s.data);
	free(main.data);
}

static void *run_main(void *arg)
{
	struct peer *p = arg;
	struct pl_recv_msg msg;

	p->ret = pl_recv_run(p->r, &msg, &p->fault);
	return NULL;
}

static void until_written(struct pl_recv *r, uint64_t bytes)
{
	struct pl_recv_stats stats;

	do {
		usleep(1000);
		pl_recv_stats(r, &stats);
	} while (stats.written_bytes < bytes);
}

/* What lane 0 has allocated ahead is no hole any more when another lane writes there. */
static void room_that_was_allocated_ahead_is_for_all_lanes(void)
{
	struct pl_recv_cfg cfg = {
		.slots = 3, .slot_size = 64 * KiB, .max_frame = 1 << 20, .sparse = 1,
		.reply_fd = -1, .direct = { 512, 512 }, .writers = 2, .ahead = 1,
	};
	uint8_t *data = must_alloc(64 * KiB), got[PL_BLOCK];
	struct stream s = { 0 };
	struct peer p = { 0 };
	int main[2], lane[2];
	uint64_t sent = 0;

	fill_random(data, 64 * KiB);
	OK(pipe(main) == 0 && pipe(lane) == 0);
	cfg.in_fd = main[0];
	cfg.out_fd = disk_file();
	EQ(pl_recv_new(&p.r, &cfg), 0);
	agree(p.r, main[1], PL_FEATURE_LANES, NULL);
	OK(pthread_create(&p.thread, NULL, run_main, &p) == 0);
	for (; sent < 5 * MiB; sent += 64 * KiB) {
		s.len = 0;
		frame(&s, sent, data, 64 * KiB);
		say(main[1], &s);
	}
	until_written(p.r, sent);
	EQ(pl_recv_add_lane(p.r, lane[0], 7), 0);
	s.len = 0;
	own_barrier(&s, 0, 7);
	frame(&s, 7 * MiB, data, PL_BLOCK);
	own_barrier(&s, 1, 7);
	say(lane[1], &s);
	until_written(p.r, sent + PL_BLOCK);
	s.len = 0;
	barrier(&s, 1, both, 2, 0);
	frame(&s, 0, NULL, 0);
	say(main[1], &s);
	pthread_join(p.thread, NULL);
	EQ(p.ret, PL_RECV_END);
	OK(pread(cfg.out_fd, got, PL_BLOCK, 7 * MiB) == PL_BLOCK);
	OK(!memcmp(got, data, PL_BLOCK));
	pl_recv_free(p.r);
	for (int i = 0; i < 2; i++) {
		close(main[i]);
		close(lane[i]);
	}
	close(cfg.out_fd);
	free(s.data);
	free(data);
}

/* Lane 0 is the copy itself. */
static void lane_0_ends_the_copy(void)
{
	struct pl_extent all = { 0, 4 * MiB };
	struct pl_fault fault;
	struct copy c;

	copy_open(&c, all.end, 0, false, false, LONG_STALL);
	copy_add_line(&c, (struct line){ .breaks_after = UINT64_MAX }, false);
	pl_recv_cancel(c.peer.r);
	pthread_join(c.peer.thread, NULL);
	EQ(c.peer.ret, -ECANCELED);
	close(c.main.receiver);
	c.main.receiver = -1;
	EQ(pl_pump_pass(c.pump, &all, 1, 0, &fault), -EPIPE);
	EQ(fault.stage, PL_STAGE_WRITE);
	EQ(fault.lane, 0);
	OK(pthread_create(&c.peer.thread, NULL, peer_main, &c.peer) == 0);
	copy_close(&c, false);
}

static void a_cancel_ends_a_pass(void)
{
	struct pl_extent all = { 0, 4 * MiB };
	struct pl_fault fault;
	struct copy c;
	pthread_t thread;

	copy_open(&c, all.end, 0, false, false, LONG_STALL);
	copy_add_line(&c, (struct line){ .breaks_after = 100, .end = STALLS }, false);
	c.main.end = STALLS;
	pl_recv_cancel(c.peer.r);
	pthread_join(c.peer.thread, NULL);
	OK(pthread_create(&thread, NULL, cancel_pump_soon, c.pump) == 0);
	EQ(pl_pump_pass(c.pump, &all, 1, 0, &fault), -ECANCELED);
	pthread_join(thread, NULL);
	OK(pthread_create(&c.peer.thread, NULL, peer_main, &c.peer) == 0);
	copy_close(&c, false);
}

/* ---- streams that begin well, and then have any faults */

#define ROOM (1ull << 20)	/* of the target: `largest` */
#define AHEAD (48 * KiB)	/* a pipe takes so much without a reader */

/* What each byte of the image is.  Not 0: that is a hole. */
static uint8_t byte_at(uint64_t pos)
{
	return (uint8_t)(1 + (pos * 2654435761u >> 16) % 255);
}

static void some_data(struct stream *s)
{
	static uint8_t data[9000];
	uint32_t len = 5 + (uint32_t)rnd(rnd(3) ? 300 : sizeof(data) - 5);
	uint64_t pos = rnd(ROOM - len);
	struct header h = { PL_PROOF_MARK, 8, 1 };

	for (uint32_t i = 0; i < len; i++)
		data[i] = byte_at(pos + i);
	if (rnd(4) == 0 && len > PL_BLOCK) {
		pos -= pos % PL_BLOCK;
		memset(data, 0, PL_BLOCK);
		len = PL_BLOCK;
	}
	frame(s, pos, data, len);
	if (rnd(60) == 0) {	/* a question, at any time */
		add(s, &h, sizeof(h));
		add(s, data, 8);
	}
}

/* True: a byte of it is another one. */
static bool spoil(struct stream *s, uint64_t of)
{
	if (rnd(of) || !s->len)
		return false;
	for (uint64_t i = 1 + rnd(3); i; i--)
		s->data[rnd(s->len)] ^= (uint8_t)(1u << rnd(8));
	if (rnd(4) == 0)
		s->len = rnd(s->len) + 1;
	return true;
}

static void main_stream(struct stream *s, uint32_t sequence, const uint16_t *names)
{
	struct header claim = { PL_PROOF_MARK, 48, 0 };
	uint8_t body[48] = { 0 };

	for (uint32_t i = 1; i <= sequence && s->len < AHEAD - 20000; i++) {
		for (uint64_t n = rnd(3); n; n--)
			some_data(s);
		barrier(s, rnd(12) ? i : (uint32_t)rnd(9), names, (uint32_t)rnd(4), rnd(2));
		if (rnd(2))
			frame(s, 0, "sync", 4);
	}
	add(s, &claim, sizeof(claim));
	add(s, body, sizeof(body));
	frame(s, 0, NULL, 0);
}

static void lane_stream(struct stream *s, uint32_t sequence, uint16_t number)
{
	own_barrier(s, 0, number);
	for (uint32_t i = 1; i <= sequence && s->len < AHEAD - 20000; i++) {
		for (uint64_t n = rnd(3); n; n--)
			some_data(s);
		own_barrier(s, rnd(12) ? i : (uint32_t)rnd(9), number);
	}
}

/* It ends, whatever comes; nothing is written past what the target may have; and if no
   byte was spoilt, what is written is what was sent. */
static void any_faults(uint64_t number)
{
	enum { LANES = 3, MOST_RUNS = 200 };
	static const uint16_t names[] = { 0, 7, 8, 9 };
	struct pl_recv_cfg cfg = {
		.slots = 3, .slot_size = 16 * KiB, .max_frame = 1 << 20, .sparse = 1,
		.window = 64 * KiB, .reply_fd = -1, .lane_stall_ms = 30, .largest = ROOM,
	};
	uint64_t features = PL_FEATURE_LANES | PL_FEATURE_COMPRESSED | PL_FEATURE_PROOF |
			    (rnd(2) ? PL_FEATURE_RESUME : 0);
	int fds[LANES + 1][2], out = temp_file(NULL, 0);
	struct pl_lane_end lost[PL_BARRIER_NAMES];
	uint32_t rounds = (uint32_t)rnd(6);
	struct pl_proof proof;
	struct pl_fault fault;
	struct pl_recv_msg msg;
	bool spoilt = false;
	struct pl_recv *r;
	uint8_t *got;
	off_t size;
	int ret = 0;

	for (unsigned i = 0; i <= LANES; i++)
		OK(pipe2(fds[i], O_CLOEXEC) == 0);
	cfg.in_fd = fds[0][0];
	cfg.out_fd = out;
	EQ(pl_proof_init(&proof, ROOM), 0);
	EQ(pl_recv_new(&r, &cfg), 0);
	agree(r, fds[0][1], features, &proof);
	for (unsigned i = 0; i <= LANES; i++) {
		struct stream s = { 0 };

		if (i)
			lane_stream(&s, rounds, names[i]);
		else
			main_stream(&s, rounds, names);
		spoilt |= number % 4 && spoil(&s, 2);
		say(fds[i][1], &s);
		free(s.data);
		if (rnd(8))	/* else it stays open, and says no more */
			close(fds[i][1]);
		else
			fds[i][1] = -1 - fds[i][1];
	}
	if (fds[0][1] < 0)
		close(-1 - fds[0][1]);
	for (unsigned i = 1; i <= LANES; i++)
		if (rnd(5))
			(void)!pl_recv_add_lane(r, fds[i][0], names[i]);
	for (unsigned i = 0; i < MOST_RUNS && ret >= 0 && ret != PL_RECV_BROKEN; i++) {
		uint32_t len;

		ret = pl_recv_run(r, &msg, &fault);
		if (ret == PL_RECV_LOST || ret == PL_RECV_BROKEN)
			OK(pl_recv_lost(r, lost) <= PL_BARRIER_NAMES);
		else if (ret == PL_RECV_SYNC)
			pl_recv_synced(r);
		else if (ret == PL_RECV_QUESTION)
			OK(pl_recv_proof_data(r, &len) && len);
		else if (ret == PL_RECV_END && rnd(2))
			pl_recv_reopen(r);
		else if (ret == PL_RECV_END)
			break;
	}
	pl_recv_end_lanes(r);
	pl_recv_free(r);
	size = lseek(out, 0, SEEK_END);
	OK(size >= 0 && size <= (off_t)ROOM);
	got = must_alloc((size_t)size);
	OK(pread(out, got, (size_t)size, 0) == size);
	for (uint64_t i = 0; !spoilt && i < (uint64_t)size; i++)
		OK(!got[i] || got[i] == byte_at(i));
	free(got);
	pl_proof_fini(&proof);
	for (unsigned i = 0; i <= LANES; i++) {
		close(fds[i][0]);
		if (i && fds[i][1] < 0)
			close(-1 - fds[i][1]);
	}
	close(out);
}

int main(void)
{
	signal(SIGPIPE, SIG_IGN);
	for (uint64_t i = 0; i < so_many(200); i++)
		any_faults(i);
	log_of_a_lane();
	barriers_need_the_feature();
	what_a_lane_may_not_say();
	data_before_the_first_frame_of_a_lane();
	a_lane_that_comes_late();
	a_lane_that_was_not_used();
	what_came_of_a_lane_is_counted();
	barriers_have_an_end();
	a_full_disk_names_the_lane();
	room_that_was_allocated_ahead_is_for_all_lanes();
	lane_0_ends_the_copy();
	a_cancel_ends_a_pass();
	a_lane_that_never_came();
	what_follows_end_goes_over_lane_0();
	lanes_are_not_for_old_contents();
	the_first_lane_overtakes_nothing();
	one_breaks(DROPS);
	one_breaks(DELIVERS_LATE);
	one_breaks(STALLS);
	for (uint64_t i = 0; i < so_many(40); i++)
		random_schedule(i, i % 2 ? 0 : i % 5);
	return 0;
}

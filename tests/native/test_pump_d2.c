/* SPDX-License-Identifier: Apache-2.0 */
/* The sending pump in D2 and D3: packets, answers in flight, bad peers. */
#define _GNU_SOURCE
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <time.h>

#include "packets.h"

#define SIZE (4 * MiB + 4)
#define WINDOW 256u

/* The other end of the socket: takes packets apart into an image and answers
   as it is told to. */
struct peer {
	pthread_t thread;
	int fd;
	bool digests;
	unsigned hold;		/* answers are kept back until so many are due */
	unsigned fail_at;	/* this packet gets -7 and then a hang-up; 0: none */
	unsigned extra_at;	/* after this packet there are two answers; 0: none */
	unsigned deaf_at;	/* no answers from this one on; 0: always some */
	unsigned close_at;	/* closes after this packet; 0: never */
	uint8_t *image;
	uint64_t packets, asyncs, commands, ends, bytes, due;
};

static bool take_all(int fd, void *buf, size_t len)
{
	for (char *p = buf; len;) {
		ssize_t n = read(fd, p, len);

		if (n <= 0)
			return false;
		p += n;
		len -= (size_t)n;
	}
	return true;
}

/* Does not read on before the answers are out. */
static void answer(struct peer *p, unsigned count, int32_t value)
{
	int32_t values[1100];

	OK(count <= 1100);
	for (unsigned i = 0; i < count; i++)
		values[i] = value;
	for (size_t at = 0; at < count * sizeof(*values);) {
		ssize_t n = send(p->fd, (char *)values + at,
				 count * sizeof(*values) - at, MSG_NOSIGNAL);

		if (n < 0)
			return;
		at += (size_t)n;
	}
}

static void *peer_main(void *arg)
{
	struct peer *p = arg;
	struct toy toy = { 0 };
	uint8_t sum[PL_DIGEST], want[PL_DIGEST];
	uint8_t *buf = must_alloc(2 * MiB);
	struct packet h;

	while (take_all(p->fd, &h, sizeof(h))) {
		EQ(h.mark, PL_D2_MARK);
		EQ(h.padding, 0);
		if (p->digests)
			OK(take_all(p->fd, sum, sizeof(sum)));
		OK(h.size <= 2 * MiB);
		if (!take_all(p->fd, buf, h.size))
			break;
		if (p->digests) {
			toy_digest(&toy, buf, h.size, want);
			OK(!memcmp(sum, want, sizeof(sum)));
		}
		p->packets++;
		if (h.size && h.type != CMD) {
			OK(h.pos + h.size <= SIZE);
			memcpy(p->image + h.pos, buf, h.size);
			p->bytes += h.size;
		}
		p->ends += h.size == 0;
		p->commands += h.type == CMD && h.size;
		p->asyncs += h.type == ASYNC;
		if (p->fail_at && p->packets == p->fail_at) {
			answer(p, (unsigned)p->due, 0);
			answer(p, 1, -7);
			shutdown(p->fd, SHUT_RDWR);
			break;
		}
		if (p->close_at && p->packets == p->close_at) {
			shutdown(p->fd, SHUT_RDWR);
			break;
		}
		if (p->deaf_at && p->packets >= p->deaf_at)
			continue;
		p->due += h.type != ASYNC || h.size == 0;
		if (p->extra_at && p->packets == p->extra_at)
			p->due++;
		if (p->due > p->hold || h.type == CMD) {
			answer(p, (unsigned)p->due, 0);
			p->due = 0;
		}
	}
	free(buf);
	return NULL;
}

static int peer_start(struct peer *p, int buffer)
{
	int fd[2];

	OK(socketpair(AF_UNIX, SOCK_STREAM, 0, fd) == 0);
	if (buffer)
		for (int i = 0; i < 2; i++)
			OK(setsockopt(fd[i], SOL_SOCKET, SO_SNDBUF, &buffer,
				      sizeof(buffer)) == 0);
	p->fd = fd[0];
	p->image = must_alloc(SIZE);
	OK(pthread_create(&p->thread, NULL, peer_main, p) == 0);
	return fd[1];
}

static void peer_end(struct peer *p, int fd)
{
	shutdown(fd, SHUT_RDWR);
	pthread_join(p->thread, NULL);
	close(fd);
	close(p->fd);
	free(p->image);
}

static struct pl_pump *new_pump(int src, int out, bool async, struct toy *toy,
				uint32_t stall_ms)
{
	struct pl_pump_cfg cfg = {
		.src_fd = src, .size = SIZE, .align = 1, .out_fd = out,
		.sink = PL_SINK_PACKETS, .cluster = 4096, .slots = 4, .readers = 2,
		.async = async, .window = WINDOW, .stall_ms = stall_ms,
		.digest = toy ? toy_digest : NULL, .digest_ctx = toy,
	};
	struct pl_pump *p;

	EQ(pl_pump_new(&p, &cfg), 0);
	return p;
}

static const struct pl_extent all = { 0, SIZE };

static void command(uint8_t *to, uint32_t size, struct toy *toy, size_t *len)
{
	struct packet h = { PL_D2_MARK, CMD, size, 0, 0 };
	uint32_t word = 0;

	memcpy(to, &h, sizeof(h));
	*len = sizeof(h);
	if (toy) {
		toy_digest(toy, &word, size, to + *len);
		*len += PL_DIGEST;
	}
	memcpy(to + *len, &word, size);
	*len += size;
}

static int ask(struct pl_pump *p, uint32_t size, struct toy *toy, uint32_t timeout_ms,
	       struct pl_fault *fault)
{
	struct toy own = { 0 };
	uint8_t buf[64];
	size_t len;

	command(buf, size, toy ? &own : NULL, &len);
	return pl_pump_ask(p, buf, len, timeout_ms, fault);
}

/* Whatever the peer does with its answers, the image arrives. */
static void arrives(bool async, bool digests, unsigned hold, int buffer)
{
	struct peer peer = { .digests = digests, .hold = hold };
	uint8_t *data = must_alloc(SIZE);
	struct pl_pump_stats stats;
	struct toy toy = { 0 };
	struct pl_fault fault;
	struct pl_pump *p;
	int src, out;

	fill_random(data, SIZE);
	src = temp_file(data, SIZE);
	out = peer_start(&peer, buffer);
	p = new_pump(src, out, async, digests ? &toy : NULL, 10000);
	EQ(pl_pump_pass(p, &all, 1, 0, &fault), 0);
	EQ(ask(p, 4, digests ? &toy : NULL, 10000, &fault), 0);
	EQ(ask(p, 0, digests ? &toy : NULL, 10000, &fault), 0);
	pl_pump_stats(p, &stats);
	EQ(pl_pump_write(p, "x", 1, &fault), -EINVAL);
	pl_pump_free(p);
	OK(!memcmp(peer.image, data, SIZE));
	EQ(peer.packets, SIZE / 4096 + 1 + 2);
	EQ(peer.asyncs, async ? SIZE / 4096 + 1 : 0);
	EQ(peer.commands, 1);
	EQ(peer.ends, 1);
	EQ(stats.data_bytes, SIZE);
	EQ(stats.wire_bytes, SIZE + 4 + peer.packets * (digests ? 40 : 24));
	peer_end(&peer, out);
	close(src);
	free(data);
}

/* One pass, then SYNC: the first that fails, how, and where.  Only a deaf peer
   makes the deadline pass: one that answers may be slow on a loaded machine. */
static void fails(struct peer peer, bool async, int err, enum pl_stage stage,
		  uint64_t frame, int32_t reply)
{
	uint32_t stall_ms = peer.deaf_at == 1 ? 300 : peer.deaf_at ? 1000 : 60000;
	struct pl_fault fault = { 0 };
	int src = temp_file(NULL, SIZE), out = peer_start(&peer, 0), ret;
	struct pl_pump *p = new_pump(src, out, async, NULL, stall_ms);

	ret = pl_pump_pass(p, &all, 1, 0, &fault);
	if (!ret)
		ret = ask(p, 4, NULL, stall_ms, &fault);
	EQ(ret, err);
	EQ(fault.stage, stage);
	EQ(fault.reply, reply);
	EQ(fault.frame, frame);
	pl_pump_free(p);
	peer_end(&peer, out);
	close(src);
}

static void failures(void)
{
	for (unsigned at = 1; at < 1020; at += 101) {
		fails((struct peer){ .fail_at = at }, false, -EREMOTEIO,
		      PL_STAGE_REPLY, at - 1, -7);
		fails((struct peer){ .fail_at = at }, true, -EREMOTEIO,
		      PL_STAGE_REPLY, 0, -7);
	}
	/* The SYNC itself. */
	fails((struct peer){ .fail_at = SIZE / 4096 + 2 }, false, -EREMOTEIO,
	      PL_STAGE_REPLY, SIZE / 4096 + 1, -7);
	fails((struct peer){ .extra_at = SIZE / 4096 + 2 }, false, -EPROTO,
	      PL_STAGE_REPLY, SIZE / 4096 + 2, 0);
	fails((struct peer){ .extra_at = 3 }, true, -EPROTO, PL_STAGE_REPLY, 0, 0);
	/* Deaf: the window stops the sender, then the deadline. */
	fails((struct peer){ .deaf_at = 1 }, false, -ETIMEDOUT, PL_STAGE_REPLY, 0, 0);
	fails((struct peer){ .deaf_at = 100 }, false, -ETIMEDOUT, PL_STAGE_REPLY, 99, 0);
	fails((struct peer){ .deaf_at = 1 }, true, -ETIMEDOUT, PL_STAGE_REPLY, 0, 0);
}

static void closed(bool async)
{
	struct peer peer = { .close_at = 500 };
	struct pl_fault fault = { 0 };
	int src = temp_file(NULL, SIZE), out = peer_start(&peer, 0);
	struct pl_pump *p = new_pump(src, out, async, NULL, 10000);

	EQ(pl_pump_pass(p, &all, 1, 0, &fault), -EPIPE);
	pl_pump_free(p);
	peer_end(&peer, out);
	close(src);
}

/* A deaf peer has no more than a window of packets that it did not answer. */
static void window_is_kept(void)
{
	struct peer peer = { .deaf_at = 1 };
	struct pl_pump_stats stats;
	struct pl_fault fault;
	int src = temp_file(NULL, SIZE), out = peer_start(&peer, 0);
	struct pl_pump *p = new_pump(src, out, false, NULL, 500);

	EQ(pl_pump_pass(p, &all, 1, 0, &fault), -ETIMEDOUT);
	pl_pump_stats(p, &stats);
	OK(stats.frames <= WINDOW && stats.frames > WINDOW - 16);
	pl_pump_free(p);
	peer_end(&peer, out);
	close(src);
}

/* Many packets in one write to a peer that is stuck in answering: it reads on
   only if its answers are taken meanwhile. */
static void neither_blocks_the_other(void)
{
	static struct pl_extent ext[1000];
	struct peer peer = { 0 };
	struct pl_pump_cfg cfg = {
		.size = SIZE, .align = 1, .sink = PL_SINK_PACKETS, .cluster = MiB,
		.slots = 4, .readers = 2, .window = 4096, .stall_ms = 5000,
	};
	uint8_t *data = must_alloc(SIZE);
	struct pl_fault fault;
	struct pl_pump *p;

	fill_random(data, SIZE);
	cfg.src_fd = temp_file(data, SIZE);
	cfg.out_fd = peer_start(&peer, 1);
	for (size_t i = 0; i < 1000; i++)
		ext[i] = (struct pl_extent){ i * 4096, i * 4096 + 100 };
	EQ(pl_pump_new(&p, &cfg), 0);
	EQ(pl_pump_pass(p, ext, 1000, 0, &fault), 0);
	EQ(ask(p, 0, NULL, 5000, &fault), 0);
	pl_pump_free(p);
	EQ(peer.packets, 1001);
	for (size_t i = 0; i < 1000; i++)
		OK(!memcmp(peer.image + ext[i].start, data + ext[i].start, 100));
	peer_end(&peer, cfg.out_fd);
	close(cfg.src_fd);
	free(data);
}

static void *cancel_later(void *arg)
{
	usleep(50000);
	pl_pump_cancel(arg);
	return NULL;
}

static void cancelled(void)
{
	struct peer peer = { .deaf_at = 1 };
	struct pl_fault fault;
	int src = temp_file(NULL, SIZE), out = peer_start(&peer, 0);
	struct pl_pump *p = new_pump(src, out, false, NULL, 0);
	pthread_t thread;

	OK(pthread_create(&thread, NULL, cancel_later, p) == 0);
	EQ(ask(p, 4, NULL, 0, &fault), -ECANCELED);
	pthread_join(thread, NULL);
	EQ(pl_pump_pass(p, &all, 1, 0, &fault), -ECANCELED);
	pl_pump_free(p);
	peer_end(&peer, out);
	close(src);
}

static void bad_configs(void)
{
	struct pl_pump_cfg cfg = { .src_fd = 0, .out_fd = 1, .size = 4096, .align = 1,
				   .sink = PL_SINK_PACKETS, .cluster = 4096,
				   .slots = 2, .window = 255 };
	struct pl_fault fault;
	struct pl_pump *p;

	EQ(pl_pump_new(&p, &cfg), -EINVAL);
	cfg.window = 256;
	EQ(pl_pump_new(&p, &cfg), 0);
	pl_pump_free(p);
	cfg.sink = PL_SINK_FRAMES;
	EQ(pl_pump_new(&p, &cfg), 0);
	EQ(pl_pump_ask(p, "x", 1, 0, &fault), -EINVAL);
	pl_pump_free(p);
}

static void *answer_and_hang_up(void *arg)
{
	int fd = *(int *)arg;
	int32_t fine = 0;
	char packet[13];

	OK(take_all(fd, packet, sizeof(packet)));
	OK(write(fd, &fine, sizeof(fine)) == sizeof(fine));
	OK(shutdown(fd, SHUT_WR) == 0);
	return NULL;
}

/* The last answer, and right behind it the end: the peer has done its part. */
static void hangs_up_when_done(void)
{
	struct pl_pump_cfg cfg = { .src_fd = 0, .size = 4096, .align = 1,
				   .sink = PL_SINK_PACKETS, .cluster = 4096,
				   .slots = 2, .window = 256 };
	struct pl_fault fault;
	struct pl_pump *p;
	pthread_t thread;
	int fd[2];

	OK(socketpair(AF_UNIX, SOCK_STREAM, 0, fd) == 0);
	cfg.out_fd = fd[0];
	EQ(pl_pump_new(&p, &cfg), 0);
	OK(pthread_create(&thread, NULL, answer_and_hang_up, &fd[1]) == 0);
	EQ(pl_pump_ask(p, "an END packet", 13, 1000, &fault), 0);
	pthread_join(thread, NULL);
	/* But one that owes an answer has failed. */
	EQ(pl_pump_ask(p, "an END packet", 13, 1000, &fault), -EPIPE);
	EQ(fault.stage, PL_STAGE_REPLY);
	pl_pump_free(p);
	close(fd[0]);
	close(fd[1]);
}

int main(void)
{
	signal(SIGPIPE, SIG_IGN);
	bad_configs();
	arrives(false, false, 0, 0);
	arrives(false, false, 100, 0);
	/* A peer whose answers block it, and a sender whose packets do. */
	arrives(false, false, 0, 1);
	arrives(true, false, 0, 0);
	arrives(false, true, 0, 0);
	arrives(true, true, 0, 1);
	neither_blocks_the_other();
	failures();
	closed(false);
	closed(true);
	hangs_up_when_done();
	window_is_kept();
	cancelled();
	return 0;
}

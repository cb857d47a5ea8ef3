/* SPDX-License-Identifier: Apache-2.0 */
/* Streams for the receiving pump's tests, and who feeds them. */
#ifndef STREAM_H
#define STREAM_H

#include <sys/socket.h>

#include "testing.h"

struct header {
	uint32_t mark, size;
	uint64_t pos;
};
_Static_assert(sizeof(struct header) == 16, "as on the wire");

struct stream {
	uint8_t *data;
	size_t len, room;
};

static inline void add(struct stream *s, const void *data, size_t len)
{
	if (s->len + len > s->room) {
		s->room = (s->len + len) * 2;
		s->data = realloc(s->data, s->room);
		OK(s->data);
	}
	if (len)
		memcpy(s->data + s->len, data, len);
	s->len += len;
}

static inline void frame(struct stream *s, uint64_t pos, const void *data, uint32_t len)
{
	struct header h = { PL_D1_MARK, len, pos };

	add(s, &h, sizeof(h));
	add(s, data, len);
}

/* Feeds a stream in pieces, then closes, or waits to be told. */
struct feeder {
	pthread_t thread;
	const uint8_t *data;
	size_t len, piece, split;
	int fd;
};

static inline void put(int fd, const uint8_t *p, size_t n)
{
	while (n) {
		ssize_t k = write(fd, p, n);

		if (k < 0 && (errno == EPIPE || errno == ECONNRESET))
			return;
		OK(k >= 0);
		p += k;
		n -= (size_t)k;
	}
}

static inline void *feeder_main(void *arg)
{
	struct feeder *f = arg;

	if (f->split) {
		put(f->fd, f->data, f->split);
		usleep(300);
		put(f->fd, f->data + f->split, f->len - f->split);
	} else {
		for (size_t at = 0; at < f->len; at += f->piece)
			put(f->fd, f->data + at,
			    f->len - at < f->piece ? f->len - at : f->piece);
	}
	close(f->fd);
	return NULL;
}

static inline int open_feed(struct feeder *f, const struct stream *s, size_t piece,
		     size_t split, bool sock)
{
	int fd[2];

	if (sock)
		OK(socketpair(AF_UNIX, SOCK_STREAM, 0, fd) == 0);
	else
		OK(pipe(fd) == 0);
	*f = (struct feeder){ .data = s->data, .len = s->len, .piece = piece,
			      .split = split, .fd = fd[1] };
	OK(pthread_create(&f->thread, NULL, feeder_main, f) == 0);
	return fd[0];
}

#endif

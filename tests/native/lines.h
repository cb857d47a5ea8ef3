/* SPDX-License-Identifier: Apache-2.0 */
/* A line between the two ends of a lane, which holds bytes back, and breaks. */
#ifndef LINES_H
#define LINES_H

#include <signal.h>
#include <sys/socket.h>

#include "testing.h"

enum end_of_line {
	CARRIES,	/* all of it */
	DROPS,		/* both ends at once; what is under way is lost */
	DELIVERS_LATE,	/* the sender's end; what is under way arrives, much later */
	STALLS,		/* it takes nothing any more, and says nothing */
};

struct line {
	pthread_t thread;
	int in, out;		/* of the line itself */
	int sender, receiver;	/* what the two pumps have */
	uint64_t breaks_after;	/* bytes */
	enum end_of_line end;
	uint64_t seed;		/* 0: no byte is held back */
};

static inline uint64_t line_rnd(struct line *l, uint64_t below)
{
	l->seed = after(l->seed);
	return l->seed % below;
}

/* False: the receiver's end is closed. */
static inline bool line_put(int fd, const char *p, size_t n)
{
	while (n) {
		ssize_t k = write(fd, p, n);

		if (k < 0 && errno == EINTR)
			continue;
		if (k < 0)
			return false;
		p += k;
		n -= (size_t)k;
	}
	return true;
}

static inline void *line_main(void *arg)
{
	enum { MOST = 65536 };
	struct line *l = arg;
	char *buf = must_alloc(MOST);
	uint64_t done = 0;

	while (done < l->breaks_after) {
		size_t want = l->seed ? line_rnd(l, line_rnd(l, 3) ? 9000 : MOST) + 1 : MOST;
		ssize_t n = read(l->in, buf, want);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0 || !line_put(l->out, buf, (size_t)n))
			break;
		done += (uint64_t)n;
		if (l->seed && !line_rnd(l, 4))
			usleep((useconds_t)line_rnd(l, 300));
	}
	if (done >= l->breaks_after && l->end == DELIVERS_LATE) {
		ssize_t n = read(l->in, buf, MOST);

		close(l->in);
		l->in = -1;
		for (ssize_t at = 0; at < n; at += 512) {
			usleep(100);
			if (!line_put(l->out, buf + at,
				      (size_t)(n - at < 512 ? n - at : 512)))
				break;
		}
	}
	if (l->in >= 0 && (done < l->breaks_after || l->end != STALLS)) {
		close(l->in);
		l->in = -1;
	}
	if (done < l->breaks_after || l->end != STALLS) {
		close(l->out);
		l->out = -1;
	}
	free(buf);
	return NULL;
}

static inline void line_ends(int fd[2], bool sock)
{
	if (sock)
		OK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fd) == 0);
	else
		OK(pipe2(fd, O_CLOEXEC) == 0);
}

/* The ends become sockets or pipes. */
static inline void line_open(struct line *l, bool sock)
{
	int a[2], b[2];

	line_ends(a, sock);
	line_ends(b, sock);
	l->in = a[0];
	l->sender = a[1];
	l->receiver = b[0];
	l->out = b[1];
	OK(fcntl(l->sender, F_SETFL, O_NONBLOCK) == 0);
	OK(pthread_create(&l->thread, NULL, line_main, l) == 0);
}

static inline void line_close(struct line *l)
{
	close(l->sender);
	close(l->receiver);
	pthread_join(l->thread, NULL);
	if (l->in >= 0)
		close(l->in);
	if (l->out >= 0)
		close(l->out);
}

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * libFuzzer harness for the receiver of a file stream: files_in.c, to which the input
 * comes in frames of any size, as it waits for them (seams.h).  What is written to which
 * file, and how it ends, must be that of a plain look at the stream.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "files_in.h"
#include "io.h"

#define CHECK(x) do { if (!(x)) { \
	fprintf(stderr, "FINDING line %d: %s\n", __LINE__, #x); abort(); } } while (0)

enum { WINDOW = 2 * PL_FRAME_MOST, FILES = 4, LARGEST = 300, MOST = 100 };
enum outcome { ENDED = 1, EARLY, NAME, REFUSED };

static struct {
	const uint8_t *data;
	size_t len, at;
	uint32_t order;
	struct pl_files_in *f;
	uint64_t credit;
} in;

struct result {
	uint8_t file[FILES][LARGEST];
	enum outcome outcome;
	uint64_t budget;
};
static struct result got, want;

static uint32_t choice(uint32_t below)
{
	in.order = in.order * 1103515245 + 12345;
	return (in.order >> 16) % below;
}

/* The reader of the connection: a frame, or the channel's end. */
static bool feed(void)
{
	size_t left = in.len - in.at, n = 1 + choice(PL_FRAME_MOST), done = 0;
	struct iovec iov[2];
	int parts;

	n = n < left ? n : left;
	if (!n) {
		pl_files_in_finish(in.f);
		return false;
	}
	parts = pl_files_in_room(in.f, (uint32_t)n, iov);
	if (parts == -EDQUOT)
		return false;
	CHECK(parts == 1 || parts == 2);
	for (int i = 0; i < parts; i++) {
		memcpy(iov[i].iov_base, in.data + in.at + done, iov[i].iov_len);
		done += iov[i].iov_len;
	}
	CHECK(done == n);
	pl_files_in_put(in.f, (uint32_t)n);
	in.at += n;
	return true;
}

int fuzz_cond_wait(pthread_cond_t *cond, pthread_mutex_t *lock)
{
	unsigned times = 1 + choice(4);

	(void)cond;
	pthread_mutex_unlock(lock);
	while (times-- && feed())
		;
	pthread_mutex_lock(lock);
	return 0;
}

int fuzz_cond_signal(pthread_cond_t *cond)
{
	(void)cond;
	return 0;
}

int fuzz_poll(struct pollfd *pfd, nfds_t n, int timeout)
{
	(void)pfd;
	(void)n;
	(void)timeout;
	abort();
}

int pl_gate_write(struct pl_gate *g, struct iovec *iov, unsigned n, bool urgent,
		  uint32_t silence_ms, const int *stopped)
{
	uint32_t amount;

	(void)g;
	(void)silence_ms;
	CHECK(!*stopped);
	CHECK(urgent && n == 2 && iov[0].iov_len == PL_FRAME_HEAD && iov[1].iov_len == 4);
	memcpy(&amount, iov[1].iov_base, 4);
	in.credit += amount;
	CHECK(in.credit <= in.at);
	return 0;
}

int pl_pwrite_full(int fd, const void *buf, size_t len, uint64_t pos)
{
	CHECK(fd >= 0 && fd < FILES && len && pos <= LARGEST && len <= LARGEST - pos);
	if (choice(2))	/* the reader does not wait for the file */
		feed();
	memcpy(got.file[fd] + pos, buf, len);
	return 0;
}

void *pl_buf_new(size_t len)
{
	return malloc(len);	/* its own: ASan sees a read past the end */
}

void pl_buf_free(void *buf, size_t len)
{
	(void)len;
	free(buf);
}

/* What the caller would refuse. */
static bool refused(uint32_t length, uint64_t pos, uint64_t budget)
{
	return length > MOST || pos > LARGEST || length > LARGEST - pos || length > budget;
}

static int file_of(const char *name, size_t len)
{
	return (int)((len * 2 + (uint8_t)name[0]) % FILES);
}

static void receive(void)
{
	struct pl_piece p;
	enum pl_stage stage;
	int err = pl_files_in_next(in.f, &p, &stage);

	while (!err && p.name_len) {
		if (refused(p.length, p.pos, got.budget)) {
			got.outcome = REFUSED;
			return;
		}
		if (p.length)
			err = pl_files_in_take(in.f, file_of(p.name, p.name_len), MOST, LARGEST,
					       &got.budget, &p, &stage);
		else
			err = pl_files_in_next(in.f, &p, &stage);
	}
	CHECK(!err || stage == PL_STAGE_READ);
	CHECK(!err || err == -ENODATA || err == -EMSGSIZE);
	got.outcome = !err ? ENDED : err == -ENODATA ? EARLY : NAME;
}

static void look(const uint8_t *data, size_t len)
{
	for (want.outcome = EARLY; len >= PL_PIECE_HEAD;) {
		struct pl_piece_head head;
		const char *name = (const char *)data + PL_PIECE_HEAD;
		size_t n;

		memcpy(&head, data, sizeof(head));
		if (!head.name) {
			want.outcome = ENDED;
			return;
		}
		if (head.name > PL_PIECE_NAME) {
			want.outcome = NAME;
			return;
		}
		data += PL_PIECE_HEAD;
		len -= PL_PIECE_HEAD;
		if (len < head.name)
			return;
		data += head.name;
		len -= head.name;
		if (refused(head.length, head.pos, want.budget)) {
			want.outcome = REFUSED;
			return;
		}
		n = len < head.length ? len : head.length;
		want.budget -= head.length;
		memcpy(want.file[file_of(name, head.name)] + head.pos, data, n);
		if (n < head.length)
			return;
		data += n;
		len -= n;
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
	struct pl_files_in_cfg cfg = { .gate = (struct pl_gate *)&in, .channel = 1,
				       .window = WINDOW };

	if (len < 2)
		return -1;
	memset(&got, 0, sizeof(got));
	memset(&want, 0, sizeof(want));
	got.budget = want.budget = data[1];
	in.order = data[0];
	in.data = data + 2;
	in.len = len - 2;
	in.at = in.credit = 0;
	CHECK(!pl_files_in_new(&in.f, &cfg));
	receive();
	look(in.data, in.len);
	CHECK(got.outcome == want.outcome);
	CHECK(got.budget == want.budget);
	CHECK(!memcmp(got.file, want.file, sizeof(got.file)));
	pl_files_in_free(in.f);
	return 0;
}

#ifdef REPLAY
#include "replay.h"
#endif

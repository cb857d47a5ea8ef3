/* SPDX-License-Identifier: Apache-2.0 */
/* The reading end of a connection: see intake.h. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

#include "intake.h"
#include "io.h"

#define RECEIVERS 8u	/* the rounds of memory come one after the other */
#define DROP 16384u

struct pl_intake {
	struct pl_intake_cfg cfg;
	uint8_t *early;
	size_t early_at;
	pthread_mutex_t lock;	/* guards all below */
	struct pl_files_in *receiver[RECEIVERS];
};

int pl_intake_new(struct pl_intake **out, const struct pl_intake_cfg *cfg)
{
	struct pl_intake *in = calloc(1, sizeof(*in));

	if (!in)
		return -ENOMEM;
	in->cfg = *cfg;
	in->early = malloc(cfg->early_len + 1);
	if (!in->early) {
		free(in);
		return -ENOMEM;
	}
	memcpy(in->early, cfg->early, cfg->early_len);
	pthread_mutex_init(&in->lock, NULL);
	*out = in;
	return 0;
}

void pl_intake_free(struct pl_intake *in)
{
	if (!in)
		return;
	for (unsigned i = 0; i < RECEIVERS; i++)
		pl_files_in_free(in->receiver[i]);
	pthread_mutex_destroy(&in->lock);
	free(in->early);
	free(in);
}

static int wait_readable(const struct pl_intake *in)
{
	struct pollfd pfd[2] = {
		{ .fd = in->cfg.stop_fd, .events = POLLIN },
		{ .fd = in->cfg.fd, .events = POLLIN },
	};
	int n = poll(pfd, 2, in->cfg.silence_ms ? (int)in->cfg.silence_ms : -1);

	if (n < 0)
		return errno == EINTR ? 0 : -errno;
	if (n == 0)
		return -ETIMEDOUT;
	return pfd[0].revents ? -ECANCELED : 0;
}

static int read_all(struct pl_intake *in, struct iovec *iov, unsigned n)
{
	pl_iov_skip(&iov, &n, 0);
	while (n && in->early_at < in->cfg.early_len) {
		size_t left = in->cfg.early_len - in->early_at;
		size_t k = iov->iov_len < left ? iov->iov_len : left;

		memcpy(iov->iov_base, in->early + in->early_at, k);
		in->early_at += k;
		pl_iov_skip(&iov, &n, k);
	}
	while (n) {
		ssize_t k;
		int err = wait_readable(in);

		if (err)
			return err;
		k = readv(in->cfg.fd, iov, (int)n);
		if (k < 0) {
			if (errno == EINTR || errno == EAGAIN)
				continue;
			return -errno;
		}
		if (k == 0)
			return -ENODATA;
		pl_iov_skip(&iov, &n, (size_t)k);
	}
	return 0;
}

int pl_intake_read(struct pl_intake *in, void *buf, size_t len)
{
	struct iovec iov = { buf, len };

	return read_all(in, &iov, 1);
}

static int drop(struct pl_intake *in, uint32_t len)
{
	uint8_t buf[DROP];
	int err = 0;

	while (!err && len) {
		uint32_t n = len < DROP ? len : DROP;

		err = pl_intake_read(in, buf, n);
		len -= n;
	}
	return err;
}

static int deliver(struct pl_intake *in, struct pl_files_in *f, uint32_t len)
{
	struct iovec iov[2];
	int n = pl_files_in_room(f, len, iov);
	int err;

	if (n < 0)
		return n;
	if (n == 0)
		return drop(in, len);
	err = read_all(in, iov, (unsigned)n);
	if (!err)
		pl_files_in_put(f, len);
	return err;
}

/* The receiver that a frame with this head is for, to be given back; or NULL. */
static struct pl_files_in *enter(struct pl_intake *in, const struct pl_frame_head *head)
{
	uint32_t len = le32toh(head->length);
	struct pl_files_in *f = NULL;

	/* What is not valid is for the caller to refuse. */
	if (head->kind != PL_FRAME_DATA || head->zero || !len || len > PL_FRAME_MOST)
		return NULL;
	pthread_mutex_lock(&in->lock);
	for (unsigned i = 0; i < RECEIVERS && !f; i++)
		if (in->receiver[i] &&
		    pl_files_in_channel(in->receiver[i]) == le16toh(head->channel))
			f = in->receiver[i];
	if (f)
		pl_files_in_keep(f);
	pthread_mutex_unlock(&in->lock);
	return f;
}

int pl_intake_head(struct pl_intake *in, uint8_t raw[8])
{
	for (;;) {
		struct pl_frame_head head;
		struct pl_files_in *f;
		int err = pl_intake_read(in, raw, PL_FRAME_HEAD);

		if (err)
			return err;
		memcpy(&head, raw, sizeof(head));
		f = enter(in, &head);
		if (!f)
			return 0;
		err = deliver(in, f, le32toh(head.length));
		pl_files_in_free(f);
		if (err)
			return err;
	}
}

int pl_intake_add(struct pl_intake *in, struct pl_files_in *f)
{
	int err = -EBUSY;

	pthread_mutex_lock(&in->lock);
	for (unsigned i = 0; i < RECEIVERS && err; i++)
		if (!in->receiver[i]) {
			pl_files_in_keep(f);
			in->receiver[i] = f;
			err = 0;
		}
	pthread_mutex_unlock(&in->lock);
	return err;
}

void pl_intake_remove(struct pl_intake *in, struct pl_files_in *f)
{
	pthread_mutex_lock(&in->lock);
	for (unsigned i = 0; i < RECEIVERS; i++)
		if (in->receiver[i] == f) {
			in->receiver[i] = NULL;
			pl_files_in_free(f);
		}
	pthread_mutex_unlock(&in->lock);
}

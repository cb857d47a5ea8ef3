/* SPDX-License-Identifier: Apache-2.0 */
/* The sender of a file stream: see files_out.h. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

#include "clock.h"
#include "counters.h"
#include "files_out.h"
#include "hash.h"
#include "io.h"
#include "mux_wire.h"

/* Read at a time: one frame has it, with the heads of its pieces. */
#define CHUNK (PL_FRAME_MOST - PL_BLOCK)
#define PAGES (CHUNK / PL_BLOCK)
#define MOST_RUNS ((PAGES + 1) / 2)
/* A page in so many bytes of zeroes is sent all the same.  The peer cannot tell zeroes that
   are left out from a sender that hangs, and its patience begins anew with PL_PROGRESS bytes. */
#define MOST_SILENT (4u << 20)
/* The worst is one run of all pages but one, and the longest name. */
_Static_assert(PL_BLOCK >= 2 * (PL_PIECE_HEAD + PL_PIECE_NAME),
	       "a chunk of at most two runs fits into a frame");
_Static_assert(PL_BLOCK > PL_PIECE_HEAD + PL_PIECE_NAME,
	       "each further run leaves out a page, which is more than its head");

struct pl_files_out {
	struct pl_files_out_cfg cfg;
	struct pl_files_out_stats stats;	/* atomic, field by field */
	uint8_t *buf;
	uint64_t start_ns;
	uint64_t silent;	/* bytes of zeroes since the last frame */
	pthread_mutex_t lock;	/* guards all below */
	pthread_cond_t changed;
	uint64_t credit;
	int stopped;		/* atomic, too: pl_gate_write looks at it */
};

int pl_files_out_new(struct pl_files_out **out, const struct pl_files_out_cfg *cfg)
{
	struct pl_files_out *o;
	pthread_condattr_t attr;

	if (cfg->window < PL_FRAME_MOST || !cfg->channel)
		return -EINVAL;
	o = calloc(1, sizeof(*o));
	if (!o)
		return -ENOMEM;
	o->cfg = *cfg;
	o->credit = cfg->window;
	o->start_ns = pl_now_ns();
	o->buf = pl_buf_new(CHUNK);
	if (!o->buf) {
		free(o);
		return -ENOMEM;
	}
	pthread_mutex_init(&o->lock, NULL);
	pthread_condattr_init(&attr);
	pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
	pthread_cond_init(&o->changed, &attr);
	pthread_condattr_destroy(&attr);
	*out = o;
	return 0;
}

void pl_files_out_free(struct pl_files_out *o)
{
	if (!o)
		return;
	pl_buf_free(o->buf, CHUNK);
	pthread_cond_destroy(&o->changed);
	pthread_mutex_destroy(&o->lock);
	free(o);
}

/* Wait for the rate; `lock` held. */
static int obey_rate(struct pl_files_out *o)
{
	uint64_t sent = __atomic_load_n(&o->stats.data_bytes, __ATOMIC_RELAXED);
	struct timespec due;

	if (!o->cfg.rate)
		return o->stopped;
	due = pl_timespec(o->start_ns + (uint64_t)((double)sent * PL_NS_PER_S /
						   (double)o->cfg.rate));
	while (!o->stopped)
		if (pthread_cond_timedwait(&o->changed, &o->lock, &due) == ETIMEDOUT)
			return 0;
	return o->stopped;
}

/* Take credit for so many bytes, when it is there and the rate allows them. */
static int take_credit(struct pl_files_out *o, uint32_t bytes)
{
	uint64_t stall = o->cfg.stall_ms * (uint64_t)PL_NS_PER_MS;
	struct timespec until;
	int err;

	pthread_mutex_lock(&o->lock);
	err = obey_rate(o);
	until = pl_timespec(pl_now_ns() + stall);
	while (!err && o->credit < bytes) {
		if (stall)
			err = -pthread_cond_timedwait(&o->changed, &o->lock, &until);
		else
			pthread_cond_wait(&o->changed, &o->lock);
		err = o->stopped ? o->stopped : err;
	}
	if (!err)
		o->credit -= bytes;
	pthread_mutex_unlock(&o->lock);
	return err;
}

/* One DATA frame; iov[0] is for its head. */
static int send_frame(struct pl_files_out *o, struct iovec *iov, unsigned n, uint32_t bytes,
		      enum pl_stage *stage)
{
	struct pl_frame_head head = pl_frame(PL_FRAME_DATA, o->cfg.channel, bytes);
	int err;

	iov[0] = (struct iovec){ &head, sizeof(head) };
	*stage = PL_STAGE_REPLY;
	err = take_credit(o, bytes);
	if (err)
		return err;
	err = pl_gate_write(o->cfg.gate, iov, n, false, o->cfg.silence_ms, &o->stopped);
	if (!err || err != __atomic_load_n(&o->stopped, __ATOMIC_ACQUIRE))
		*stage = PL_STAGE_WRITE;
	return err;
}

static bool is_left_out(const struct pl_files_out *o, size_t at, size_t end)
{
	size_t len = end - at < PL_BLOCK ? end - at : PL_BLOCK;

	if (!at && o->silent >= MOST_SILENT)
		return false;
	return pl_is_zero(o->buf + at, len);
}

/* The chunk in `buf`, which is the file's at `pos`, as one frame of runs. */
static int send_chunk(struct pl_files_out *o, const char *name, uint16_t len, uint16_t mode,
		      uint64_t pos, size_t size, enum pl_stage *stage)
{
	struct pl_piece_head head[MOST_RUNS];
	struct iovec iov[1 + 3 * MOST_RUNS];
	unsigned n = 1, runs = 0;
	size_t data = 0, at = 0;
	uint32_t bytes;
	int err;

	while (at < size) {
		size_t start;

		while (at < size && is_left_out(o, at, size))
			at += PL_BLOCK;
		if (at >= size)
			break;
		start = at;
		while (at < size && !is_left_out(o, at, size))
			at += PL_BLOCK;
		if (at > size)
			at = size;
		head[runs] = pl_piece(len, mode, (uint32_t)(at - start), pos + start);
		iov[n++] = (struct iovec){ &head[runs++], PL_PIECE_HEAD };
		iov[n++] = (struct iovec){ (char *)name, len };
		iov[n++] = (struct iovec){ o->buf + start, at - start };
		data += at - start;
	}
	bytes = (uint32_t)(data + runs * (PL_PIECE_HEAD + (size_t)len));
	err = runs ? send_frame(o, iov, n, bytes, stage) : 0;
	if (!err) {
		o->silent = runs ? 0 : o->silent + size;
		pl_count(&o->stats.data_bytes, data);
		pl_count(&o->stats.zero_bytes, size - data);
	}
	return err;
}

int pl_files_out_grow(struct pl_files_out *o, const char *name, uint16_t len,
		      uint16_t mode, int fd, uint64_t *pos, enum pl_stage *stage)
{
	*stage = PL_STAGE_NONE;
	if (!len || len > PL_PIECE_NAME || *pos > INT64_MAX - CHUNK)
		return -EINVAL;
	for (;;) {
		ssize_t n = pread(fd, o->buf, CHUNK, (off_t)*pos);
		int err;

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0) {
			*stage = PL_STAGE_READ;
			return n ? -errno : 0;
		}
		err = send_chunk(o, name, len, mode, *pos, (size_t)n, stage);
		if (err)
			return err;
		*pos += (uint64_t)n;
	}
}

int pl_files_out_complete(struct pl_files_out *o, const char *name, uint16_t len,
			  uint16_t mode, uint64_t size, enum pl_stage *stage)
{
	struct pl_piece_head head = pl_piece(len, mode, 0, size);
	struct iovec iov[3] = { { 0 }, { &head, sizeof(head) }, { (char *)name, len } };

	*stage = PL_STAGE_NONE;
	if (len > PL_PIECE_NAME)
		return -EINVAL;
	return send_frame(o, iov, 3, PL_PIECE_HEAD + len, stage);
}

int pl_files_out_credit(struct pl_files_out *o, uint32_t bytes)
{
	bool fits;

	pthread_mutex_lock(&o->lock);
	fits = o->credit + bytes <= o->cfg.window;
	if (fits)
		o->credit += bytes;
	pthread_cond_broadcast(&o->changed);
	pthread_mutex_unlock(&o->lock);
	return fits ? 0 : -EDQUOT;
}

void pl_files_out_stop(struct pl_files_out *o, int err)
{
	pthread_mutex_lock(&o->lock);
	if (!o->stopped)
		__atomic_store_n(&o->stopped, err, __ATOMIC_RELEASE);
	pthread_cond_broadcast(&o->changed);
	pthread_mutex_unlock(&o->lock);
}

void pl_files_out_get_stats(const struct pl_files_out *o, struct pl_files_out_stats *to)
{
	pl_read_counters(to, &o->stats, sizeof(*to));
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The receiver of a file stream: see files_in.h.  The ring is used by the connection's
 * reader, who fills what is free, and by the thread that writes files, which has what is
 * used.  Only the counts are under the lock.
 */
#define _GNU_SOURCE
#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>

#include "clock.h"
#include "files_in.h"
#include "io.h"
#include "patience.h"

struct pl_files_in {
	struct pl_files_in_cfg cfg;
	uint8_t *ring;		/* of `window` bytes */

	unsigned owners;	/* atomic */

	/* the writing thread's */
	uint64_t due;		/* bytes that were taken, and not given back */
	struct pl_patience peer_gives;

	pthread_mutex_t lock;	/* guards all below */
	pthread_cond_t came;
	uint64_t head;		/* where the reader goes on to put */
	uint64_t tail;		/* where the writing thread goes on to take */
	uint64_t used;
	bool finished;
	int stopped;		/* atomic, too: pl_gate_write looks at it */
};

int pl_files_in_new(struct pl_files_in **out, const struct pl_files_in_cfg *cfg)
{
	struct pl_files_in *f;
	pthread_condattr_t attr;

	if (cfg->window < 2 * (uint64_t)PL_FRAME_MOST || !cfg->channel)
		return -EINVAL;
	f = calloc(1, sizeof(*f));
	if (!f)
		return -ENOMEM;
	f->cfg = *cfg;
	f->owners = 1;
	f->ring = pl_buf_new(cfg->window);
	if (!f->ring) {
		free(f);
		return -ENOMEM;
	}
	pthread_mutex_init(&f->lock, NULL);
	pthread_condattr_init(&attr);
	pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
	pthread_cond_init(&f->came, &attr);
	pthread_condattr_destroy(&attr);
	*out = f;
	return 0;
}

void pl_files_in_free(struct pl_files_in *f)
{
	if (!f || __atomic_sub_fetch(&f->owners, 1, __ATOMIC_ACQ_REL))
		return;
	pl_buf_free(f->ring, f->cfg.window);
	pthread_cond_destroy(&f->came);
	pthread_mutex_destroy(&f->lock);
	free(f);
}

void pl_files_in_keep(struct pl_files_in *f)
{
	__atomic_add_fetch(&f->owners, 1, __ATOMIC_RELAXED);
}

uint16_t pl_files_in_channel(const struct pl_files_in *f)
{
	return f->cfg.channel;
}

/* ---- the connection's reader */

int pl_files_in_room(struct pl_files_in *f, uint32_t len, struct iovec iov[2])
{
	uint64_t size = f->cfg.window, first;
	int n;

	pthread_mutex_lock(&f->lock);
	if (f->stopped)
		n = 0;
	else if (f->finished)
		n = -EPROTO;
	else if (f->used + len > size)
		n = -EDQUOT;
	else {
		if (!f->used)	/* what was used last is still in a cache */
			f->head = f->tail = 0;
		first = size - f->head < len ? size - f->head : len;
		iov[0] = (struct iovec){ f->ring + f->head, first };
		iov[1] = (struct iovec){ f->ring, len - first };
		n = first < len ? 2 : 1;
	}
	pthread_mutex_unlock(&f->lock);
	return n;
}

void pl_files_in_put(struct pl_files_in *f, uint32_t len)
{
	pthread_mutex_lock(&f->lock);
	f->head = (f->head + len) % f->cfg.window;
	f->used += len;
	assert(f->used <= f->cfg.window);
	pthread_cond_signal(&f->came);
	pthread_mutex_unlock(&f->lock);
}

void pl_files_in_finish(struct pl_files_in *f)
{
	pthread_mutex_lock(&f->lock);
	f->finished = true;
	pthread_cond_signal(&f->came);
	pthread_mutex_unlock(&f->lock);
}

void pl_files_in_stop(struct pl_files_in *f, int err)
{
	pthread_mutex_lock(&f->lock);
	if (!f->stopped)
		__atomic_store_n(&f->stopped, err, __ATOMIC_RELEASE);
	pthread_cond_signal(&f->came);
	pthread_mutex_unlock(&f->lock);
}

/* ---- the writing thread */

/* Wait for the ring's next bytes; `lock` held. */
static int wait_used(struct pl_files_in *f)
{
	uint64_t limit = f->cfg.stall_ms * (uint64_t)PL_NS_PER_MS;
	struct pl_patience *p = &f->peer_gives;

	while (!f->used && !f->finished && !f->stopped) {
		uint64_t start = pl_now_ns();
		struct timespec until;

		if (!limit) {
			pthread_cond_wait(&f->came, &f->lock);
			continue;
		}
		if (p->waited_ns >= limit)
			return -ETIMEDOUT;
		until = pl_timespec(start + limit - p->waited_ns);
		pthread_cond_timedwait(&f->came, &f->lock, &until);
		p->waited_ns += pl_now_ns() - start;
	}
	if (f->stopped)
		return f->stopped;
	return f->used ? 0 : -ENODATA;
}

/* The next bytes that are there, without a gap: `most` at most. */
static int peek(struct pl_files_in *f, size_t most, uint8_t **data, size_t *len)
{
	int err;

	pthread_mutex_lock(&f->lock);
	err = wait_used(f);
	if (!err) {
		size_t n = f->used < most ? f->used : most;
		size_t straight = f->cfg.window - f->tail;

		*data = f->ring + f->tail;
		*len = n < straight ? n : straight;
	}
	pthread_mutex_unlock(&f->lock);
	return err;
}

/* They are taken.  The peer has credit for them when it is worth a frame. */
static int taken(struct pl_files_in *f, size_t len)
{
	struct pl_frame_head head = pl_frame(PL_FRAME_CREDIT, f->cfg.channel, 4);
	struct iovec iov[2] = { { &head, sizeof(head) }, { NULL, 4 } };
	uint32_t amount;

	pthread_mutex_lock(&f->lock);
	f->used -= len;
	f->tail = (f->tail + len) % f->cfg.window;
	pthread_mutex_unlock(&f->lock);
	pl_patience_moved(&f->peer_gives, len);
	f->due += len;
	/* Less than this is always left to the peer for one more frame. */
	if (f->due < f->cfg.window / 8)
		return 0;
	amount = htole32((uint32_t)f->due);
	iov[1].iov_base = &amount;
	f->due = 0;
	return pl_gate_write(f->cfg.gate, iov, 2, true, f->cfg.silence_ms, &f->stopped);
}

static bool is_stopped(struct pl_files_in *f, int err)
{
	return err == __atomic_load_n(&f->stopped, __ATOMIC_ACQUIRE);
}

static int exactly(struct pl_files_in *f, void *buf, size_t len, enum pl_stage *stage)
{
	uint8_t *to = buf;

	while (len) {
		uint8_t *data;
		size_t n;
		int err;

		*stage = PL_STAGE_READ;
		err = peek(f, len, &data, &n);
		if (err)
			return err;
		memcpy(to, data, n);
		to += n;
		len -= n;
		err = taken(f, n);
		if (err) {
			*stage = is_stopped(f, err) ? PL_STAGE_READ : PL_STAGE_REPLY;
			return err;
		}
	}
	return 0;
}

int pl_files_in_next(struct pl_files_in *f, struct pl_piece *p, enum pl_stage *stage)
{
	struct pl_piece_head head;
	int err = exactly(f, &head, sizeof(head), stage);

	if (err)
		return err;
	p->name_len = le16toh(head.name);
	p->mode = le16toh(head.mode);
	p->length = le32toh(head.length);
	p->pos = le64toh(head.pos);
	*stage = PL_STAGE_READ;
	if (p->name_len > PL_PIECE_NAME)
		return -EMSGSIZE;
	return exactly(f, p->name, p->name_len, stage);
}

static int write_data(struct pl_files_in *f, int fd, uint64_t pos, size_t left,
		      enum pl_stage *stage)
{
	while (left) {
		uint8_t *data;
		size_t n;
		int err;

		*stage = PL_STAGE_READ;
		err = peek(f, left, &data, &n);
		if (err)
			return err;
		*stage = PL_STAGE_WRITE;
		err = pl_pwrite_full(fd, data, n, pos);
		if (err)
			return err;
		pos += n;
		left -= n;
		err = taken(f, n);
		if (err) {
			*stage = is_stopped(f, err) ? PL_STAGE_READ : PL_STAGE_REPLY;
			return err;
		}
	}
	return 0;
}

int pl_files_in_take(struct pl_files_in *f, int fd, uint32_t most, uint64_t largest,
		     uint64_t *budget, struct pl_piece *p, enum pl_stage *stage)
{
	char name[PL_PIECE_NAME];
	uint16_t len = p->name_len;
	int err;

	*stage = PL_STAGE_NONE;
	if (largest > INT64_MAX || p->length > largest || p->pos > largest - p->length ||
	    p->length > *budget)
		return -EINVAL;
	memcpy(name, p->name, len);
	do {
		*budget -= p->length;
		err = write_data(f, fd, p->pos, p->length, stage);
		if (!err)
			err = pl_files_in_next(f, p, stage);
	} while (!err && p->length && p->name_len == len && !memcmp(p->name, name, len) &&
		 p->length <= most && p->length <= largest && p->length <= *budget &&
		 p->pos <= largest - p->length);
	return err;
}

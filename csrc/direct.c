/* SPDX-License-Identifier: Apache-2.0 */
/* Direct writes, and buffered ones between them: see direct.h. */
#define _GNU_SOURCE
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

#include "counters.h"
#include "direct.h"

#define MAX_BLOCK 65536u

static bool is_alignment(uint32_t n)
{
	return n && !(n & (n - 1)) && n <= MAX_BLOCK;
}

int pl_direct_init(struct pl_direct *d, int fd, const struct pl_direct_cfg *cfg)
{
	if ((cfg->block || cfg->memory) &&
	    (!is_alignment(cfg->block) || !is_alignment(cfg->memory)))
		return -EINVAL;
	*d = (struct pl_direct){ .fd = fd, .cfg = *cfg };
	/* A page of the page cache is never written both ways at once. */
	if (d->cfg.block && d->cfg.block < PL_BLOCK)
		d->cfg.block = PL_BLOCK;
	return -pthread_rwlock_init(&d->lock, NULL);
}

void pl_direct_fini(struct pl_direct *d)
{
	pthread_rwlock_destroy(&d->lock);
}

static bool refused(const struct pl_direct *d)
{
	return __atomic_load_n(&d->refused, __ATOMIC_RELAXED);
}

static void refuse(struct pl_direct *d)
{
	__atomic_store_n(&d->refused, true, __ATOMIC_RELAXED);
}

static void switch_to(struct pl_direct *d, bool direct)
{
	int flags = fcntl(d->fd, F_GETFL);

	flags = direct ? flags | O_DIRECT : flags & ~O_DIRECT;
	if (fcntl(d->fd, F_SETFL, flags) < 0 && direct)
		refuse(d);
}

void pl_direct_begin(struct pl_direct *d)
{
	if (d->begun || !d->cfg.block || refused(d))
		return;
	pthread_rwlock_wrlock(&d->lock);
	if (!refused(d)) {
		d->begun = true;
		switch_to(d, true);
	}
	pthread_rwlock_unlock(&d->lock);
}

void pl_direct_end(struct pl_direct *d)
{
	pthread_rwlock_wrlock(&d->lock);
	if (d->begun)
		switch_to(d, false);
	d->begun = false;
	pthread_rwlock_unlock(&d->lock);
}

void pl_direct_refuse(struct pl_direct *d)
{
	pthread_rwlock_wrlock(&d->lock);
	refuse(d);
	if (d->begun)
		switch_to(d, false);
	pthread_rwlock_unlock(&d->lock);
}

/* Of the next bytes, how many go one way: direct, or buffered. */
static uint32_t next_piece(const struct pl_direct *d, const uint8_t *data,
			   uint32_t len, uint64_t pos, bool *direct)
{
	uint32_t block = d->cfg.block, into = (uint32_t)(pos % block);

	*direct = false;
	if (!d->begun || refused(d) || len < block)
		return len;
	if (into)
		return block - into < len ? block - into : len;
	if ((uintptr_t)data % d->cfg.memory)
		return len;
	*direct = true;
	return len - len % block;
}

/* How many bytes were written: less than all when the file system refuses to. */
static ssize_t write_direct(struct pl_direct *d, const uint8_t *data, uint32_t len,
			    uint64_t pos)
{
	uint32_t done = 0;

	while (done < len) {
		ssize_t n = pwrite(d->fd, data + done, len - done,
				   (off_t)(pos + done));

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && (errno == EINVAL || errno == EOPNOTSUPP)) {
			refuse(d);
			break;
		}
		if (n < 0)
			return -errno;
		if (n == 0)
			return -ENOSPC;
		pl_count(&d->bytes, (uint64_t)n);
		done += (uint32_t)n;
		/* Cut short within a block: the rest of it goes the other way. */
		if (done % d->cfg.block)
			break;
	}
	return done;
}

int pl_direct_write(struct pl_direct *d, const uint8_t *data, uint32_t len,
		    uint64_t pos, pl_buffered buffered, void *ctx)
{
	assert(pos <= (uint64_t)INT64_MAX - len);
	if (!d->cfg.block)
		return buffered(ctx, data, len, pos);
	while (len) {
		bool direct;
		ssize_t n = next_piece(d, data, len, pos, &direct);

		if (direct) {
			pthread_rwlock_rdlock(&d->lock);
			/* Refused just now: the next turn takes the other way. */
			n = refused(d) ? 0 : write_direct(d, data, (uint32_t)n, pos);
			pthread_rwlock_unlock(&d->lock);
			if (n < 0)
				return (int)n;
		} else {
			int err;

			pthread_rwlock_wrlock(&d->lock);
			switch_to(d, false);
			err = buffered(ctx, data, (uint32_t)n, pos);
			if (d->begun && !refused(d))
				switch_to(d, true);
			pthread_rwlock_unlock(&d->lock);
			if (err)
				return err;
		}
		data += n;
		pos += (uint64_t)n;
		len -= (uint32_t)n;
	}
	return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The sending pump: claim -> hook -> read -> classify -> emit.
 *
 * Slots are claimed in the order of the extents and, into a stream, emitted in
 * that order.  Helper threads claim, read and classify; the calling thread
 * emits, and claims too whenever the next slot in order is not ready yet: a
 * machine with two cores then pays for no wake-up in the usual case.
 */
#define _GNU_SOURCE
#include <assert.h>
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/uio.h>
#include <unistd.h>

#include "io.h"
#include "pump_internal.h"

#define MAX_ALIGN 65536u	/* the largest logical block of a disk */

/* Lock held: the first failure is the one that is reported, and no slot waits for its
   turn after it. */
void pl_pump_fail(struct pl_pump *p, int err, const struct pl_fault *fault)
{
	if (err && !p->err) {
		p->err = err;
		p->fault = *fault;
		pthread_cond_broadcast(&p->turn);
	}
}

/* Lock held: what was in the slot is sent, or the pass has failed. */
void pl_slot_finish(struct pl_pump *p, struct slot *s)
{
	assert(s->busy && p->emitted < p->claimed);
	STAT_ADD(p, done_bytes, s->bytes);
	s->busy = s->ready = false;
	p->emitted++;
}

/* Lock held on entry and exit.  Read one claimed slot; it is `ready` then, or
   sent.  when: what p->packs must be at least for it to be compressed. */
void pl_slot_process(struct pl_pump *p, struct slot *s, struct packer *packer,
		     enum pump_packs when)
{
	struct pl_fault fault = { 0 };
	int err;

	/* More can be claimed: let one sleeping reader have it. */
	if (p->sleeping && p->next < p->n)
		pthread_cond_signal(&p->work);
	pthread_mutex_unlock(&p->lock);
	if (__atomic_load_n(&p->packs, __ATOMIC_RELAXED) < when)
		packer = NULL;
	err = pl_slot_fill(p, s, packer, &fault);
	pthread_mutex_lock(&p->lock);
	assert(s->busy && !s->ready && p->processing > 0);
	p->processing--;
	pl_pump_fail(p, err, &fault);
	if (p->sink->in_order)
		s->ready = true;
	else
		pl_slot_finish(p, s);
	if (p->emitter_waits) {
		pthread_cond_signal(&p->done);
		if (p->lanes.n)
			pl_lanes_wake(p);
	}
}

static void *reader(void *arg)
{
	struct reader *self = arg;
	struct pl_pump *p = self->p;

	pthread_mutex_lock(&p->lock);
	while (!p->quit) {
		struct slot *s = pl_slot_claim(p);

		if (s) {
			pl_slot_process(p, s, self->packer, PACKS_READERS);
			continue;
		}
		p->sleeping++;
		pthread_cond_wait(&p->work, &p->lock);
		p->sleeping--;
	}
	pthread_mutex_unlock(&p->lock);
	return NULL;
}

/* Lock held on entry and exit. */
static void emit_next(struct pl_pump *p, struct slot *s)
{
	struct pl_fault fault = { 0 };
	int err;

	pthread_mutex_unlock(&p->lock);
	err = p->sink->emit(p, s, &fault);
	pl_pack_emitted(p, s);
	pthread_mutex_lock(&p->lock);
	pl_pump_fail(p, err, &fault);
	pl_slot_finish(p, s);
	if (p->sleeping && p->next < p->n)
		pthread_cond_signal(&p->work);
}

static int check_pass(const struct pl_pump *p, const struct pl_extent *ext,
		      size_t n, unsigned flags)
{
	uint64_t last = 0;

	if ((flags & (PL_PASS_CHANGED | PL_PASS_SKIP_ZERO | PL_PASS_HOLES)) &&
	    !p->cfg.known)
		return -EINVAL;
	if ((flags & PL_PASS_PRIOR) &&
	    (!p->cfg.known || !p->cfg.prior || (flags & PL_PASS_LIVE)))
		return -EINVAL;
	for (size_t i = 0; i < n; i++) {
		if (ext[i].start < last || ext[i].end <= ext[i].start ||
		    ext[i].end > p->cfg.size)
			return -EINVAL;
		last = ext[i].end;
	}
	return 0;
}

int pl_pump_pass(struct pl_pump *p, const struct pl_extent *ext, size_t n,
		 unsigned flags, struct pl_fault *fault)
{
	size_t share = n / (2 * (p->nthreads + 1));
	int err = check_pass(p, ext, n, flags);

	*fault = (struct pl_fault){ 0 };
	pthread_mutex_lock(&p->lock);
	p->floor = 0;
	pthread_mutex_unlock(&p->lock);
	if (!err)
		err = pl_lanes_barrier(p, false, fault);
	if (err)
		return err;
	pl_pack_begin(p);
	pthread_mutex_lock(&p->lock);
	p->ext = ext;
	p->n = n;
	p->next = 0;
	p->pos = p->floor = 0;
	p->flags = flags;
	p->live = (flags & PL_PASS_LIVE) && p->can_splice;
	p->claimed = p->emitted = p->planned = 0;
	p->err = 0;
	p->fault = *fault;
	pl_direct_begin(&p->direct);
	/* Few extents are spread over the readers, many are batched. */
	p->frags_per_slot = share < 1 ? 1 : share > PL_FRAGS ? PL_FRAGS :
						(unsigned)share;
	__atomic_store_n(&p->stats.done_bytes, 0, __ATOMIC_RELAXED);
	for (;;) {
		/* A lane may come in the middle; it takes part at once. */
		if (pl_lanes_adopt(p)) {
			if (!pl_lanes_turn(p))
				break;
			continue;
		}
		struct slot *head = &p->slot[p->emitted % p->cfg.slots];
		struct slot *s;

		if (p->err) {
			if (!p->processing)
				break;
		} else if (head->ready) {
			emit_next(p, head);
			continue;
		} else if ((s = pl_slot_claim(p))) {
			/* The next slot in order is not ready.  If the stream waits
			   for it, this one goes sooner as it is; as long as the
			   stream is the bottleneck, what is under way lasts. */
			pl_slot_process(p, s, p->packer, PACKS_ALL);
			continue;
		} else if (p->err) {
			continue;	/* cancelled, or the hook has failed */
		} else if (!p->processing && p->claimed == p->emitted) {
			break;
		}
		p->emitter_waits = true;
		pthread_cond_wait(&p->done, &p->lock);
		p->emitter_waits = false;
	}
	assert(p->err || (p->next == p->n && p->claimed == p->emitted));
	if (p->err && p->cfg.features & PL_FEATURE_RESUME && pl_lanes_unsent(p))
		p->fault.stage = PL_STAGE_NONE;	/* no memory: it cannot go on */
	for (unsigned i = 0; i < p->cfg.slots; i++)
		p->slot[i].busy = p->slot[i].ready = false;
	pl_ahead_close(&p->ahead);
	pl_direct_end(&p->direct);
	pl_lanes_rest(p);
	if (!p->err)
		pl_huge_settle(p);
	p->n = p->next = 0;
	err = p->err;
	*fault = p->fault;
	pthread_mutex_unlock(&p->lock);
	return err;
}

int pl_pump_write(struct pl_pump *p, const void *buf, size_t len,
		  struct pl_fault *fault)
{
	struct iovec iov = { (void *)buf, len };
	int err;

	*fault = (struct pl_fault){ 0 };
	/* Only frames are written; and what is answered must be asked. */
	if (!p->sink->put_header || p->sink->take_answers)
		return -EINVAL;
	err = pl_lanes_barrier(p, true, fault);
	if (!err)
		err = pl_stream_write(p, &iov, 1, fault);
	if (!err)
		pl_lanes_wrote(p, len);
	return err;
}

void pl_pump_limit(struct pl_pump *p, uint64_t rate)
{
	pthread_mutex_lock(&p->lock);	/* readers look at it after they took work */
	p->cfg.rate = rate;
	pthread_mutex_unlock(&p->lock);
}

void pl_pump_cancel(struct pl_pump *p)
{
	uint64_t one = 1;

	__atomic_store_n(&p->cancelled, true, __ATOMIC_RELAXED);
	if (write(p->cancel_fd, &one, sizeof(one)) < 0)
		return;		/* full counter: it is readable already */
	pthread_mutex_lock(&p->lock);
	pthread_cond_broadcast(&p->done);
	pthread_mutex_unlock(&p->lock);
}

void pl_pump_stats(const struct pl_pump *p, struct pl_pump_stats *out)
{
	pl_read_counters(out, &p->stats, sizeof(*out));
	out->direct_bytes = __atomic_load_n(&p->direct.bytes, __ATOMIC_RELAXED);
}

static const struct pl_sink_ops *const sinks[] = {
	[PL_SINK_FRAMES] = &pl_sink_frames,
	[PL_SINK_FILE] = &pl_sink_file,
	[PL_SINK_PACKETS] = &pl_sink_packets,
	[PL_SINK_NONE] = &pl_sink_none,
};

/* NULL: there is no such kind. */
static const struct pl_sink_ops *sink_of(enum pl_sink kind)
{
	size_t i = (size_t)kind;

	return i < sizeof(sinks) / sizeof(*sinks) ? sinks[i] : NULL;
}

static int check_cfg(const struct pl_pump_cfg *c)
{
	const struct pl_sink_ops *sink = sink_of(c->sink);

	if (!sink || c->window < sink->min_window || c->src_fd < 0 ||
	    (c->out_fd < 0 && c->sink != PL_SINK_NONE) || c->slots < 2 ||
	    c->slots > 1024 || c->readers > 64 || !c->align ||
	    (c->align & (c->align - 1)) || c->align > MAX_ALIGN ||
	    c->tail >= c->align || c->tail > c->size ||
	    !c->cluster || c->cluster % PL_BLOCK || c->cluster > 64u << 20 ||
	    c->size > INT64_MAX - c->src_base || c->stall_ms > INT32_MAX ||
	    c->lane_stall_ms > INT32_MAX)
		return -EINVAL;
	if (c->features && c->sink != PL_SINK_FRAMES)
		return -EINVAL;
	if (c->compress != PL_COMPRESS_NEVER &&
	    (!(c->features & PL_FEATURE_COMPRESSED) || c->level < 1 || c->level > 19))
		return -EINVAL;
	if (c->known && (c->known->size != c->size ||
			 c->cluster % (1ull << c->known->shift)))
		return -EINVAL;
	if (c->proof && c->proof->size != c->size)
		return -EINVAL;
	if (c->prior && c->prior->size != c->size)
		return -EINVAL;
	return 0;
}

static int start_threads(struct pl_pump *p)
{
	sigset_t all, old;
	int err = 0;

	/* Signals belong to the threads of the program, not to ours. */
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	while (p->nthreads < p->cfg.readers && !err) {
		struct reader *r = &p->reader[p->nthreads];

		err = -pthread_create(&r->thread, NULL, reader, r);
		if (!err)
			p->nthreads++;
	}
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	return err;
}

/* One for each thread that may read; false: no memory. */
static bool make_packers(struct pl_pump *p)
{
	for (unsigned i = 0; i < p->cfg.readers; i++) {
		p->reader[i].p = p;
		if (p->cfg.compress != PL_COMPRESS_NEVER &&
		    !(p->reader[i].packer = pl_packer_new(p)))
			return false;
	}
	return p->cfg.compress == PL_COMPRESS_NEVER || (p->packer = pl_packer_new(p));
}

int pl_pump_new(struct pl_pump **out, const struct pl_pump_cfg *cfg)
{
	struct pl_pump *p;
	int err = check_cfg(cfg);

	if (err)
		return err;
	p = calloc(1, sizeof(*p));
	if (!p)
		return -ENOMEM;
	p->cfg = *cfg;
	p->sink = sink_of(cfg->sink);
	p->cancel_fd = p->lanes.wake_fd = -1;
	p->ahead.fd = cfg->ahead && cfg->direct.block ? cfg->out_fd : -1;
	p->ahead.limit = (cfg->size + PL_BLOCK - 1) / PL_BLOCK * PL_BLOCK;
	pthread_mutex_init(&p->lock, NULL);
	pthread_mutex_init(&p->rate_lock, NULL);
	pthread_mutex_init(&p->huge_lock, NULL);
	pthread_cond_init(&p->work, NULL);
	pthread_cond_init(&p->done, NULL);
	pthread_cond_init(&p->turn, NULL);
	/* A cluster, and what alignment adds before and after it. */
	p->buf_size = cfg->cluster +
		      2 * (cfg->align > PL_BLOCK ? cfg->align : PL_BLOCK);
	/* Runs are apart by a block at least; or there is one per fragment. */
	p->max_runs = cfg->cluster / PL_BLOCK / 2 + PL_FRAGS + 2;
	p->hdr_size = p->sink->header_size;
	if (p->sink->digests && cfg->digest)
		p->hdr_size += PL_DIGEST;
	p->hdr_room = p->hdr_size;
	if (cfg->compress != PL_COMPRESS_NEVER)
		p->hdr_room += PL_PACKED_HEADER;
	p->slot = calloc(cfg->slots, sizeof(*p->slot));
	p->reader = calloc(cfg->readers + 1, sizeof(*p->reader));
	p->memory = pl_buf_new(cfg->slots * p->buf_size);
	if (!p->slot || !p->reader || !p->memory || !make_packers(p))
		goto nomem;
	for (unsigned i = 0; i < cfg->slots; i++) {
		struct slot *s = &p->slot[i];

		s->buf = p->memory + i * p->buf_size;
		s->run = calloc(p->max_runs, sizeof(*s->run));
		/* Twice: a run of the reserved size takes two frames. */
		if (p->hdr_size)
			s->hdr = calloc(2 * p->max_runs, p->hdr_room);
		if (!s->run || (p->hdr_size && !s->hdr))
			goto nomem;
	}
	p->can_splice = pl_can_splice(p, cfg->out_fd);
	err = pl_direct_init(&p->direct, cfg->out_fd, &cfg->direct);
	if (!err)
		err = pl_pump_huge_init(p);
	if (!err) {
		p->cancel_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
		err = p->cancel_fd < 0 ? -errno : 0;
	}
	if (!err && cfg->features & (PL_FEATURE_LANES | PL_FEATURE_RESUME)) {
		p->lanes.wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
		err = p->lanes.wake_fd < 0 ? -errno : 0;
	}
	if (!err && cfg->features & PL_FEATURE_RESUME)
		err = pl_lanes_keep_log(p);
	if (!err)
		err = start_threads(p);
	if (!err) {
		*out = p;
		return 0;
	}
	pl_pump_free(p);
	return err;
nomem:
	pl_pump_free(p);
	return -ENOMEM;
}

void pl_pump_free(struct pl_pump *p)
{
	if (!p)
		return;
	pthread_mutex_lock(&p->lock);
	p->quit = true;
	pthread_cond_broadcast(&p->work);
	pthread_mutex_unlock(&p->lock);
	for (unsigned i = 0; i < p->nthreads; i++)
		pthread_join(p->reader[i].thread, NULL);
	for (unsigned i = 0; p->reader && i < p->cfg.readers; i++)
		pl_packer_free(p->reader[i].packer);
	pl_packer_free(p->packer);
	for (unsigned i = 0; p->slot && i < p->cfg.slots; i++) {
		free(p->slot[i].run);
		free(p->slot[i].hdr);
	}
	pl_buf_free(p->memory, p->cfg.slots * p->buf_size);
	free(p->slot);
	free(p->reader);
	pl_pump_huge_fini(p);
	pl_direct_fini(&p->direct);
	pl_lanes_fini(p);
	if (p->cancel_fd >= 0)
		close(p->cancel_fd);
	pthread_cond_destroy(&p->turn);
	pthread_cond_destroy(&p->done);
	pthread_cond_destroy(&p->work);
	pthread_mutex_destroy(&p->huge_lock);
	pthread_mutex_destroy(&p->rate_lock);
	pthread_mutex_destroy(&p->lock);
	free(p);
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The pump's compression: each run by itself, in place, by the thread that has read it.
 *
 * What does not become smaller by a sixteenth is sent as it is.  zstd's fast levels skip
 * through what they find nothing in, at several GB/s; but even that costs, and the slow
 * levels take ten times as long.  So a fast level looks at a sample first, unless the
 * user has asked for a fast one.
 *
 * Whether it is done at all is decided from slot to slot (pays.h).
 */
#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "clock.h"
#include "pump_internal.h"
#include "zstd_h.h"

#define MIN_RUN 1024u		/* smaller ones gain next to nothing */
#define MAX_RUN (1u << 20)	/* and no receiver needs a larger window */
#define FAST_LEVEL 1		/* the fastest that looks for frequent bytes, too */
#define FAST_UNTIL 5		/* the levels above look at everything */
#define SAMPLES 8u
#define SAMPLE (PL_BLOCK / SAMPLES)	/* bytes; a block of them takes 3 us */

struct packer {
	ZSTD_CCtx *ctx;
	uint8_t sample[PL_BLOCK];
	size_t size;
	uint8_t room[];
};

struct packer *pl_packer_new(const struct pl_pump *p)
{
	size_t size = p->cfg.cluster < MAX_RUN ? p->cfg.cluster : MAX_RUN;
	struct packer *k = malloc(sizeof(*k) + size);

	if (!k)
		return NULL;
	k->size = size;
	k->ctx = ZSTD_createCCtx();
	if (k->ctx)
		return k;
	free(k);
	return NULL;
}

void pl_packer_free(struct packer *k)
{
	if (k)
		ZSTD_freeCCtx(k->ctx);
	free(k);
}

/* Into k->room: how many bytes; 0: it is not worth it. */
static uint32_t squeeze(struct packer *k, int level, const uint8_t *data, uint32_t len)
{
	size_t most = len - len / 16 - PL_PACKED_HEADER, n;

	assert(most <= k->size);
	if (ZSTD_isError(ZSTD_CCtx_setParameter(k->ctx, ZSTD_c_compressionLevel, level)))
		return 0;
	n = ZSTD_compress2(k->ctx, k->room, most, data, len);
	return ZSTD_isError(n) ? 0 : (uint32_t)n;
}

/* Parts of it become smaller. */
static bool promises(struct packer *k, const uint8_t *data, uint32_t len)
{
	uint32_t step = len / SAMPLES / PL_BLOCK * PL_BLOCK;

	if (!step)
		return true;
	/* Each is from another part of a block: what begins one may be of a kind. */
	for (uint32_t i = 0; i < SAMPLES; i++)
		memcpy(k->sample + i * SAMPLE, data + i * (step + SAMPLE), SAMPLE);
	return squeeze(k, FAST_LEVEL, k->sample, sizeof(k->sample));
}

void pl_slot_pack(struct pl_pump *p, struct slot *s, struct packer *k)
{
	int level = p->cfg.level;
	bool look = p->cfg.compress == PL_COMPRESS_AUTO || level > FAST_UNTIL;

	assert(p->sink->in_order && s->data == s->buf);
	for (unsigned i = 0; i < s->nruns; i++) {
		struct frag *r = &s->run[i];
		uint8_t *data = s->data + r->off;

		if (r->len < MIN_RUN || r->len > k->size)
			continue;
		if (look && !promises(k, data, r->len))
			continue;
		r->packed = squeeze(k, level, data, r->len);
		memcpy(data, k->room, r->packed);
	}
}

/* Between two slots, or two passes. */
static void choose(struct pl_pump *p)
{
	const struct pl_pays *pays = &p->pays;
	bool always = p->cfg.compress == PL_COMPRESS_ALWAYS;
	enum pump_packs packs = PACKS_NOBODY;

	/* In the freeze nothing is tried out: time counts, and the CPU is needed. */
	if (p->frozen ? (always ? pays->waits : pays->proven) : (always || pays->on))
		packs = always || pays->waits || !p->nthreads ? PACKS_ALL : PACKS_READERS;
	__atomic_store_n(&p->packs, packs, __ATOMIC_RELAXED);
}

void pl_pack_begin(struct pl_pump *p)
{
	if (p->cfg.compress == PL_COMPRESS_NEVER)
		return;
	choose(p);
	p->counted_ns = pl_now_ns();
	p->waited_ns = 0;
}

void pl_pack_emitted(struct pl_pump *p, const struct slot *s)
{
	struct pl_while w = { .waited_ns = p->waited_ns };
	uint64_t now;

	if (p->cfg.compress == PL_COMPRESS_NEVER)
		return;
	now = pl_now_ns();
	w.ns = now - p->counted_ns;
	p->counted_ns = now;
	p->waited_ns = 0;
	if (p->frozen)
		return;
	for (unsigned i = 0; i < s->nruns; i++) {
		w.bytes += s->run[i].len;
		w.packed_bytes += s->run[i].packed ? s->run[i].len : 0;
	}
	pl_pays_add(&p->pays, &w);
	choose(p);
}

void pl_pump_frozen(struct pl_pump *p, bool frozen)
{
	p->frozen = frozen;	/* looked at when a pass begins */
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What of a slot must be sent.  Blocks that are zero at both ends are not;
 * in a CHANGED pass neither are chunks whose hash is that of what was sent, nor in
 * a PRIOR pass blocks that the target had before.
 * Keeps `known` and `proof` true: they describe the target as it will be when
 * this slot's runs have been written.  Slots of one pass are disjoint, but they
 * share words of the bitmap: hence the atomics.
 */
#include <assert.h>

#include "pump_internal.h"

static bool is_nonzero(const struct pl_bitmap *b, uint64_t block)
{
	return __atomic_load_n(&b->word[block / 64], __ATOMIC_RELAXED) >>
		       (block % 64) & 1;
}

static void set_nonzero(struct pl_bitmap *b, uint64_t block, bool value)
{
	uint64_t bit = 1ull << (block % 64);

	if (value)
		__atomic_fetch_or(&b->word[block / 64], bit, __ATOMIC_RELAXED);
	else
		__atomic_fetch_and(&b->word[block / 64], ~bit, __ATOMIC_RELAXED);
}

/* Append [pos, pos + len) to the runs, joined with the one before it. */
static void add_run(struct slot *s, uint64_t pos, uint32_t len, uint32_t off,
		    bool joins)
{
	struct frag *r = s->nruns ? &s->run[s->nruns - 1] : NULL;

	assert(len && (!r || r->pos + r->len <= pos));
	if (joins && r && r->pos + r->len == pos && r->off + r->len == off)
		r->len += len;
	else
		s->run[s->nruns++] =
			(struct frag){ .pos = pos, .len = len, .off = off };
}

/* The target has this block, and it need not say how long the image is. */
static bool is_prior(const struct pl_pump *p, uint64_t pos, const uint8_t *data,
		     uint32_t len)
{
	if (!(p->flags & PL_PASS_PRIOR) ||
	    ((p->flags & PL_PASS_LAST) && pos + len == p->cfg.size))
		return false;
	return pl_prior_same(p->cfg.prior, pos / PL_BLOCK, data, len);
}

struct part {		/* of one fragment, within one chunk */
	uint64_t pos;
	uint32_t len, off;
	bool whole;	/* the whole chunk */
};

static void classify_part(struct pl_pump *p, struct slot *s,
			  const struct frag *f, struct part part)
{
	struct pl_known *k = p->cfg.known;
	uint64_t *known_hash = &k->hash[part.pos >> k->shift];
	const uint8_t *data = s->data + part.off;
	bool holes = p->flags & PL_PASS_HOLES;
	bool all_zero = true, sent = false;
	uint64_t hash = PL_HASH_UNKNOWN;
	struct pl_proof *proof = p->cfg.proof;

	if (!holes && part.whole && p->live) {
		all_zero = false;	/* block by block, below */
	} else if (!holes && part.whole) {
		hash = pl_hash_block(data, part.len);
		all_zero = hash == PL_HASH_ZERO;
		if ((p->flags & PL_PASS_CHANGED) && hash == *known_hash &&
		    !((p->flags & PL_PASS_LAST) &&
		      part.pos + part.len == k->size)) {
			STAT_ADD(p, same_bytes, part.len);
			return;
		}
	} else if (holes && part.whole) {
		hash = PL_HASH_ZERO;
	}
	for (uint32_t at = 0; at < part.len; at += PL_BLOCK) {
		uint32_t len = part.len - at < PL_BLOCK ? part.len - at : PL_BLOCK;
		uint64_t pos = part.pos + at, block = pos / PL_BLOCK;
		bool zero = holes || (part.whole && all_zero) ||
			    pl_is_zero(data + at, len);
		bool skip = zero && (p->flags & PL_PASS_SKIP_ZERO) &&
			    !is_nonzero(&k->nonzero, block);

		if (skip && (p->flags & PL_PASS_LAST) && pos + len == k->size)
			skip = false;
		if (skip) {
			STAT_ADD(p, zero_bytes, len);
			continue;
		}
		set_nonzero(&k->nonzero, block, !zero || p->live);
		/* Of a live block, too: if the page changes before the peer reads
		   it, it is marked, and sent and hashed again. */
		if (proof)
			pl_proof_set(proof, block,
				     zero ? PL_HASH_ZERO :
				     hash != PL_HASH_UNKNOWN && part.len == len ?
					    hash : pl_hash_block(data + at, len));
		if (!zero && is_prior(p, pos, data + at, len)) {
			STAT_ADD(p, same_bytes, len);
			continue;
		}
		add_run(s, pos, len, part.off + at, pos != f->pos);
		sent = true;
	}
	/* Two slots can have parts of one chunk: both forget its hash. */
	if (p->live && !sent)
		hash = PL_HASH_ZERO;
	if (part.whole || sent)
		__atomic_store_n(known_hash, part.whole ? hash : PL_HASH_UNKNOWN,
				 __ATOMIC_RELAXED);
}

/* Nothing to send of this hole: the target has zeroes there too, as it mostly
   has; so this is seen before any memory is touched. */
bool pl_hole_is_known(const struct pl_pump *p, const struct frag *f)
{
	const struct pl_known *k = p->cfg.known;
	uint64_t block = f->pos / PL_BLOCK;
	uint64_t end = (f->pos + f->len + PL_BLOCK - 1) / PL_BLOCK;

	if (!(p->flags & PL_PASS_SKIP_ZERO))
		return false;
	if ((p->flags & PL_PASS_LAST) && f->pos + f->len == k->size)
		return false;
	/* Not by pl_bitmap_next: it would look through all of a sparse source for
	   each piece of it. */
	while (block < end) {
		if (block % 64 == 0 &&
		    !__atomic_load_n(&k->nonzero.word[block / 64], __ATOMIC_RELAXED))
			block += 64;
		else if (is_nonzero(&k->nonzero, block++))
			return false;
	}
	return true;
}

void pl_slot_classify(struct pl_pump *p, struct slot *s)
{
	struct pl_known *k = p->cfg.known;

	s->nruns = 0;
	for (unsigned i = 0; i < s->nfrags; i++) {
		const struct frag *f = &s->frag[i];
		uint64_t end = f->pos + f->len;

		if (!k) {
			add_run(s, f->pos, f->len, f->off, false);
			if (p->cfg.proof)
				pl_proof_note(p->cfg.proof, s->data + f->off, f->len,
					      f->pos);
			continue;
		}
		if ((p->flags & PL_PASS_HOLES) && pl_hole_is_known(p, f)) {
			STAT_ADD(p, zero_bytes, f->len);
			continue;
		}
		for (uint64_t pos = f->pos; pos < end;) {
			uint64_t c0 = pos >> k->shift << k->shift;
			uint64_t c1 = c0 + (1ull << k->shift);
			struct part part = { .pos = pos };

			if (c1 > k->size)
				c1 = k->size;
			part.whole = pos == c0 && end >= c1;
			part.len = (uint32_t)((c1 < end ? c1 : end) - pos);
			part.off = f->off + (uint32_t)(pos - f->pos);
			classify_part(p, s, f, part);
			pos += part.len;
		}
	}
	assert(s->nruns <= p->max_runs);
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The receiver's short cut: on tmpfs the stream is read straight into a huge
 * page of the file, one copy instead of two, and no page of it is allocated
 * singly.  The reader does it alone, while the writer may still be busy with
 * slots.  That is safe because only a part of the file for which nothing was
 * read before is made a page: no slot writes there, until the page has ended.
 */
#include <assert.h>
#include <string.h>

#include "hash.h"
#include "recv_internal.h"

/* Data must have come without a gap for so long before a page is made: in
   between it may be nothing but holes. */
#ifndef MIN_RUN		/* tests take smaller ones */
#define MIN_RUN (1u << 20)
#endif
#define PAGE_BLOCKS (PL_HUGE / PL_BLOCK)
_Static_assert(sizeof(((struct pl_recv *)0)->page_zero) * 8 == PAGE_BLOCKS,
	       "a bit for each block of the page");

static bool is_zero_block(const struct pl_recv *r, uint32_t i)
{
	return r->page_zero[i / 64] >> (i % 64) & 1;
}

uint8_t *pl_recv_place(struct pl_recv *r, uint64_t pos, uint32_t left,
		       uint32_t *room)
{
	/* Another lane may write there, before or after. */
	if (r->features & PL_FEATURE_LANES)
		return NULL;
	if (r->page && (pos != r->page_pos + r->page_used ||
			r->page_used == PL_HUGE))
		pl_recv_end_page(r);
	if (!r->page) {
		/* D2's packets are answered by the writer, from slots. */
		if (!pl_huge_usable(&r->huge) || r->dialect != PL_DIALECT_D1 ||
		    pos % PL_HUGE ||
		    pos < r->read_end || pos != r->run_end ||
		    pos - r->run_start < MIN_RUN)
			return NULL;
		r->page = pl_huge_make(&r->huge, pos, 0);
		if (!r->page)
			return NULL;
		r->page_pos = pos;
		r->page_used = 0;
		memset(r->page_zero, 0, sizeof(r->page_zero));
		RECV_ADD(r, huge_bytes, PL_HUGE);
	}
	*room = left < PL_HUGE - r->page_used ? left : PL_HUGE - r->page_used;
	return r->page + r->page_used;
}

void pl_recv_placed(struct pl_recv *r, uint32_t len)
{
	uint32_t end = r->page_used + len;

	assert(r->page && end <= PL_HUGE);
	/* Blocks that came whole, as they do from a sender that reads blocks. */
	for (uint32_t at = (r->page_used + PL_BLOCK - 1) / PL_BLOCK * PL_BLOCK;
	     at + PL_BLOCK <= end; at += PL_BLOCK)
		if (pl_is_zero(r->page + at, PL_BLOCK))
			r->page_zero[at / PL_BLOCK / 64] |=
				1ull << (at / PL_BLOCK % 64);
	if (r->cfg.proof)
		pl_proof_note(r->cfg.proof, r->page + r->page_used, len,
			      r->page_pos + r->page_used);
	pl_recv_saw(r, r->page_pos + r->page_used, len);
	r->page_used = end;
	__atomic_store_n(&r->placed_end, r->page_pos + end, __ATOMIC_RELAXED);
}

void pl_recv_saw(struct pl_recv *r, uint64_t pos, uint32_t len)
{
	if (pos != r->run_end)
		r->run_start = pos;
	r->run_end = pos + len;
	if (r->run_end > r->read_end)
		r->read_end = r->run_end;
}

void pl_recv_end_page(struct pl_recv *r)
{
	/* The file has no page of its own for less than a block. */
	uint64_t used = (r->page_used + PL_BLOCK - 1) / PL_BLOCK * PL_BLOCK;
	uint64_t zeroes = 0;
	uint32_t end;

	if (!r->page)
		return;
	pl_huge_unmap(&r->huge, 0);
	r->page = NULL;
	pl_huge_punch(&r->huge, r->page_pos + used, r->page_pos + PL_HUGE);
	for (uint32_t i = 0; i < PAGE_BLOCKS; i = end + 1) {
		for (end = i; end < PAGE_BLOCKS && is_zero_block(r, end);)
			end++;
		if ((end - i) * PL_BLOCK < MIN_PUNCH)
			continue;
		pl_huge_punch(&r->huge, r->page_pos + (uint64_t)i * PL_BLOCK,
			      r->page_pos + (uint64_t)end * PL_BLOCK);
		zeroes += (uint64_t)(end - i) * PL_BLOCK;
	}
	RECV_ADD(r, hole_bytes, zeroes);
	RECV_ADD(r, written_bytes, r->page_used - zeroes);
	if (zeroes || used < PL_HUGE)
		pl_huge_regret(&r->huge);
}

/* SPDX-License-Identifier: Apache-2.0 */
/* A tree of hashes over an image: see proof.h. */
#define _GNU_SOURCE
#include <assert.h>
#include <endian.h>
#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "proof.h"

static void *reserve(uint64_t bytes)
{
	void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (p == MAP_FAILED)
		return NULL;
	/* A huge page would cost 2 MiB for the first block of its GiB. */
	madvise(p, bytes, MADV_NOHUGEPAGE);
	return p;
}

int pl_proof_init(struct pl_proof *p, uint64_t size)
{
	uint64_t below;
	int err = 0;

	if (size > INT64_MAX)
		return -EINVAL;
	*p = (struct pl_proof){ .size = size,
				.blocks = (size + PL_BLOCK - 1) / PL_BLOCK };
	below = p->blocks ? p->blocks : 1;
	p->leaf = reserve(below * sizeof(*p->leaf));
	if (!p->leaf)
		return -ENOMEM;
	do {
		struct pl_proof_level *l = &p->level[p->levels];

		below = (below + PL_PROOF_FANOUT - 1) / PL_PROOF_FANOUT;
		l->node = reserve(below * sizeof(*l->node));
		if (!l->node)
			err = -ENOMEM;
		l->nodes = below;
		p->levels++;
		/* A bit per node: its own number stands for bytes of 2^9. */
		if (!err)
			err = pl_bitmap_init(&l->stale, below << 9, 9);
	} while (!err && below > 1);
	if (err)
		pl_proof_fini(p);
	return err;
}

void pl_proof_fini(struct pl_proof *p)
{
	if (!p)
		return;
	for (unsigned i = 0; i < p->levels; i++) {
		struct pl_proof_level *l = &p->level[i];

		if (l->node)
			munmap(l->node, l->nodes * sizeof(*l->node));
		pl_bitmap_fini(&l->stale);
	}
	p->levels = 0;
	if (p->leaf)
		munmap(p->leaf, (p->blocks ? p->blocks : 1) * sizeof(*p->leaf));
	p->leaf = NULL;
}

/* Any thread. */
static void mark(struct pl_proof_level *l, uint64_t node)
{
	uint64_t *word = &l->stale.word[node / 64], bit = 1ull << (node % 64);

	if (!(__atomic_load_n(word, __ATOMIC_RELAXED) & bit))
		__atomic_fetch_or(word, bit, __ATOMIC_RELAXED);
}

void pl_proof_set(struct pl_proof *p, uint64_t block, uint64_t hash)
{
	assert(block < p->blocks);
	if (__atomic_load_n(&p->leaf[block], __ATOMIC_RELAXED) == hash)
		return;
	__atomic_store_n(&p->leaf[block], hash, __ATOMIC_RELAXED);
	mark(&p->level[0], block / PL_PROOF_FANOUT);
}

static uint32_t length_of(const struct pl_proof *p, uint64_t block)
{
	uint64_t left = p->size - block * PL_BLOCK;

	return left < PL_BLOCK ? (uint32_t)left : PL_BLOCK;
}

void pl_proof_note(struct pl_proof *p, const void *data, size_t len, uint64_t pos)
{
	const uint8_t *from = data;
	uint32_t step;

	assert(pos <= p->size && len <= p->size - pos);
	for (; len; from += step, pos += step, len -= step) {
		uint64_t block = pos / PL_BLOCK;
		uint32_t in_block = (uint32_t)(pos % PL_BLOCK);
		uint32_t whole = length_of(p, block);

		step = len < whole - in_block ? (uint32_t)len : whole - in_block;
		pl_proof_set(p, block, step == whole ? pl_hash_block(from, step) :
						       PL_PROOF_UNKNOWN);
	}
}

static int read_back(struct pl_proof *p, int fd, uint64_t block)
{
	uint8_t data[PL_BLOCK] = { 0 };
	uint32_t len = length_of(p, block), got = 0;

	if (fd < 0)
		return -ENODATA;
	while (got < len) {
		ssize_t n = pread(fd, data + got, len - got,
				  (off_t)(block * PL_BLOCK + got));

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		if (n == 0)
			break;
		got += (uint32_t)n;
	}
	p->leaf[block] = pl_hash_block(data, len);
	return 0;
}

static int hash_leaves(struct pl_proof *p, int fd, uint64_t node)
{
	uint64_t first = node * PL_PROOF_FANOUT, any = 0, n = PL_PROOF_FANOUT;
	uint64_t leaf[PL_PROOF_FANOUT];

	if (n > p->blocks - first)
		n = p->blocks - first;
	for (uint64_t i = 0; i < n; i++) {
		if (p->leaf[first + i] == PL_PROOF_UNKNOWN) {
			int err = read_back(p, fd, first + i);

			if (err)
				return err;
		}
		leaf[i] = htole64(p->leaf[first + i]);
		any |= leaf[i];
	}
	if (any)
		pl_hash128(leaf, n * sizeof(*leaf), p->level[0].node[node]);
	else
		memset(p->level[0].node[node], 0, PL_HASH128);
	return 0;
}

static void hash_nodes(struct pl_proof *p, unsigned level, uint64_t node)
{
	struct pl_proof_level *below = &p->level[level - 1];
	uint64_t first = node * PL_PROOF_FANOUT, n = PL_PROOF_FANOUT;
	uint8_t *to = p->level[level].node[node];

	if (n > below->nodes - first)
		n = below->nodes - first;
	if (pl_is_zero(below->node[first], n * PL_HASH128))
		memset(to, 0, PL_HASH128);
	else
		pl_hash128(below->node[first], n * PL_HASH128, to);
}

static int refresh(struct pl_proof *p, int fd)
{
	for (unsigned i = 0; i < p->levels; i++) {
		struct pl_bitmap *stale = &p->level[i].stale;

		for (uint64_t w = 0; w < stale->nwords; w++)
			while (stale->word[w]) {
				unsigned bit = (unsigned)__builtin_ctzll(stale->word[w]);
				uint64_t node = w * 64 + bit;
				int err = 0;

				if (i)
					hash_nodes(p, i, node);
				else
					err = hash_leaves(p, fd, node);
				if (err)
					return err;
				if (i + 1 < p->levels)
					mark(&p->level[i + 1], node / PL_PROOF_FANOUT);
				stale->word[w] &= ~(1ull << bit);
			}
	}
	return 0;
}

int pl_proof_root(struct pl_proof *p, int fd, uint8_t root[PL_HASH128])
{
	struct {
		uint8_t top[PL_HASH128];
		uint64_t size;
		uint32_t block, algorithm;
	} sealed = { .size = htole64(p->size), .block = htole32(PL_BLOCK),
		     .algorithm = htole32(PL_PROOF_ALGORITHM) };
	int err = p->blocks ? refresh(p, fd) : 0;

	_Static_assert(sizeof(sealed) == PL_HASH128 + 16, "no padding is hashed");
	if (err)
		return err;
	memcpy(sealed.top, p->level[p->levels - 1].node[0], PL_HASH128);
	pl_hash128(&sealed, sizeof(sealed), root);
	return 0;
}

int pl_proof_differ(const struct pl_proof *a, const struct pl_proof *b, uint64_t from,
		    struct pl_extent *run)
{
	uint64_t block = (from + PL_BLOCK - 1) / PL_BLOCK;

	if (a->size != b->size)
		return -EINVAL;
	while (block < a->blocks && a->leaf[block] == b->leaf[block])
		block++;
	if (block >= a->blocks)
		return 0;
	run->start = block * PL_BLOCK;
	while (block < a->blocks && a->leaf[block] != b->leaf[block])
		block++;
	run->end = block == a->blocks ? a->size : block * PL_BLOCK;
	return 1;
}

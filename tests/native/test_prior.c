/* SPDX-License-Identifier: Apache-2.0 */
/* Digests of what a target had: by their definition, from end to end, and hostile ones. */
#define _GNU_SOURCE
#include "stream.h"

#define CELL PL_PRIOR_CELL

static uint8_t random_key[PL_PRIOR_KEY];

/* NH and what follows it, one word after the other, as prior.h defines them. */
static void model(const uint8_t *block, uint8_t out[16])
{
	unsigned __int128 sum[2] = { 0, 0 }, p61 = ((unsigned __int128)1 << 61) - 1;
	uint64_t k[PL_PRIOR_NH], m[512], a, half[2];

	memcpy(k, random_key, sizeof(k));
	memcpy(m, block, sizeof(m));
	for (unsigned t = 0; t < 2; t++)
		for (unsigned i = 0; i < 256; i++) {
			uint64_t x = k[2 * t + 2 * i] + m[2 * i];
			uint64_t y = k[2 * t + 2 * i + 1] + m[2 * i + 1];

			sum[t] += (unsigned __int128)x * y;
		}
	for (unsigned j = 0; j < 2; j++) {
		unsigned __int128 h = 0;

		for (unsigned i = 0; i < 9; i++) {
			uint64_t x = i == 8 ? 1 :
				     (uint32_t)(sum[i / 4] >> (i % 4 * 32));

			memcpy(&a, random_key + sizeof(k) + (j * 9 + i) * 8, 8);
			h = (h + (a & (uint64_t)p61) % p61 * x) % p61;
		}
		half[j] = (uint64_t)h;
	}
	half[1] |= 1ull << 63;
	memcpy(out, half, 16);
}

static void definition(void)
{
	uint8_t block[4096], got[16], want[16];
	struct pl_prior_key k;

	for (int i = 0; i < 300; i++) {
		if (i % 10 == 0)
			fill_random(random_key, sizeof(random_key));
		if (i == 10)	/* every sum and coefficient at its largest */
			memset(random_key, 0xff, sizeof(random_key));
		if (i == 20)
			memset(random_key, 0, sizeof(random_key));
		fill_random(block, sizeof(block));
		if (i % 3 == 0)
			memset(block + rnd(4096), 0, 1);
		if (i % 10 == 1)
			memset(block, i % 20 == 1 ? 0xff : 0, sizeof(block));
		pl_prior_key(&k, random_key);
		pl_prior_digest(&k, block, 4096, got);
		model(block, want);
		OK(!memcmp(got, want, 16));
	}
	/* A shorter block counts as if zeroes followed. */
	for (uint32_t len = 0; len < 4096; len += 500) {
		memset(block + len, 0, sizeof(block) - len);
		pl_prior_digest(&k, block, 4096, want);
		pl_prior_digest(&k, block, len, got);
		OK(!memcmp(got, want, 16));
		fill_random(block, sizeof(block));
	}
}

/* Each bit of a block and each word of the key has a part in the digest. */
static void all_of_it_counts(void)
{
	uint8_t block[4096], a[16], b[16];
	struct pl_prior_key k;

	fill_random(random_key, sizeof(random_key));
	fill_random(block, sizeof(block));
	pl_prior_key(&k, random_key);
	pl_prior_digest(&k, block, 4096, a);
	for (unsigned bit = 0; bit < 4096 * 8; bit += 7) {
		block[bit / 8] ^= (uint8_t)(1u << bit % 8);
		pl_prior_digest(&k, block, 4096, b);
		OK(memcmp(a, b, 8) && memcmp(a + 8, b + 8, 8));
		block[bit / 8] ^= (uint8_t)(1u << bit % 8);
	}
	for (unsigned at = 0; at < PL_PRIOR_KEY; at += 8) {
		random_key[at] ^= 1;
		pl_prior_key(&k, random_key);
		pl_prior_digest(&k, block, 4096, b);
		OK(memcmp(a, b, 16));
		random_key[at] ^= 1;
	}
}

/* Tells all of `fd` to a table. */
static void tell_all(int fd, int copy_fd, uint64_t size, struct pl_prior *p,
		     struct pl_known *known, struct pl_proof *proof)
{
	struct pl_prior_cell *c = must_alloc(sizeof(*c));
	uint8_t *out = must_alloc(PL_PRIOR_MAX);

	EQ(pl_prior_cell_init(c, random_key, size), 0);
	for (uint64_t pos = 0; pos < size; pos += CELL) {
		uint64_t end = size - pos < CELL ? size : pos + CELL;
		uint32_t blocks, digests, len;

		pl_prior_cell_begin(c, pos);
		EQ(pl_prior_cell_read(c, fd, copy_fd, pos, end, proof), 0);
		len = pl_prior_cell_tell(c, out, &blocks, &digests);
		EQ(blocks, (end - pos + 4095) / 4096);
		EQ(pl_prior_load(p, known, pos, blocks, digests, out, len), 0);
	}
	pl_prior_cell_fini(c);
	free(c);
	free(out);
}

static int read_all(int fd, void *to, uint64_t size)
{
	return pread(fd, to, size, 0) == (ssize_t)size;
}

/*
 * An image and an older state of it: a pass writes what differs and nothing else, and both
 * proofs are those of the image.  copied: the older state is in a file of its own.
 */
static void from_end_to_end(uint64_t size, unsigned shift, bool copied)
{
	uint8_t *now = must_alloc(size), *then = must_alloc(size), *got = must_alloc(size);
	uint8_t root[16], other[16];
	struct pl_prior p;
	struct pl_known known;
	struct pl_proof proof, theirs;
	struct pl_pump_cfg cfg = { .align = 1, .sink = PL_SINK_FILE, .readers = 2,
				   .slots = 4, .cluster = 256u << 10, .size = size,
				   .known = &known, .proof = &proof, .prior = &p };
	struct pl_pump_stats stats;
	struct pl_pump *pump;
	struct pl_fault fault;
	struct pl_extent all = { 0, size };
	uint64_t differs = 0;
	int old;

	fill_random(then, size);
	memset(then + size / 4, 0, size / 8);
	memcpy(now, then, size);
	for (int i = 0; i < 40; i++) {
		uint64_t at = rnd(size), len = rnd(5000) + 1;

		if (len > size - at)
			len = size - at;
		memset(now + at, i % 3 ? 7 : 0, len);
	}
	for (uint64_t at = 0; at < size; at += 4096) {
		uint64_t len = size - at < 4096 ? size - at : 4096;

		/* The last block says how long the image is. */
		if (memcmp(now + at, then + at, len) || at + len == size)
			differs += len;
	}
	EQ(pl_known_init(&known, size, shift), 0);
	EQ(pl_proof_init(&proof, size), 0);
	EQ(pl_proof_init(&theirs, size), 0);
	EQ(pl_prior_init(&p, random_key, size), 0);
	old = temp_file(then, size);
	cfg.src_fd = temp_file(now, size);
	cfg.out_fd = copied ? temp_file(NULL, size) : old;
	tell_all(old, copied ? cfg.out_fd : -1, size, &p, &known, &theirs);
	OK(read_all(cfg.out_fd, got, size) && !memcmp(got, then, size));
	EQ(pl_proof_root(&theirs, -1, root), 0);
	EQ(pl_pump_new(&pump, &cfg), 0);
	EQ(pl_pump_pass(pump, &all, 1,
			PL_PASS_PRIOR | PL_PASS_LAST | PL_PASS_SKIP_ZERO, &fault), 0);
	pl_pump_stats(pump, &stats);
	EQ(stats.data_bytes, differs);
	OK(read_all(cfg.out_fd, got, size) && !memcmp(got, now, size));
	pl_proof_note(&theirs, now, size, 0);
	EQ(pl_proof_root(&theirs, -1, root), 0);
	EQ(pl_proof_root(&proof, -1, other), 0);
	OK(!memcmp(root, other, 16));
	/* What is known after that: nothing has changed. */
	EQ(pl_pump_pass(pump, &all, 1, PL_PASS_CHANGED | PL_PASS_SKIP_ZERO, &fault), 0);
	pl_pump_stats(pump, &stats);
	EQ(stats.data_bytes, differs);
	/* Without digests all of it goes, but for zeroes at both ends. */
	pl_prior_forget(&p, 0, size);
	EQ(pl_pump_pass(pump, &all, 1, PL_PASS_PRIOR | PL_PASS_SKIP_ZERO, &fault), 0);
	pl_pump_stats(pump, &stats);
	OK(stats.data_bytes > differs + size / 2);
	pl_pump_free(pump);
	if (copied)
		close(cfg.out_fd);
	close(old);
	close(cfg.src_fd);
	pl_prior_fini(&p);
	pl_proof_fini(&proof);
	pl_proof_fini(&theirs);
	pl_known_fini(&known);
	free(now);
	free(then);
	free(got);
}

/* What cannot be read differs from everything; a file that is too short ends in zeroes. */
static void unreadable(void)
{
	uint8_t block[4096], out[PL_PRIOR_MAX];
	struct pl_prior_cell *c = must_alloc(sizeof(*c));
	uint32_t blocks, digests, len;
	struct pl_known known;
	struct pl_prior p;
	int fd = temp_file(NULL, 0);

	fill_random(block, sizeof(block));
	OK(pwrite(fd, block, 4096, 0) == 4096);
	EQ(pl_known_init(&known, CELL, 12), 0);
	EQ(pl_prior_init(&p, random_key, CELL), 0);
	EQ(pl_prior_cell_init(c, random_key, CELL), 0);
	pl_prior_cell_begin(c, 0);
	EQ(pl_prior_cell_read(c, fd, -1, 0, CELL, NULL), 0);
	len = pl_prior_cell_tell(c, out, &blocks, &digests);
	EQ(digests, 1);
	EQ(len, blocks / 8 + 16);
	EQ(pl_prior_load(&p, &known, 0, blocks, digests, out, len), 0);
	OK(pl_prior_same(&p, 0, block, 4096));
	OK(!pl_prior_same(&p, 1, block, 4096));
	pl_prior_cell_begin(c, 0);
	EQ(pl_prior_cell_read(c, -1, -1, 0, 8192, NULL), 0);	/* EBADF */
	len = pl_prior_cell_tell(c, out, &blocks, &digests);
	EQ(digests, 2);
	EQ(pl_prior_load(&p, &known, 0, blocks, digests, out, len), 0);
	OK(!pl_prior_same(&p, 0, block, 4096));
	EQ(pl_prior_cell_read(c, fd, -1, 0, CELL + 1, NULL), -EINVAL);
	EQ(pl_prior_cell_read(c, fd, -1, 1, 8192, NULL), -EINVAL);
	EQ(pl_prior_cell_read(c, fd, 1 << 20, 0, 4096, NULL), -EBADF);
	pl_prior_cell_begin(c, CELL);
	EQ(pl_prior_cell_read(c, fd, -1, 0, 4096, NULL), -EINVAL);
	pl_prior_cell_fini(c);
	pl_prior_fini(&p);
	pl_known_fini(&known);
	close(fd);
	free(c);
}

/* A peer's cells: what is not well-formed changes nothing. */
static void hostile(void)
{
	uint64_t size = CELL + 3 * 4096 + 5;
	uint8_t data[PL_PRIOR_MAX + 100] = { 0 };
	struct pl_known known, other;
	struct pl_prior p;

	EQ(pl_known_init(&known, size, 12), 0);
	EQ(pl_known_init(&other, size + 1, 12), 0);
	EQ(pl_prior_init(&p, random_key, size), 0);
	EQ(pl_prior_init(&p, random_key, (uint64_t)INT64_MAX + 1), -EINVAL);
	data[0] = 5;
	EQ(pl_prior_load(&p, &known, CELL, 4, 2, data, 1 + 32), 0);
	EQ(pl_prior_load(&p, &other, CELL, 4, 2, data, 1 + 32), -EINVAL);
	EQ(pl_prior_load(&p, &known, CELL, 4, 2, data, 1 + 31), -EINVAL);
	EQ(pl_prior_load(&p, &known, CELL, 4, 2, data, 1 + 33), -EINVAL);
	EQ(pl_prior_load(&p, &known, CELL, 4, 3, data, 1 + 48), -EINVAL);
	EQ(pl_prior_load(&p, &known, CELL, 4, 1, data, 1 + 16), -EINVAL);
	EQ(pl_prior_load(&p, &known, CELL, 2, 2, data, 1 + 32), -EINVAL);
	EQ(pl_prior_load(&p, &known, CELL, 5, 2, data, 1 + 32), -EINVAL);
	EQ(pl_prior_load(&p, &known, 4096, 4, 2, data, 1 + 32), -EINVAL);
	EQ(pl_prior_load(&p, &known, 2 * CELL, 4, 2, data, 1 + 32), -EINVAL);
	EQ(pl_prior_load(&p, &known, UINT64_MAX - CELL + 1, 4, 2, data, 1 + 32),
	   -EINVAL);
	EQ(pl_prior_load(&p, &known, 0, PL_PRIOR_BLOCKS + 1, 2, data, 129 + 32),
	   -EINVAL);
	EQ(pl_prior_load(&p, &known, CELL, UINT32_MAX, UINT32_MAX, data, 0), -EINVAL);
	pl_prior_fini(&p);
	pl_known_fini(&known);
	pl_known_fini(&other);
}

/* A pass with digests needs them, and must look at what it sends. */
static void refused(void)
{
	struct pl_pump_cfg cfg = { .align = 1, .sink = PL_SINK_NONE, .slots = 2,
				   .cluster = 4096, .size = 4096, .out_fd = -1 };
	struct pl_extent all = { 0, 4096 };
	struct pl_known known;
	struct pl_prior p, other;
	struct pl_pump *pump;
	struct pl_fault fault;

	cfg.src_fd = temp_file(NULL, 4096);
	EQ(pl_known_init(&known, 4096, 12), 0);
	EQ(pl_prior_init(&p, random_key, 4096), 0);
	EQ(pl_prior_init(&other, random_key, 8192), 0);
	cfg.known = &known;
	cfg.prior = &other;
	EQ(pl_pump_new(&pump, &cfg), -EINVAL);
	cfg.prior = NULL;
	EQ(pl_pump_new(&pump, &cfg), 0);
	EQ(pl_pump_pass(pump, &all, 1, PL_PASS_PRIOR, &fault), -EINVAL);
	pl_pump_free(pump);
	cfg.prior = &p;
	EQ(pl_pump_new(&pump, &cfg), 0);
	EQ(pl_pump_pass(pump, &all, 1, PL_PASS_PRIOR | PL_PASS_LIVE, &fault), -EINVAL);
	EQ(pl_pump_pass(pump, &all, 1, PL_PASS_PRIOR, &fault), 0);
	pl_pump_free(pump);
	pl_prior_fini(&p);
	pl_prior_fini(&other);
	pl_known_fini(&known);
	close(cfg.src_fd);
}

int main(void)
{
	definition();
	all_of_it_counts();
	from_end_to_end(3 * MiB + 77, 12, false);
	from_end_to_end(CELL + MiB + 4096, 13, true);
	from_end_to_end(2 * CELL, 16, true);
	unreadable();
	hostile();
	refused();
	return 0;
}
